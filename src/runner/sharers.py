"""Sharers: rows that have the answer of another one, which was asked for it, and are done once it is there."""

from __future__ import annotations

from collections.abc import Iterable

from runner.metrics import Meter


class Sharers:
    """Counts them, in memory that grows with what is being asked and not with the rows."""

    def __init__(self, meter: Meter) -> None:
        self.count = 0
        self._meter = meter
        self._waiting: dict[int, int] = {}  # by the ticket of an answer that is to come: who shares it

    def expect(self, tickets: Iterable[int]) -> None:
        """The answers with these tickets are to come."""
        self._waiting.update(dict.fromkeys(tickets, 0))

    def join(self, tickets: Iterable[int]) -> None:
        """Rows share the answers with these tickets, one row for each."""
        for ticket in tickets:
            self.count += 1
            if ticket in self._waiting:
                self._waiting[ticket] += 1
            else:
                self._meter.deduplicated()

    def settle(self, tickets: Iterable[int]) -> None:
        """The answers with these tickets have come, or will not come at all."""
        if self._waiting:
            self._meter.deduplicated(sum(self._waiting.pop(ticket, 0) for ticket in tickets))
