"""The store: a run's SQLite file, the only truth about what was asked and what came of it.

One connection on one thread (aiosqlite's), WAL, group commit: rows are claimed in chunks, outcomes are saved in groups
that form by themselves while the last group is being committed. What is committed survives the death of the process;
what is not was in flight.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields
from operator import attrgetter
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import aiosqlite

from runner.database import connect, lock_folder, translated
from runner.errors import StoreError
from runner.types import Attempt

_GROUP_SIZE = 1024
"""Outcomes that may wait for their commit before savers have to wait too."""

_GROUP_DELAY_S = 0.01
"""How long a group gathers before it is committed: what a kill can cost, and what a commit is shared by."""

_BLOCK = 64
"""Rows in one INSERT."""

_CHUNK = 1000
"""Rows read at a time when the store is projected."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A row as the dataset has it now, to be looked up and, if it has no answer, taken up."""

    position: int
    content: bytes
    metadata: str | None  # JSON


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What the store has for a claimed row."""

    occurrence: int  # which of the rows that ask this it is
    answered: bool  # it has an outcome that is not to be asked for again
    unscored_text: str | None = None  # of an answer that is to be scored


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a row: the columns of ``answers``, in their order. See schema.sql."""

    content: bytes
    occurrence: int
    settled_at: float
    output_text: str | None = None
    details: str | None = None
    finish_reason: str | None = None
    request_id: str | None = None
    model_id: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    reasoning_tokens: int | None = None
    cached_tokens: int | None = None
    error_type: str | None = None
    error_message: str | None = None
    error_status: int | None = None
    deployment: str | None = None
    retries: int = 0
    queue_wait_s: float = 0.0
    service_time_s: float = 0.0
    end_to_end_s: float = 0.0
    ttft_s: float | None = None
    cost_usd: float | None = None


