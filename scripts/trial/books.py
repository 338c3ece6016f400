"""The books of a run: what its results.sqlite says was asked, answered and paid."""

from __future__ import annotations

import json
import shutil
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

WAITING = 256
"""Answers that may wait for their commit."""

ROUNDING_USD = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Books:
    """What a run has entered. Contents are what the rows ask, as the store knows them.

    What a killed session had taken up and not answered counts as one attempt, as the next session will book it.
    """

    rows: Sequence[tuple[int, bytes, str]] = ()  # position, content, name
    answers: Mapping[bytes, int]  # good ones, by content
    attempts: Mapping[bytes, int]  # others, by content
    at_least_usd: float = 0.0
    bounds_usd: float = 0.0  # of the attempts whose cost is unknown
    without_bound: int = 0  # attempts of unknown cost that have none
    elapsed_s: float = 0.0  # of all sessions
    is_closed: bool = True  # the last session has said that it ended
    trouble: str | None = None  # what SQLite has against the file

    @property
    def at_most_usd(self) -> float:
        return self.at_least_usd + self.bounds_usd

    def booked(self, content: bytes) -> int:
        """How often its books allow that it was asked."""
        return self.answers.get(content, 0) + self.attempts.get(content, 0)


def read_books(path: Path) -> Books:
    """The books in ``path`` as the last session left them. The file is left alone: to open it would tidy it up."""
    if not path.is_file():
        return Books(answers={}, attempts={})
    with tempfile.TemporaryDirectory(prefix="books-") as aside:
        for each in path.parent.glob(f"{path.name}*"):
            shutil.copy(each, aside)
        with closing(sqlite3.connect(Path(aside, path.name))) as database:
            if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'attempts'").fetchone():
                return Books(answers={}, attempts={})
            return _read(database)


def _read(database: sqlite3.Connection) -> Books:
    [verdict] = database.execute("PRAGMA integrity_check(1)").fetchone()
    rows = database.execute("SELECT position, content, metadata FROM rows ORDER BY position").fetchall()
    at_least, bounds, without_bound = database.execute(_COSTS).fetchone()
    [elapsed_s] = database.execute("SELECT total(last_seen - started_at) FROM sessions").fetchone()
    last = database.execute("SELECT ended_at FROM sessions ORDER BY id DESC LIMIT 1").fetchone()
    return Books(
        rows=[
            (position, content, json.loads(metadata or "{}").get("name", "")) for position, content, metadata in rows
        ],
        answers=dict(database.execute(_ANSWERS).fetchall()),
        attempts=Counter(dict(database.execute(_ATTEMPTS).fetchall())),
        at_least_usd=at_least,
        bounds_usd=bounds,
        without_bound=without_bound,
        elapsed_s=elapsed_s,
        is_closed=last is None or last[0] is not None,
        trouble=None if verdict == "ok" else verdict,
    )


_IN_FLIGHT = """
    rows.session = (SELECT max(id) FROM sessions WHERE ended_at IS NULL)
    AND rows.session = (SELECT max(id) FROM sessions)
    AND NOT EXISTS (SELECT 1 FROM answers WHERE answers.ticket = rows.ticket)
"""

_COSTS = f"""
    WITH attempt (cost_usd, bound_usd) AS (
        SELECT cost_usd, cost_bound_usd FROM answers
        UNION ALL
        SELECT cost_usd, cost_bound_usd FROM attempts
        UNION ALL
        SELECT NULL, cost_bound_usd FROM rows WHERE {_IN_FLIGHT}
    )
    SELECT
        total(cost_usd),
        total(bound_usd) FILTER (WHERE cost_usd IS NULL),
        count(*) FILTER (WHERE cost_usd IS NULL AND bound_usd IS NULL)
    FROM attempt
"""

_ANSWERS = "SELECT content, count(*) FROM answers WHERE error_type IS NULL GROUP BY content"

_ATTEMPTS = f"""
    WITH attempt (content) AS (
        SELECT content FROM answers WHERE error_type IS NOT NULL
        UNION ALL
        SELECT content FROM attempts
        UNION ALL
        SELECT content FROM rows WHERE {_IN_FLIGHT}
    )
    SELECT content, count(*) FROM attempt GROUP BY content
"""
