"""The ledger of a quota that several processes share: who draws how much of it, and when. No clock, no lock, no I/O.

A process draws a slice: as much as the requests take that wait in it, but no more than what comes in within
`SLICE_S`, so that the others have their turn. It is to be used within `LEASE_S`, and the ledger counts it from the end
of that time on: in no window do the slices of all processes exceed the limit, whatever becomes of a process. What a
slice turns out not to need is given back. Who finds too little gets a ticket, and tickets are served in order; one
that is not shown again within `TICKET_S` belongs to a process that is gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import orjson

from runner.bucket import DAY_S, Bucket, Limit
from runner.quota import Reading

LEASE_S = 0.2
SLICE_S = 0.1
POLL_S = 0.05
TICKET_S = 1.0
LONGEST_POLL_S = 0.25
"""How often a process that waits shows its ticket, however long there is nothing for it."""


class Return(NamedTuple):
    """What comes back of slices drawn ``at`` one time; below zero it is a debt."""

    at: float
    amounts: Sequence[float]
    sent: bool  # whether the provider knows of the requests


class Heard(NamedTuple):
    """What an answer's headers said."""

    number: int  # of the limit, from 0
    remaining: float
    reset_s: float | None
    charged: float  # what was in the window when the request was granted
    at: float  # when that was


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What a process tells and asks, at once."""

    holder: str  # the process
    returns: Sequence[Return] = ()
    heard: Sequence[Heard] = ()
    pause_s: float = 0.0
    reason: str = ""
    need: Sequence[float] | None = None  # the least that is of use; None: nothing is
    want: Sequence[float] = ()  # what all take that wait
    version: int = 0  # of the ledger when this process saw it last
    seen: Sequence[float] = ()  # what was in the windows then


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """What a process gets."""

    amounts: Sequence[float] | None  # None: nothing
    at: float  # the ledger's time
    charged: Sequence[float]  # in the windows, by all processes
    wait_s: float = 0.0  # until there is something, as far as one can tell
    ask_again_s: float = 0.0
    paused_s: float = 0.0
    reason: str = ""
    version: int
    lost: bool = False  # the ledger had forgotten what this process knew


class SharedQuota(Protocol):
    """Where the ledger is kept. Used from one thread at a time."""

    limits: Sequence[Limit]

    def exchange(self, order: Order) -> Slice:
        """Carry out ``order``, all of it or nothing.

        Raises:
            OSError: The ledger cannot be reached; the message names it.
        """
        ...

    def close(self) -> None:
        """Free the connection. Another exchange opens a new one."""
        ...


@dataclass(slots=True)
class Ledger:
    """The state, and what an order does to it."""

    limits: Sequence[Limit]
    version: int = 0
    _paused_until: float = 0.0
    _reason: str = ""
    _tickets: dict[str, float] = field(default_factory=dict)  # when they were shown last, by holder; the first is next
    _stored: dict[str, Any] = field(default_factory=dict)  # buckets by name, those of other processes' limits too

    def exchange(self, order: Order, now: float) -> Slice:
        buckets = [self._bucket(limit) for limit in self.limits]
        for bucket in buckets:
            bucket.update(now)
        lost = order.version > self.version
        if lost:
            self._recover(buckets, order.seen, now)
        self.version = max(self.version, order.version) + 1
        for back in order.returns:
            for bucket, amount in zip(buckets, back.amounts, strict=True):
                bucket.give_back(0.0, amount, back.at, now, sent=back.sent)
        for heard in order.heard:
            reading = Reading(kind="", remaining=heard.remaining, limit=None, reset_s=heard.reset_s)
            buckets[heard.number].sync(reading, heard.charged, heard.at, now)
        if now + order.pause_s > max(now, self._paused_until):
            self._paused_until, self._reason = now + order.pause_s, order.reason
        drawn = self._draw(buckets, order, now)
        self._stored |= {bucket.name: bucket.dump() for bucket in buckets}
        paused_s = max(0.0, self._paused_until - now)
        return Slice(
            amounts=drawn.amounts,
            at=now,
            charged=[bucket.charged for bucket in buckets],
            wait_s=drawn.wait_s,
            ask_again_s=drawn.ask_again_s,
            paused_s=paused_s,
            reason=self._reason if paused_s else "",
            version=self.version,
            lost=lost,
        )

    def dump(self) -> bytes:
        return orjson.dumps([self.version, self._paused_until, self._reason, self._tickets, self._stored])

    def load(self, state: bytes) -> None:
        """Take up what `dump` wrote.

        Raises:
            ValueError: It did not.
        """
        self.version, self._paused_until, self._reason, self._tickets, self._stored = orjson.loads(state)

    def _bucket(self, limit: Limit) -> Bucket:
        bucket = Bucket(limit, least_burst_s=2 * LEASE_S, lease_s=LEASE_S)
        if limit.name in self._stored:
            bucket.load(self._stored[limit.name])
        return bucket

    def _recover(self, buckets: Sequence[Bucket], seen: Sequence[float], now: float) -> None:
        """Assume the worst of what was forgotten: that the minute is used up; and of the day, what was in it last."""
        for bucket, charged in zip(buckets, seen, strict=True):
            if bucket.window_s < DAY_S:
                bucket.exhaust(now)
            elif charged > bucket.charged:
                bucket.take(charged - bucket.charged, now)

    def _draw(self, buckets: Sequence[Bucket], order: Order, now: float) -> _Drawn:
        self._tickets = {holder: seen for holder, seen in self._tickets.items() if now - seen <= TICKET_S}
        if order.need is None:
            self._tickets.pop(order.holder, None)
            return _Drawn(None)
        if now < self._paused_until:
            return _Drawn(None, ask_again_s=self._paused_until - now)
        if next(iter(self._tickets), order.holder) != order.holder:
            self._tickets[order.holder] = now
            wait_s = max(b.wait_s(cost, now, is_next=False) for b, cost in zip(buckets, order.need, strict=True))
            return _Drawn(None, wait_s=wait_s, ask_again_s=POLL_S)
        amounts = _slice(buckets, order.need, order.want, now)
        wait_s = max(bucket.wait_s(amount, now) for bucket, amount in zip(buckets, amounts, strict=True))
        if wait_s > 0:
            self._tickets[order.holder] = now
            return _Drawn(None, wait_s=wait_s, ask_again_s=min(wait_s, LONGEST_POLL_S))
        self._tickets.pop(order.holder, None)
        for bucket, amount in zip(buckets, amounts, strict=True):
            bucket.take(amount, now)
        return _Drawn(amounts)


def _slice(buckets: Sequence[Bucket], need: Sequence[float], want: Sequence[float], now: float) -> list[float]:
    """The part of ``want`` that comes in within `SLICE_S`, or is left of the day; but all of ``need``."""
    part = 1.0
    for bucket, amount in zip(buckets, want, strict=True):
        if amount > 0:
            most = bucket.rate * SLICE_S if bucket.window_s < DAY_S else bucket.room(now)
            part = max(0.0, min(part, most / amount))
    return [max(least, part * amount) for least, amount in zip(need, want, strict=True)]


class _Drawn(NamedTuple):
    amounts: Sequence[float] | None
    wait_s: float = 0.0
    ask_again_s: float = 0.0
