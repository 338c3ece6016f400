"""JSONL: one JSON object a line."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any

import orjson

from runner.config import DatasetConfig
from runner.dataset.paths import find_text
from runner.errors import DatasetError


class Jsonl:
    """One JSON object a line, in UTF-8. Blank lines are no rows."""

    def __init__(self, config: DatasetConfig) -> None:
        self._path, shown = find_text(config)
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
            lines = iter(partial(file.readline, _LONGEST_LINE), b"")
            for number, line in enumerate(lines, 1):
                if _is_cut(line):
                    next((rest for rest in lines if rest.endswith(b"\n")), None)
                if not line.isspace():
                    yield number, line

    def count(self) -> int:
        return sum(1 for _ in self.records())

    def fields(self, record: bytes) -> dict[str, Any]:
        if _is_cut(record):
            raise ValueError(f"the line is longer than {_LONGEST_LINE >> 20} MiB")
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


_LONGEST_LINE = 128 * 2**20
"""A longer line fails alone: no row is so long, but a file of another kind may be one line, larger than the memory."""


def _is_cut(line: bytes) -> bool:
    return len(line) == _LONGEST_LINE and not line.endswith(b"\n")


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
        what = f"{error.msg[:1].lower()}{error.msg[1:]}".removesuffix(" at")
        raise ValueError(f"no valid JSON: {what} at {where}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"no valid JSON: {name}")