class Store:
    """One run's database. Open it with `Store.open`; use it as ``async with``.

    Belongs to one event loop. A second process that opens the same file for writing is refused.
    """

    def __init__(self, database: aiosqlite.Connection, path: Path, lock: IO[str] | None) -> None:
        self.path = path
        self._database = database
        self._lock = lock
        self._transacting = asyncio.Lock()
        self._pending: list[tuple[int, Outcome, str | None]] = []
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._writer: asyncio.Task[None] | None = None
        self._failure: Exception | None = None
        self._on_commit: Callable[[Sequence[Outcome]], None] | None = None
        self._session = 0

    @classmethod
    async def open(cls, path: Path, *, on_commit: Callable[[Sequence[Outcome]], None] | None = None) -> Store:
        """Open ``path`` for one run, making it if need be, and enter what the last session lost into the ledger.

        Args:
            on_commit: Called on the event loop with the outcomes that have just become durable.

        Raises:
            StoreError: Not ours, of another version, damaged, unwritable, or in use by another process.
        """
        lock = lock_folder(path)
        try:
            database = await connect(path)
        except BaseException:
            lock.close()
            raise
        store = cls(database, path, lock)
        store._on_commit = on_commit
        try:
            async with translated(path):
                await store._begin_session()
        except BaseException:
            await store.aclose()
            raise
        store._writer = asyncio.create_task(store._write())
        return store

    @classmethod
    async def open_readonly(cls, path: Path) -> Store:
        """Open a run's database to read it, whether it is running or not.

        Raises:
            StoreError: It does not exist, is not ours, of another version, or damaged.
        """
        if not path.is_file():
            raise StoreError(f"{path}: no such file")
        return cls(await connect(path, readonly=True), path, None)

    async def __aenter__(self) -> Store:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Commit what is pending, end the session and close the file."""
        try:
            if self._writer is not None:
                self._writer.cancel()
                await asyncio.wait([self._writer])
                async with translated(self.path):
                    await self._commit_pending()
                    await self._execute("UPDATE sessions SET ended_at = ? WHERE id = ?", (time.time(), self._session))
        finally:
            await self._database.close()
            if self._lock is not None:
                self._lock.close()

    # Asking

    async def claim(self, claims: Sequence[Claim], *, retry_failed: bool, scored: bool) -> list[Known]:
        """Bring the rows at these consecutive positions up to date, look them up, and take up those without an answer.

        All in one transaction. Chunks come in the dataset's order, from position 0 on.

        Args:
            claims: Rows in ascending positions.
            retry_failed: Whether a row that failed is taken up again; its failure then moves to the ledger.
            scored: Whether answers should have scores: those without get their text back, to be scored.
        """
        async with self._transaction():
            occurrences, answers, stored = await asyncio.gather(  # one wait for the database's thread, not three
                self._occurrences(claims), self._answers(claims), self._stored(claims)
            )
            known: list[Known] = []
            changed: list[tuple[Any, ...]] = []
            failed: list[tuple[bytes, int]] = []
            now = time.time()
            for claim, occurrence in zip(claims, occurrences, strict=True):
                key = (claim.content, occurrence)
                error_type = answers.get(key, _NO_ANSWER)
                if error_type is not None and error_type is not _NO_ANSWER and retry_failed:
                    failed.append(key)
                    error_type = _NO_ANSWER
                answered = error_type is not _NO_ANSWER
                row = stored.get(claim.position)
                moved = row is None or row[:3] != (*key, claim.metadata)
                if moved or not answered:
                    changed.append((claim.position, *key, claim.metadata, None if answered else now))
                unscored = scored and answered and error_type is None and (row is None or moved or not row[3])
                text = await self._output_text(key) if unscored else None
                known.append(Known(occurrence=occurrence, answered=answered, unscored_text=text))
            if failed:
                await self._database.executemany(_MOVE_FAILURE, failed)
                await self._database.executemany(_FORGET_FAILURE, failed)
            if changed:
                await self._insert(_ROWS, changed)
        return known

    async def forget_scores(self) -> None:
        """Have every answer scored again: the scorers changed."""
        await self._execute("UPDATE rows SET scores = NULL WHERE scores IS NOT NULL", ())

    async def put_scores(self, scores: Iterable[tuple[int, str]]) -> None:
        """Store scores (JSON) by position."""
        async with self._transaction():
            await self._database.executemany(_PUT_SCORES, [(text, position) for position, text in scores])

    async def truncate(self, length: int) -> None:
        """The dataset has ``length`` positions: drop rows beyond, keep their answers."""
        await self._execute("DELETE FROM rows WHERE position >= ?", (length,))

    async def forget_rows(self) -> int:
        """Drop the rows and their answers. Returns how many answers to rows of earlier datasets remain."""
        await self.flush()
        async with self._transaction():
            await self._database.execute(_FORGET_ANSWERS)
            await self._database.execute("DELETE FROM rows")
            [(remaining,)] = await self._fetch("SELECT count(*) FROM answers", ())
        return int(remaining)

    # Answering

    async def save(self, position: int, outcome: Outcome, scores: str | None = None) -> None:
        """Hand in what came of the row at ``position``. It is durable when ``on_commit`` says so.

        Raises:
            StoreError: The database can no longer be written; what was handed in before is in memory only.
        """
        if self._failure is not None:
            raise self._failure
        self._pending.append((position, outcome, scores))
        self._wake.set()
        if len(self._pending) >= _GROUP_SIZE:
            self._room.clear()
            await self._room.wait()
            if self._failure is not None:
                raise self._failure

    async def note_attempt(self, key: tuple[bytes, int], attempt: Attempt) -> None:
        """Enter a failed attempt in the ledger, durably, before it is followed by another."""
        values = (
            *key,
            attempt.number,
            attempt.deployment,
            attempt.started_at,
            attempt.service_time_s,
            attempt.error,
            _encodable(attempt.message),
            attempt.status,
            attempt.cost_usd,
        )
        await self._execute(_PUT_ATTEMPT, values)

    async def note_lost(self, keys: Iterable[tuple[bytes, int]]) -> None:
        """Enter requests that were cancelled in flight in the ledger: what they cost is unknown."""
        async with self._transaction():
            await self._database.executemany(_PUT_LOST, [(*key, time.time()) for key in keys])

    async def flush(self) -> None:
        """Commit what is pending."""
        async with translated(self.path):
            await self._commit_pending()

    # Facts about the run

    async def meta(self) -> dict[str, str]:
        async with translated(self.path), self._database.execute("SELECT name, value FROM meta") as cursor:
            return {row["name"]: row["value"] async for row in cursor}

    async def put_meta(self, facts: Mapping[str, str]) -> None:
        async with self._transaction():
            await self._database.executemany(
                "INSERT INTO meta (name, value) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value",
                list(facts.items()),
            )

    async def query(self, sql: str, parameters: Sequence[Any] = ()) -> AsyncGenerator[sqlite3.Row, None]:
        """The rows of a SELECT, a chunk in memory at a time. Tables: schema.sql."""
        async with translated(self.path), self._database.execute(sql, parameters) as cursor:
            while rows := await cursor.fetchmany(_CHUNK):
                for row in rows:
                    yield row

    # Transactions

    @asynccontextmanager
    async def _transaction(self) -> AsyncIterator[None]:
        """All or nothing, one at a time."""
        async with self._transacting, translated(self.path):
            try:
                yield  # the first write begins the transaction
                if self._database.in_transaction:
                    await self._database.commit()
            except BaseException:
                await self._database.rollback()
                raise

    async def _insert(self, into: str, rows: Sequence[tuple[Any, ...]]) -> None:
        """Insert many rows with few statements: each one costs the event loop's thread two turns of the GIL."""
        whole = len(rows) - len(rows) % _BLOCK
        mark = f"({_marks(rows[0])})"
        block_sql = f"{into} VALUES {', '.join([mark] * _BLOCK)}"
        blocks = [
            self._database.execute(block_sql, [value for row in rows[start : start + _BLOCK] for value in row])
            for start in range(0, whole, _BLOCK)
        ]
        await asyncio.gather(*blocks, self._database.executemany(f"{into} VALUES {mark}", rows[whole:]))

    async def _execute(self, sql: str, parameters: Sequence[Any]) -> None:
        async with self._transaction():
            await self._database.execute(sql, parameters)

    async def _begin_session(self) -> None:
        async with self._transaction():
            await self._database.execute(_ENTER_LOST)
            cursor = await self._database.execute(
                "INSERT INTO sessions (started_at, last_seen) VALUES (?1, ?1)", (time.time(),)
            )
            self._session = cursor.lastrowid or 0

    async def _write(self) -> None:
        """Commit in groups: while one is being written, the next one gathers."""
        while True:
            await self._wake.wait()
            await asyncio.sleep(_GROUP_DELAY_S)
            try:
                async with translated(self.path):
                    await self._commit_pending()
            except Exception as failure:
                self._failure = failure
                self._room.set()
                return

    async def _commit_pending(self) -> None:
        """Commit all that was handed in. What could not be committed stays pending."""
        self._wake.clear()
        if not self._pending:
            return
        async with self._transaction():  # only now, for a group that is being committed is pending too
            group = self._pending[:]
            if group:
                await self._put_answers([_COLUMNS_OF(outcome) for _, outcome, _ in group])
                if scored := [(scores, position) for position, _, scores in group if scores is not None]:
                    await self._database.executemany(_PUT_SCORES, scored)
                await self._database.execute(_SEEN, (time.time(), self._session))
        del self._pending[: len(group)]
        self._room.set()
        if group and self._on_commit is not None:
            self._on_commit([outcome for _, outcome, _ in group])

    async def _put_answers(self, rows: Sequence[tuple[Any, ...]]) -> None:
        try:
            await self._insert(_ANSWERS, rows)
        except UnicodeEncodeError:
            await self._insert(_ANSWERS, [tuple(map(_encodable, row)) for row in rows])

    # Lookups

    async def _occurrences(self, claims: Sequence[Claim]) -> list[int]:
        """Which of the rows that ask the same each claim is, counted from the dataset's beginning."""
        contents = {claim.content for claim in claims}
        sql = f"{_next_occurrences(len(contents))} SELECT content, occurrence FROM next"
        following = {row[0]: row[1] for row in await self._fetch(sql, (*contents, claims[0].position))}
        occurrences = []
        for claim in claims:
            occurrences.append(following[claim.content])
            following[claim.content] += 1
        return occurrences

    async def _answers(self, claims: Sequence[Claim]) -> dict[tuple[bytes, int], str | None]:
        """The error class, or None for a success, of the answers there are."""
        contents = {claim.content for claim in claims}
        sql = f"""
            {_next_occurrences(len(contents))}
            SELECT answers.content, answers.occurrence, answers.error_type
            FROM next
            JOIN answers ON answers.content = next.content
                AND answers.occurrence BETWEEN next.occurrence AND next.occurrence + ?
        """
        rows = await self._fetch(sql, (*contents, claims[0].position, len(claims)))
        return {(content, occurrence): error_type for content, occurrence, error_type in rows}

    async def _stored(self, claims: Sequence[Claim]) -> dict[int, tuple[Any, ...]]:
        """Content, occurrence, metadata and scores of the rows that are at these positions."""
        sql = "SELECT position, content, occurrence, metadata, scores FROM rows WHERE position BETWEEN ? AND ?"
        return {row[0]: tuple(row[1:]) for row in await self._fetch(sql, (claims[0].position, claims[-1].position))}

    async def _fetch(self, sql: str, parameters: Sequence[Any]) -> Iterable[sqlite3.Row]:
        return await self._database.execute_fetchall(sql, parameters)

    async def _output_text(self, key: tuple[bytes, int]) -> str | None:
        sql = "SELECT output_text FROM answers WHERE content = ? AND occurrence = ?"
        return next((text for (text,) in await self._fetch(sql, key)), None)


