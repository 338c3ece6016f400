from __future__ import annotations

import csv
import io
import json
import os
import tracemalloc
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from runner.config import DatasetConfig, DatasetKind, ShardConfig
from runner.dataset import Row, count_rows, open_dataset
from runner.errors import ConfigError, DatasetError, RowError

CONF = Path(__file__).parents[1] / "conf" / "dataset"


def dataset(path: Path | str | None, kind: str = "jsonl", **options: Any) -> DatasetConfig:
    return DatasetConfig(kind=DatasetKind(kind), path=None if path is None else str(path), **options)


def rows_of(path: Path, kind: str = "jsonl", **options: Any) -> list[Row]:
    return list(open_dataset(dataset(path, kind, **options)))


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(content: str | bytes, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that a property test writes again for each example."""
    return tmp_path_factory.mktemp("dataset") / "rows.jsonl"


# Every kind


def test_a_single_dataset_is_one_row_without_fields() -> None:
    assert list(open_dataset(DatasetConfig())) == [Row(index=0, fields={}, source="single:1")]
    assert count_rows(DatasetConfig()) == 1


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize("path", [None, ""])
def test_a_file_dataset_without_a_path_names_the_key(kind: str, path: str | None) -> None:
    with pytest.raises(ConfigError, match=r"dataset\.path is not set"):
        open_dataset(dataset(path, kind))


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_limit_takes_the_first_rows_and_shard_takes_its_share_of_those(write: Any, kind: str) -> None:
    content = "n\n" if kind == "csv" else ""
    content += "".join(f"{n}\n" if kind == "csv" else f'{{"n": "{n}"}}\n' for n in range(10))
    path = write(content)
    whole = rows_of(path, kind)
    assert [row.index for row in whole] == list(range(10))
    shards = [rows_of(path, kind, limit=8, shard=ShardConfig(index=index, count=3)) for index in range(3)]
    assert [[row.index for row in shard] for shard in shards] == [[0, 3, 6], [1, 4, 7], [2, 5]]
    assert sorted(chain(*shards), key=lambda row: row.index) == whole[:8]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize("limit", [None, 0, 1, 5, 7, 100])
@pytest.mark.parametrize(("index", "count"), [(0, 1), (0, 3), (2, 3), (9, 10)])
def test_count_rows_agrees_with_reading(write: Any, kind: str, limit: int | None, index: int, count: int) -> None:
    content = (
        'a,b\n1,2\n\n"3\n\n",4\nbad\n5,6\n\n' if kind == "csv" else '{"a": 1}\n\n  \r\nbad\n{"a": 2}\n{"a": 3}\n\n'
    )
    config = dataset(write(content), kind, limit=limit, shard=ShardConfig(index=index, count=count))
    assert count_rows(config) == len(list(open_dataset(config)))


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_rows_are_read_as_they_are_asked_for(write: Any, kind: str) -> None:
    text = "x" * 180
    lines = (f"{n},{text}\n" if kind == "csv" else f'{{"n": {n}, "text": "{text}"}}\n' for n in range(50_000))
    path = write(("n,text\n" if kind == "csv" else "") + "".join(lines))
    tracemalloc.start()
    try:
        assert sum(1 for _ in open_dataset(dataset(path, kind))) == 50_000
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < path.stat().st_size / 3


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_missing_file_is_noticed_at_once_and_near_names_are_offered(write: Any, kind: str) -> None:
    path = write('{"a": 1}', "questions.jsonl")
    typo = path.with_name("question.jsonl")
    with pytest.raises(DatasetError) as caught:
        open_dataset(dataset(typo, kind))
    assert f"dataset.path={typo}: there is no such file. Did you mean '{path}'?" in str(caught.value)


def test_a_relative_path_is_shown_and_suggested_as_the_user_would_write_it(
    write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(write('{"a": 1}').parent)
    with pytest.raises(DatasetError, match=r"dataset.path=row.jsonl: .* Did you mean 'rows.jsonl'\?"):
        open_dataset(dataset("row.jsonl"))
    with pytest.raises(DatasetError, match="There is no folder 'data' either"):
        open_dataset(dataset("data/rows.jsonl"))


def test_a_home_directory_is_expanded(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(write('{"a": 1}').parent))
    assert count_rows(dataset("~/rows.jsonl")) == 1


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_what_is_no_regular_file_is_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / "some.rows").touch()
    with pytest.raises(DatasetError, match=r"is a folder: name one file in it, for example .*some\.rows"):
        open_dataset(dataset(tmp_path, kind))
    (tmp_path / f"the.{kind}").touch()
    with pytest.raises(DatasetError, match=rf"for example .*the\.{kind}"):
        open_dataset(dataset(tmp_path, kind))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DatasetError, match="is no regular file"):
        open_dataset(dataset(tmp_path / "pipe", kind))
    with pytest.raises(DatasetError, match="there is no such file"):
        open_dataset(dataset("a\0b", kind))
    with pytest.raises(DatasetError, match="cannot be read: File name too long"):
        open_dataset(dataset("a" * 300, kind))


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_file_that_goes_away_after_the_check_is_a_dataset_error(write: Any, kind: str) -> None:
    path = write('{"a": 1}\n' if kind == "jsonl" else "a\n1\n")
    rows = open_dataset(dataset(path, kind))
    path.unlink()
    with pytest.raises(DatasetError, match=r"rows\.jsonl cannot be read: No such file"):
        list(rows)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "holds no rows"),
        (b"\xef\xbb\xbf", "holds no rows"),
        (b"\n\r\n\n", "holds no rows"),
        ('{"a": 1}\n'.encode("utf-16"), "is UTF-16"),
        (b"\x1f\x8b\x08\x00rest", "is compressed"),
        (b"PK\x03\x04rest", "an Excel workbook"),
        (b"PAR1\x15\x04rest", "is Parquet"),
    ],
)
def test_a_file_that_can_hold_no_rows_is_refused_before_the_first(
    write: Any, kind: str, content: bytes, problem: str
) -> None:
    path = write(content)
    with pytest.raises(DatasetError, match=problem) as caught:
        open_dataset(dataset(path, kind))
    assert str(path) in str(caught.value)
    with pytest.raises(DatasetError, match=problem):
        count_rows(dataset(path, kind))


@pytest.mark.parametrize("name", list(DatasetKind))
def test_the_group_files_set_only_known_keys(name: str) -> None:
    given = OmegaConf.load(CONF / f"{name}.yaml")
    merged = OmegaConf.merge(OmegaConf.structured(DatasetConfig), given)
    assert merged.kind == DatasetKind(name)
    merged.path = merged.function = "rows"
    # nothing but the defaults is written there
    assert OmegaConf.to_object(merged) == dataset("rows", name, function="rows")


# JSONL


def test_each_line_is_a_row_that_knows_its_place(write: Any) -> None:
    path = write('{"a": 1}\n\n   \n{"a": [true, null, {"b": "ü"}]}')
    assert rows_of(path) == [
        Row(index=0, fields={"a": 1}, source="rows.jsonl:1"),
        Row(index=1, fields={"a": [True, None, {"b": "ü"}]}, source="rows.jsonl:4"),
    ]


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"], ids=["plain", "bom"])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("end", [True, False], ids=["closed", "open"])
def test_byte_order_marks_and_line_endings_make_no_difference(
    write: Any, start: bytes, newline: bytes, end: bool
) -> None:
    content = start + newline.join([b'{"a": "x"}', b"", b'{"a": "y"}']) + (newline if end else b"")
    assert [row.fields for row in rows_of(write(content))] == [{"a": "x"}, {"a": "y"}]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"hello", "no valid JSON: expecting value at column 1: 'hello'"),
        (b'{"a": 1', "no valid JSON: .* at the end of the line"),
        (b'{"a": 1} x', "extra data at column 10: 'x'"),
        (b"{'a': 1}", "at column 2"),
        (b'{"a": NaN}', "no valid JSON: NaN"),
        (b'{"a": -Infinity}', "no valid JSON: -Infinity"),
        (b'{"a": 1e999}', "out of range|Out of range"),
        (b'{"a": "\xff"}', "no valid UTF-8: byte 0xff at position 8"),
        (rb'{"a": "\ud800"}', "half a surrogate pair"),
        (b"[1, 2]", "an array, not an object"),
        (b'"text"', "a string, not an object"),
        (b"17", "a number, not an object"),
        (b"1.5", "a number, not an object"),
        (b"123456789012345678901234567890", "a number, not an object"),
        (b"true", "a boolean, not an object"),
        (b"null", "null, not an object"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "4300 digits"),
    ],
)
def test_a_malformed_line_fails_that_row_only(write: Any, line: bytes, problem: str) -> None:
    path = write(b'{"n": 1}\n' + line + b'\n{"n": 3}\n')
    before, bad, after = rows_of(path)
    assert (before.fields, before.error) == ({"n": 1}, None)
    assert (after.fields, after.error, after.index, after.source) == ({"n": 3}, None, 2, "rows.jsonl:3")
    assert isinstance(bad.error, RowError)
    assert (bad.fields, bad.index, bad.source) == ({}, 1, "rows.jsonl:2")
    assert str(bad.error).startswith("rows.jsonl:2: ")
    with pytest.raises(RowError, match=problem):
        raise bad.error


def test_the_text_of_an_error_stays_short_and_printable(write: Any) -> None:
    _, bad = rows_of(write(b'{"n": 1}\n\x1b[31m\x00' + b"x" * 10_000))
    assert bad.error is not None
    assert str(bad.error).isprintable()
    assert len(str(bad.error)) < 120


@pytest.mark.parametrize("value", [2**63 - 1, 2**63, -(2**63) - 1, 2**64, 10**40, 1234567890123456789, 0.1, 1e300])
def test_numbers_keep_every_digit(write: Any, value: float) -> None:
    (row,) = rows_of(write(json.dumps({"a": {"b": [value]}})))
    assert row.fields == {"a": {"b": [value]}}
    assert type(row.fields["a"]["b"][0]) is type(value)


def test_control_characters_are_text_like_any_other(write: Any) -> None:
    text = "".join(map(chr, range(32))) + "\x7f\u2028\u0085"
    escaped, raw = rows_of(
        write(json.dumps({"a": text}) + "\n" + '{"a": "' + text.replace("\n", "") + '"}'), limit=None
    )
    assert escaped.fields == {"a": text}
    assert raw.fields == {"a": text.replace("\n", "")}


@pytest.mark.parametrize(
    ("content", "name", "problem"),
    [
        ('[{"a": 1}, {"a": 2}]', "rows.json", r"rows.json:1: .*one JSON array: write one object per line"),
        ('[\n  {"a": 1},\n  {"a": 2}\n]', "rows.json", r"rows.json:1: .*one JSON array: write one object per line"),
        ('\n{\n  "a": 1\n}', "rows.json", r"rows.json:2: .*JSON over several lines: write one object per line"),
        ("a,b\n1,2\n", "rows.csv", r"rows.csv:1: no JSONL: .*'a,b'.*dataset=csv reads CSV"),
        ("hello\n" * 20, "rows.txt", r"rows.txt:1: no JSONL: .*Write one JSON object per line"),
        (b"\x80" * 100, "rows.bin", r"rows.bin:1: no JSONL: no valid UTF-8"),
    ],
)
def test_a_file_that_is_no_jsonl_is_refused_with_the_way_out(
    write: Any, content: str | bytes, name: str, problem: str
) -> None:
    with pytest.raises(DatasetError, match=problem):
        open_dataset(dataset(write(content, name)))


def test_one_object_among_the_first_ten_lines_makes_a_file_jsonl(write: Any) -> None:
    assert len(rows_of(write("bad\n\n" * 9 + '{"a": 1}\n'))) == 10
    with pytest.raises(DatasetError, match="no JSONL"):
        open_dataset(dataset(write("bad\n\n" * 10 + '{"a": 1}\n')))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
JSON_OBJECTS = st.dictionaries(st.text(), JSON_VALUES, max_size=5)


@given(objects=st.lists(JSON_OBJECTS, min_size=1, max_size=6), escaped=st.booleans())
@example(objects=[{"a": -(2**63) - 1, "b": 2**64, "\0": "\u2028"}], escaped=False)
def test_any_json_object_is_read_as_it_was_written(scratch: Path, objects: list[Any], escaped: bool) -> None:
    scratch.write_text("".join(json.dumps(each, ensure_ascii=escaped) + "\n" for each in objects), encoding="utf-8")
    rows = rows_of(scratch)
    assert [row.error for row in rows] == [None] * len(objects)
    assert [repr(row.fields) for row in rows] == [repr(each) for each in objects]  # 1, 1.0 and True are equal, not same


NOISE = st.binary(max_size=40) | st.sampled_from(
    [
        b"",
        b"\r",
        b"\x0c",
        b"\x00",
        b"\xef\xbb\xbf",
        b"{",
        b'{"a": NaN}',
        b'"',
        b"[" * 2000,
        b"\xed\xa0\x80",
        b"9" * 5000,
    ]
)


@given(noise=st.lists(NOISE, max_size=12))
def test_noise_never_costs_a_good_line(scratch: Path, noise: list[bytes]) -> None:
    lines = [b'{"good": 0}']
    for number, each in enumerate(noise, 1):
        lines += [each, b'{"good": %d}' % number]
    scratch.write_bytes(b"\n".join(lines))
    rows = rows_of(scratch)
    assert [row.fields["good"] for row in rows if "good" in row.fields] == list(range(len(noise) + 1))
    assert [row.index for row in rows] == list(range(len(rows)))
    for row in rows:
        assert row.error is None or (row.fields == {} and str(row.error).encode())


@given(
    content=st.binary(max_size=200) | st.lists(NOISE, max_size=20).map(b"\n".join),
    kind=st.sampled_from(["jsonl", "csv"]),
)
def test_any_bytes_are_rows_or_a_dataset_error(scratch: Path, content: bytes, kind: str) -> None:
    scratch.write_bytes(content)
    try:
        rows = rows_of(scratch, kind)
    except DatasetError:
        return
    assert count_rows(dataset(scratch, kind)) == len(rows)
    assert all(isinstance(row.error, RowError | None) for row in rows)


# CSV


def test_the_header_gives_the_fields_and_every_value_is_text(write: Any) -> None:
    path = write('id,question\n1,"Who, where?"\n\n2,\n', "rows.csv")
    assert rows_of(path, "csv") == [
        Row(index=0, fields={"id": "1", "question": "Who, where?"}, source="rows.csv:2"),
        Row(index=1, fields={"id": "2", "question": ""}, source="rows.csv:4"),
    ]


def test_a_row_over_several_lines_has_the_place_of_its_first(write: Any) -> None:
    path = write('a,b\r\n"one\ntwo\r\nthree","say ""hi"""\r\n4,5', "rows.csv")
    first, second = rows_of(path, "csv")
    assert (first.fields, first.source) == ({"a": "one\ntwo\r\nthree", "b": 'say "hi"'}, "rows.csv:2")
    assert (second.fields, second.source) == ({"a": "4", "b": "5"}, "rows.csv:5")


@pytest.mark.parametrize(
    ("content", "fields"),
    [
        ("\ufeffa,b\n1,2\n", {"a": "1", "b": "2"}),
        ("a;b\n1,5;2\n", {"a": "1,5", "b": "2"}),
        ("a\tb\n1,5\t2;3\n", {"a": "1,5", "b": "2;3"}),
        ('"a, or so";b\n1;2\n', {"a, or so": "1", "b": "2"}),
        ("question\nwhat;now?\n", {"question": "what;now?"}),
        (" a , b \n 1 ,2\n", {"a": " 1 ", "b": "2"}),
        ("\n\na,b\n1,2", {"a": "1", "b": "2"}),
        ("a,b\n\x00,\x1b\n", {"a": "\x00", "b": "\x1b"}),
    ],
)
def test_the_header_tells_the_delimiter(write: Any, content: str, fields: dict[str, str]) -> None:
    (row,) = rows_of(write(content), "csv")
    assert row.fields == fields


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"1", "1 cells, and the header has 2"),
        (b"1,2,3", "3 cells, and the header has 2"),
        (b'"1"x,2', "no valid CSV"),
        (b"caf\xe9,2", "no valid UTF-8: save the file as UTF-8"),
    ],
)
def test_a_malformed_csv_line_fails_that_row_only(write: Any, line: bytes, problem: str) -> None:
    path = write(b"a,b\n1,2\n" + line + b"\n3,4\n", "rows.csv")
    before, bad, after = rows_of(path, "csv")
    assert (before.fields, after.fields) == ({"a": "1", "b": "2"}, {"a": "3", "b": "4"})
    assert after.source == "rows.csv:4"
    assert (bad.fields, bad.source) == ({}, "rows.csv:3")
    with pytest.raises(RowError, match=f"^rows.csv:3: {problem}"):
        raise bad.error or AssertionError


