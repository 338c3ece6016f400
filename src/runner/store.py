"""The store: a run's SQLite file, the only truth about what was asked and what came of it.

One connection on one thread, WAL, group commit: rows are claimed in chunks (`runner.claims`), outcomes are saved in
groups that form by themselves while the last group is being committed (`runner.commits`). What is committed survives
the death of the process; what is not was in flight.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, TypeVar

from runner.answers import (
    Entry,
    Key,
    Outcome,
    enter_lost,
    move_all_to_ledger,
    put_answers,
    put_attempts,
    read_answers,
)
from runner.claims import SETTLED, Claim, Claimed, Elsewhere, Known, Lookup, Session, Terms, look_up, take_up
from runner.commits import GroupCommit
from runner.database import PATIENCE_S, Database, Parameters, Statements, lock_folder
from runner.errors import StoreError
from runner.pool import Pool
from runner.reserve import Reserve
from runner.twins import Twin, Twins
from runner.types import Attempt

__all__ = ["Claim", "FileMark", "Key", "Known", "Outcome", "Store", "Terms"]

T = TypeVar("T")

_FILES = 1000
"""Files looked up at a time."""

_TICKET_BITS = 32
"""A ticket is the number of a session, and a number of so many bits within it: nobody has had it before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileMark:
    """A file as it was when its content was hashed."""

    path: str  # absolute
    size: int  # bytes
    mtime_ns: int
    digest: bytes  # 16 bytes


