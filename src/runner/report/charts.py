"""Charts: what is shown of runs side by side, on a page and in W&B."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from runner import figures
from runner.bench.levels import Mode
from runner.bench.sweeps import Gathered
from runner.charts import Bar, Bars, Chart, Lines, Series
from runner.report.facts import RunFacts, read_benchmarks, score_names

_SERIES = 6
"""Lines that a chart shows at once: more cannot be told apart."""


def charts_of(runs: Sequence[RunFacts]) -> list[Chart]:
    """The charts that there is something to show on."""
    benchmarks = read_benchmarks(runs)
    charts = [
        *(_over_levels(benchmarks) if benchmarks else _over_a_number(runs)),
        *_scores(runs),
        *_over_time(runs),
        *(_totals(runs) if len(runs) > 1 else ()),
    ]
    return [chart for chart in charts if _shows_something(chart)]


def _shows_something(chart: Chart) -> bool:
    return any(series.points for series in chart.series) if isinstance(chart, Lines) else bool(chart.values)


def _over_levels(benchmarks: Sequence[Gathered]) -> Iterator[Chart]:
    """Throughput and latency of benchmarks over their levels, and one over the other for each user."""
    unit = "requests in flight" if benchmarks[0].verdict.mode is Mode.closed else "requests sent per second"
    shown = benchmarks[:_SERIES]
    yield Lines(
        title="Throughput over load",
        note="Where it no longer rises, more load only makes requests wait.",
        x=unit,
        y="requests per second",
        series=[
            Series(name=each.name, points=[(facts.level, facts.requests_per_s.value) for facts in each.levels])
            for each in shown
        ],
        logarithmic=True,
        dots=True,
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
    yield Lines(
        title="Latency over load",
        note="Of answered requests, everything included. What so few requests do not tell is left out.",
        x=unit,
        y="seconds",
        series=[each for each in latencies if each.points],
        logarithmic=True,
        dots=True,
    )
    speeds = [
        Series(
            name=each.name,
            points=[
                (facts.tokens_per_s_per_user, facts.tokens_per_s["completion"])
                for facts in each.levels
                if facts.tokens_per_s and facts.tokens_per_s_per_user
            ],
        )
        for each in shown
    ]
    yield Lines(
        title="Tokens for all over tokens for each",
        note="What a level of load brings in total, over what a single request gets of it. Up and right is better.",
        x="completion tokens per second of one request",
        y="completion tokens per second",
        series=[each for each in speeds if each.points],
        dots=True,
    )


def _over_a_number(runs: Sequence[RunFacts]) -> Iterator[Chart]:
    """Throughput and latency over the one numeric key that sets the runs apart, such as the concurrency."""
    key = numeric_key(runs)
    if key is None:
        return
    ordered = sorted(((float(run.overrides[key]), run.summary) for run in runs if run.summary), key=lambda one: one[0])
    rates = [(x, summary["requests_per_s"]) for x, summary in ordered if summary.get("requests_per_s")]
    logarithmic = len(rates) > 2 and rates[0][0] > 0 and rates[-1][0] >= 8 * rates[0][0]
    yield Lines(
        title=f"Throughput over {key}",
        note="Where it no longer rises, more of it brings nothing.",
        x=key,
        y="requests per second",
        series=[Series(name="requests per second", points=rates)],
        logarithmic=logarithmic,
        dots=True,
    )
    yield Lines(
        title=f"Latency over {key}",
        note="Service time of answered requests.",
        x=key,
        y="seconds",
        series=[
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
        logarithmic=logarithmic,
        dots=True,
    )


def _scores(runs: Sequence[RunFacts]) -> Iterator[Chart]:
    for name in score_names(runs):
        yield Bars(
            title=f"Score: {name}",
            note="Means with their 95 % intervals. Where intervals overlap much, the difference may be chance.",
            x=f"{name}, mean",
            values=[
                Bar(
                    name=run.label,
                    value=score.mean,
                    text=figures.score(score.mean),
                    low=score.low,
                    high=score.high,
                    place=place,
                )
                for place, run in _placed(runs)
                if (score := run.scores.get(name))
            ],
        )


def _over_time(runs: Sequence[RunFacts]) -> Iterator[Chart]:
    """Each run that was asked anything is named in both charts, whether it has a line there or not."""
    shown = [(place, run) for place, run in _placed(runs) if run.latencies_s or run.rate][:_SERIES]
    yield Lines(
        title="Latency",
        note="Service time of answered requests: which share of them took so long at most.",
        x="seconds",
        y="share of the requests",
        series=[
            Series(
                name=run.label,
                points=_shares(run.latencies_s),
                note="" if run.latencies_s else "no answer",
                place=place,
            )
            for place, run in shown
        ],
    )
    yield Lines(
        title="Speed",
        note="Answers per second over the time of the run, its pauses included.",
        x="seconds since the first answer",
        y="answers per second",
        series=[
            Series(name=run.label, points=run.rate, note="" if run.rate else "too short for a line", place=place)
            for place, run in shown
        ],
    )


def _totals(runs: Sequence[RunFacts]) -> Iterator[Chart]:
    costs = [(place, run, cost) for place, run in _placed(runs) if (cost := run.summary.get("cost_usd")) is not None]
    yield Bars(
        title="Cost",
        note="Of all that was ever asked in a run, for rows that have changed since too; not of answers taken over.",
        x="US dollars",
        values=[
            Bar(name=run.label, value=cost, text=text, place=place)
            for (place, run, cost), text in zip(costs, figures.dollars_apart([each[2] for each in costs]), strict=True)
        ],
    )
    kinds = dict.fromkeys(kind for run in runs for kind in run.summary.get("errors") or {})
    yield Bars(
        title="Errors",
        note="Rows that failed, by class.",
        x="rows",
        values=[
            Bar(name=f"{run.label} {kind}".strip(), value=count, text=f"{count:,}", place=place)
            for place, run in _placed(runs)
            for kind in kinds
            if (count := (run.summary.get("errors") or {}).get(kind))
        ],
    )


def _placed(runs: Sequence[RunFacts]) -> Iterator[tuple[int | None, RunFacts]]:
    """The runs, each with the place that gives it one colour in all charts; a single one needs none."""
    return ((place if len(runs) > 1 else None, run) for place, run in enumerate(runs))


def numeric_key(runs: Sequence[RunFacts]) -> str | None:
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
