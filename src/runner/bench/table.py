"""How levels are shown: a line each for logs and scripts, a table for people, and what is recommended."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TextIO

from runner import figures
from runner.bench.levels import Figure, LevelFacts, Mode
from runner.bench.verdict import Standing, Verdict
from runner.progress import say, show_table, write

HEADER = (
    *("level", "requests/s", "p50", "p95", "p99", "TTFT p95", "ITL p95", "queue p95"),
    *("completion tokens/s", "prompt tokens/s", "failed", "p50, p95, p99 with failures", ""),
)

_OPTIONAL = ("prompt tokens/s", "queue p95", "ITL p95", "p50")
"""Columns that a narrow terminal goes without, the first one first."""

_PERCENTS = (50, 95, 99)


def show_levels(levels: Sequence[LevelFacts], verdict: Verdict, *, stream: TextIO) -> None:
    """Print the levels, as a table where ``stream`` is a terminal and otherwise a line each, and what follows."""
    if stream.isatty():
        header, lines = wanted_columns(levels)
        if not header[-1]:  # the notes have room below
            header, lines = header[:-1], [line[:-1] for line in lines]
        show_table(
            header,
            lines,
            styles=["yellow" if facts.audit.limited_by == "client" else "" for facts in levels],
            optional=_OPTIONAL,
            stream=stream,
        )
        for facts in levels:
            if text := note(facts):
                say(stream, f"level {facts.level:g}: {text}")
    else:
        write(stream, "".join(f"{level_line(facts)}\n" for facts in levels))
    if len(levels) > 1:  # one level alone is compared with nothing
        say(stream, "\n".join([verdict_line(verdict), *evidence(verdict)]))


def level_line(facts: LevelFacts) -> str:
    """``c=8    rps=3.14  p50=0.401s  …``; a percentile that so few requests do not tell is ``-``.

    Where requests failed, the percentiles that count them as answers that never come follow:
    ``with_failures_p95=never``.
    """

    def seconds(what: str, percent: int) -> str:
        figure = facts.percentile(what, percent)
        if figure is None:
            return "-"
        return f"{figure.value:.3f}s" if math.isfinite(figure.value) else "never"

    load = f"c={facts.level:<4g}" if facts.mode is Mode.closed else f"rate={facts.level:<4g}"
    parts = [
        f"{load} rps={facts.requests_per_s.value:.2f}",
        *(f"p{percent}={seconds('latency_s', percent)}" for percent in _PERCENTS),
        f"svc_p95={seconds('service_time_s', 95)}",
        f"q_p95={seconds('queue_wait_s', 95)}",
        f"err={facts.failed}/{facts.requests}",
        f"elapsed={facts.elapsed_s:.1f}s",
    ]
    if facts.failed:
        parts += (f"with_failures_p{percent}={seconds('latency_with_failures_s', percent)}" for percent in _PERCENTS)
    if facts.audit.limited_by == "client":
        parts.append("client-limited")
    return "  ".join(parts)


def verdict_line(verdict: Verdict) -> str:
    """``recommended_max_parallel_requests=8``, or ``recommended_requests_per_second=…`` for rates."""
    name = "max_parallel_requests" if verdict.mode is Mode.closed else "requests_per_second"
    return f"recommended_{name}={'none' if verdict.level is None else f'{verdict.level:g}'}"


def evidence(verdict: Verdict) -> list[str]:
    """Why, and what to do with it, in sentences."""
    lines = [f"{reason[0].upper()}{reason[1:]}." for reason in verdict.reasons]
    if verdict.level is not None:
        bracket = f"[{_or_none(verdict.highest_pass)}, {_or_none(verdict.first_fail)}]"
        sure = "" if verdict.standing is Standing.found else f", {verdict.standing.value}"
        shape = "" if verdict.monotone else ", throughput is not monotone"
        lines.append(f"[highest pass, first fail] = {bracket}{shape}{sure}.")
        lines.append(f"Paste: {verdict.override}")
    return lines


def level_cells(facts: LevelFacts) -> list[str]:
    """A level under the `HEADER`."""
    tokens = facts.tokens_per_s or {"prompt": 0.0, "completion": 0.0}
    return [
        f"{facts.level:g}" if facts.mode is Mode.closed else f"{facts.level:g}/s",
        _rate(facts.requests_per_s),
        *(_seconds(facts.percentile("latency_s", percent)) for percent in _PERCENTS),
        _seconds(facts.percentile("ttft_s", 95)),
        _seconds(facts.percentile("itl_s", 95)),
        _seconds(facts.percentile("queue_wait_s", 95)),
        figures.short(tokens["completion"]) if tokens["completion"] else "",
        figures.short(tokens["prompt"]) if tokens["prompt"] else "",
        f"{facts.failed}/{facts.requests}",
        _with_failures(facts),
        note(facts),
    ]


def _with_failures(facts: LevelFacts) -> str:
    """The percentiles that count a failure as an answer that never comes, where there was one."""
    found = [facts.percentile("latency_with_failures_s", percent) for percent in _PERCENTS] if facts.failed else []
    shown = ["-" if each is None else _seconds(each) if math.isfinite(each.value) else "never" for each in found]
    return ", ".join(shown)


def note(facts: LevelFacts) -> str:
    """What the audit found."""
    found = "; ".join(facts.audit.notes)
    return f"client-limited: {found}" if facts.audit.limited_by == "client" else found


def wanted_columns(levels: Sequence[LevelFacts]) -> tuple[Sequence[str], list[list[str]]]:
    """The header and the lines of a table, without the columns that are empty."""
    lines = [level_cells(facts) for facts in levels]
    kept = [place for place in range(len(HEADER)) if any(line[place] for line in lines)]
    return [HEADER[place] for place in kept], [[line[place] for place in kept] for line in lines]


def _rate(figure: Figure) -> str:
    if figure.interval is None:
        return figures.short(figure.value)
    return (
        f"{figures.short(figure.value)} [{figures.short(figure.interval.low)}, {figures.short(figure.interval.high)}]"
    )


def _seconds(figure: Figure | None) -> str:
    return "" if figure is None else figures.seconds(figure.value)


def _or_none(level: float | None) -> str:
    return "none" if level is None else f"{level:g}"
