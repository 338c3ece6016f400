"""CSV and its relatives: a header, and one record a row."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from itertools import islice
from typing import Any

from runner.config import DatasetConfig
from runner.dataset.paths import find_text
from runner.errors import DatasetError


class Csv:
    """A header and one record a row, quoted as RFC 4180 says, in UTF-8. Every value is a string.

    Commas, semicolons or tabs separate the cells: whichever gives the header most of them. Blank lines are no rows.
    """

    def __init__(self, config: DatasetConfig) -> None:
        self._path, shown = find_text(config)
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

    def count(self) -> int:
        return sum(1 for _ in self.records())

    def fields(self, record: list[str] | csv.Error) -> dict[str, Any]:
        if isinstance(record, csv.Error):
            cut = "unexpected end" in str(record)
            raise ValueError(f"no valid CSV: {_OPEN_QUOTE if cut else record}")
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


_OPEN_QUOTE = "a quote is opened and never closed, so all that follows is taken for this row"


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
