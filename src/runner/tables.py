"""Result rows as files: lines of JSON, or flat tables in CSV and Parquet. A row at a time, in constant memory."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, BinaryIO, Protocol

import orjson

from runner.errors import StoreError
from runner.extras import missing

COLUMNS = {
    "run": "text",
    "_index": "integer",
    "_sample": "integer",
    "output_text": "text",
    "output_parsed": "json",
    "embedding": "vector",
    "text": "text",
    "language": "text",
    "duration_s": "number",
    "reasoning": "text",
    "tool_calls": "json",
    "choices": "json",
    "finish_reason": "text",
    "prompt_tokens": "integer",
    "completion_tokens": "integer",
    "total_tokens": "integer",
    "reasoning_tokens": "integer",
    "cached_tokens": "integer",
    "request_id": "text",
    "model_id": "text",
    "reused_from": "text",
    "deduplicated_from": "integer",
    "error_type": "text",
    "error_message": "text",
    "error_status": "integer",
    "metadata": "json",
    "scores": "json",
    "queue_wait_s": "number",
    "service_time_s": "number",
    "end_to_end_s": "number",
    "deployment": "text",
    "retries": "integer",
    "cost_usd": "number",
    "ttft_s": "number",
}
"""The columns of a table, in their order, and what is in them. What a row has beside them is JSON, in columns after."""

RECORDS = {
    "token_usage": [name for name in COLUMNS if name.endswith("_tokens")],
    "error": [name for name in COLUMNS if name.startswith("error_")],
    "metrics": list(COLUMNS)[list(COLUMNS).index("queue_wait_s") :],
}
"""Fields of a row that are records, and the columns of what is in them."""

_PLAIN = (str, int, float, bool)
"""What stands in a cell as it is."""

_RARE = frozenset(
    {
        *("run", "_sample", "embedding", "text", "language", "duration_s", "reasoning", "choices"),
        *("reused_from", "deduplicated_from"),
    }
)
"""Columns that a table without rows goes without."""

_ROW_GROUP = 10_000
"""Rows in one row group of a Parquet file, at most."""

_ROW_GROUP_SIZE = 16_000_000
"""Characters and numbers in one row group, at most, save for its last row."""

# https://owasp.org/www-community/attacks/CSV_Injection
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


class Writer(Protocol):
    """Writes result rows to a binary file, which stays open."""

    def write(self, row: Mapping[str, Any]) -> None: ...

    def close(self) -> None:
        """Write what is left."""
        ...


class Columns:
    """The columns of a table: which they are, and a row's values in their order.

    Args:
        fields: The fields that there are in some row. None at all: the usual columns.
        spread: Fields that are objects, each with the keys that get columns of their own, as in ``metadata.id``. The
            others stay JSON in one column.
    """

    def __init__(self, fields: Iterable[str], *, spread: Mapping[str, Sequence[str]] | None = None) -> None:
        self._fields = frozenset(fields)
        self._spread = {field: frozenset(keys) for field, keys in (spread or {}).items() if field in self._fields}
        names = {name for field in self._fields for name in RECORDS.get(field, [field])}
        known = [name for name in COLUMNS if (name in names if names else name not in _RARE)]
        self.names = []
        for name in known + sorted(names - COLUMNS.keys()):
            spread_over = (spread or {}).get(name) if name in self._spread else None
            self.names += [name] if spread_over is None else [f"{name}.{key}" for key in spread_over]
        self.kinds = [COLUMNS.get(name, "json") for name in self.names]
        self._json = [name for name, kind in zip(self.names, self.kinds, strict=True) if kind == "json"]
        self._details = [name for name in self.names if name in _RARE and name not in self._json]

    def values(self, row: Mapping[str, Any]) -> list[Any]:
        """The values of ``row``, as `COLUMNS` says; JSON is a text.

        Raises:
            StoreError: The row has a field that there was none of when the columns were chosen.
        """
        self._expect(row.keys() - self._fields)
        values = dict(row)
        for field, keys in self._spread.items():
            record = orjson.loads(orjson.dumps(values.pop(field, None))) or {}
            self._expect({f"{field}.{key}" for key in record.keys() - keys})
            values |= {f"{field}.{key}": value for key, value in record.items()}
        values.update(values.pop("token_usage", None) or {})
        values.update(values.pop("metrics", None) or {})
        for name, value in (values.pop("error", None) or {}).items():
            values[f"error_{name}"] = value
        for name in self._json:
            if (value := values.get(name)) is not None and not ("." in name and isinstance(value, _PLAIN)):
                values[name] = orjson.dumps(value).decode()
        for name in self._details:
            if isinstance(value := values.get(name), orjson.Fragment):
                values[name] = orjson.loads(orjson.dumps(value))
        return list(map(values.get, self.names))

    def _expect(self, new: Set[str]) -> None:
        if new:
            raise StoreError(f"the run goes on and has got new columns ({', '.join(sorted(new))}): export again")


class JsonLines:
    """A `Writer` of a row a line, as it is."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, row: Mapping[str, Any]) -> None:
        self._file.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))

    def close(self) -> None:
        pass


