"""Hugging Face's datasets: of the Hub, of a local folder or file, or saved by the library."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from runner.config import DatasetConfig
from runner.dataset import arrow
from runner.dataset.paths import expanded
from runner.errors import DatasetError
from runner.extras import missing

_BATCH = 256
"""Rows converted at a time."""


class HuggingFace:
    """A split of a dataset, read in Arrow's form: images and audio stay the bytes and paths that they are stored as.

    What the types become: `runner.dataset.arrow`.
    """

    def __init__(self, config: DatasetConfig) -> None:
        path = expanded(config, example="openai/gsm8k dataset.name=main dataset.split=test")
        self.name = f"{os.path.basename(path.rstrip('/'))}[{config.split}]" if config.split else path
        self._path = path
        self._rows = _load(path, config.name, config.split, config.streaming).with_format("arrow")
        if next(self.records(), None) is None:
            raise DatasetError(f"dataset.path={config.path} holds no rows")

    def records(self) -> Iterator[tuple[int, arrow.Record]]:
        try:
            yield from arrow.records(self._rows.iter(batch_size=_BATCH))
        except Exception as error:  # whatever the library, a file or the network came across
            raise _failed(self._path, error) from error

    def count(self) -> int | None:
        return len(self._rows) if hasattr(self._rows, "__len__") else None

    def fields(self, record: arrow.Record) -> dict[str, Any]:
        return arrow.fields(record)


@lru_cache(maxsize=1)
def _load(path: str, name: str | None, split: str | None, streaming: bool) -> Any:
    """The split, loaded once for the passes over it."""
    try:
        import datasets
    except ImportError:
        raise missing("dataset=huggingface", "huggingface") from None
    saved = any(os.path.isfile(os.path.join(path, mark)) for mark in ("state.json", "dataset_dict.json"))
    try:
        if saved:
            found = datasets.load_from_disk(path)
        else:
            found = datasets.load_dataset(path, name, split=split, streaming=streaming)
    except Exception as error:
        raise _failed(path, error) from None
    if split is not None and not saved:
        return found
    splits = found if isinstance(found, Mapping) else {str(found.split): found}
    if split is None and len(splits) == 1:
        return next(iter(splits.values()))
    if split in splits:
        return splits[split]
    wrong = "is not set" if split is None else f"{split} does not exist"
    raise DatasetError(f"dataset.split {wrong}: {path} has the splits {', '.join(map(str, splits))}")


def _failed(path: str, error: Exception) -> DatasetError:
    return DatasetError(f"dataset.path={path}: {type(error).__name__}: {' '.join(str(error).split())[:500]}")