_NO_ANSWER = ""
"""Stands for the error class of a row that has no answer."""

_COLUMNS = tuple(field.name for field in fields(Outcome))
_COLUMNS_OF = attrgetter(*_COLUMNS)

_ANSWERS = f"INSERT OR REPLACE INTO answers ({', '.join(_COLUMNS)})"

_ROWS = "INSERT OR REPLACE INTO rows (position, content, occurrence, metadata, asked_at)"

_SEEN = "UPDATE sessions SET last_seen = ? WHERE id = ?"

_PUT_SCORES = "UPDATE rows SET scores = ? WHERE position = ?"

_PUT_ATTEMPT = """
    INSERT INTO attempts (
        content, occurrence, number, deployment, started_at, service_time_s,
        error_type, error_message, error_status, cost_usd
    )
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""

_PUT_LOST = "INSERT INTO attempts (content, occurrence, started_at, error_type) VALUES (?, ?, ?, 'Lost')"

_MOVE_FAILURE = """
    INSERT INTO attempts (
        content, occurrence, number, deployment, started_at, service_time_s,
        error_type, error_message, error_status, cost_usd
    )
    SELECT
        content, occurrence, retries + 1, deployment, settled_at - service_time_s, service_time_s,
        error_type, error_message, error_status, cost_usd
    FROM answers
    WHERE content = ? AND occurrence = ?