class Csv:
    """A `Writer` of a table as text: RFC 4180 in UTF-8, a header, nothing for null.

    Models and servers are not to be trusted: a text that a spreadsheet would take for a formula gets an apostrophe
    before it.
    """

    def __init__(self, file: BinaryIO, columns: Columns) -> None:
        self._columns = columns
        self._writer = csv.writer(
            _Utf8(file)
        )  # ends lines as RFC 4180 does; with others, it would not quote all breaks
        self._writer.writerow(columns.names)

    def write(self, row: Mapping[str, Any]) -> None:
        self._writer.writerow(map(_cell, self._columns.values(row)))

    def close(self) -> None:
        pass


class Parquet:
    """A `Writer` of a typed table, in row groups; an embedding is a list of numbers.

    Raises:
        ConfigError: pyarrow is not installed.
    """

    def __init__(self, file: BinaryIO, columns: Columns) -> None:
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError:
            raise missing("--format parquet", "parquet") from None
        types = {
            "text": pyarrow.string(),
            "json": pyarrow.string(),
            "integer": pyarrow.int64(),
            "number": pyarrow.float64(),
            "vector": pyarrow.list_(pyarrow.float64()),
        }
        self._pyarrow = pyarrow
        self._columns = columns
        self._schema = pyarrow.schema(
            [(name, types[kind]) for name, kind in zip(columns.names, columns.kinds, strict=True)]
        )
        self._writer = parquet.ParquetWriter(file, self._schema, compression="zstd")
        self._rows: list[Sequence[Any]] = []
        self._size = 0

    def write(self, row: Mapping[str, Any]) -> None:
        values = self._columns.values(row)
        self._rows.append(values)
        self._size += sum(len(value) for value in values if isinstance(value, str | list))
        if len(self._rows) >= _ROW_GROUP or self._size >= _ROW_GROUP_SIZE:
            self._write_group()

    def close(self) -> None:
        if self._rows:
            self._write_group()
        self._writer.close()

    def _write_group(self) -> None:
        columns = zip(self._schema, zip(*self._rows, strict=True), strict=True)
        arrays = [self._pyarrow.array(values, field.type) for field, values in columns]
        self._writer.write_batch(self._pyarrow.record_batch(arrays, schema=self._schema))
        self._rows.clear()
        self._size = 0


class _Utf8:
    """The face of a text file that the csv module writes to."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, text: str) -> None:
        self._file.write(text.encode())


def _cell(value: Any) -> Any:
    if isinstance(value, str):
        return f"'{value}" if value.startswith(_FORMULA) else value
    return orjson.dumps(value).decode() if isinstance(value, list) else value
