"""Arrow's tables as rows: what Parquet and Hugging Face's datasets have in common."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Iterator, Mapping
from datetime import date, time, timedelta
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import pyarrow as pa

Record: TypeAlias = "tuple[pa.RecordBatch | pa.Table, int]"
"""A batch, and the row in it."""


def records(batches: Iterable[pa.RecordBatch | pa.Table]) -> Iterator[tuple[int, Record]]:
    """The rows of ``batches``, numbered from 1, none of them converted yet."""
    number = 0
    for batch in batches:
        for place in range(batch.num_rows):
            number += 1
            yield number, (batch, place)


def fields(record: Record) -> dict[str, Any]:
    """One row as JSON has it.

    Dates and times are texts in ISO 8601, durations seconds, decimals texts with all their digits, bytes base64, maps
    objects; NaN and infinity, which JSON lacks, are null.

    Raises:
        ValueError: A value has no such form.
    """
    batch, place = record
    return {name: _plain(column[place].as_py()) for name, column in zip(batch.schema.names, batch.columns, strict=True)}


def _plain(value: Any) -> Any:
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else None
        case date() | time():  # a datetime is a date
            return value.isoformat()
        case timedelta():
            return value.total_seconds()
        case bytes():
            return base64.b64encode(value).decode()
        case Mapping():
            return {str(key): _plain(each) for key, each in value.items()}
        case [tuple(), *_]:  # a map's entries
            return {str(key): _plain(each) for key, each in value}
        case list():
            return [_plain(each) for each in value]
        case _:
            return str(value)
