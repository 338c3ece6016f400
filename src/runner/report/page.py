"""The page: facts and plots in one HTML file without scripts or links. Everything from a model is escaped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from runner import figures
from runner.bench.sweeps import Gathered
from runner.bench.table import evidence, verdict_line, wanted_columns
from runner.comparison import HEADER, Comparison, difference_cells
from runner.report.charts import charts_of
from runner.report.facts import SAMPLES, RunFacts, read_benchmarks, score_names
from runner.report.plots import draw

_LONGEST_TEXT = 2_000


def render(runs: Sequence[RunFacts], *, title: str, comparisons: Sequence[Comparison] = ()) -> str:
    """The page for one run, or the comparison of several."""
    benchmarks = read_benchmarks(runs)
    environment = Environment(
        loader=PackageLoader("runner.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["shown"] = _shown
    return environment.get_template("page.html").render(
        title=title,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        runs=runs,
        header=run_header(runs),
        table=run_lines(runs),
        server_header=SERVER_HEADER,
        servers=[(run.label, lines) for run in runs if (lines := server_lines(run))],
        plots=[(chart, draw(chart)) for chart in charts_of(runs)],
        benchmarks=[_benchmark(each) for each in benchmarks],
        comparisons=[(each, [difference_cells(one) for one in each.differences]) for each in comparisons],
        difference_header=HEADER,
        facts_of=_facts,
        answer=_answer,
        most_samples=SAMPLES,
        settings={run.label: json.dumps(run.settings, indent=2, ensure_ascii=False) for run in runs},
    )


def _facts(run: RunFacts) -> Iterator[tuple[str, str]]:
    """What the head of a single run's page shows."""
    summary = run.summary
    yield "state", run.state
    if summary.get("rows"):
        yield "rows", _rows(run)
    for key in ("succeeded", "failed", "reused", "truncated", "unparsed", "retries"):
        if summary.get(key):
            yield key, f"{summary[key]:,}"
    for name in run.scores:
        yield f"{name} [95 % interval]", _score(run, name)
    if summary.get("elapsed_s"):
        yield "elapsed", figures.duration(summary["elapsed_s"])
    for rate, label in ((figures.rows_per_s(summary), "rows/s"), (summary.get("tokens_per_s"), "total tokens/s")):
        if rate:
            yield f"{label}{_at_level(summary)}", figures.short(rate)
    for key, label in (("latency_s", "latency"), ("queue_wait_s", "queue wait")):
        for name, value in (summary.get(key) or {}).items():
            if value is not None:
                yield f"{label} {name}{_at_level(summary)}", figures.seconds(value)
    for name, count in (summary.get("tokens") or {}).items():
        if count:
            yield f"{name} tokens", f"{count:,}"
    if "cost_usd" in summary:
        yield "cost", figures.closing_cost(summary["cost_usd"], summary.get("cost_usd_upper_bound"))


def _answer(row: Mapping[str, Any]) -> Any:
    """What a row of any task was answered."""
    for key in ("output_parsed", "output_text", "text"):
        if row.get(key) not in (None, ""):
            return row[key]
    embedding = row.get("embedding")
    return f"{len(embedding)} dimensions" if embedding else ""


def _at_level(summary: Mapping[str, Any]) -> str:
    """The level that rates and latencies are of, where a benchmark has several."""
    levels = (summary.get("bench") or {}).get("levels", ())
    level = summary.get("level")
    return f" at level {level:g}" if level is not None and len(levels) > 1 else ""


def run_header(runs: Sequence[RunFacts]) -> list[str]:
    """What is told of runs side by side."""
    return [
        "run",
        "state",
        "rows",
        "failed",
        *(["truncated"] if _are_truncated(runs) else []),
        *(f"{name} [95 %]" for name in score_names(runs)),
        "p50",
        "p95",
        "rows/s",
        "total tokens/s",
        "cost",
    ]


def run_lines(runs: Sequence[RunFacts]) -> list[list[str]]:
    """The runs under the `run_header`."""
    return [_line(run, runs) for run in runs]


SERVER_HEADER = ("server", "answered", "share", "failed", "p50", "p95", "retries", "last answer")


def server_lines(run: RunFacts) -> list[list[str]]:
    """The servers of a run under the `SERVER_HEADER`, where there are several."""
    deployments: Mapping[str, Mapping[str, Any]] = run.summary.get("deployments") or {}
    if len(deployments) < 2:
        return []
    return [
        [
            label,
            _count(told["answered"]),
            f"{told['share']:.0%}",
            _count(told["failed"]),
            *_latencies(told),
            figures.by_name(_count(told["retries"]), told.get("retries_by_error", {})),
            f"after {figures.duration(run.last_answers_s[label])}" if label in run.last_answers_s else "none",
        ]
        for label, told in deployments.items()
    ]


def _line(run: RunFacts, runs: Sequence[RunFacts]) -> list[str]:
    summary = run.summary
    at_level = _at_level(summary)
    return [
        run.label,
        run.state,
        _rows(run),
        _count(summary.get("failed")),
        *([_count(summary.get("truncated"))] if _are_truncated(runs) else []),
        *(_score(run, name) for name in score_names(runs)),
        *(f"{latency}{at_level}" if latency else "" for latency in _latencies(summary)),
        *(
            f"{figures.short(rate)}{at_level}" if rate else ""
            for rate in (figures.rows_per_s(summary), summary.get("tokens_per_s"))
        ),
        figures.closing_cost(summary["cost_usd"], summary.get("cost_usd_upper_bound")) if "cost_usd" in summary else "",
    ]


def _are_truncated(runs: Sequence[RunFacts]) -> bool:
    """Whether some answers of the runs were cut off at the limit on their length."""
    return any(run.summary.get("truncated") for run in runs)


def _rows(run: RunFacts) -> str:
    rows, left = _count(run.summary.get("rows")), figures.left_to_ask(run.summary)
    if rows and not run.knows_rows:
        return f"{rows} so far"
    return f"{rows}, {left:,} left to ask" if left else rows


def _latencies(told: Mapping[str, Any]) -> list[str]:
    """The p50 and the p95 of a run or a server, empty where there is none."""
    known = told.get("latency_s") or {}
    return [figures.seconds(known[name]) if known.get(name) is not None else "" for name in ("p50", "p95")]


def _score(run: RunFacts, name: str) -> str:
    score = run.scores.get(name)
    return (
        ""
        if score is None
        else f"{figures.score(score.mean)} [{figures.score(score.low)}, {figures.score(score.high)}]"
    )


def _count(value: Any) -> str:
    return "" if value is None else f"{value:,}"


def _benchmark(benchmark: Gathered) -> dict[str, Any]:
    header, table = wanted_columns(benchmark.levels)
    verdict = benchmark.verdict
    conclusion = [verdict_line(verdict), *evidence(verdict)] if len(benchmark.levels) > 1 else []
    return {"name": benchmark.name, "header": header, "table": table, "conclusion": conclusion}


def _shown(value: Any) -> str:
    """A cell of a sample row: text as it is, anything else as JSON, cut where it is long."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}… ({len(text):,} characters)"
