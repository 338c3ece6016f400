"""Charts as data: lines and bars, which a page or a tracker draws in its own way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

LONGEST_LABEL = 60
"""Characters of a name that there is room for beside a line or a bar."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """A line, under the name that the legend shows."""

    name: str
    points: Sequence[tuple[float, float]]
    note: str = ""  # shown after the name: why there is no line, for example
    place: int | None = None  # of its run among all, which it has its colour by; None: its place in this chart


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A value, with an interval where one is known."""

    name: str
    value: float
    text: str
    low: float | None = None
    high: float | None = None
    place: int | None = None  # as for a line


@dataclass(frozen=True, slots=True, kw_only=True)
class Lines:
    """A line for each series over a common x axis."""

    title: str
    note: str  # how to read it, in a sentence
    x: str  # what the axis shows, with the unit
    y: str
    series: Sequence[Series]
    logarithmic: bool = False  # whether the x axis doubles from tick to tick
    dots: bool = False  # whether the points themselves are marked


@dataclass(frozen=True, slots=True, kw_only=True)
class Bars:
    """A bar for each value."""

    title: str
    note: str  # how to read it, in a sentence
    x: str  # what the values are, with the unit
    values: Sequence[Bar]


Chart: TypeAlias = Lines | Bars


def labels_apart(names: Sequence[str]) -> list[str]:
    """The names of lines or bars, cut to `LONGEST_LABEL` characters so that those that differ still do.

    What names have in common is cut where it is long, as is what follows where they part:
    ``prompt="You are a careful supp…delivery, billing``.
    """
    long = {name for name in names if len(name) > LONGEST_LABEL}
    for width in range(LONGEST_LABEL - 1, 0, -1):
        cut = dict(_cut_apart(long, width))
        if all(len(label) <= LONGEST_LABEL for label in cut.values()):
            return [cut.get(name, name) for name in names]
    return [_cut(f"#{number} {name}", LONGEST_LABEL - 1) for number, name in enumerate(names)]


def series_labels(series: Sequence[Series]) -> list[str]:
    """What a legend says of lines: their `labels_apart`, and their notes."""
    labels = labels_apart([each.name for each in series])
    return [f"{label} ({each.note})" if each.note else label for label, each in zip(labels, series, strict=True)]


def _cut_apart(names: Iterable[str], width: int) -> Iterator[tuple[str, str]]:
    """Different names, each with what is left of it if no stretch up to where names part has more than ``width``
    characters. Of each stretch the first is left, by which the names differ."""
    by_first: dict[str, list[str]] = {}
    for name in names:
        by_first.setdefault(name[:1], []).append(name)
    for group in by_first.values():
        if len(group) == 1:
            yield group[0], _cut(group[0], width)
            continue
        common = _beginning(group)
        label = _cut(common, width, end=len(common) - common.rfind(" ") - 1)
        for rest, cut in _cut_apart([name[len(common) :] for name in group], width):
            yield common + rest, label + cut


def _beginning(names: Sequence[str]) -> str:
    """What all of them begin with."""
    first, last = min(names), max(names)
    return first[: next((place for place, letter in enumerate(first) if letter != last[place]), len(first))]


def _cut(text: str, width: int, *, end: int = 0) -> str:
    """So many characters of ``text``, up to ``end`` of them from its end."""
    if len(text) <= width + 1:
        return text
    end = min(end, width // 2)
    return f"{text[: width - end]}…{text[len(text) - end :]}"
