"""The page: facts and plots in one HTML file without scripts or links. Everything from a model is escaped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from runner import figures
from runner.bench.levels import Mode
from runner.bench.sweeps import Gathered
from runner.bench.table import evidence, verdict_line, wanted_columns
from runner.comparison import HEADER, Comparison, difference_cells
from runner.report.facts import RunFacts, read_benchmarks
from runner.report.plots import Bar, Series, bars, lines

_LONGEST_TEXT = 2_000
_SERIES = 6
"""Lines that a plot shows at once: more cannot be told apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """A plot with its heading, and a sentence on how to read it."""

    title: str
    note: str
    drawing: Markup


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
        header=_header(runs),
        table=[_line(run, runs) for run in runs],
        plots=[plot for plot in (*_over_levels(benchmarks), *_plots(runs, benchmarks)) if plot.drawing],
        benchmarks=[_benchmark(each) for each in benchmarks],
        comparisons=[(each, [difference_cells(one) for one in each.differences]) for each in comparisons],
        difference_header=HEADER,
        facts_of=_facts,
        answer=_answer,
        settings={run.label: json.dumps(run.settings, indent=2, ensure_ascii=False) for run in runs},
    )


def _facts(run: RunFacts) -> Iterator[tuple[str, str]]:
    """What the head of a single run's page shows."""
    summary = run.summary
    yield "state", run.state
    for key in ("rows", "succeeded", "failed", "reused", "retries"):
        if summary.get(key):
            yield key, f"{summary[key]:,}"
    for name in run.scores:
        yield f"{name} [95 % interval]", _score(run, name)
    if summary.get("elapsed_s"):
        yield "elapsed", figures.duration(summary["elapsed_s"])
    for key, label in (("requests_per_s", "requests/s"), ("tokens_per_s", "tokens/s")):
        if summary.get(key):
            yield label, figures.short(summary[key])
    for key, label in (("latency_s", "latency"), ("queue_wait_s", "queue wait")):
        for name, value in (summary.get(key) or {}).items():
            if value is not None:
                yield f"{label} {name}", figures.seconds(value)
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


def _header(runs: Sequence[RunFacts]) -> list[str]:
    return [
        "run",
        "state",
        "rows",
        "failed",
        *_score_names(runs),
        "p50",
        "p95",
        "requests/s",
        "tokens/s",
        "cost",
    ]


def _line(run: RunFacts, runs: Sequence[RunFacts]) -> list[str]:
    summary = run.summary
    latency = summary.get("latency_s") or {}
    return [
        run.label,
        run.state,
        _count(summary.get("rows")),
        _count(summary.get("failed")),
        *(_score(run, name) for name in _score_names(runs)),
        *(figures.seconds(latency[name]) if latency.get(name) is not None else "" for name in ("p50", "p95")),
        *(figures.short(summary[key]) if summary.get(key) else "" for key in ("requests_per_s", "tokens_per_s")),
        figures.closing_cost(summary["cost_usd"], summary.get("cost_usd_upper_bound")) if "cost_usd" in summary else "",
    ]


def _score_names(runs: Sequence[RunFacts]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.scores))


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


def _over_levels(benchmarks: Sequence[Gathered]) -> Iterator[Plot]:
    """Throughput and latency of benchmarks over their levels."""
    if not benchmarks:
        return
    unit = "requests in flight" if benchmarks[0].verdict.mode is Mode.closed else "requests sent per second"
    shown = benchmarks[:_SERIES]
    rates = [
        Series(name=each.name, points=[(facts.level, facts.requests_per_s.value) for facts in each.levels])
        for each in shown
    ]
    yield Plot(
        title="Throughput over load",
        note="Where it no longer rises, more load only makes requests wait.",
        drawing=lines(rates, x=unit, y="requests per second", logarithmic=True, dots=True),
    )
    percents = (50, 95, 99) if len(benchmarks) == 1 else (95,)
    latencies = [
        Series(
            name=f"p{percent}" if len(benchmarks) == 1 else f"{each.name} p{percent}",
            points=[
                (facts.level, figure.value)
                for facts in each.levels
                if (figure := facts.percentile("latency_s", percent)) is not None
            ],
        )
        for each in shown
        for percent in percents
    ]
    yield Plot(
        title="Latency over load",
        note="Of answered requests, everything included. What so few requests do not tell is left out.",
        drawing=lines([each for each in latencies if each.points], x=unit, y="seconds", logarithmic=True, dots=True),
    )


