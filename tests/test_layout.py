from __future__ import annotations

import pytest

from runner.layout import blocks, laid_out, paragraph, remarks_of, wrapped

HEADER = ["level", "requests/s", "p50", "queue p95", ""]
LINES = [["1", "18.5 [16.7, 20.2]", "54 ms", "0 ms", ""], ["16", "304", "52 ms", "1.25 s", "the client is busy"]]


def test_a_table_that_fits_is_left_as_it_is() -> None:
    layout = laid_out(HEADER, LINES, 80)

    assert (layout.header, layout.lines, layout.remarks, layout.left_out) == (HEADER, LINES, (), ())
    assert layout.widths == [5, 17, 5, 9, 18]


def test_headers_are_wrapped_before_cells() -> None:
    layout = laid_out(HEADER[:-1], [line[:-1] for line in LINES], 5 + 17 + 5 + 6 + 13)

    assert layout.widths == [5, 17, 5, 6]


def test_remarks_go_below_before_a_column_is_left_out() -> None:
    layout = laid_out(HEADER, LINES, 52, optional=["queue p95"])

    assert layout.header == HEADER[:-1]
    assert (layout.remarks, layout.left_out) == (["16: the client is busy"], [])


def test_the_least_important_column_is_left_out_first() -> None:
    layout = laid_out(HEADER, LINES, 35, optional=["queue p95", "p50"])

    assert layout.header == ["level", "requests/s", "p50"]
    assert layout.left_out == ["queue p95"]


def test_without_room_for_a_table_each_line_is_a_block() -> None:
    layout = laid_out(["cell", "exit", "rows"], [["model=simulated/large request.temperature=0.7", "0", "4"]], 30)

    assert layout.widths is None
    assert blocks(layout.header, layout.lines, 30) == [
        ["cell model=simulated/large", "request.temperature=0.7", "  exit 0  rows 4"]
    ]


def test_the_cells_of_blocks_stand_below_each_other() -> None:
    lines = [["a", "0", "1,024", "50 ms"], ["b", "130", "", "5 ms"]]

    assert blocks(["cell", "exit", "rows", "p50"], lines, 28) == [
        ["cell a", "  exit 0    rows 1,024", "  p50 50 ms"],
        ["cell b", "  exit 130", "  p50 5 ms"],
    ]


def test_a_remark_on_several_lines_is_made_once() -> None:
    lines = [[name, "cannot tell" if name != "c" else ""] for name in "abcdefg"]

    assert list(remarks_of(lines)) == ["a, b, d and 3 more: cannot tell"]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("prompt 9,400, completion 5,640", ["prompt 9,400,", "completion 5,640"]),
        ("one of them takes 320 ms", ["one of them", "takes 320 ms"]),
        ("in all [18.9, 19.8]", ["in all", "[18.9, 19.8]"]),
        ("anunbreakableword and another", ["anunbreakableword", "and another"]),
        ("実験実験実験 実験", ["実験実験実験", "実験"]),
        ("", [""]),
    ],
)
def test_lines_are_broken_at_spaces_and_not_within_a_figure(text: str, lines: list[str]) -> None:
    assert wrapped(text, 16 if text.isascii() else 14) == lines


def test_a_line_goes_on_beside_its_label() -> None:
    assert paragraph("cost      a dollar or two", 32) == ["cost      a dollar or two"]
    assert paragraph("cost      a dollar or perhaps three", 30) == ["cost      a dollar or perhaps", "          three"]
    assert paragraph("a/long/path/of/a/file  it is gone", 24) == ["a/long/path/of/a/file ", "it is gone"]
