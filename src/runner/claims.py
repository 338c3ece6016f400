"""Claims: the rows of the dataset as it is now, looked up among the answers, and taken up where they have none."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping, Sequence, Set
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, Protocol, TypeAlias

from runner.answers import Key, Outcome, move_to_ledger, put_answers, read_answers
from runner.database import Statements
from runner.pool import Pool
from runner.twins import Twins


class Claimed(Protocol):
    """A row as the dataset has it now."""

    @property
    def position(self) -> int: ...
    @property
    def content(self) -> bytes: ...
    @property
    def metadata(self) -> str | None: ...  # JSON


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """The plain form of a row to be claimed."""

    position: int
    content: bytes
    metadata: str | None


class Known(NamedTuple):
    """What the store has for a claimed row."""

    ticket: int  # of its answer; 0 where nobody needs it
    answered: bool  # it is not to be asked: it has its outcome, or is not wanted
    unscored_text: str | None = None  # of an answer that is to be scored
    shared: bool = False  # it has none, but an earlier row that asks the same is being asked
    copied: bool = False  # its answer was found elsewhere, just now


_NO_TICKET = 0

SETTLED = Known(ticket=_NO_TICKET, answered=True)
"""There is nothing to do about a row."""

Elsewhere: TypeAlias = Callable[[Sequence[Any]], Awaitable[Sequence[Outcome | None]]]
"""Finds answers outside for rows that have none: one for each row, or None. Ticket and content are not looked at.
None is handed out twice: where one is not to be used, the row comes again, for another one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """On which terms rows are taken up."""

    retry_failed: bool = True  # a row that failed is taken up again; its failure moves to the ledger
    scored: bool = False  # answers should have scores: those without get their text back, to be scored
    dedupe: bool = False  # rows that ask the same share one answer; where this changes, `Store.truncate` to 0 first
    cost_bound: Callable[[Any], float | None] | None = None  # the most that an attempt at a row costs, in US dollars
    elsewhere: Elsewhere | None = None  # what it finds is copied into this store
    wanted: Callable[[int], bool] | None = None  # the positions that are taken up; None: all


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """An invocation of the run, as far as claims go."""

    id: int
    tickets: Iterator[int]  # that nobody has had
    pool: Pool
    twins: Twins


@dataclass(frozen=True, slots=True, kw_only=True)
class Lookup:
    """What the store had for the rows of a chunk before they are taken up."""

    claims: Sequence[Claimed]  # the rows
    stored: Sequence[sqlite3.Row]  # the first of them, as far as they ask what they asked before
    changed_from: int | None  # the position from which on what is stored is no longer so
    tickets: Sequence[int]  # of each
    errors: Mapping[int, str | None]  # by ticket: the error class, or None for a success, of the outcomes there are
    todo: Sequence[int]  # those to be taken up, by their place in the chunk
    shared: Set[int]  # those that wait for another one's answer
    moved: Mapping[int, int]  # by ticket: the one under which there is an answer that comes to be theirs


def look_up(
    statements: Statements, claims: Sequence[Claimed], terms: Terms, session: Session, *, most: int | None = None
) -> Lookup | None:
    """Find out what is known of rows. None: there is nothing to do about any of them.

    Looks no further than there are ``most`` of them that may have to be taken up; None: at all.

    The stored rows are always the beginning of one dataset. So a row that stands unchanged among them has its ticket;
    from the first one that has changed on, they are forgotten, and the answers that they had are found again by what
    they answer.
    """
    if _all_settled(statements, claims, terms):
        return None
    if terms.dedupe:
        statements.execute("CREATE INDEX IF NOT EXISTS rows_by_content ON rows (content)")
    stored = statements.fetch(_STORED, (claims[0].position, claims[-1].position))
    same = _unchanged(claims, stored)
    tickets = [row["ticket"] for row in stored[:same]]
    errors = {row["ticket"]: row["error_type"] for row in stored[:same] if row["answered"]}

    def is_open(n: int) -> bool:
        ticket = tickets[n] if n < len(tickets) else _NO_TICKET
        is_failed = errors.get(ticket) is not None
        is_settled = ticket in errors and not (is_failed and terms.retry_failed)
        return not is_settled and (terms.wanted is None or terms.wanted(claims[n].position))

    if most is not None:
        beyond = next(islice(filter(is_open, range(len(claims))), most, None), len(claims))
        claims, stored, tickets, same = claims[:beyond], stored[:beyond], tickets[:beyond], min(same, beyond)
    changed_from = stored[same]["position"] if same < len(stored) else None
    session.pool.go_on(claims[-1].position + 1, changed_from=changed_from)
    moved: Mapping[int, int] = {}
    if not terms.dedupe:
        held = [n for n in range(same) if is_open(n)]
        spare = session.pool.take(statements, [claims[n].content for n in held])
        moved = {tickets[n]: ticket for n, ticket in zip(held, spare, strict=True) if ticket is not None}
    anew = _new_tickets(statements, claims[same:], terms, session)
    errors |= _errors(statements, anew) if terms.dedupe or session.id > 1 else {}
    tickets += anew
    todo = [n for n in range(len(claims)) if is_open(n) and tickets[n] not in moved]
    shared: Set[int] = frozenset()
    if terms.dedupe and todo:
        shared = _shared(statements, claims, todo, session=session.id, changed_from=changed_from)
    return Lookup(
        claims=claims,
        stored=stored[:same],
        changed_from=changed_from,
        tickets=tickets,
        errors=errors,
        todo=[n for n in todo if n not in shared],
        shared=shared,
        moved=moved,
    )


