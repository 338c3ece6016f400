"""The database file: locked for one process, checked and migrated before it is used, its errors told in our words."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import sqlite3
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from importlib import resources
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from runner.errors import StoreError
from runner.private import check_folder, make_private, open_private

T = TypeVar("T")

Parameters = Sequence[Any] | Mapping[str, Any]
"""What stands for the ``?`` of a statement, or for its ``:names``."""

SCHEMA_VERSION = 4
APPLICATION_ID = 0x52554E52  # "RUNR": tells our files from other SQLite files

PATIENCE_S = 10.0
"""How long to wait for another program that has the file to itself."""
RUN_DATABASE = "results.sqlite"
"""What the database in a run's folder is called."""

_HEADER_SIZE = 100
"""Bytes that every SQLite file begins with, at least."""


def lock_folder(path: Path) -> BinaryIO:
    """Hold the run's folder for this process; the lock goes with the process, however it ends.

    A run has its folder to itself; a database of another name shares it, and is held alone.
    """
    held, name = (path.parent, ".lock") if path.name == RUN_DATABASE else (path, f".{path.name}.lock")
    if path.name == RUN_DATABASE:
        check_folder(path.parent)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open_private(path.parent / name, "a+")
    except OSError as error:
        raise StoreError(f"{path.parent}: cannot write there ({error.strerror}): {_way_out(path, error)}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        holder = file.read().decode("utf-8", "replace").strip()
        file.close()
        raise StoreError(
            f"{held} is in use by another process{f' ({holder})' if holder else ''}: wait for it to end,"
            " or give this run another name=…"
        ) from None
    with suppress(OSError):  # on a full disk, the holder stays unnamed
        os.ftruncate(file.fileno(), 0)
        os.pwrite(file.fileno(), f"pid {os.getpid()}".encode(), 0)
    return file


def is_locked(path: Path) -> bool:
    """Whether a process that this host can know of holds the folder of a run's database ``path``."""
    try:
        with (path.parent / ".lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


class Database:
    """The open file: one connection on one thread of its own, where transactions are run whole, one at a time.

    Every error of SQLite is a `StoreError`.
    """

    def __init__(self, connection: sqlite3.Connection, thread: ThreadPoolExecutor, path: Path) -> None:
        self.path = path
        self._connection = connection
        self._thread = thread

    @classmethod
    async def open(cls, path: Path, *, readonly: bool = False, patience_s: float = PATIENCE_S) -> Database:
        """Open the file, check that it is ours, lay the schema where it is new, and bring an older one up to date.

        A new file, and those that SQLite lays beside it, can be read by its owner only: there are answers in it.
        """
        _look_at(path, readonly=readonly)
        if not readonly:
            _make(path)
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sqlite")
        try:
            opened = partial(_open, path, readonly=readonly, patience_s=patience_s)
            return cls(await asyncio.get_running_loop().run_in_executor(thread, opened), thread, path)
        except BaseException:
            thread.shutdown(wait=False)
            raise

    async def aclose(self) -> None:
        try:
            await self._in_thread(self._connection.close)
        finally:
            self._thread.shutdown(wait=False)

    async def transact(self, work: Callable[[Statements], T]) -> T:
        """All that ``work`` does, in the thread, or nothing. Where this is cancelled, it may be either.

        A transaction goes to the thread and comes back once, whatever it consists of: each way costs the event loop's
        thread some turns of the GIL.
        """
        return await self._in_thread(partial(self._transact, work))

    async def fetch(self, sql: str, parameters: Parameters = ()) -> list[sqlite3.Row]:
        return await self._in_thread(partial(Statements(self._connection).fetch, sql, parameters))

    async def rows(self, sql: str, parameters: Parameters = ()) -> AsyncGenerator[sqlite3.Row, None]:
        """The rows of a SELECT, a chunk in memory at a time."""
        cursor = await self._in_thread(partial(self._connection.execute, sql, parameters))
        try:
            while rows := await self._in_thread(partial(cursor.fetchmany, _CHUNK)):
                for row in rows:
                    yield row
        finally:
            await self._in_thread(cursor.close)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        with translated(self.path):
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _transact(self, work: Callable[[Statements], T]) -> T:
        try:
            done = work(Statements(self._connection))  # the first write begins the transaction
            self._connection.commit()
        except BaseException:
            self._connection.rollback()
            raise
        return done


class Statements:
    """What a transaction consists of. Belongs to the database's thread."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def fetch(self, sql: str, parameters: Parameters = ()) -> list[sqlite3.Row]:
        return self._connection.execute(sql, parameters).fetchall()

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> int:
        """Execute a statement; returns the id of the row that it inserted."""
        return self._connection.execute(sql, parameters).lastrowid or 0

    def executemany(self, sql: str, rows: Iterable[Sequence[Any]]) -> None:
        self._connection.executemany(sql, rows)

    def insert(self, into: str, rows: Sequence[Sequence[Any]]) -> None:
        """Insert many rows with few statements: each one costs the event loop's thread two turns of the GIL.

        They take a power of two of the rows each, so that there are few to be compiled and kept.
        """
        columns = len(rows[0])
        mark = f"({', '.join('?' * columns)})"
        most = max(1, _VALUES // columns)
        start = 0
        while left := len(rows) - start:
            size = 1 << (min(left, most).bit_length() - 1)
            block = rows[start : start + size]
            self.execute(f"{into} VALUES {', '.join([mark] * size)}", list(chain.from_iterable(block)))
            start += size


_VALUES = 2048
"""Values in one INSERT, at most."""

_STATEMENTS = 128
"""Statements that are kept compiled, which takes up to 100 KB for the larger ones."""

_CHUNK = 1000
"""Rows read at a time where they are streamed."""


def _look_at(path: Path, *, readonly: bool) -> None:
    """Refuse what SQLite would take for something else, or fail over with fewer words."""
    if not path.exists():
        return
    if path.is_dir() or not os.access(path, os.R_OK if readonly else os.R_OK | os.W_OK):
        raise StoreError(f"{path} cannot be opened{'' if readonly else ' for writing'}: {_OTHER_FOLDER}")
    if 0 < path.stat().st_size < _HEADER_SIZE:  # SQLite would take it for an empty database
        raise StoreError(f"{path} is no database: move it away to start anew")


def _mode(path: Path) -> str:
    """How to open a file to read it. Where nothing can be laid beside it, nobody can be writing it either."""
    is_still = not os.access(path.parent, os.W_OK) and not path.with_name(f"{path.name}-wal").exists()
    return "mode=ro&immutable=1" if is_still else "mode=ro"


def _make(path: Path) -> None:
    try:
        make_private(path)
    except OSError as error:
        raise StoreError(f"{path} cannot be made ({error.strerror}): {_way_out(path, error)}") from None


def _open(path: Path, *, readonly: bool, patience_s: float) -> sqlite3.Connection:
    with translated(path):
        connection = sqlite3.connect(
            f"{path.absolute().as_uri()}?{_mode(path) if readonly else 'mode=rwc'}",
            uri=True,
            timeout=patience_s,
            isolation_level="IMMEDIATE",
            check_same_thread=False,
            cached_statements=_STATEMENTS,
        )
        try:
            connection.row_factory = sqlite3.Row
            _check_or_create(connection, path, readonly=readonly)
        except BaseException:
            connection.close()
            raise
    return connection


def _check_or_create(database: sqlite3.Connection, path: Path, *, readonly: bool) -> None:
    application = _number(database, "PRAGMA application_id")
    version = _number(database, "PRAGMA user_version")
    tables = _number(database, "SELECT count(*) FROM sqlite_master")
    if application == 0 and tables == 0 and not readonly:
        schema = resources.files("runner").joinpath("schema.sql").read_text(encoding="utf-8")
        database.execute("PRAGMA journal_mode = WAL")
        database.executescript(
            f"BEGIN; {schema} PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"
        )
    elif application != APPLICATION_ID:
        raise StoreError(f"{path} is no results database of runner; nothing was changed in it")
    elif version in _MIGRATIONS and not readonly:
        steps = "".join(_MIGRATIONS[each] for each in range(version, SCHEMA_VERSION))
        database.executescript(f"BEGIN IMMEDIATE; {steps} COMMIT;")
    elif version != SCHEMA_VERSION:
        way_out = (
            "the command that made it brings it up to date when it is run again"
            if version in _MIGRATIONS
            else "use the version of runner that made it, or start a new run with another name=…"
        )
        raise StoreError(f"{path} has schema version {version}, this program reads version {SCHEMA_VERSION}: {way_out}")
    if _number(database, _STRANGE):
        raise StoreError(
            f"{path} holds views, triggers or virtual tables, which no store of runner has: it is not used"
        )
    # What is sorted takes as much memory as the cache at most; beyond, it lies in a temporary file.
    for pragma in (
        "trusted_schema = OFF",
        "synchronous = NORMAL",
        "cache_size = -2048",  # KiB
        "temp_store = FILE",
        "wal_autocheckpoint = 8000",  # pages: the last ones are written over and over, and rarely out of the log
    ):
        database.execute(f"PRAGMA {pragma}")


_STRANGE = """
    SELECT count(*) FROM sqlite_master WHERE type NOT IN ('table', 'index') OR sql LIKE 'CREATE VIRTUAL%'
"""
"""What a store from elsewhere could make a SELECT do more with than read rows."""


def _number(database: sqlite3.Connection, sql: str) -> int:
    [(number,)] = database.execute(sql)
    return int(number)


_MIGRATIONS = {
    1: """
        ALTER TABLE rows ADD COLUMN session INTEGER;
        ALTER TABLE rows ADD COLUMN cost_bound_usd REAL;
        ALTER TABLE answers ADD COLUMN cost_bound_usd REAL;
        ALTER TABLE answers ADD COLUMN embedding BLOB;
        ALTER TABLE answers ADD COLUMN reused_from TEXT;
        ALTER TABLE attempts ADD COLUMN cost_bound_usd REAL;
        CREATE TABLE files (
            path     BLOB PRIMARY KEY,
            size     INTEGER NOT NULL,
            mtime_ns INTEGER NOT NULL,
            digest   BLOB NOT NULL
        ) WITHOUT ROWID;
        CREATE INDEX answers_failed ON answers (content, occurrence) WHERE error_type IS NOT NULL;
        UPDATE rows SET session = (SELECT max(id) FROM sessions)
        WHERE asked_at >= (SELECT started_at FROM sessions ORDER BY id DESC LIMIT 1);
        PRAGMA user_version = 2;
    """,
    2: """
        ALTER TABLE answers ADD COLUMN shared INTEGER NOT NULL DEFAULT 0;
        ALTER TABLE attempts ADD COLUMN shared INTEGER NOT NULL DEFAULT 0;
        PRAGMA user_version = 3;
    """,
    3: f"""
        ALTER TABLE rows ADD COLUMN ticket INTEGER NOT NULL DEFAULT 0;
        UPDATE rows SET ticket = ifnull(
            (SELECT id FROM answers WHERE content = rows.content AND occurrence = rows.occurrence),
            {1 << 31} + (
                SELECT min(position) FROM rows AS first
                WHERE first.content = rows.content AND first.occurrence = rows.occurrence
            )
        );
        DROP INDEX answers_failed;
        DROP INDEX answers_by_key;
        DROP INDEX rows_by_content;
        ALTER TABLE rows DROP COLUMN occurrence;
        ALTER TABLE answers DROP COLUMN occurrence;
        ALTER TABLE attempts DROP COLUMN occurrence;
        ALTER TABLE answers RENAME COLUMN id TO ticket;
        CREATE INDEX answers_failed ON answers (error_type) WHERE error_type IS NOT NULL;
        PRAGMA user_version = 4;
    """,
}
"""What makes a version the next one. All or nothing: a process that dies in it leaves the older version."""


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """SQLite's errors as ours, with the file and the way out."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        text = str(error)
        if text.startswith(_GARBLED):
            raise StoreError(f"{path} is damaged (it holds text that is none): move it away to start anew") from error
        match getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & _PRIMARY:
            case sqlite3.SQLITE_FULL:
                hint = f"{path} cannot be written: {_make_room(path)}"
            case sqlite3.SQLITE_IOERR:
                hint = f"{path} cannot be read or written ({text}): is the disk of {path.parent} full, or failing?"
            case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_PERM:
                hint = f"{path} cannot be opened for writing ({text}): {_OTHER_FOLDER}"
            case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
                hint = f"{path} is damaged or no database ({text}): move it away to start anew"
            case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
                hint = f"{path} is in use by another program ({text}): close it there, and run the same command again"
            case _:
                hint = f"{path}: {text}"
        raise StoreError(hint) from error


def _way_out(path: Path, error: OSError) -> str:
    return _make_room(path) if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else _OTHER_FOLDER


def _make_room(path: Path) -> str:
    return f"the disk that holds {path.parent} is full: make room, and the same command goes on"


_OTHER_FOLDER = "check the folder's permissions, or choose another runs_dir"

_GARBLED = "Could not decode to UTF-8"
"""What Python's sqlite3 says, with the text, where a column holds bytes that are no text."""

_PRIMARY = 0xFF
"""The bits of SQLite's error code that tell the class of the error."""
