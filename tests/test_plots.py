from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from runner.charts import LONGEST_LABEL, Bar, Bars, Lines, Series, labels_apart
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


def test_the_axis_of_small_sums_is_written_without_exponents() -> None:
    figure = drawn(draw(bars([Bar(name="a", value=7.8e-05, text="$0.000078")])))

    ticks = [text.text for text in figure.iter("text") if text.attrib["class"] == "tick"]
    assert ticks == ["0", "0.00002", "0.00004", "0.00006", "0.00008"]


def test_nothing_is_drawn_of_nothing() -> None:
    assert draw(line([])) == ""
    assert draw(bars([])) == ""


def test_one_point_is_drawn_although_it_makes_no_line() -> None:
    series = [Series(name="a", points=[(0.5, 44.0)]), Series(name="b", points=[(0.5, 40.0), (1.5, 20.0)])]
    figure = drawn(draw(Lines(title="t", note="", x="x", y="y", series=series)))

    assert [dot.attrib["class"] for dot in figure.iter("circle")] == ["dot c0"]


@given(st.lists(st.text("ab =", max_size=200), max_size=20), st.text("ab =", max_size=200))
def test_names_that_differ_have_short_labels_that_do(ends: list[str], beginning: str) -> None:
    names = [beginning + end for end in ends]
    labels = labels_apart(names)

    assert all(len(label) <= LONGEST_LABEL for label in labels)
    assert len(set(zip(names, labels, strict=True))) == len(set(labels)) == len(set(names))


def test_names_that_begin_alike_show_where_they_part() -> None:
    names = [
        f'model={model} prompt="You are a careful support agent. Label the ticket delivery, billing or {last}"'
        for model in ("gpt-4.1-mini", "gpt-4.1-nano")
        for last in ("other", "technical")
    ]

    assert labels_apart(names) == [
        'model=gpt-4.1-mini prompt="You are a careful supp…other"',
        'model=gpt-4.1-mini prompt="You are a careful supp…technical"',
        'model=gpt-4.1-nano prompt="You are a careful supp…other"',
        'model=gpt-4.1-nano prompt="You are a careful supp…technical"',
    ]
    assert labels_apart(["a", names[0]]) == ["a", f"{names[0][: LONGEST_LABEL - 1]}…"]


def test_names_that_no_cut_tells_apart_are_numbered() -> None:
    labels = labels_apart(["a" * length for length in range(61, 130)])

    assert labels[0].startswith("#0 aaa")
    assert labels[-1].startswith("#68 aaa")


def test_bars_and_lines_of_names_that_begin_alike_have_labels_of_their_own() -> None:
    names = [f"{'the same ' * 10}{end}" for end in ("left", "right")]
    columns = drawn(draw(bars([Bar(name=name, value=1.0, text="1") for name in names])))
    curves = draw(Lines(title="t", note="", x="x", y="y", series=[Series(name=n, points=[(1, 1)]) for n in names]))

    shown = [text.text or "" for text in columns.iter("text") if text.attrib["class"] == "name"]
    assert [label.rpartition("…")[2] for label in shown] == ["left", "right"]
    assert all(f"{label}</span>" in curves for label in shown)
