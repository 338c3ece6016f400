"""Datasets that mean harm, or are badly broken: what each holds, and what comes of it."""

from __future__ import annotations

import os
import random
from contextlib import suppress
from pathlib import Path

import pytest

from runner.config import DatasetConfig, DatasetKind
from runner.dataset import count_rows, open_dataset
from runner.errors import DatasetError

GOOD = b'{"a": 1}\n'
ROW = {"a": 1}

JSONL: dict[str, tuple[bytes, list[object] | str]] = {
    "null characters": (GOOD + b"\0" * 1000 + b"\n" + GOOD, [ROW, "no valid JSON", ROW]),
    "a null character in a text": (b'{"a": "x\\u0000y"}\n', [{"a": "x\0y"}]),
    "a key twice": (b'{"a": 2, "a": 1}\n', [ROW]),
    "NaN": (GOOD + b'{"a": NaN}\n', [ROW, "NaN"]),
    "Infinity": (GOOD + b'{"a": -Infinity}\n', [ROW, "Infinity"]),
    "a number beyond a float": (GOOD + b'{"a": 1e400}\n', [ROW, "Out of range"]),
    "a number of 100 digits": (b'{"a": 1%s}\n' % (b"0" * 100), [{"a": 10**100}]),
    "a number of 5000 digits": (GOOD + b'{"a": 1%s}\n' % (b"0" * 5000), [ROW, "4300"]),
    "another encoding in a line": (GOOD + b'{"a": "caf\xe9"}\n', [ROW, "no valid UTF-8"]),
    "a byte order mark in the midst": (GOOD + b"\xef\xbb\xbf" + GOOD + GOOD, [ROW, "BOM", ROW]),
    "UTF-16": ('{"a": 1}\n'.encode("utf-16"), "UTF-16"),
    "UTF-32": ('{"a": 1}\n'.encode("utf-32"), "UTF-16"),
    "half a surrogate pair": (GOOD + b'{"\\ud800": 1}\n', [ROW, "surrogate"]),
    "nested 900 deep": (b'{"a": %s1%s}\n' % (b"[" * 900, b"]" * 900), [None]),
    "nested 100,000 deep": (GOOD + b'{"a": %s' % (b"[" * 100_000) + b"\n", [ROW, "nested too deeply"]),
    "a line without end": (GOOD + b'{"a": "' + b"x" * 1_000_000, [ROW, "no valid JSON"]),
    "a pickle": (
        b"\x80\x04\x95\x1b\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
        "no JSONL",
    ),
    "gzip": (b"\x1f\x8b\x08\x00", "compressed"),
    "nothing": (b"", "no rows"),
}
"""What a file holds, and its rows: fields, None for any, or what the error of one says. A text: of the whole file."""

CSV: dict[str, tuple[bytes, list[object] | str]] = {
    "a quote that is never closed": (b'a,b\n1,"x\n' + b"2,3\n" * 1000, ["never closed"]),
    "a null character": (b"a,b\n1,x\0y\n2,3\n", [{"a": "1", "b": "x\0y"}, {"a": "2", "b": "3"}]),
    "a cell too many": (b"a,b\n1,2,3\n4,5\n", ["3 cells", {"a": "4", "b": "5"}]),
    "100,000 columns of one name": (b"a," * 100_000 + b"b\n1,2\n", "two columns"),
    "another encoding in a cell": (b"a\ncaf\xe9\nx\n", ["no valid UTF-8", {"a": "x"}]),
    "a formula": (b"a\n=1+1\n", [{"a": "=1+1"}]),
    "a template": (b"a\n{{ 7*7 }}\n", [{"a": "{{ 7*7 }}"}]),
    "an object to make": (b"_target_\nos.system\n", [{"_target_": "os.system"}]),
}


def read(kind: str, path: Path) -> list[object]:
    """Fields, or the error, of each row."""
    config = DatasetConfig(kind=DatasetKind[kind], path=str(path))
    rows = list(open_dataset(config))
    assert count_rows(config) == len(rows)
    return [str(row.error) if row.error else row.fields for row in rows]


@pytest.mark.parametrize(
    ("kind", "name"), [*(("jsonl", name) for name in JSONL), *(("csv", name) for name in CSV)], ids=str
)
def test_a_hostile_file_is_read_row_by_row_or_refused(tmp_path: Path, kind: str, name: str) -> None:
    content, expected = (JSONL if kind == "jsonl" else CSV)[name]
    path = tmp_path / "rows"
    path.write_bytes(content)
    if isinstance(expected, str):
        with pytest.raises(DatasetError, match=expected):
            read(kind, path)
        return
    rows = read(kind, path)
    assert len(rows) == len(expected)
    for row, wanted in zip(rows, expected, strict=True):
        if isinstance(wanted, str):
            assert isinstance(row, str)
            assert wanted in row
            assert len(row) < 300
        else:
            assert wanted in (row, None)


def test_a_line_larger_than_any_row_fails_alone_and_is_not_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_bytes(GOOD)
    with path.open("r+b") as file:  # a hole, which takes no room on the disk
        file.seek(140 * 2**20)
        file.write(b"\n" + GOOD)
    first, cut, last = open_dataset(DatasetConfig(kind=DatasetKind.jsonl, path=str(path)))
    assert (first.fields, last.fields, last.source) == (ROW, ROW, "rows:3")
    assert "longer than 128 MiB" in str(cut.error)


@pytest.mark.parametrize("seed", range(4))
def test_damaged_parquet_is_read_or_refused(tmp_path: Path, seed: int) -> None:
    pa = pytest.importorskip("pyarrow")
    path = tmp_path / "rows.parquet"
    pytest.importorskip("pyarrow.parquet").write_table(pa.table({"a": list(range(5000)), "b": ["x" * 50] * 5000}), path)
    whole = path.read_bytes()
    chance = random.Random(seed)
    for _ in range(25):
        damaged = bytearray(whole)
        for _ in range(chance.choice((1, 5, 50))):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        path.write_bytes(damaged)
        with suppress(DatasetError):
            read("parquet", path)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_what_can_be_read_only_once_or_never_ends_is_refused(tmp_path: Path, kind: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero"), Path("a\0b")):
        with pytest.raises(DatasetError):
            read(kind, path)


def test_a_folder_that_leads_back_to_itself_has_each_file_once(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "one.txt").touch()
    for name in ("x", "y", "z"):  # each of them doubles the ways
        (tmp_path / "b" / name).symlink_to(tmp_path)
    (tmp_path / "a").symlink_to(tmp_path / "b")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / os.fsdecode(b"\xff\x1b[31m")).touch()
    rows = read("files", tmp_path)
    assert [row["name"] for row in rows if isinstance(row, dict)] == ["one.txt", "\udcff\x1b[31m"]
