"""Parquet: a table by columns, read a row group at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from runner.config import DatasetConfig
from runner.dataset import arrow
from runner.dataset.paths import find_file
from runner.errors import DatasetError
from runner.extras import missing

if TYPE_CHECKING:
    import pyarrow.parquet as pq

_BATCH = 1024
"""Rows converted at a time."""


class Parquet:
    """A Parquet file. What its types become: `runner.dataset.arrow`."""

    def __init__(self, config: DatasetConfig) -> None:
        self._path, self._shown = find_file(config)
        self.name = os.path.basename(self._path)
        if not self.count():
            raise DatasetError(f"{self._shown} holds no rows")

    def records(self) -> Iterator[tuple[int, arrow.Record]]:
        from pyarrow import ArrowException

        with self._file() as file:
            try:
                yield from arrow.records(file.iter_batches(batch_size=_BATCH))
            except ArrowException as error:
                raise DatasetError(f"{self._shown} is damaged ({error})") from None

    def count(self) -> int:
        with self._file() as file:
            return int(file.metadata.num_rows)

    def fields(self, record: arrow.Record) -> dict[str, Any]:
        return arrow.fields(record)

    def _file(self) -> pq.ParquetFile:
        try:
            from pyarrow import ArrowException
            from pyarrow.parquet import ParquetFile
        except ImportError:
            raise missing("dataset=parquet", "parquet") from None
        try:
            return ParquetFile(self._path)
        except ArrowException as error:
            raise DatasetError(f"{self._shown} is no Parquet file, or not a whole one ({error})") from None
