"""Where the rows come from.

A dataset is a sequence of rows, each a dictionary of fields with a place that a message can name. It is checked when
it is opened and read as it is consumed, so its size is bounded by the disk alone.

A format is a small class that says where the records are and what one of them holds. Which rows are wanted, their
positions, and what becomes of a row that cannot be read are settled once, above the formats.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, Protocol

from runner.config import DatasetConfig, DatasetKind
from runner.dataset.delimited import Csv
from runner.dataset.files import Files
from runner.dataset.function import Function
from runner.dataset.huggingface import HuggingFace
from runner.dataset.jsonl import Jsonl
from runner.dataset.parquet import Parquet
from runner.dataset.single import Single
from runner.errors import DatasetError, RowError


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of a dataset."""

    index: int  # position in the whole dataset, from 0, whatever limit and shard leave out
    fields: dict[str, Any]  # {} where the row could not be read
    source: str  # its place: rows.jsonl:17
    error: RowError | None = None  # why it could not be read


def open_dataset(config: DatasetConfig, *, suffixes: Collection[str] | None = None) -> Iterator[Row]:
    """The rows that ``limit`` and ``shard`` leave, read as they are asked for.

    ``limit`` takes the first rows of the dataset, ``shard`` those of them whose index modulo ``count`` is its own.
    A row that cannot be read is a row with an error, and the next one is not affected.

    Args:
        config: Describes the dataset.
        suffixes: With ``dataset=files``, those of the files that are wanted of a folder or a glob. None: all are.

    Raises:
        ConfigError: The dataset is not described fully, or the library that reads it is not installed.
        DatasetError: The file is missing, empty, or in another format. Raised here, before the first row, except
            where reading fails half-way.
    """
    return _rows(_open(config, suffixes), config)


def count_rows(config: DatasetConfig, *, suffixes: Collection[str] | None = None) -> int | None:
    """How many rows `open_dataset` gives, without parsing them. None: not to be known without reading it all.

    Raises:
        ConfigError, DatasetError: As `open_dataset`.
    """
    dataset = _open(config, suffixes)
    try:
        whole = dataset.count()
    except OSError as error:
        raise _unreadable(dataset.name, error) from error
    if whole is None:
        return None
    wanted = whole if config.limit is None else min(whole, config.limit)
    return len(range(config.shard.index, wanted, config.shard.count))


def media_folder(config: DatasetConfig) -> str:
    """Where the relative paths in rows lead from: the folder of the dataset's file, or the working directory."""
    if config.kind in (DatasetKind.jsonl, DatasetKind.csv, DatasetKind.parquet):
        return os.path.dirname(os.path.expanduser(config.path or ""))
    return ""


class Dataset(Protocol):
    """One way to store rows. Making one checks that it is there and in this format."""

    name: str
    """The first half of a row's source."""

    def records(self) -> Iterator[tuple[int, Any]]:
        """Every record with the number that tells its place, unparsed. Each call starts at the first."""
        ...

    def count(self) -> int | None:
        """How many records there are; None where only reading them all would tell."""
        ...

    def fields(self, record: Any) -> dict[str, Any]:
        """What a record says.

        Raises:
            ValueError: It cannot be read; the text says why.
        """
        ...


_KINDS: Mapping[DatasetKind, Callable[[DatasetConfig], Dataset]] = {
    DatasetKind.single: Single,
    DatasetKind.jsonl: Jsonl,
    DatasetKind.csv: Csv,
    DatasetKind.parquet: Parquet,
    DatasetKind.huggingface: HuggingFace,
    DatasetKind.python: Function,
}


def _open(config: DatasetConfig, suffixes: Collection[str] | None) -> Dataset:
    try:
        if config.kind is DatasetKind.files:
            return Files(config, suffixes=suffixes)
        return _KINDS[config.kind](config)
    except OSError as error:
        raise _unreadable(str(config.path), error) from error


def _rows(dataset: Dataset, config: DatasetConfig) -> Iterator[Row]:
    indexes = count(config.shard.index, config.shard.count)
    name = dataset.name
    fields_of = dataset.fields
    wanted = islice(dataset.records(), config.shard.index, config.limit, config.shard.count)
    try:
        for index, (number, record) in zip(indexes, wanted, strict=False):
            source = f"{name}:{number}"
            try:
                fields = fields_of(record)
            except ValueError as error:
                yield Row(index=index, fields={}, source=source, error=RowError(f"{source}: {error}"))
            else:
                yield Row(index=index, fields=fields, source=source)
    except OSError as error:
        raise _unreadable(name, error) from error


def _unreadable(path: str, error: OSError) -> DatasetError:
    return DatasetError(f"{path} cannot be read: {error.strerror or error}")