def take_up(
    statements: Statements,
    lookup: Lookup,
    terms: Terms,
    found: Sequence[Outcome | None],
    *,
    session: Session,
    bounds: MutableMapping[Key, float | None],
) -> list[Known]:
    """Bring rows up to date after their lookup, keep the answers ``found`` elsewhere, and take up what has none.

    Enters in ``bounds`` what it takes up.

    Args:
        found: One for each of the rows that are to be taken up, or nothing at all.
    """
    claims, tickets, stored, shared = lookup.claims, lookup.tickets, lookup.stored, lookup.shared
    if lookup.changed_from is not None:
        statements.execute("DELETE FROM rows WHERE position >= ?", (lookup.changed_from,))
    anew = [*(tickets[n] for n in lookup.todo), *lookup.moved]
    move_to_ledger(statements, [ticket for ticket in anew if ticket in lookup.errors])
    statements.executemany("UPDATE answers SET ticket = ? WHERE ticket = ?", lookup.moved.items())
    copies = {n: outcome for n, outcome in zip(lookup.todo, found, strict=False) if outcome is not None}
    put_answers(statements, [each._replace(ticket=tickets[n], content=claims[n].content) for n, each in copies.items()])
    errors = {**lookup.errors, **dict.fromkeys(tickets[n] for n in copies), **dict.fromkeys(lookup.moved)}
    taken = {n for n in lookup.todo if n not in copies}

    keys = [(claim.content, ticket) for claim, ticket in zip(claims, tickets, strict=True)]
    if terms.cost_bound is not None:
        bounds.update((keys[n], terms.cost_bound(claims[n])) for n in taken)
    kept = [None if row["ticket"] in lookup.moved else row for row in stored]
    _lay_down(statements, claims, keys, kept, taken, bounds=bounds, session=session.id)
    scored = {n for n, (claim, row) in enumerate(zip(claims, kept, strict=False)) if row and _has_scores(claim, row)}
    unscored = {
        n for n, each in enumerate(tickets) if terms.scored and n not in scored and errors.get(each, "") is None
    }
    texts = {each.ticket: each.output_text for each in read_answers(statements, [tickets[n] for n in unscored])}
    return [
        Known(
            ticket=ticket,
            answered=n not in taken and n not in shared,
            unscored_text=texts[ticket] if n in unscored else None,
            shared=n in shared,
            copied=n in copies,
        )
        for n, ticket in enumerate(tickets)
    ]


def _all_settled(statements: Statements, claims: Sequence[Claimed], terms: Terms) -> bool:
    """Whether there is nothing to do about any of the rows: so it is with most chunks of a run that goes on.

    Compared as a whole, in one step of SQLite, which needs no Python and leaves its lock to others.
    """
    parameters = {
        "retry_failed": terms.retry_failed,
        "scored": terms.scored,
        "first": claims[0].position,
        "last": claims[-1].position,
    }
    [(positions, contents, metadata)] = statements.fetch(_SETTLED_CHUNK, parameters)
    return bool(
        contents == b"".join([claim.content for claim in claims])
        and metadata == "\0".join([claim.metadata or "" for claim in claims])
        and positions == ",".join([str(claim.position) for claim in claims])
    )


def _unchanged(claims: Sequence[Claimed], stored: Sequence[sqlite3.Row]) -> int:
    """How many of the rows still ask, in their order, what is stored of them."""
    for n, (claim, row) in enumerate(zip(claims, stored, strict=False)):
        if claim.position != row["position"] or claim.content != row["content"]:
            return n
    return min(len(claims), len(stored))


def _has_scores(claim: Claimed, row: sqlite3.Row) -> bool:
    """Whether the scores of an unchanged row are those of what it is now."""
    return bool(row["scored"]) and row["metadata"] == claim.metadata


