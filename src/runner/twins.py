"""Twins: copies of one answer, in several runs or under several limits. Rows of one store have one of them at most."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from runner.answers import Outcome
from runner.database import Statements


class Twin(NamedTuple):
    """What the copies of an answer have in common, and no two answers to the same thing."""

    content: bytes  # as the store that looks for it asks it
    service_time_s: float
    end_to_end_s: float

    @classmethod
    def of(cls, answer: Outcome, content: bytes) -> Twin:
        return cls(content, answer.service_time_s, answer.end_to_end_s)


class Twins:
    """The answers that a store has, by which it knows their copies. Belongs to the database's thread.

    Without it an answer would come a second time from elsewhere: by way of another run that took it over, or in a
    later session, which does not know what the last one was handed out. In a temporary table, as the pool.
    """

    def enter(self, statements: Statements, answers: Mapping[int, Twin]) -> list[int]:
        """Enter answers, each by a number; returns the numbers of those that were there already."""
        self._fill(statements)
        sql = _FIND.format(", ".join(["(?, ?, ?)"] * len(answers)))
        values = [value for answer in answers.values() for value in answer]
        known = {Twin._make(row) for row in statements.fetch(sql, values)}
        again = []
        new = []
        for n, answer in answers.items():
            if answer in known:
                again.append(n)
            else:
                new.append(answer)
                known.add(answer)
        statements.executemany("INSERT INTO twins VALUES (?, ?, ?)", new)
        return again

    def _fill(self, statements: Statements) -> None:
        # The table is made outside of the transaction. Its index, and what is in it, go with one that fails.
        if statements.fetch("SELECT 1 FROM temp.sqlite_master WHERE name = 'twins_by_content'"):
            return
        statements.execute(_TABLE)
        statements.execute(_FILL)
        statements.execute("CREATE INDEX temp.twins_by_content ON twins (content, service_time_s, end_to_end_s)")


_TABLE = "CREATE TEMP TABLE IF NOT EXISTS twins (content BLOB, service_time_s REAL, end_to_end_s REAL)"

_FILL = "INSERT INTO twins SELECT content, service_time_s, end_to_end_s FROM answers WHERE error_type IS NULL"

# CROSS JOIN looks up each of those that are asked for.
_FIND = """
    SELECT DISTINCT twins.content, twins.service_time_s, twins.end_to_end_s
    FROM (VALUES {}) AS asked
    CROSS JOIN twins
        ON twins.content = asked.column1
        AND twins.service_time_s = asked.column2
        AND twins.end_to_end_s = asked.column3
"""
