"""Charts as data: lines and bars, which a page or a tracker draws in its own way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """A line, under the name that the legend shows."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A value, with an interval where one is known."""

    name: str
    value: float
    text: str
    low: float | None = None
    high: float | None = None


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
