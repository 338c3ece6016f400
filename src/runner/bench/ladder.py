"""Ladders: which level is measured next."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from runner.bench.levels import LevelFacts
from runner.bench.verdict import reaches, violation
from runner.config import BenchConfig

_CLOSE = 1.25
"""Neighbours with no larger ratio need no level between them."""

_ENOUGH = 2
"""Levels in a row that bring nothing before the doubling ends: one alone may be noise."""


def first_levels(bench: BenchConfig, concurrency: int) -> list[float] | None:
    """The levels that are measured whatever comes of it; None: they follow from each other, see `next_level`."""
    for given in (bench.rate, bench.levels, concurrency):
        if given == "auto":
            return None
        if given is not None:
            return [float(level) for level in (given if isinstance(given, Sequence) else [given])]
    return []


def interleaved(levels: Sequence[float], repeats: int) -> Iterator[tuple[float, int]]:
    """Each level in each repeat, from 1: up and down by turns, so that what drifts meets all of them alike."""
    for repeat in range(1, repeats + 1):
        for level in levels if repeat % 2 else reversed(levels):
            yield level, repeat


def next_level(measured: Mapping[float, LevelFacts], bench: BenchConfig) -> float | None:
    """The next level of an adaptive ladder; None: it is high and fine enough.

    It doubles until more load brings nothing, breaks ``bench.slo`` or meets the client's own limits, and then halves
    the gap (as a ratio) below the knee, or between the last level that passes and the first that fails.
    """
    levels = sorted(measured)
    if not levels:
        return 1.0
    failing = next((level for level in levels if violation(measured[level], bench.slo)), None)
    passing = [measured[level] for level in levels if failing is None or level < failing]
    if not passing:
        return None
    best = max(passing, key=lambda facts: facts.requests_per_s.value)
    knee = next(facts.level for facts in passing if reaches(facts, best, bench.plateau))
    idle = sum(facts.level > knee for facts in passing)
    goes_on = failing is None and idle < _ENOUGH and passing[-1].audit.limited_by != "client"
    if goes_on and 2 * levels[-1] <= bench.max_level:
        return 2 * levels[-1]
    if failing is not None and not idle:
        return _between(passing[-1].level, failing)
    below = [level for level in levels if level < knee]
    return _between(below[-1], knee) if below else None


def _between(low: float, high: float) -> float | None:
    middle = round(math.sqrt(low * high))
    return float(middle) if high / low > _CLOSE and low < middle < high else None