def _plots(runs: Sequence[RunFacts], benchmarks: Sequence[Gathered]) -> Iterator[Plot]:
    for name in _score_names(runs):
        yield Plot(
            title=f"Score: {name}",
            note="Means with their 95 % intervals. Where intervals overlap much, the difference may be chance.",
            drawing=bars(
                [
                    Bar(
                        name=run.label, value=score.mean, text=figures.score(score.mean), low=score.low, high=score.high
                    )
                    for run in runs
                    if (score := run.scores.get(name))
                ],
                x=f"{name}, mean",
            ),
        )
    if not benchmarks:
        yield from _over_a_number(runs)
    yield Plot(
        title="Latency",
        note="Service time of answered requests: which share of them took so long at most.",
        drawing=lines(
            [Series(name=run.label, points=_shares(run.latencies_s)) for run in runs[:_SERIES] if run.latencies_s],
            x="seconds",
            y="share of the requests",
        ),
    )
    yield Plot(
        title="Speed",
        note="Answers per second over the time of the run, its pauses included.",
        drawing=lines(
            [Series(name=run.label, points=run.rate) for run in runs[:_SERIES] if run.rate],
            x="seconds since the first answer",
            y="answers per second",
        ),
    )
    if len(runs) > 1:
        yield Plot(
            title="Cost",
            note="Of all that was asked in a run, answers taken over from others not included.",
            drawing=bars(
                [
                    Bar(name=run.label, value=cost, text=figures.dollars(cost))
                    for run in runs
                    if (cost := run.summary.get("cost_usd")) is not None
                ],
                x="US dollars",
            ),
        )


def _over_a_number(runs: Sequence[RunFacts]) -> Iterator[Plot]:
    """Throughput and latency over the one numeric key that sets the runs apart, such as the concurrency."""
    key = _numeric_key(runs)
    if key is None:
        return
    ordered = sorted((float(run.overrides[key]), run.summary) for run in runs if run.summary)
    rates = [(x, summary["requests_per_s"]) for x, summary in ordered if summary.get("requests_per_s")]
    logarithmic = len(rates) > 2 and rates[0][0] > 0 and rates[-1][0] >= 8 * rates[0][0]
    yield Plot(
        title=f"Throughput over {key}",
        note="Where it no longer rises, more of it brings nothing.",
        drawing=lines(
            [Series(name="requests per second", points=rates)],
            x=key,
            y="requests per second",
            logarithmic=logarithmic,
            dots=True,
        ),
    )
    yield Plot(
        title=f"Latency over {key}",
        note="Service time of answered requests.",
        drawing=lines(
            [
                Series(
                    name=name,
                    points=[
                        (x, summary["latency_s"][name])
                        for x, summary in ordered
                        if (summary.get("latency_s") or {}).get(name) is not None
                    ],
                )
                for name in ("p50", "p95", "p99")
            ],
            x=key,
            y="seconds",
            logarithmic=logarithmic,
            dots=True,
        ),
    )


def _numeric_key(runs: Sequence[RunFacts]) -> str | None:
    """The key whose numeric values set all the runs apart."""
    if len(runs) < 3:
        return None
    for key in runs[0].overrides:
        values = [run.overrides.get(key) for run in runs]
        if len(set(values)) == len(values) and all(value is not None and _is_number(value) for value in values):
            return key
    return None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _shares(latencies_s: Sequence[float]) -> list[tuple[float, float]]:
    last = max(1, len(latencies_s) - 1)
    return [(value, place / last) for place, value in enumerate(latencies_s)]


def _shown(value: Any) -> str:
    """A cell of a sample row: text as it is, anything else as JSON, cut where it is long."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}… ({len(text):,} characters)"