def _new_tickets(statements: Statements, claims: Sequence[Claimed], terms: Terms, session: Session) -> list[int]:
    """The tickets of rows that are laid down anew: of an answer that is there, or one that nobody has had."""
    if not claims:
        return []
    contents = [claim.content for claim in claims]
    if terms.dedupe:
        distinct = list(dict.fromkeys(contents))
        shared = _tickets_before(statements, distinct, claims[0].position)
        rest = [content for content in distinct if content not in shared]
        shared |= zip(rest, _own_tickets(statements, rest, session), strict=True)
        return [shared[content] for content in contents]
    return _own_tickets(statements, contents, session)


def _own_tickets(statements: Statements, contents: Sequence[bytes], session: Session) -> list[int]:
    tickets = session.pool.take(statements, contents)
    rest = [n for n, ticket in enumerate(tickets) if ticket is None]
    failures = session.pool.take(statements, [contents[n] for n in rest], failed=True)
    for n, ticket in zip(rest, failures, strict=True):
        tickets[n] = ticket
    return [next(session.tickets) if ticket is None else ticket for ticket in tickets]


def _tickets_before(statements: Statements, contents: Sequence[bytes], position: int) -> dict[bytes, int]:
    """The tickets of rows before a position that ask the same."""
    sql = _BEFORE.format(", ".join(["(?)"] * len(contents)))
    return {row["content"]: row["ticket"] for row in statements.fetch(sql, (*contents, position))}


def _errors(statements: Statements, tickets: Sequence[int]) -> dict[int, str | None]:
    """The error class, or None for a success, of the outcomes there are."""
    marks = ", ".join("?" * len(tickets))
    rows = statements.fetch(f"SELECT ticket, error_type FROM answers WHERE ticket IN ({marks})", tickets)
    return {row["ticket"]: row["error_type"] for row in rows}


def _shared(
    statements: Statements, claims: Sequence[Claimed], todo: Sequence[int], *, session: int, changed_from: int | None
) -> Set[int]:
    """Which of the rows in ``todo`` wait for the answer of another one, which this session has taken up."""
    contents = {claims[n].content for n in todo}
    sql = _ASKED_BEFORE.format(", ".join(["(?)"] * len(contents)))
    asked = {content for (content,) in statements.fetch(sql, (*contents, session, changed_from))}
    shared = set()
    for n in todo:
        if claims[n].content in asked:
            shared.add(n)
        asked.add(claims[n].content)
    return shared


def _lay_down(
    statements: Statements,
    claims: Sequence[Claimed],
    keys: Sequence[Key],
    kept: Sequence[sqlite3.Row | None],
    taken: Set[int],
    *,
    bounds: Mapping[Key, float | None],
    session: int,
) -> None:
    """Write the rows that are taken up, and those of which nothing, or other metadata, is ``kept``."""
    now = time.time()
    rows: list[tuple[Any, ...]] = []
    for n, (claim, key) in enumerate(zip(claims, keys, strict=True)):
        if n in taken:
            rows.append((claim.position, *key, claim.metadata, now, session, bounds.get(key)))
        elif n >= len(kept) or (row := kept[n]) is None or row["metadata"] != claim.metadata:
            rows.append((claim.position, *key, claim.metadata, None, None, None))
    if rows:
        statements.insert(_ROWS, rows)


_STORED = """
    SELECT
        rows.position, rows.ticket, rows.content, rows.metadata,
        rows.scores IS NOT NULL AS scored,
        answers.ticket IS NOT NULL AS answered,
        answers.error_type
    FROM rows
    LEFT JOIN answers USING (ticket)
    WHERE rows.position BETWEEN ? AND ?
    ORDER BY rows.position
"""

# CROSS JOIN has the rows in their order.
_SETTLED_CHUNK = """
    SELECT
        group_concat(rows.position),
        CAST(group_concat(rows.content, '') AS BLOB),
        group_concat(ifnull(rows.metadata, ''), char(0))
    FROM rows
    CROSS JOIN answers USING (ticket)
    WHERE rows.position BETWEEN :first AND :last AND CASE
        WHEN answers.error_type IS NOT NULL THEN NOT :retry_failed
        ELSE rows.scores IS NOT NULL OR NOT :scored
    END
"""

_ROWS = "INSERT OR REPLACE INTO rows (position, content, ticket, metadata, asked_at, session, cost_bound_usd)"

_BEFORE = """
    WITH asked (content) AS (VALUES {}), place (position) AS (VALUES (?))
    SELECT rows.content, rows.ticket
    FROM asked, place
    JOIN rows ON rows.position = (
        SELECT min(position) FROM rows WHERE content = asked.content AND position < place.position
    )
"""

_ASKED_BEFORE = """
    WITH asked (content) AS (VALUES {}), at_work (session, until) AS (VALUES (?, ?))
    SELECT asked.content
    FROM asked, at_work
    WHERE EXISTS (
        SELECT 1
        FROM rows
        WHERE rows.content = asked.content
            AND rows.session = at_work.session
            AND rows.position < ifnull(at_work.until, rows.position + 1)
    )
"""
