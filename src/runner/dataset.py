"""Where the rows come from.

A dataset is a sequence of rows, each a dictionary of fields with a place that a message can name. It is checked when
it is opened and read as it is consumed, so its size is bounded by the disk alone.

A format is a small class that says where the records are and what one of them holds. Which rows are wanted, their
positions, and what becomes of a row that cannot be read are settled once, above the formats.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, Protocol

import orjson

from runner.config import DatasetConfig, DatasetKind
from runner.errors import ConfigError, DatasetError, RowError


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of a dataset."""

    index: int  # position in the whole dataset, from 0, whatever limit and shard leave out
    fields: dict[str, Any]  # {} where the row could not be read
    source: str  # its place: rows.jsonl:17
    error: RowError | None = None  # why it could not be read


def open_dataset(config: DatasetConfig) -> Iterator[Row]:
    """The rows that ``limit`` and ``shard`` leave, read as they are asked for.

    ``limit`` takes the first rows of the dataset, ``shard`` those of them whose index modulo ``count`` is its own.
    A row that cannot be read is a row with an error, and the next one is not affected.

    Raises:
        ConfigError: The dataset is not described fully, or its kind is not available.
        DatasetError: The file is missing, empty, or in another format. Raised here, before the first row, except
            where reading fails half-way.
    """
    return _rows(_open(config), config)


def count_rows(config: DatasetConfig) -> int | None:
    """How many rows `open_dataset` gives, without parsing them. None: not to be known without reading it all.

    Raises:
        ConfigError, DatasetError: As `open_dataset`.
    """
    dataset = _open(config)
    try:
        return sum(1 for _ in _wanted(dataset, config))
    except OSError as error:
        raise _unreadable(dataset.name, error) from error


class Dataset(Protocol):
    """One way to store rows. Making one checks that it is there and in this format."""

    name: str
    """The first half of a row's source."""

    def records(self) -> Iterator[tuple[int, Any]]:
        """Every record with the number that tells its place, unparsed. Each call starts at the first."""
        ...

    def fields(self, record: Any) -> dict[str, Any]:
        """What a record says.

        Raises:
            ValueError: It cannot be read; the text says why.
        """
        ...


class Single:
    """One row without fields: the prompt is all there is."""

    name = "single"

    def __init__(self, config: DatasetConfig) -> None: ...

    def records(self) -> Iterator[tuple[int, None]]:
        yield 1, None

    def fields(self, record: None) -> dict[str, Any]:
        return {}


class Jsonl:
    """One JSON object a line, in UTF-8. Blank lines are no rows."""

    def __init__(self, config: DatasetConfig) -> None:
        self._path, shown = _find_file(config)
        self.name = os.path.basename(self._path)
        first = list(islice(self.records(), 10))
        if not first:
            raise DatasetError(f"{shown} holds no rows")
        reasons = [reason for _, line in first if (reason := self._reason(line))]
        if len(reasons) == len(first) or _is_array(b"".join(line for _, line in first)):
            number, line = first[0]
            raise DatasetError(f"{shown}:{number}: no JSONL: {reasons[0]}. {self._way_out(line)}")

    def records(self) -> Iterator[tuple[int, bytes]]:
        with open(self._path, "rb", buffering=1 << 20) as file:
            if file.read(3) != codecs.BOM_UTF8:
                file.seek(0)
            for number, line in enumerate(file, 1):
                if not line.isspace():
                    yield number, line

    def fields(self, record: bytes) -> dict[str, Any]:
        try:
            value = orjson.loads(record)
            if _LONG_NUMBER in record.translate(_DIGITS):  # orjson rounds integers beyond 64 bits
                value = _loads_any(record)
        except orjson.JSONDecodeError:
            value = _loads_any(record)
        if type(value) is not dict:
            raise ValueError(f"{_JSON_TYPES[type(value)]}, not an object")
        return value

    def _reason(self, line: bytes) -> str | None:
        """Why a line is no row; None if it is one."""
        try:
            self.fields(line)
        except ValueError as error:
            return str(error)
        return None

    def _way_out(self, line: bytes) -> str:
        if line.lstrip().startswith(b"["):
            return "It looks like one JSON array: write one object per line (jq -c '.[]' rows.json > rows.jsonl)"
        if line.strip() == b"{":
            return "It looks like JSON over several lines: write one object per line (jq -c . rows.json > rows.jsonl)"
        if self.name.endswith((".csv", ".tsv")):
            return "dataset=csv reads CSV"
        return "Write one JSON object per line"


