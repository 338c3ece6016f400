from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from runner.charts import Bar, Bars, Lines, Series
from runner.report.plots import draw

NUMBERS = st.floats(min_value=-1e12, max_value=1e12, allow_nan=False)


def line(points: list[tuple[float, float]], *, logarithmic: bool = False) -> Lines:
    series = [Series(name="a", points=points)]
    return Lines(title="t", note="", x="x", y="y", series=series, logarithmic=logarithmic, dots=True)


def bars(values: list[Bar]) -> Bars:
    return Bars(title="t", note="", x="<x>", values=values)


def drawn(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg[: svg.index("</svg>") + 6])


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=20))
def test_any_points_are_drawn_inside_the_figure(points: list[tuple[float, float]]) -> None:
    figure = drawn(draw(line(points)))

    _, _, width, height = map(float, figure.attrib["viewBox"].split())
    dots = [(float(dot.attrib["cx"]), float(dot.attrib["cy"])) for dot in figure.iter("circle")]
    assert len(dots) == len(points)
    assert all(0 <= x <= width and 0 <= y <= height for x, y in dots)


@given(st.lists(NUMBERS, min_size=1, max_size=8), st.text(max_size=80))
def test_any_values_and_names_are_drawn_as_bars(values: list[float], name: str) -> None:
    figure = drawn(draw(bars([Bar(name=f"<{value}>", value=value, text="&") for value in values])))

    assert len(list(figure.iter("rect"))) == len(values)


def test_a_doubling_axis_spaces_doublings_evenly() -> None:
    points = [(float(2**power), 1.0) for power in range(6)]
    figure = drawn(draw(line(points, logarithmic=True)))

    places = [float(dot.attrib["cx"]) for dot in figure.iter("circle")]
    steps = {round(right - left) for left, right in pairwise(places)}
    assert len(steps) == 1


def test_nothing_is_drawn_of_nothing() -> None:
    assert draw(line([])) == ""
    assert draw(bars([])) == ""


def test_one_point_is_drawn_although_it_makes_no_line() -> None:
    series = [Series(name="a", points=[(0.5, 44.0)]), Series(name="b", points=[(0.5, 40.0), (1.5, 20.0)])]
    figure = drawn(draw(Lines(title="t", note="", x="x", y="y", series=series)))

    assert [dot.attrib["class"] for dot in figure.iter("circle")] == ["dot c0"]
