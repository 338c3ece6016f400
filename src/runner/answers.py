"""Answers: what came of each row, and the ledger of every other attempt that was made for it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any, NamedTuple, TypeAlias

from runner.database import Statements
from runner.types import Attempt

Key: TypeAlias = tuple[bytes, int]
"""What is asked, and the ticket of its answer."""


WAS_SENT = "(error_type IS NULL OR error_type = 'GivenUp' OR error_status IS NOT NULL OR cost_usd IS NOT 0)"
"""Of ``answers`` and ``attempts``, in SQL: an error without a status that costs nothing for certain ended an attempt
that never reached a server."""

_CHOICE_TRUNCATED = '"finish_reason":"length"'

TRUNCATED = f"(answers.finish_reason = 'length' OR instr(answers.details, '{_CHOICE_TRUNCATED}') > 0)"
"""Of ``answers``, in SQL, what `Outcome.is_truncated` says."""


class Outcome(NamedTuple):
    """What came of a row: the columns of ``answers``, in their order, as they are inserted. See schema.sql."""

    ticket: int
    content: bytes
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
    cost_bound_usd: float | None = None
    embedding: bytes | None = None
    reused_from: str | None = None
    shared: bool = False

    @property
    def is_truncated(self) -> bool:
        """Whether the answer, or one of several choices, was cut off at the limit on its length."""
        return self.finish_reason == "length" or _CHOICE_TRUNCATED in (self.details or "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """An attempt that did not become a row's outcome: the columns of ``attempts``, in their order. See schema.sql."""

    content: bytes
    number: int | None = None
    deployment: str | None = None
    started_at: float | None = None
    service_time_s: float | None = None
    error_type: str
    error_message: str | None = None
    error_status: int | None = None
    cost_usd: float | None = None
    cost_bound_usd: float | None = None
    shared: bool = False

    @classmethod
    def of(cls, key: Key, attempt: Attempt, cost_bound_usd: float | None, *, shared: bool = False) -> Entry:
        return cls(
            content=key[0],
            number=attempt.number,
            deployment=attempt.deployment,
            started_at=attempt.started_at,
            service_time_s=attempt.service_time_s,
            error_type=attempt.error,
            error_message=attempt.message,
            error_status=attempt.status,
            cost_usd=attempt.cost_usd,
            cost_bound_usd=cost_bound_usd if attempt.cost_usd is None else None,
            shared=shared,
        )

    @classmethod
    def lost(cls, key: Key, cost_bound_usd: float | None, *, shared: bool = False) -> Entry:
        """An attempt whose outcome is not known, as it is given up now."""
        return cls(
            content=key[0],
            started_at=time.time(),
            error_type="Lost",
            cost_bound_usd=cost_bound_usd,
            shared=shared,
        )


# Each of these is a step of a transaction.


def put_answers(statements: Statements, outcomes: Sequence[Outcome]) -> None:
    """Enter what came of rows, in the place of what was known of them."""
    _put(statements, _PUT_ANSWERS, outcomes)


def put_attempts(statements: Statements, entries: Sequence[Entry]) -> None:
    _put(statements, _PUT_ATTEMPTS, list(map(_ENTRY, entries)))


def move_to_ledger(statements: Statements, tickets: Iterable[int]) -> None:
    """Make the outcomes of rows that are asked again attempts among others: what they cost was paid."""
    chosen = [(ticket,) for ticket in tickets]
    statements.executemany(f"{_MOVE} WHERE reused_from IS NULL AND ticket = ?", chosen)
    statements.executemany("DELETE FROM answers WHERE ticket = ?", chosen)


def move_all_to_ledger(statements: Statements) -> None:
    """Give up every answer."""
    statements.execute(f"{_MOVE} WHERE reused_from IS NULL")
    statements.execute("DELETE FROM answers")


def enter_lost(statements: Statements) -> None:
    """Enter what the last session had taken up and not answered when it was killed: it may have been paid for."""
    killed = statements.fetch("SELECT id FROM sessions WHERE ended_at IS NULL ORDER BY id DESC LIMIT 1")
    last = statements.fetch("SELECT max(id) FROM sessions")
    if killed and killed[0][0] == last[0][0]:
        statements.execute(_ENTER_LOST, (killed[0][0],))


def read_answers(statements: Statements, tickets: Sequence[int]) -> list[Outcome]:
    """Those of the answers with these tickets that are a success."""
    columns = ", ".join(_ANSWER_COLUMNS)
    marks = ", ".join("?" * len(tickets))
    sql = f"SELECT {columns} FROM answers WHERE error_type IS NULL AND ticket IN ({marks})"
    return [Outcome._make(row) for row in statements.fetch(sql, tickets)]


def _put(statements: Statements, into: str, rows: Sequence[tuple[Any, ...]]) -> None:
    if not rows:
        return
    try:
        statements.insert(into, rows)
    except UnicodeEncodeError:
        statements.insert(into, [tuple(map(_encodable, row)) for row in rows])


def _encodable(value: Any) -> Any:
    """Text without the lone surrogates that a model may write, and that UTF-8 has no form for."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


_ANSWER_COLUMNS = Outcome._fields
_PUT_ANSWERS = f"INSERT OR REPLACE INTO answers ({', '.join(_ANSWER_COLUMNS)})"

_ENTRY_COLUMNS = tuple(field.name for field in fields(Entry))
_ENTRY = attrgetter(*_ENTRY_COLUMNS)
_PUT_ATTEMPTS = f"INSERT INTO attempts ({', '.join(_ENTRY_COLUMNS)})"

_MOVE = f"""
    {_PUT_ATTEMPTS}
    SELECT
        content, retries + 1, deployment, settled_at - service_time_s, service_time_s,
        coalesce(error_type, 'GivenUp'), error_message, error_status, cost_usd, cost_bound_usd,
        shared
    FROM answers
"""

_ENTER_LOST = """
    INSERT INTO attempts (content, started_at, error_type, cost_bound_usd)
    SELECT rows.content, max(rows.asked_at, sessions.last_seen), 'Lost', rows.cost_bound_usd
    FROM rows
    JOIN sessions ON sessions.id = rows.session
    LEFT JOIN answers USING (ticket)
    WHERE rows.session = ? AND answers.ticket IS NULL
"""
