"""The pool: answers that are there already, by what they answer, for rows that have none. Each is handed out once."""

from __future__ import annotations

from collections.abc import Sequence

from runner.database import Statements

_MOST = 1000
"""How many answers to the same thing are looked at for a chunk of rows."""


class Pool:
    """What a store held before the session's own answers came. Belongs to the database's thread.

    It takes the place of an index of what answers answer, which would have to be kept up to date all the time and is
    wanted only where a dataset was changed. It is made when the first row without an answer is looked up, in a
    temporary table, which goes with the connection.

    Args:
        session: The first one has no earlier answers. None: of a store that is only read, every answer can be had.
    """

    def __init__(self, session: int | None) -> None:
        self._session = session
        self._beyond = 0
        self._changed_from: int | None = None

    def go_on(self, position: int, *, changed_from: int | None = None) -> None:
        """Rows before ``position`` have their answers; those from ``changed_from`` on give theirs up."""
        self._beyond = position
        if self._changed_from is None:
            self._changed_from = changed_from

    def take(self, statements: Statements, contents: Sequence[bytes], *, failed: bool = False) -> list[int | None]:
        """For each of ``contents``, the ticket of an answer to it, or None where there is none, or no more.

        Answers that no row has come first, then those of the last rows, which are asked in their turn instead.

        Args:
            failed: Failures, and no answers.
        """
        if self._session == 1 or not contents:
            return [None] * len(contents)
        first = self._beyond if self._changed_from is None else self._changed_from
        self._fill(statements, first)
        distinct = list(dict.fromkeys(contents))
        sql = _FIND.format(", ".join(["(?)"] * len(distinct)))
        tickets: dict[bytes, list[int]] = {}
        for content, ticket in statements.fetch(sql, (*distinct, failed, first, _MOST)):
            tickets.setdefault(content, []).append(ticket)
        taken = [found.pop() if (found := tickets.get(content)) else None for content in contents]
        statements.executemany(
            "DELETE FROM pool WHERE ticket = ?", [(ticket,) for ticket in taken if ticket is not None]
        )
        return taken

    def _fill(self, statements: Statements, first: int) -> None:
        # The table is made outside of the transaction. Its index, and what is in it, go with one that fails.
        if statements.fetch("SELECT 1 FROM temp.sqlite_master WHERE name = 'pool_by_content'"):
            return
        statements.execute(_TABLE)
        if self._session is not None:
            statements.execute(_FILL_FROM_ROWS, (first,))
        statements.execute(_FILL_WITHOUT_ROWS if self._session is not None else _FILL)
        statements.execute("CREATE INDEX temp.pool_by_content ON pool (content, failed, position DESC)")


_TABLE = """
    CREATE TEMP TABLE IF NOT EXISTS pool (
        ticket   INTEGER PRIMARY KEY,
        content  BLOB NOT NULL,
        failed   INTEGER NOT NULL,
        position INTEGER NOT NULL -- of a row that has it; where there is none, beyond every row
    )
"""

_FILL_FROM_ROWS = """
    INSERT OR IGNORE INTO pool
    SELECT answers.ticket, answers.content, answers.error_type IS NOT NULL, rows.position
    FROM rows
    JOIN answers USING (ticket)
    WHERE rows.position >= ?
"""

_FILL = "INSERT INTO pool SELECT ticket, content, error_type IS NOT NULL, 1 << 62 FROM answers"

_FILL_WITHOUT_ROWS = f"{_FILL} WHERE ticket NOT IN (SELECT ticket FROM rows)"

# Those to be handed out first come last.
_FIND = """
    SELECT pool.content, pool.ticket
    FROM (VALUES {}) AS asked
    JOIN pool ON pool.ticket IN (
        SELECT best.ticket
        FROM pool AS best
        WHERE best.content = asked.column1 AND best.failed = ? AND best.position >= ?
        ORDER BY best.position DESC, best.ticket
        LIMIT ?
    )
    ORDER BY pool.position, pool.ticket DESC
"""