def _is_array(text: bytes) -> bool:
    """Whether a short file is one array. Written over several lines, its last object alone looks like a row."""
    try:
        return text.lstrip().startswith(b"[") and isinstance(orjson.loads(text), list)
    except orjson.JSONDecodeError:
        return False


_DIGITS = bytes(ord("0") if chr(byte).isdigit() and byte < 128 else ord(" ") for byte in range(256))
_LONG_NUMBER = b"0" * 19
_JSON_TYPES = {
    list: "an array",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "a boolean",
    type(None): "null",
}


def _loads_any(line: bytes) -> Any:
    """What the standard library makes of a line that orjson refuses or rounds.

    It keeps integers of any size and takes control characters as they are. What could not be written as JSON again
    (NaN, infinity, half a surrogate pair) is refused here too.
    """
    try:
        value = json.loads(line.decode(), strict=False, parse_constant=_refuse_constant)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeDecodeError as error:
        raise ValueError(f"no valid UTF-8: byte 0x{line[error.start]:02x} at position {error.start + 1}") from None
    except UnicodeEncodeError as error:
        raise ValueError(f"half a surrogate pair: {error.object[error.start]!a}") from None
    except json.JSONDecodeError as error:
        found = error.doc[error.pos :][:20].rstrip()
        where = f"column {error.colno}: {found!r}" if found else "the end of the line"
        raise ValueError(f"no valid JSON: {error.msg[:1].lower()}{error.msg[1:]} at {where}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"no valid JSON: {name}")


class Csv:
    """A header and one record a row, quoted as RFC 4180 says, in UTF-8. Every value is a string.

    Commas, semicolons or tabs separate the cells: whichever gives the header most of them. Blank lines are no rows.
    """

    def __init__(self, config: DatasetConfig) -> None:
        self._path, shown = _find_file(config)
        self.name = os.path.basename(self._path)
        headers = {delimiter: self._header(delimiter) for delimiter in ",;\t"}
        self._delimiter = max(headers, key=lambda delimiter: len(headers[delimiter]))
        self._names = headers[self._delimiter]
        if not self._names:
            raise DatasetError(f"{shown} holds no rows")
        if self._names[0].startswith("{"):
            raise DatasetError(f"{shown}: the header looks like JSON: dataset=jsonl reads one JSON object per line")
        for column, name in enumerate(self._names, 1):
            if not name:
                raise DatasetError(f"{shown}: column {column} has no name in the header")
            if self._names.index(name) < column - 1:
                raise DatasetError(f"{shown}: two columns of the header are named {name!r}")
            if not _is_utf8(name):
                raise DatasetError(f"{shown}: the header is no valid UTF-8: save the file as UTF-8")
        if next(self.records(), None) is None:
            raise DatasetError(f"{shown} holds no rows, only a header")

    def records(self) -> Iterator[tuple[int, list[str] | csv.Error]]:
        return islice(self._lines(self._delimiter), 1, None)

    def fields(self, record: list[str] | csv.Error) -> dict[str, Any]:
        if isinstance(record, csv.Error):
            cut = "unexpected end" in str(record)
            raise ValueError(f"no valid CSV: {'a quote is opened and never closed' if cut else record}")
        if len(record) != len(self._names):
            raise ValueError(f"{len(record)} cells, and the header has {len(self._names)}")
        if not _is_utf8("".join(record)):
            raise ValueError("no valid UTF-8: save the file as UTF-8")
        return dict(zip(self._names, record, strict=True))

    def _header(self, delimiter: str) -> list[str]:
        _, cells = next(self._lines(delimiter), (1, []))
        return [] if isinstance(cells, csv.Error) else [name.strip() for name in cells]

    def _lines(self, delimiter: str) -> Iterator[tuple[int, list[str] | csv.Error]]:
        csv.field_size_limit(max(csv.field_size_limit(), 1 << 26))  # 131,072 characters are less than many a prompt
        # A byte that is no UTF-8 becomes half a surrogate pair: the cell that holds it fails, not the file.
        with open(self._path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            while True:
                number = reader.line_num + 1
                try:
                    cells = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    yield number, error
                else:
                    if cells:
                        yield number, cells


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


_KINDS: dict[DatasetKind, type[Single] | type[Jsonl] | type[Csv]] = {
    DatasetKind.single: Single,
    DatasetKind.jsonl: Jsonl,
    DatasetKind.csv: Csv,
}


def _open(config: DatasetConfig) -> Dataset:
    kind = _KINDS.get(config.kind)
    if kind is None:
        known = ", ".join(kind.value for kind in _KINDS)
        raise ConfigError(f"dataset={config.kind.value} is not available yet: choose one of {known}")
    try:
        return kind(config)
    except OSError as error:
        raise _unreadable(str(config.path), error) from error


def _rows(dataset: Dataset, config: DatasetConfig) -> Iterator[Row]:
    indexes = count(config.shard.index, config.shard.count)
    name = dataset.name
    fields_of = dataset.fields
    try:
        for index, (number, record) in zip(indexes, _wanted(dataset, config), strict=False):
            source = f"{name}:{number}"
            try:
                fields = fields_of(record)
            except ValueError as error:
                yield Row(index=index, fields={}, source=source, error=RowError(f"{source}: {error}"))
            else:
                yield Row(index=index, fields=fields, source=source)
    except OSError as error:
        raise _unreadable(name, error) from error


def _wanted(dataset: Dataset, config: DatasetConfig) -> Iterator[tuple[int, Any]]:
    return islice(dataset.records(), config.shard.index, config.limit, config.shard.count)


def _unreadable(path: str, error: OSError) -> DatasetError:
    return DatasetError(f"{path} cannot be read: {error.strerror or error}")


_FOREIGN = {
    codecs.BOM_UTF16_LE: "is UTF-16: save it as UTF-8",
    codecs.BOM_UTF16_BE: "is UTF-16: save it as UTF-8",
    b"\x1f\x8b": "is compressed: unpack it first",
    b"PK\x03\x04": "is a ZIP archive or an Excel workbook: unpack it, or save it as CSV",
    b"PAR1\x15": "is Parquet, not text",
}


def _find_file(config: DatasetConfig) -> tuple[str, str]:
    """The path to open, and the path as the user wrote it."""
    if not config.path:
        raise ConfigError(
            f"dataset.path is not set: dataset={config.kind.value} reads a file,"
            f" for example dataset.path=rows.{config.kind.value}"
        )
    path = os.path.expanduser(config.path)
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: no path at all, it holds a NUL
        raise DatasetError(f"dataset.path={config.path}: there is no such file.{_suggestion(path)}") from None
    if stat.S_ISDIR(mode):
        raise DatasetError(f"dataset.path={config.path} is a folder: name one file in it")
    if not stat.S_ISREG(mode):
        raise DatasetError(f"dataset.path={config.path} is no regular file: a dataset is read more than once")
    with open(path, "rb") as file:
        start = file.read(8)
    for magic, what in _FOREIGN.items():
        if start.startswith(magic):
            raise DatasetError(f"{config.path} {what}")
    return path, config.path


def _suggestion(path: str) -> str:
    folder, name = os.path.split(path)
    try:
        near = difflib.get_close_matches(name, os.listdir(folder or os.curdir), n=3)
    except OSError:
        return f" There is no folder {folder!r} either" if not os.path.exists(folder) else ""
    return f" Did you mean {' or '.join(repr(os.path.join(folder, each)) for each in near)}?" if near else ""
