"""Plots as inline SVG: lines, and bars with intervals. Static, scaled to the page, coloured by its style sheet."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from runner.charts import Bar, Bars, Chart, Lines, Series, labels_apart, series_labels
from runner.figures import short

_WIDTH, _HEIGHT = 480, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 18, 12, 40
_COLOURS = 6


def draw(chart: Chart) -> Markup:
    """The chart as SVG, with its legend; empty where there is nothing to show."""
    return _lines(chart) if isinstance(chart, Lines) else _bars(chart)


def _lines(chart: Lines) -> Markup:
    series = chart.series
    xs = [point[0] for each in series for point in each.points]
    ys = [point[1] for each in series for point in each.points]
    if not xs:
        return Markup("")
    across = _Axis.over(xs, _LEFT, _WIDTH - _RIGHT, logarithmic=chart.logarithmic)
    up = _Axis.over([0.0, *ys], _HEIGHT - _BOTTOM, _TOP)
    parts = [*_grid(across, up), *_titles(chart.x, chart.y)]
    for number, each in enumerate(series):
        colour = _colour(each, number)
        path = " ".join(f"{across.place(px):.1f},{up.place(py):.1f}" for px, py in each.points)
        parts.append(f'<polyline class="line {colour}" points="{path}"/>')
        if chart.dots or len(each.points) == 1:  # of one point there is no line
            parts += [
                f'<circle class="dot {colour}" cx="{across.place(px):.1f}" cy="{up.place(py):.1f}" r="3.5">'
                f"<title>{escape(each.name)}: {px:g}, {short(py)}</title></circle>"
                for px, py in each.points
            ]
    return _figure(parts, _HEIGHT, f"{chart.y} over {chart.x}") + _legend(series)


def _bars(chart: Bars) -> Markup:
    """A horizontal bar for each value, its name above it and its interval across its end."""
    values = chart.values
    if not values:
        return Markup("")
    row = 44
    height = len(values) * row + _BOTTOM
    ends = [0.0, *(value.value for value in values), *(v.high for v in values if v.high is not None)]
    across = _Axis.over([end for end in ends if math.isfinite(end)], 8, _WIDTH - 90)
    parts = [
        f'<line class="grid" x1="{across.place(tick):.1f}" x2="{across.place(tick):.1f}" y1="4" y2="{height - 34}"/>'
        f'<text class="tick" x="{across.place(tick):.1f}" y="{height - 18}" text-anchor="middle">{_tick(tick)}</text>'
        for tick in across.ticks
    ]
    labels = labels_apart([value.name for value in values])
    for number, (value, label) in enumerate(zip(values, labels, strict=True)):
        top = number * row
        end = across.place(value.value)
        start = across.place(0.0)
        parts.append(
            f'<text class="name" x="8" y="{top + 14}">{escape(label)}</text>'
            f'<rect class="bar {_colour(value, number)}" x="{min(start, end):.1f}" y="{top + 20}"'
            f' width="{abs(end - start):.1f}" height="14" rx="2"/>'
            f'<text class="value" x="{_right_of(value, across):.1f}" y="{top + 31}">{escape(value.text)}</text>'
        )
        if value.low is not None and value.high is not None and math.isfinite(value.high - value.low):
            low, high = across.place(value.low), across.place(value.high)
            parts.append(
                f'<path class="interval" d="M{low:.1f} {top + 27}H{high:.1f}M{low:.1f} {top + 23}v8'
                f'M{high:.1f} {top + 23}v8"/>'
            )
    parts.append(f'<text class="title" x="{_WIDTH / 2}" y="{height - 2}" text-anchor="middle">{escape(chart.x)}</text>')
    return _figure(parts, height, chart.x)


@dataclass(frozen=True, slots=True)
class _Axis:
    """Values on a stretch of the page."""

    low: float
    high: float
    start: float
    end: float
    ticks: Sequence[float]
    logarithmic: bool = False

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float, *, logarithmic: bool = False) -> _Axis:
        low, high = min(values), max(values)
        if logarithmic and low > 0:
            ticks = [2.0**power for power in range(math.floor(math.log2(low)), math.ceil(math.log2(high)) + 1)]
            return cls(ticks[0], ticks[-1] if ticks[-1] > ticks[0] else 2 * ticks[0], start, end, ticks, True)
        step = _nice((high - low) / 5 or abs(high) or 1.0)
        ticks = [step * number for number in range(math.floor(low / step), math.ceil(high / step) + 1)]
        return cls(ticks[0], max(ticks[-1], ticks[0] + step), start, end, ticks)

    def place(self, value: float) -> float:
        low, high = self.low, self.high
        if self.logarithmic:
            value, low, high = math.log2(value), math.log2(low), math.log2(high)
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def _nice(step: float) -> float:
    """The next step of 1, 2 or 5 times a power of ten."""
    step = max(step, sys.float_info.min)  # below, there are no powers of ten any more
    size = 10.0 ** math.floor(math.log10(step))
    return next(size * factor for factor in (1, 2, 5, 10) if size * factor >= step * 0.999)


def _grid(across: _Axis, up: _Axis) -> Iterator[str]:
    for tick in up.ticks:
        y = up.place(tick)
        yield f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text class="tick" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_tick(tick)}</text>'
    for tick in across.ticks:
        x = across.place(tick)
        yield f'<text class="tick" x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{_tick(tick)}</text>'


def _tick(value: float) -> str:
    """A tick's label, without an exponent where its digits have room."""
    if abs(value) >= 1000:
        return short(value)
    plain = f"{value:.12f}".rstrip("0").rstrip(".")
    return plain if len(plain) <= 9 else f"{round(value, 12):g}"


def _titles(x: str, y: str) -> Iterator[str]:
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    centre = (_LEFT + _WIDTH - _RIGHT) / 2
    yield f'<text class="title" x="{centre}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x)}</text>'
    yield (
        f'<text class="title" x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">'
        f"{escape(y)}</text>"
    )


def _right_of(value: Bar, across: _Axis) -> float:
    ends = [value.value, 0.0]
    if value.high is not None and math.isfinite(value.high):
        ends.append(value.high)
    return across.place(max(ends)) + 6


def _colour(each: Series | Bar, number: int) -> str:
    return f"c{(number if each.place is None else each.place) % _COLOURS}"


def _figure(parts: Sequence[str], height: int, title: str) -> Markup:
    return Markup(
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )


def _legend(series: Sequence[Series]) -> Markup:
    if len(series) < 2 and all(each.place is None for each in series):
        return Markup("")
    entries = (
        f'<span class="entry"><i class="key {_colour(each, number)}"></i>{escape(label)}</span>'
        for number, (each, label) in enumerate(zip(series, series_labels(series), strict=True))
    )
    return Markup(f'<p class="legend">{"".join(entries)}</p>')
