"""Claims: the rows of the dataset as it is now, looked up among the answers, and taken up where they have none."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from runner.answers import Key, Outcome, move_to_ledger, put_answers, read_answers
from runner.database import Statements


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What the store has for a claimed row."""

    occurrence: int  # which of the rows that ask this it is; 0 where they share one answer
    answered: bool  # it is not to be asked: it has its outcome, or is not wanted
    unscored_text: str | None = None  # of an answer that is to be scored
    shared: bool = False  # it has none, but an earlier row that asks the same is being asked


Elsewhere: TypeAlias = Callable[[Sequence[tuple[Any, int]]], Awaitable[Sequence[Outcome]]]
"""Finds answers outside for rows that have none, each given with its occurrence."""


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
class Lookup:
    """What the store had for the rows of a chunk before they are taken up."""

    stored: Sequence[sqlite3.Row]  # the first of them, as far as they ask what they asked before
    changed_from: int | None  # the position from which on what is stored is no longer so
    keys: Sequence[Key]  # of each
    errors: Mapping[Key, str | None]  # the error class, or None for a success, of the outcomes there are
    todo: Sequence[int]  # those to be taken up, by their place in the chunk
    shared: Set[int]  # those that wait for another one's answer
    moved: Mapping[Key, int]  # those that get the answer of a later row that asks the same, by its occurrence


def look_up(statements: Statements, claims: Sequence[Claimed], terms: Terms, *, session: int) -> Lookup | None:
    """Find out what is known of rows. None: there is nothing to do about any of them.

    The stored rows are always the beginning of one dataset. So a row that stands unchanged among them is known with
    its occurrence; from the first one that has changed on, they are forgotten and laid down anew.
    """
    if _all_settled(statements, claims, terms):
        return None
    stored = statements.fetch(_STORED, (claims[0].position, claims[-1].position))
    same = _unchanged(claims, stored)
    keys = [(claim.content, row["occurrence"]) for claim, row in zip(claims, stored[:same], strict=False)]
    keys += _new_keys(statements, claims[same:], dedupe=terms.dedupe)
    errors = {key: row["error_type"] for key, row in zip(keys, stored[:same], strict=False) if row["answered"]}
    errors |= _errors(statements, keys[same:])
    todo = [n for n, key in enumerate(keys) if key not in errors or (terms.retry_failed and errors[key] is not None)]
    if terms.wanted is not None:
        todo = [n for n in todo if terms.wanted(claims[n].position)]
    changed_from = stored[same]["position"] if same < len(stored) else None
    shared: Set[int] = frozenset()
    if terms.dedupe and todo:
        shared = _shared(statements, claims, todo, session=session, changed_from=changed_from)
    moved = {} if terms.dedupe else _moved(statements, keys, todo, session=session)
    return Lookup(
        stored=stored[:same],
        changed_from=changed_from,
        keys=keys,
        errors=errors,
        todo=[n for n in todo if n not in shared and keys[n] not in moved],
        shared=shared,
        moved=moved,
    )


def take_up(
    statements: Statements,
    claims: Sequence[Claimed],
    terms: Terms,
    lookup: Lookup | None,
    found: Sequence[Outcome],
    *,
    session: int,
    bounds: MutableMapping[Key, float | None],
) -> list[Known]:
    """Bring rows up to date after their lookup, keep the answers ``found`` elsewhere, and take up what has none.

    Enters in ``bounds`` what it takes up.
    """
    if lookup is None:
        return [_SETTLED] * len(claims)
    keys, stored, shared = lookup.keys, lookup.stored, lookup.shared
    if lookup.changed_from is not None:
        statements.execute("DELETE FROM rows WHERE position >= ?", (lookup.changed_from,))
    anew = [*(keys[n] for n in lookup.todo), *lookup.moved]
    move_to_ledger(statements, [key for key in anew if key in lookup.errors])
    statements.executemany(_MOVE, [(key[1], key[0], source) for key, source in lookup.moved.items()])
    put_answers(statements, found)
    is_found = {(outcome.content, outcome.occurrence) for outcome in found}
    errors = {**lookup.errors, **dict.fromkeys(is_found), **dict.fromkeys(lookup.moved)}
    taken = {n for n in lookup.todo if keys[n] not in is_found}

    if terms.cost_bound is not None:
        bounds.update((keys[n], terms.cost_bound(claims[n])) for n in taken)
    kept = [None if key in lookup.moved else row for key, row in zip(keys, stored, strict=False)]
    _lay_down(statements, claims, keys, kept, taken, bounds=bounds, session=session)
    scored = {n for n, (claim, row) in enumerate(zip(claims, kept, strict=False)) if row and _has_scores(claim, row)}
    unscored = {n for n, key in enumerate(keys) if terms.scored and n not in scored and errors.get(key, "") is None}
    answers = read_answers(statements, [keys[n] for n in unscored])
    texts = {(answer.content, answer.occurrence): answer.output_text for answer in answers}
    return [
        Known(
            occurrence=key[1],
            answered=n not in taken and n not in shared,
            unscored_text=texts[key] if n in unscored else None,
            shared=n in shared,
        )
        for n, key in enumerate(keys)
    ]


def _all_settled(statements: Statements, claims: Sequence[Claimed], terms: Terms) -> bool:
    """Whether there is nothing to do about any of the rows: so it is with most chunks of a run that goes on.

    Compared as a whole, in one step of SQLite, which needs no Python and leaves its lock to others.
    """
    parameters = (terms.retry_failed, terms.scored, claims[0].position, claims[-1].position)
    [(positions, contents, metadata, occurrences)] = statements.fetch(_SETTLED_CHUNK, parameters)
    return (
        not occurrences
        and contents == b"".join([claim.content for claim in claims])
        and metadata == "\0".join([claim.metadata or "" for claim in claims])
        and positions == ",".join([str(claim.position) for claim in claims])
    )


