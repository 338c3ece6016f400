"""Files as rows: recordings, pictures, texts."""

from __future__ import annotations

import glob
import os
from collections.abc import Collection, Iterator
from typing import Any

from runner.config import DatasetConfig
from runner.dataset.paths import expanded, suggestion
from runner.errors import DatasetError


class Files:
    """A row for each file that a path, a glob (``**`` for any depth) or a folder, with all below it, names.

    In the order of their paths, hidden ones left out; their contents are read by whoever asks for them. A folder's
    links to folders are followed, each folder once, so that one that leads back to itself has an end. The fields:
    ``path`` as the pattern leads to it, ``name``, ``stem``, ``suffix`` (lower case, with its dot), ``size`` in bytes.

    Args:
        config: Names them.
        suffixes: Those of the files that are wanted, however many others a folder or a glob leads to. None: all are.
    """

    def __init__(self, config: DatasetConfig, *, suffixes: Collection[str] | None = None) -> None:
        pattern = expanded(config, example="'recordings/**/*.wav'")
        self.name = os.path.basename(pattern.rstrip("/")) or pattern
        self._pattern = pattern
        self._is_folder = os.path.isdir(pattern)
        self._suffixes: Collection[str] | None = None
        if not self._is_folder and os.path.exists(pattern):
            self._pattern = glob.escape(pattern)
        else:
            self._suffixes = suffixes
        if not self._paths():
            if any(map(os.path.isfile, self._found())):
                raise DatasetError(f"dataset.path={config.path}: no file there ends with {', '.join(suffixes or ())}")
            if os.path.isdir(pattern):
                raise DatasetError(f"dataset.path={config.path}: this folder holds no files")
            hint = "" if glob.has_magic(pattern) else suggestion(pattern)
            raise DatasetError(f"dataset.path={config.path}: there is no such file.{hint}")

    def records(self) -> Iterator[tuple[int, str]]:
        return iter(enumerate(self._paths(), 1))

    def count(self) -> int:
        return len(self._paths())

    def fields(self, record: str) -> dict[str, Any]:
        name = os.path.basename(record)
        stem, suffix = os.path.splitext(name)
        try:
            size = os.stat(record).st_size
        except OSError as error:
            raise ValueError(f"{record}: {error.strerror}") from None
        return {"path": record, "name": name, "stem": stem, "suffix": suffix.lower(), "size": size}

    def _paths(self) -> list[str]:
        """In order, so that a row keeps its place; names are all that is held."""
        return sorted(path for path in self._found() if self._is_wanted(path) and os.path.isfile(path))

    def _found(self) -> Iterator[str]:
        return _below(self._pattern) if self._is_folder else glob.iglob(self._pattern, recursive=True)

    def _is_wanted(self, path: str) -> bool:
        return self._suffixes is None or os.path.splitext(path)[1].lower() in self._suffixes


def _below(folder: str) -> Iterator[str]:
    seen = {os.path.realpath(folder)}
    for here, folders, names in os.walk(folder, followlinks=True):
        wanted = []
        for name in sorted(each for each in folders if not each.startswith(".")):
            if (place := os.path.realpath(os.path.join(here, name))) not in seen:
                seen.add(place)
                wanted.append(name)
        folders[:] = wanted
        yield from (os.path.join(here, name) for name in names if not name.startswith("."))
