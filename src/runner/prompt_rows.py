"""The rows that `prompt_map` returns, in the forms that it offers, and in a database of their own."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from runner.errors import ConfigError, StoreError
from runner.extras import missing
from runner.private import make_private

DTYPES = ("list[dict]", "list[str]", "list[tuple[str,str]]", "polars")
SHAPES = ("original", "unique")

STORE_KIND = "prompt_map"
"""The fact ``kind`` of a store whose rows are prompts: their metadata are ``idx`` and ``prompt``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRow:
    """A prompt and what came of it."""

    idx: int  # in the list of prompts; of a unique one, where it comes first
    key: str  # identity of what was asked: equal for equal prompts
    prompt: str
    status: str  # done, or missing: there is no answer
    result: str | None  # None: missing
    error: str | None  # why it is missing

    def as_dict(self) -> dict[str, Any]:
        """The row as it is handed out; one without an answer has an ``error`` too, why there is none."""
        row = {
            "idx": self.idx,
            "key": self.key,
            "prompt": self.prompt,
            "status": self.status,
            "result": self.result,
        }
        return row if self.error is None else {**row, "error": self.error}


def check_form(return_dtype: str, output_shape: str) -> None:
    """See that `shaped` will be able to do as asked, before anything is paid for.

    Raises:
        ConfigError: It will not.
    """
    if return_dtype not in DTYPES:
        raise ConfigError(f"return_dtype={return_dtype!r}: choose one of {', '.join(DTYPES)}")
    if output_shape not in SHAPES:
        raise ConfigError(f"output_shape={output_shape!r}: choose one of {', '.join(SHAPES)}")
    if return_dtype == "polars" and find_spec("polars") is None:
        raise missing("return_dtype='polars'", "polars")


def shaped(rows: Sequence[PromptRow], return_dtype: str) -> Any:
    """The rows as a list of dictionaries, of results, of (prompt, result), or as a Polars frame."""
    if return_dtype == "list[str]":
        return [row.result for row in rows]
    if return_dtype == "list[tuple[str,str]]":
        return [(row.prompt, row.result) for row in rows]
    records = [row.as_dict() for row in rows]
    if return_dtype == "list[dict]":
        return records

    import polars

    text = polars.String
    schema = {"idx": polars.Int64, "key": text, "prompt": text, "status": text, "result": text}
    if any("error" in record for record in records):
        schema["error"] = text
    return polars.DataFrame(records, schema=schema)


def check_place(path: Path) -> None:
    """See that ``path`` holds nothing but what `write_rows` may replace, before anything is paid for.

    Raises:
        StoreError: It is no SQLite file, or somebody else's.
    """
    if not path.exists():
        return
    try:
        with closing(_connect(path)) as database:
            _check_ours(database, path)
    except (sqlite3.Error, OSError) as error:
        raise StoreError(f"{path}: the results cannot be written ({error}); name another results_db_url") from None


def write_rows(path: Path, rows: Sequence[PromptRow]) -> None:
    """Put ``rows`` into the table ``results`` of the SQLite file ``path``, in place of those that were there.

    Raises:
        StoreError: The file cannot be written, is no SQLite file, or somebody else's.
    """
    values = (
        tuple(
            each.encode("utf-8", "replace").decode() if isinstance(each, str) else each  # lone surrogates
            for each in (row.idx, row.key, row.prompt, row.status, row.result, row.error)
        )
        for row in rows
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        make_private(path)
        with closing(sqlite3.connect(path, isolation_level=None)) as database:
            database.execute("BEGIN IMMEDIATE")
            _check_ours(database, path)
            database.execute("DROP TABLE IF EXISTS results")
            database.execute(_RESULTS)
            database.executemany("INSERT INTO results VALUES (?, ?, ?, ?, ?, ?)", values)
            database.execute("COMMIT")
    except (sqlite3.Error, OSError) as error:
        raise StoreError(f"{path}: the results cannot be written ({error}); name another results_db_url") from None


def holds_rows(path: Path) -> bool:
    """Whether ``path`` is what `write_rows` has written."""
    try:
        with closing(_connect(path)) as database:
            return bool(database.execute("SELECT 1 FROM sqlite_master WHERE name = 'results'").fetchall())
    except sqlite3.Error:
        return False


def read_rows(path: Path) -> Iterator[PromptRow]:
    """The rows that `write_rows` has put into ``path``.

    Raises:
        StoreError: There are none.
    """
    try:
        with closing(_connect(path)) as database:
            sql = "SELECT idx, key, prompt, status, result, error FROM results ORDER BY idx"
            for idx, key, prompt, status, result, error in database.execute(sql):
                yield PromptRow(idx=idx, key=key, prompt=prompt, status=status, result=result, error=error)
    except sqlite3.Error as failure:
        raise StoreError(f"{path} holds no results of prompt_map ({failure})") from None


def _check_ours(database: sqlite3.Connection, path: Path) -> None:
    tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    columns = {name for _, name, *_ in database.execute("PRAGMA table_info(results)")}
    if tables - {"results"} or (tables and _ESSENTIAL - columns):
        raise StoreError(f"{path} holds other tables than prompt_map's results: name another results_db_url")


def _connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)


_ESSENTIAL = {"idx", "key", "prompt", "status", "result"}
"""Columns that results have had in every version."""

_RESULTS = """
    CREATE TABLE results (
        idx    INTEGER PRIMARY KEY,
        key    TEXT NOT NULL,
        prompt TEXT NOT NULL,
        status TEXT NOT NULL,
        result TEXT,
        error  TEXT
    )
"""
