"""Comparisons: two runs over the same rows, row by row, so that what the rows have in common cancels out.

    comparisons = await compare([("model=a", folder_a), ("model=b", folder_b)])

Differences are of the second run to the first, each with an interval of 99 %. Where the interval holds zero, the rows
do not tell the two apart.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, TextIO

import orjson

from runner import figures
from runner.database import RUN_DATABASE
from runner.intervals import Interval, clustered_mean_interval, effective_size, paired_shares_interval
from runner.progress import printable, say, show_table, write
from runner.results import samples_of
from runner.store import Store

_MOST_SHOWN = 10
"""Comparisons that are printed."""

_UNTHINKABLE = 1e12
"""Rows that nobody has."""

CONFIDENCE = 0.99
"""Of an interval. A comparison has several of them, and at 95 % every fourth or so would find what is not there."""

_POWER = ((2.5758 + 0.8416) / 2.5758) ** 2
"""How many times the rows of an interval that just excludes zero it takes to exclude it four times in five."""

_NOISE = 1e-9
"""Relative differences of means that come of adding numbers up."""

SCORE = "score "
"""What the name of a scorer's figure begins with."""

FAILED = "failed"
"""The figure that is 1 for a row that failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How far the second run is from the first in one figure, over the rows for which both have it."""

    figure: str  # `SCORE` and a scorer's name, `FAILED`, latency_s, ttft_s, prompt_tokens, completion_tokens, cost_usd
    pairs: int
    independent: float  # how many pairs that share no answer would tell as much
    first: float  # mean
    second: float
    interval: Interval | None  # of second - first; None: too few pairs for one
    is_share: bool  # each row has 0 or 1

    @property
    def value(self) -> float:
        return 0.0 if math.isclose(self.first, self.second, rel_tol=_NOISE) else self.second - self.first

    @property
    def is_told(self) -> bool:
        """Whether the rows tell the two apart."""
        return self.interval is not None and 0.0 not in self.interval

    @property
    def pairs_wanted(self) -> int | None:
        """Rows with answers of their own that would tell a difference of this size, four times in five.

        More than there are; None: it is told, or there is none.
        """
        if self.interval is None or self.is_told or self.value == 0:
            return None
        reach = self.value - (self.interval.low if self.value > 0 else self.interval.high)  # to zero and beyond
        return math.ceil(self.independent * _POWER * (reach / self.value) ** 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two runs side by side."""

    first: str  # their names
    second: str
    differences: Sequence[Difference] = ()
    same_prompts: bool = True  # False: what was asked about the rows differs, so that it is prompts that are compared
    note: str = ""  # what to know about rows that share answers, answers taken over and times, where there are some
    refusal: str | None = None  # why they cannot be compared


async def compare(runs: Sequence[tuple[str, Path]]) -> list[Comparison]:
    """Each run, a name and a folder, against the first one.

    Runs over other rows are refused. A run that has not seen its whole dataset is compared over the rows that it has,
    if their metadata agree and hold the whole row: not where rows bring their own prompts. Samples of a row are
    averaged first, as they are not independent of each other. Where rows share an answer, the first of them stands for
    what it took; the intervals of scores are as wide as those of fewer rows that share none. Time and cost of an answer
    of another run are none of this one. Memory does not grow with the rows.

    Raises:
        StoreError: A run's database cannot be read.
    """
    first, others = runs[0], runs[1:]
    return [await _compare(first, other) for other in others]


def is_run(folder: Path) -> bool:
    """Whether there is a run to compare in a folder; a benchmark keeps no rows."""
    return (folder / RUN_DATABASE).is_file()


async def _compare(first: tuple[str, Path], second: tuple[str, Path]) -> Comparison:
    names = Comparison(first=first[0], second=second[0])
    async with await _open(first[1]) as one, await _open(second[1]) as two:
        facts = [await store.meta() for store in (one, two)]
        known = all(each.get("rows") for each in facts)  # both have seen their whole dataset
        if known and facts[0]["rows"] != facts[1]["rows"]:
            return replace(names, refusal="their rows differ: compare runs over the same dataset")
        if not known and any(each.get("whole_rows") != "true" for each in facts):
            return replace(names, refusal="whether their rows are the same is known when both have seen all of them")
        tally = Pairs()
        is_shared = is_taken_over = False
        async with aclosing(_pairs(one, two)) as pairs:
            async for index, here, there in pairs:
                if not known and here.metadata != there.metadata:
                    return replace(names, refusal=f"their rows differ, for example row {index}")
                tally.add(here.values, there.values, alike=max(here.alike, there.alike))
                is_shared |= here.is_shared or there.is_shared
                is_taken_over |= here.is_taken_over or there.is_taken_over
        if not tally.count:
            return replace(names, refusal="no row has been asked in both")
    same_prompts = not known or facts[0]["inputs"] == facts[1]["inputs"]
    differences = tally.differences()
    is_timed = any(each.is_told for each in differences if each.figure in _TIMES)
    note = "; ".join([_SHARED] * is_shared + [_TAKEN_OVER] * is_taken_over + [_TIMED] * is_timed)
    return replace(names, differences=differences, same_prompts=same_prompts, note=note)


_SHARED = "rows that share an answer count once in latency, tokens and cost, and widen the other intervals"
_TAKEN_OVER = "latency and cost of answers that were taken over do not count"
_TIMED = "latency is of the time at which each ran: what else the servers and this machine did then is part of it"


async def _open(folder: Path) -> Store:
    return await Store.open_readonly(folder / RUN_DATABASE)


@dataclass(slots=True)
class _Row:
    """What came of one row: the values of each figure, one a sample."""

    metadata: str | None
    alike: int = 1  # rows that share its answer, itself included
    is_shared: bool = False  # whether an answer of its stands with another row already
    is_taken_over: bool = False  # whether an answer of its is another run's
    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, record: Any) -> None:
        self._put(FAILED, float(record["error_type"] is not None))
        if record["error_type"] is not None:
            return
        self.is_shared |= not record["is_first"]
        self.is_taken_over |= record["reused_from"] is not None
        for name in _COLUMNS if record["is_first"] else ():
            self._put(name, record[name])
        for name, score in orjson.loads(record["scores"] or b"{}").items():
            self._put(f"{SCORE}{name}", score)

    def _put(self, name: str, value: float | None) -> None:
        if value is not None:
            self.values.setdefault(name, []).append(float(value))


async def _rows(store: Store) -> AsyncGenerator[tuple[int, _Row], None]:
    """The settled rows in the dataset's order, samples together."""
    meta = await store.meta()
    samples = samples_of(meta)
    settled = _SETTLED_SHARING if meta.get("dedupe") == "true" else _SETTLED
    index, row = -1, _Row(None)
    async with aclosing(store.query(settled)) as records:
        async for record in records:
            if record["position"] // samples != index:
                if index >= 0:
                    yield index, row
                index, row = record["position"] // samples, _Row(record["metadata"], record["alike"])
            row.add(record)
    if index >= 0:
        yield index, row


async def _pairs(one: Store, two: Store) -> AsyncGenerator[tuple[int, _Row, _Row], None]:
    """The rows that both have."""
    async with aclosing(_rows(one)) as here, aclosing(_rows(two)) as there:
        left, right = await anext(here, None), await anext(there, None)
        while left is not None and right is not None:
            if left[0] == right[0]:
                yield left[0], left[1], right[1]
                left, right = await anext(here, None), await anext(there, None)
            elif left[0] < right[0]:
                left = await anext(here, None)
            else:
                right = await anext(there, None)


_COLUMNS = {
    "latency_s": "CASE WHEN reused_from IS NULL THEN service_time_s END",
    "ttft_s": "CASE WHEN reused_from IS NULL THEN ttft_s END",
    "prompt_tokens": "prompt_tokens",
    "completion_tokens": "completion_tokens",
    "cost_usd": "CASE WHEN reused_from IS NULL THEN cost_usd END",
}
"""Figures of an answer, and where they are."""

_TIMES = ("latency_s", "ttft_s")

_SETTLED_ROWS = f"""
    SELECT rows.position, rows.metadata, rows.scores, error_type, reused_from,
        {", ".join(f"{column} AS {name}" for name, column in _COLUMNS.items())}
"""

_SETTLED = f"""
    {_SETTLED_ROWS}, TRUE AS is_first, 1 AS alike
    FROM rows
    JOIN answers USING (ticket)
    ORDER BY rows.position
"""

_SETTLED_SHARING = f"""
    {_SETTLED_ROWS}, rows.position = first AS is_first, alike
    FROM rows
    JOIN answers USING (ticket)
    JOIN (SELECT ticket, min(position) AS first, count(*) AS alike FROM rows GROUP BY ticket) USING (ticket)
    ORDER BY rows.position
"""


class Pairs:
    """Sums over pairs of rows, in constant memory."""

    def __init__(self) -> None:
        self.count = 0
        self._sums: dict[str, _Sums] = {}

    def add(self, here: Mapping[str, Sequence[float]], there: Mapping[str, Sequence[float]], *, alike: int = 1) -> None:
        """A row of the first run and the same of the second: the values of each figure, one a sample.

        Args:
            alike: How many pairs tell the same as this one, itself included, as they share their answers.
        """
        self.count += 1
        for name, first in here.items():
            second = there.get(name)
            if second is not None:
                sums = self._sums.setdefault(name, _Sums(_is_of_rows(name)))
                sums.add(first, second, alike=1 if name in _COLUMNS else alike)

    def differences(self) -> list[Difference]:
        """Scores first, then failures, then what it took. What neither run ever has is left out."""
        order = [*(name for name in self._sums if name.startswith(SCORE)), FAILED, *_COLUMNS, "itl_s"]
        found = [self._sums[name].difference(name) for name in order if name in self._sums]
        return [each for each in found if each.figure != FAILED or each.first or each.second]


def _is_of_rows(name: str) -> bool:
    """Scores and failures are a row's own, and shares of the rows where they are 0 or 1; the rest is a request's."""
    return name == FAILED or name.startswith(SCORE)


class _Sums:
    """One figure over pairs: the means, how the differences spread, and for shares who succeeded where."""

    def __init__(self, may_be_share: bool) -> None:
        self._n = 0
        self._alike = 0
        self._first = self._second = 0.0
        self._mean = self._squares = 0.0  # of the differences, by Welford's method
        self._is_share = may_be_share
        self._outcomes = Counter[tuple[float, float]]()

    def add(self, first: Sequence[float], second: Sequence[float], *, alike: int) -> None:
        here, there = fmean(first), fmean(second)
        self._n += 1
        self._alike += alike
        self._first += here
        self._second += there
        step = there - here - self._mean
        self._mean += step / self._n
        self._squares += step * (there - here - self._mean)
        self._is_share = self._is_share and here in (0.0, 1.0) and there in (0.0, 1.0)
        if self._is_share:
            self._outcomes[here, there] += 1

    def difference(self, name: str) -> Difference:
        independent = effective_size(self._n, self._alike)
        return Difference(
            figure=name,
            pairs=self._n,
            independent=independent,
            first=self._first / self._n,
            second=self._second / self._n,
            interval=self._interval(independent),
            is_share=self._is_share,
        )

    def _interval(self, independent: float) -> Interval | None:
        if self._is_share:
            weight = independent / self._n
            return paired_shares_interval(
                both=weight * self._outcomes[1.0, 1.0],
                first=weight * self._outcomes[1.0, 0.0],
                second=weight * self._outcomes[0.0, 1.0],
                neither=weight * self._outcomes[0.0, 0.0],
                confidence=CONFIDENCE,
            )
        return clustered_mean_interval(self._mean, self._squares, self._n, independent, confidence=CONFIDENCE)


def show_comparisons(comparisons: Sequence[Comparison], *, stream: TextIO) -> None:
    """Print the differences of runs to the first one."""
    for each in comparisons[:_MOST_SHOWN]:
        first, second = printable(each.first), printable(each.second)
        if each.refusal is not None:
            say(stream, f"\nnot compared: {first} and {second}: {each.refusal}")
            continue
        note = "" if each.same_prompts else ", with other prompts"
        say(stream, f"\ndifferences over the same rows{note}\nfirst   {first}\nsecond  {second}")
        show_table(HEADER, [difference_cells(difference) for difference in each.differences], stream=stream)
        if each.note:
            say(stream, each.note)
    if len(comparisons) > _MOST_SHOWN:
        write(stream, f"\n{len(comparisons) - _MOST_SHOWN} more: python -m runner.report\n")


HEADER = ("", "first", "second", "difference", "99 % interval", "rows", "")


def difference_cells(difference: Difference) -> list[str]:
    """A difference under the `HEADER`."""
    interval = difference.interval
    level = _percent if difference.is_share else _SHOWN_AS.get(difference.figure, _plain)
    change = _points if difference.is_share else level
    return [
        printable(_NAMES.get(difference.figure, difference.figure)),
        level(difference.first),
        level(difference.second),
        f"{'+' if difference.value > 0 else ''}{change(difference.value)}",
        "" if interval is None else f"[{change(interval.low)}, {change(interval.high)}]",
        f"{difference.pairs:,}",
        finding(difference),
    ]


def finding(difference: Difference) -> str:
    """What the interval says, in words."""
    count = round(difference.independent)
    are_shared = count < difference.pairs
    shared = f"; these {difference.pairs:,} share theirs and tell as much as {_rough(count)}" if are_shared else ""
    each = " with an answer each" if are_shared else ""
    if difference.interval is None:
        return f"too few rows{each}{shared}"
    if difference.is_told:
        return "higher" if difference.value > 0 else "lower"
    if difference.interval.low == difference.interval.high:
        return "the same"
    wanted = difference.pairs_wanted
    if wanted is None or wanted > _UNTHINKABLE:
        return "cannot tell: no difference in these rows"
    unit = "rows" if _is_of_rows(difference.figure) else "requests"
    return f"cannot tell: it would take about {_rough(wanted)} {unit}{each}{shared}"


def _rough(count: int) -> str:
    return str(count) if count < 1000 else figures.short(count)


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _points(value: float) -> str:
    """A difference of shares, in percentage points."""
    return f"{100 * value:.1f} pp"


def _plain(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _seconds(value: float) -> str:
    return f"{1000 * value:.3g} ms" if abs(value) < 1 else f"{value:.3g} s"


def _dollars(value: float) -> str:
    return f"{'-' if value < 0 else ''}{figures.small_dollars(abs(value))}"


_NAMES = {
    "latency_s": "mean latency",
    "ttft_s": "mean TTFT",
    "itl_s": "mean ITL",
    "prompt_tokens": "mean prompt tokens",
    "completion_tokens": "mean completion tokens",
    "cost_usd": "mean cost per request",
}
"""What figures are called where their unit is shown: means over the rows, beside the percentiles of other tables."""

_SHOWN_AS = {"latency_s": _seconds, "ttft_s": _seconds, "itl_s": _seconds, "cost_usd": _dollars}
"""How figures with a unit are shown."""