class Store:
    """One run's database. Open it with `Store.open`; use it as ``async with``.

    Belongs to one event loop. A second process that opens the same file for writing is refused.
    """

    def __init__(
        self,
        database: Database,
        *,
        lock: BinaryIO | None = None,
        reserve: Reserve | None = None,
        on_commit: Callable[[Sequence[Outcome]], None] | None = None,
    ) -> None:
        self.path = database.path
        self._database = database
        self._lock = lock
        self._reserve = reserve
        self._on_commit = on_commit
        self._commits: GroupCommit[_Settled | Entry] = GroupCommit(self._commit, self._committed)
        self._bounds: dict[Key, float | None] = {}  # the most that an attempt costs, of what is at work
        self._listeners: list[Callable[[StoreError], None]] = []
        self._session: Session | None = None
        self._is_at_work = False  # once it has taken something up
        self._pool = Pool(None)
        self._now = _steady_clock()

    @classmethod
    async def open(cls, path: Path, *, on_commit: Callable[[Sequence[Outcome]], None] | None = None) -> Store:
        """Open ``path`` for one run, making it if need be, and enter what the last session lost into the ledger.

        Args:
            on_commit: Called on the event loop with the outcomes that have just become durable.

        Raises:
            StoreError: Not ours, of a version that cannot be migrated, damaged, unwritable, or in use by another
                process.
        """
        lock = lock_folder(path)
        try:
            database = await Database.open(path)
        except BaseException:
            lock.close()
            raise
        store = cls(database, lock=lock, reserve=Reserve(path.with_name(f".{path.name}.reserve")), on_commit=on_commit)
        try:
            await store._begin_session()
        except BaseException:
            await store.aclose()
            raise
        return store

    @classmethod
    async def open_readonly(cls, path: Path, *, patience_s: float = PATIENCE_S) -> Store:
        """Open a run's database to read it, whether it is running or not.

        Args:
            patience_s: How long to wait for another program that has it to itself.

        Raises:
            StoreError: It does not exist, is not ours, of another version, or damaged.
        """
        if not path.is_file():
            raise StoreError(f"{path}: no such file")
        return cls(await Database.open(path, readonly=True, patience_s=patience_s))

    async def __aenter__(self) -> Store:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Commit what is pending, end the session and close the file."""
        try:
            if self._session is not None:
                await self._commits.flush()
                await self._execute("UPDATE sessions SET ended_at = ? WHERE id = ?", (self._now(), self._session.id))
        finally:
            await self._database.aclose()
            if self._reserve is not None:
                self._reserve.release()
            if self._lock is not None:
                self._lock.close()

    def listen(self, listener: Callable[[StoreError], None]) -> None:
        """Have ``listener`` called when the disk is full, and there is just enough room left for what is in flight."""
        self._listeners.append(listener)

    # Asking

    async def claim(self, claims: Sequence[Claimed], terms: Terms, *, most: int | None = None) -> list[Known]:
        """Bring the rows at these consecutive positions up to date, look them up, and take up those without an answer.

        All in one transaction, save the search for answers elsewhere. Chunks come in the dataset's order, from position
        0 on, one after the other.

        Args:
            most: How many are taken up at most; those after them are not claimed. None: all.

        Returns:
            One for each that was claimed.
        """
        session = self._session
        assert session is not None

        def look(statements: Statements) -> Lookup | None:
            return look_up(statements, claims, terms, session, most=most)

        def take(statements: Statements, lookup: Lookup | None, found: Sequence[Outcome | None] = ()) -> list[Known]:
            if lookup is None:
                return [SETTLED] * len(claims)
            known = take_up(statements, lookup, terms, found, session=session, bounds=self._bounds)
            self._is_at_work |= not all(fact.answered or fact.shared for fact in known)
            return known

        if terms.elsewhere is None:
            return await self._transact(lambda statements: take(statements, look(statements)))
        lookup = await self._database.transact(look)
        todo = [lookup.claims[n] for n in lookup.todo] if lookup else []
        found = await self._found(todo, terms.elsewhere, session, dedupe=terms.dedupe)
        return await self._transact(lambda statements: take(statements, lookup, found))

    def is_new(self, ticket: int) -> bool:
        """Whether a ticket is of this session: nobody had asked for its answer before."""
        return self._session is not None and ticket >> _TICKET_BITS == self._session.id

    async def _found(
        self, claims: Sequence[Claimed], elsewhere: Elsewhere, session: Session, *, dedupe: bool
    ) -> Sequence[Outcome | None]:
        """What there is elsewhere for rows; unless they share answers, nothing that the store has already."""
        found: list[Outcome | None] = [None] * len(claims)
        missing: Sequence[int] = range(len(claims))
        while missing:
            for n, each in zip(missing, await elsewhere([claims[n] for n in missing]), strict=True):
                found[n] = each
            twins = {n: Twin.of(each, claims[n].content) for n in missing if (each := found[n]) and not dedupe}
            missing = await self._database.transact(partial(session.twins.enter, answers=twins)) if twins else ()
        return found

    async def take(self, contents: Sequence[bytes]) -> list[Outcome | None]:
        """For each of ``contents``, an answer to it that no row has, or None. Each answer is handed out once."""
        pool = self._session.pool if self._session else self._pool

        def take(statements: Statements) -> list[Outcome | None]:
            tickets = pool.take(statements, contents)
            taken = read_answers(statements, [ticket for ticket in tickets if ticket is not None])
            answers: dict[int | None, Outcome] = {answer.ticket: answer for answer in taken}
            return [answers.get(ticket) for ticket in tickets]

        return await self._database.transact(take)

    async def forget_scores(self) -> None:
        """Have every answer scored again: the scorers changed."""
        await self._execute(_FORGET_SCORES)

    async def put_scores(self, scores: Iterable[tuple[int, str]]) -> None:
        """Store scores (JSON) by position."""
        rows = [(text, position) for position, text in scores]
        await self._database.transact(lambda statements: statements.executemany(_PUT_SCORES, rows))

    async def truncate(self, length: int) -> None:
        """The dataset has ``length`` positions: drop rows beyond, keep their answers."""
        await self._execute("DELETE FROM rows WHERE position >= ?", (length,))

    async def start_over(self) -> None:
        """Give up every answer, to ask everything anew. What they cost stays in the ledger; the time begins anew."""

        def start_over(statements: Statements) -> None:
            move_all_to_ledger(statements)
            statements.execute(_FORGET_SCORES)
            statements.execute(_FIRST_SESSION)

        await self._database.transact(start_over)

    async def forget_rows(self) -> int:
        """Drop the rows and their answers. Returns how many answers to rows of earlier datasets remain."""

        def forget_rows(statements: Statements) -> int:
            statements.execute(_FORGET_ANSWERS)
            statements.execute("DELETE FROM rows")
            [(remaining,)] = statements.fetch("SELECT count(*) FROM answers")
            return int(remaining)

        await self.flush()
        return await self._database.transact(forget_rows)

    # Answering

    async def save_all(self, settled: Iterable[tuple[int, Outcome, str | None]]) -> None:
        """Hand in what came of rows, with their positions and scores. It is durable when ``on_commit`` says so.

        All of them are handed in before this waits for anything.

        Raises:
            StoreError: The database can no longer be written; what was handed in before is in memory only.
        """
        await self._commits.put_all(
            _Settled(position, self._bounded(outcome), scores) for position, outcome, scores in settled
        )

    async def note_attempts(self, keys: Iterable[Key], attempt: Attempt) -> None:
        """Enter an attempt that failed, durably before it is followed by another.

        Each of the rows that shared it has an entry with its part of the cost; the first one's counts as the attempt.
        """
        await self._commits.put_durably(
            Entry.of(key, attempt, self._bounds.get(key), shared=place > 0) for place, key in enumerate(keys)
        )

    async def note_lost(self, requests: Iterable[Iterable[Key]]) -> None:
        """Enter requests, by the rows that shared them, that were cancelled in flight: what they cost is unknown."""
        await self._commits.put_durably(
            Entry.lost(key, self._bounds.get(key), shared=place > 0)
            for keys in requests
            for place, key in enumerate(keys)
        )

    async def flush(self) -> None:
        """Commit what is pending."""
        await self._commits.flush()
        await self.note_alive()

    async def note_alive(self) -> None:
        """Note that the session goes on, as each commit does; one that has nothing to ask takes no time."""
        if self._session is not None and self._is_at_work:
            seen = self._now(), self._session.id
            await self._transact(lambda statements: statements.execute(_SEEN, seen))

    # Facts about the run

    async def meta(self) -> dict[str, str]:
        return {row["name"]: row["value"] for row in await self._database.fetch("SELECT name, value FROM meta")}

    async def put_meta(self, facts: Mapping[str, str]) -> None:
        sql = "INSERT INTO meta (name, value) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value"
        rows = list(facts.items())
        await self._database.transact(lambda statements: statements.executemany(sql, rows))

    def query(self, sql: str, parameters: Parameters = ()) -> AsyncGenerator[sqlite3.Row, None]:
        """The rows of a SELECT, a chunk in memory at a time. Tables: schema.sql."""
        return self._database.rows(sql, parameters)

    async def files(self, paths: Collection[str]) -> dict[str, FileMark]:
        """What is known of the files at these absolute paths, of those of which something is."""
        names = [os.fsencode(path) for path in paths]
        marks: dict[str, FileMark] = {}
        for start in range(0, len(names), _FILES):
            part = names[start : start + _FILES]
            sql = f"SELECT path, size, mtime_ns, digest FROM files WHERE path IN ({', '.join('?' * len(part))})"
            for name, size, mtime_ns, digest in await self._database.fetch(sql, part):
                path = os.fsdecode(name)
                marks[path] = FileMark(path=path, size=size, mtime_ns=mtime_ns, digest=digest)
        return marks

    async def put_files(self, marks: Iterable[FileMark]) -> None:
        """Keep what is known of files."""
        sql = "INSERT OR REPLACE INTO files (path, size, mtime_ns, digest) VALUES (?, ?, ?, ?)"
        rows = [(os.fsencode(mark.path), mark.size, mark.mtime_ns, mark.digest) for mark in marks]
        await self._database.transact(lambda statements: statements.executemany(sql, rows))

    # Transactions

    def _bounded(self, outcome: Outcome) -> Outcome:
        bound = self._bounds.pop((outcome.content, outcome.ticket), None)
        if outcome.cost_usd is None and bound is not None:
            return outcome._replace(cost_bound_usd=bound)
        return outcome

    async def _execute(self, sql: str, parameters: Sequence[Any] = ()) -> None:
        await self._database.transact(lambda statements: statements.execute(sql, parameters))

    async def _begin_session(self) -> None:
        def begin(statements: Statements) -> int:
            enter_lost(statements)
            now = self._now()
            return statements.execute("INSERT INTO sessions (started_at, last_seen) VALUES (?, ?)", (now, now))

        session = await self._database.transact(begin)
        self._session = Session(id=session, tickets=count(session << _TICKET_BITS), pool=Pool(session), twins=Twins())

    async def _transact(self, work: Callable[[Statements], T]) -> T:
        """Do a transaction; where it fails, once more in the room that was held back, and have it known."""
        try:
            return await self._database.transact(work)
        except StoreError as error:
            if self._reserve is None or not self._reserve.give_up():
                raise
            done = await self._database.transact(work)
            for listener in self._listeners:
                listener(error)
            return done

    async def _commit(self, group: Sequence[_Settled | Entry]) -> None:
        settled = [each for each in group if isinstance(each, _Settled)]
        outcomes = [each.outcome for each in settled]
        entries = [each for each in group if isinstance(each, Entry)]
        session = self._session
        scores = [(each.scores, each.position) for each in settled if each.scores is not None]

        def commit(statements: Statements) -> None:
            put_answers(statements, outcomes)
            put_attempts(statements, entries)
            statements.executemany(_PUT_SCORES, scores)
            statements.execute(_SEEN, (self._now(), session.id if session else None))

        await self._transact(commit)

    def _committed(self, group: Sequence[_Settled | Entry]) -> None:
        outcomes = [each.outcome for each in group if isinstance(each, _Settled)]
        if outcomes and self._on_commit is not None:
            self._on_commit(outcomes)


def _steady_clock() -> Callable[[], float]:
    """Unix time as it is now, and goes on from here, whatever becomes of the host's clock."""
    wall, steady = time.time(), time.monotonic()
    return lambda: wall + time.monotonic() - steady


class _Settled(NamedTuple):
    """What came of the row at a position."""

    position: int
    outcome: Outcome
    scores: str | None


_PUT_SCORES = "UPDATE rows SET scores = ? WHERE position = ?"

_FIRST_SESSION = """
    INSERT OR REPLACE INTO meta (name, value)
    SELECT 'first_session', max(id) FROM sessions
"""

_FORGET_SCORES = "UPDATE rows SET scores = NULL WHERE scores IS NOT NULL"

_SEEN = "UPDATE sessions SET last_seen = ? WHERE id = ?"

_FORGET_ANSWERS = """
    DELETE FROM answers
    WHERE ticket IN (SELECT ticket FROM rows)
"""
