"""The database file: locked for one process, checked before it is used, its errors told in our words."""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import resources
from pathlib import Path
from typing import IO

import aiosqlite

from runner.errors import StoreError

SCHEMA_VERSION = 1
APPLICATION_ID = 0x52554E52  # "RUNR": tells our files from other SQLite files

RUN_DATABASE = "results.sqlite"
"""What the database in a run's folder is called."""

_HEADER_SIZE = 100
"""Bytes that every SQLite file begins with, at least."""


def lock_folder(path: Path) -> IO[str]:
    """Hold the run's folder for this process; the lock goes with the process, however it ends.

    A run has its folder to itself; a database of another name shares it, and is held alone.
    """
    held, name = (path.parent, ".lock") if path.name == RUN_DATABASE else (path, f".{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = (path.parent / name).open("a+", encoding="utf-8")
    except OSError as error:
        raise StoreError(f"{path.parent}: cannot write there ({error.strerror}); choose another runs_dir") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        holder = file.read().strip()
        file.close()
        raise StoreError(
            f"{held} is in use by another process{f' ({holder})' if holder else ''}: wait for it to end,"
            " or give this run another name=…"
        ) from None
    file.truncate(0)
    file.write(f"pid {os.getpid()}")
    file.flush()
    return file


async def connect(path: Path, *, readonly: bool = False) -> aiosqlite.Connection:
    """Open the file, check that it is ours, and lay the schema where it is new."""
    _look_at(path, readonly=readonly)
    async with translated(path):
        uri = f"{path.absolute().as_uri()}?mode={'ro' if readonly else 'rwc'}"
        # Opened here and not by aiosqlite, which would leave its thread behind where this fails.
        opened = sqlite3.connect(uri, uri=True, isolation_level="IMMEDIATE", check_same_thread=False)
        database = await aiosqlite.Connection(lambda: opened, iter_chunk_size=64)
        try:
            database.row_factory = sqlite3.Row
            await _check_or_create(database, path, readonly=readonly)
        except BaseException:
            await database.close()
            raise
        return database


def _look_at(path: Path, *, readonly: bool) -> None:
    """Refuse what SQLite would take for something else, or fail over with fewer words."""
    if not path.exists():
        return
    if path.is_dir() or not os.access(path, os.R_OK if readonly else os.R_OK | os.W_OK):
        raise StoreError(f"{path} cannot be opened{'' if readonly else ' for writing'}: check the folder's permissions")
    if 0 < path.stat().st_size < _HEADER_SIZE:  # SQLite would take it for an empty database
        raise StoreError(f"{path} is no database: move it away to start anew")


async def _check_or_create(database: aiosqlite.Connection, path: Path, *, readonly: bool) -> None:
    application = await _number(database, "PRAGMA application_id")
    version = await _number(database, "PRAGMA user_version")
    tables = await _number(database, "SELECT count(*) FROM sqlite_master")
    if application == 0 and tables == 0 and not readonly:
        schema = resources.files("runner").joinpath("schema.sql").read_text(encoding="utf-8")
        await database.execute_fetchall("PRAGMA journal_mode = WAL")
        await database.executescript(
            f"BEGIN; {schema} PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"
        )
    elif application != APPLICATION_ID:
        raise StoreError(f"{path} is no results database of runner; nothing was changed in it")
    elif version != SCHEMA_VERSION:
        raise StoreError(
            f"{path} has schema version {version}, this program reads version {SCHEMA_VERSION}: use the version of"
            " runner that made it, or start a new run with another name=…"
        )
    for pragma in ("synchronous = NORMAL", "cache_size = -8192", "temp_store = MEMORY", "busy_timeout = 10000"):
        await database.execute_fetchall(f"PRAGMA {pragma}")


async def _number(database: aiosqlite.Connection, sql: str) -> int:
    async with database.execute(sql) as cursor:
        row = await cursor.fetchone()
    return int(row[0]) if row else 0


@asynccontextmanager
async def translated(path: Path) -> AsyncIterator[None]:
    """SQLite's errors as ours, with the file and the way out."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        text = str(error)
        if "full" in text:
            hint = f"the disk that holds {path.parent} is full: make room, and the same command goes on"
        elif "readonly" in text or "unable to open" in text:
            hint = f"{path} cannot be opened for writing ({text}): check the folder's permissions"
        elif "malformed" in text or "not a database" in text:
            hint = f"{path} is damaged or no database ({text}): move it away to start anew"
        else:
            hint = f"{path}: {text}"
        raise StoreError(hint) from error