"""

_FORGET_FAILURE = "DELETE FROM answers WHERE content = ? AND occurrence = ?"

_FORGET_ANSWERS = """
    DELETE FROM answers
    WHERE (content, occurrence) IN (SELECT content, occurrence FROM rows)
"""

# A session without an end was killed: what it had taken up and not answered may have been asked, and paid for.
_ENTER_LOST = """
    INSERT INTO attempts (content, occurrence, started_at, error_type)
    SELECT rows.content, rows.occurrence, rows.asked_at, 'Lost'
    FROM rows
    LEFT JOIN answers ON answers.content = rows.content AND answers.occurrence = rows.occurrence
    WHERE answers.id IS NULL
        AND rows.asked_at >= (
            SELECT started_at FROM sessions
            WHERE id = (SELECT max(id) FROM sessions) AND ended_at IS NULL
        )
"""


def _next_occurrences(count: int) -> str:
    """A table ``next`` of so many contents, and the occurrence of each that comes at a position or after it."""
    return f"""
        WITH asked (content) AS (VALUES {", ".join(["(?)"] * count)}),
        place (position) AS (VALUES (?)),
        next (content, occurrence) AS (
            SELECT asked.content, ifnull((
                SELECT rows.occurrence + 1
                FROM rows
                WHERE rows.content = asked.content AND rows.position < place.position
                ORDER BY rows.position DESC
                LIMIT 1
            ), 0)
            FROM asked, place
        )
    """


def _encodable(value: Any) -> Any:
    """Text without the lone surrogates that a model may write, and that UTF-8 has no form for."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def _marks(values: Sequence[Any]) -> str:
    return ", ".join("?" * len(values))