_SETTLED = Known(occurrence=0, answered=True)


def _unchanged(claims: Sequence[Claimed], stored: Sequence[sqlite3.Row]) -> int:
    """How many of the rows still ask, in their order, what is stored of them."""
    for n, (claim, row) in enumerate(zip(claims, stored, strict=False)):
        if claim.position != row["position"] or claim.content != row["content"]:
            return n
    return min(len(claims), len(stored))


def _has_scores(claim: Claimed, row: sqlite3.Row) -> bool:
    """Whether the scores of an unchanged row are those of what it is now."""
    return bool(row["scored"]) and row["metadata"] == claim.metadata


def _new_keys(statements: Statements, claims: Sequence[Claimed], *, dedupe: bool) -> list[Key]:
    """The keys of rows that are laid down anew: an occurrence is counted from the dataset's beginning."""
    if dedupe or not claims:
        return [(claim.content, 0) for claim in claims]
    contents = {claim.content for claim in claims}
    sql = _NEXT_OCCURRENCES.format(", ".join(["(?)"] * len(contents)))
    rows = statements.fetch(sql, (*contents, claims[0].position))
    following = {row["content"]: row["occurrence"] for row in rows}
    keys = []
    for claim in claims:
        keys.append((claim.content, following[claim.content]))
        following[claim.content] += 1
    return keys


def _errors(statements: Statements, keys: Sequence[Key]) -> dict[Key, str | None]:
    """The error class, or None for a success, of the outcomes there are."""
    if not keys:
        return {}
    sql = _ERRORS.format(", ".join(["(?, ?)"] * len(keys)))
    rows = statements.fetch(sql, [value for key in keys for value in key])
    return {(content, occurrence): error_type for content, occurrence, error_type in rows}


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


def _moved(statements: Statements, keys: Sequence[Key], todo: Sequence[int], *, session: int) -> dict[Key, int]:
    """Which rows in ``todo`` get an answer that an earlier session got for a later row that asks the same.

    That row may be gone. If it is still there, it is asked in its turn instead.
    """
    if not todo or session == 1:
        return {}
    last: dict[bytes, int] = {}
    for content, occurrence in keys:
        last[content] = max(last.get(content, 0), occurrence)
    contents = {keys[n][0] for n in todo}
    sql = _SPARE.format(", ".join(["(?, ?)"] * len(contents)))
    places = [value for content in contents for value in (content, last[content])]
    spare: dict[bytes, list[int]] = {}
    for row in statements.fetch(sql, (*places, _LATER, session)):
        spare.setdefault(row["content"], []).append(row["occurrence"])
    moved = {}
    for n in todo:
        if occurrences := spare.get(keys[n][0]):
            moved[keys[n]] = occurrences.pop()
    return moved


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
        rows.position, rows.content, rows.occurrence, rows.metadata,
        rows.scores IS NOT NULL AS scored,
        answers.id IS NOT NULL AS answered,
        answers.error_type
    FROM rows
    LEFT JOIN answers ON answers.content = rows.content AND answers.occurrence = rows.occurrence
    WHERE rows.position BETWEEN ? AND ?
    ORDER BY rows.position
"""

# CROSS JOIN has the rows in their order. The retry of failures is ?1, the want of scores ?2.
_SETTLED_CHUNK = """
    SELECT
        group_concat(rows.position),
        CAST(group_concat(rows.content, '') AS BLOB),
        group_concat(ifnull(rows.metadata, ''), char(0)),
        total(rows.occurrence)
    FROM rows
    CROSS JOIN answers ON answers.content = rows.content AND answers.occurrence = rows.occurrence
    WHERE rows.position BETWEEN ?3 AND ?4 AND CASE
        WHEN answers.error_type IS NOT NULL THEN NOT ?1
        ELSE rows.scores IS NOT NULL OR NOT ?2
    END
"""

_ROWS = "INSERT OR REPLACE INTO rows (position, content, occurrence, metadata, asked_at, session, cost_bound_usd)"

_ERRORS = """
    SELECT answers.content, answers.occurrence, answers.error_type
    FROM (VALUES {}) AS asked
    JOIN answers ON answers.content = asked.column1 AND answers.occurrence = asked.column2
"""

_SPARE = """
    SELECT answers.content, answers.occurrence
    FROM (VALUES {}) AS asked
    JOIN answers
        ON answers.content = asked.column1 AND answers.occurrence BETWEEN asked.column2 + 1 AND asked.column2 + ?
    WHERE answers.error_type IS NULL AND answers.settled_at < (SELECT started_at FROM sessions WHERE id = ?)
    ORDER BY answers.occurrence DESC
"""

_LATER = 1000
"""How many occurrences are looked at, where many rows ask the same."""

_MOVE = "UPDATE answers SET occurrence = ? WHERE content = ? AND occurrence = ?"

# The occurrence of each of some contents that comes at a position or after it.
_NEXT_OCCURRENCES = """
    WITH asked (content) AS (VALUES {}), place (position) AS (VALUES (?))
    SELECT asked.content, ifnull((
        SELECT rows.occurrence + 1
        FROM rows
        WHERE rows.content = asked.content AND rows.position < place.position
        ORDER BY rows.position DESC
        LIMIT 1
    ), 0) AS occurrence
    FROM asked, place
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