def test_a_quote_that_is_never_closed_is_named_where_it_opens(write: Any) -> None:
    _, bad = rows_of(write('a,b\n1,2\n"3,4\n5,6\n', "rows.csv"), "csv")
    assert str(bad.error) == (
        "rows.csv:3: no valid CSV: a quote is opened and never closed, so all that follows is taken for this row"
    )


def test_a_cell_may_be_larger_than_the_csv_module_allows(write: Any) -> None:
    text = "x" * 500_000
    (row,) = rows_of(write(f"a,b\n1,{text}\n"), "csv")
    assert row.fields["b"] == text


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("a,b,a\n1,2,3\n", "two columns of the header are named 'a'"),
        (",a\n1,2\n", "column 1 has no name"),
        ("a,b,\n1,2,\n", "column 3 has no name"),
        ("a,b\n", "holds no rows, only a header"),
        ('{"a": 1, "b": 2}\n', "dataset=jsonl reads"),
        (b"caf\xe9\n1\n", "the header is no valid UTF-8"),
    ],
)
def test_a_header_that_cannot_name_the_fields_is_refused(write: Any, content: str | bytes, problem: str) -> None:
    path = write(content, "rows.csv")
    with pytest.raises(DatasetError, match=problem) as caught:
        open_dataset(dataset(path, "csv"))
    assert str(path) in str(caught.value)


@given(table=st.lists(st.lists(st.text(max_size=8), min_size=2, max_size=2), min_size=1, max_size=6))
def test_any_text_survives_csv(scratch: Path, table: list[list[str]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, quoting=csv.QUOTE_ALL).writerows([["a", "b"], *table])
    scratch.write_bytes(text.getvalue().encode())
    assert [list(row.fields.values()) for row in rows_of(scratch, "csv")] == table
