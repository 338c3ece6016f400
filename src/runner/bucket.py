"""Buckets: what may still be used of a provider's quotas. Bookkeeping only: no clock, no lock, no I/O.

Times are seconds on any one clock, and never matter but by their differences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from runner.quota import Reading

MINUTE_S = 60.0
DAY_S = 86_400.0

SPANS = 240
"""Spans of time that a window is divided into; what was taken leaves it a span at a time."""

TRAVEL_S = 0.25
"""By how much one request may be longer under way to the provider than another. A window is kept for so much longer,
so that it holds where the requests arrive and not only where they were granted."""

HEARD_S = 5.0
"""How long a provider's word on what is left stands as it is; then what it does not leave us comes back steadily."""

_BURST_SHARE = 0.02
"""Default burst, as a share of the limit."""

ROUNDING = 1e-9
"""Share of a limit by which sums of floats may be wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """So much of one thing in one window."""

    name: str  # as the configuration calls it: rpm, tpm, …
    amount: float
    window_s: float
    burst: float | None = None  # what may go out at once; None: 2 % of the amount, at least 1


class Charge(NamedTuple):
    """What a request was charged, in each of the buckets."""

    at: float  # when
    costs: Sequence[float]
    charged: Sequence[float]  # what was in the window of each bucket then, this included


class Bucket:
    """One quota. A level that fills up steadily paces what is taken, a log of the last window keeps it to the limit.

    Args:
        limit: What it holds.
        least_burst_s: The burst is at least what comes in so many seconds.
        lease_s: How long after `take` the amount may be used, where it is taken in advance.
    """

    __slots__ = (
        "_ceiling",
        "_foreign",
        "_foreign_at",
        "_foreign_s",
        "_keep_s",
        "_spans",
        "_synced",
        "_updated",
        "_width_s",
        "burst",
        "charged",
        "level",
        "limit",
        "name",
        "rate",
        "window_s",
    )

    def __init__(self, limit: Limit, *, least_burst_s: float = 0.0, lease_s: float = 0.0) -> None:
        self.name = limit.name
        self.limit = limit.amount
        self.window_s = limit.window_s
        self.rate = limit.amount / limit.window_s
        burst = max(1.0, limit.amount * _BURST_SHARE) if limit.burst is None else limit.burst
        self.burst = min(limit.amount, max(burst, self.rate * least_burst_s))
        self.level = self.burst
        self.charged = 0.0  # in the window
        self._keep_s = limit.window_s + TRAVEL_S + lease_s
        self._width_s = limit.window_s / SPANS
        self._ceiling = self.burst
        self._updated = 0.0
        self._spans: dict[int, float] = {}  # what was charged, by number of the span; oldest first
        self._foreign = 0.0  # what the provider does not leave us of our limit, when it was last heard
        self._foreign_at = 0.0
        self._foreign_s = 0.0  # how long until that is over
        self._synced = -1.0  # when the request was granted whose headers were heard last

    def wait_s(self, cost: float, now: float, *, is_next: bool = True) -> float:
        """Seconds until ``cost`` can be taken. One that exceeds the burst is saved up for, if it is the next."""
        self.update(now)
        if is_next:
            self._ceiling = max(self.burst, cost)
        pace_s = (cost - self.level) / self.rate if cost > self.level else 0.0
        excess = self.charged + cost - self.limit
        if self._foreign:
            excess += self.foreign(now)
        if excess <= ROUNDING * self.limit:
            return pace_s
        return max(pace_s, self._room_s(excess, now))

    def room(self, now: float) -> float:
        """What can be taken at once."""
        return min(self.level, self.limit - self.charged - self.foreign(now))

    def take(self, cost: float, now: float) -> None:
        """Charge ``cost``, whether there is room for it or not."""
        span = int(now / self._width_s)
        self._spans[span] = self._spans.get(span, 0.0) + cost
        self.charged += cost
        self.level -= cost
        self._ceiling = self.burst

    def recall(self, cost: float, at: float) -> None:
        """Charge what was taken before there was this bucket, as far as there is room: the limit was kept then too.

        What came before that which is charged already counts in its window, and no more for the pace.
        """
        if not self._spans or at >= self._updated:
            self.update(at)
        cost = min(cost, max(0.0, self.limit - self.charged))
        if at >= self._updated:
            self.take(cost, at)
        elif at > self._updated - self.window_s:
            span = int(at / self._width_s)
            self._spans = dict(sorted({**self._spans, span: self._spans.get(span, 0.0) + cost}.items()))
            self.charged += cost

    def give_back(self, cost: float, amount: float, taken_at: float, now: float, *, sent: bool = True) -> None:
        """Take ``amount`` off a charge; below zero it is a debt. What has left the window is too late to be used.

        Args:
            cost: The charge.
            taken_at: When it was taken.
            sent: Whether the provider knows of the request. Then what it says to have left includes the charge, and
                what comes back is believed when its headers say so.
        """
        self.update(now)
        amount = max(amount, cost - self.limit)  # a debt beyond the limit is a server's nonsense
        span = int(taken_at / self._width_s)
        if span not in self._spans:
            self.level += min(0.0, amount)
            return
        self._spans[span] -= amount
        self.charged -= amount
        self.level = min(self.level + amount, self.limit)
        if sent and amount > 0 and now < self._foreign_at + self._foreign_s:
            self._foreign = min(self._foreign + amount, self.limit)

    def sync(self, reading: Reading, charged: float, taken_at: float, now: float) -> None:
        """Believe the provider where it leaves less than the bucket does.

        What it says is held against what was charged when the request was granted: what was granted since, and is
        perhaps still under way, stays charged beside it. Of two readings that of the later request counts, whichever
        comes first. However much the provider leaves, what the bucket charged by itself stays charged.

        Args:
            charged: What was in the window when the request was granted.
            taken_at: When that was.
        """
        if taken_at < self._synced:
            return
        self.update(now)
        self._synced = taken_at
        reset_s = self.window_s if reading.reset_s is None else min(reading.reset_s, self.window_s)
        self._foreign = min(max(0.0, self.limit - charged - reading.remaining), self.limit)
        self._foreign_at, self._foreign_s = now, reset_s

    def foreign(self, now: float) -> float:
        """What the provider does not leave us; nothing after the time at which it said that all is there again."""
        left_s = self._foreign_at + self._foreign_s - now
        if left_s <= 0:
            return 0.0
        return self._foreign * min(1.0, left_s / max(1e-9, self._foreign_s - HEARD_S))

    def resize(self, amount: float) -> None:
        """Another limit, as the provider says."""
        self.limit = self.burst = amount
        self.rate = amount / self.window_s

    def exhaust(self, now: float) -> None:
        """Count the whole window as used up: what happened in it is not known."""
        self.take(self.limit, now)

    def update(self, now: float) -> None:
        """Let time pass."""
        if now == self._updated:
            return
        if now > self._updated:
            filled = min(self._ceiling, self.level + (now - self._updated) * self.rate)
            self.level = max(self.level, filled)
        self._updated = now
        last = int((now - self._keep_s) / self._width_s) - 1  # that has left the window
        while self._spans and (first := next(iter(self._spans))) <= last:
            self.charged -= self._spans.pop(first)
        if not self._spans:
            self.charged = 0.0  # rounding adds up

    def dump(self) -> list[Any]:
        """All that changes, as plain values; `load` takes it up again."""
        return [
            self.level,
            self._ceiling,
            self._updated,
            self._synced,
            self._foreign,
            self._foreign_at,
            self._foreign_s,
            list(self._spans),
            list(self._spans.values()),
        ]

    def load(self, state: Sequence[Any]) -> None:
        self.level, self._ceiling, self._updated, self._synced = state[:4]
        self._foreign, self._foreign_at, self._foreign_s, spans, amounts = state[4:]
        self._spans = dict(zip(spans, amounts, strict=True))
        self.charged = math.fsum(amounts)

    def _room_s(self, excess: float, now: float) -> float:
        """Seconds until so much has left the window."""
        all_back_s = max(0.0, self._foreign_at + self._foreign_s - now)
        foreign = self.foreign(now)
        back_s = math.inf if foreign < excess else all_back_s * (1 - (foreign - excess) / self._foreign)
        excess -= ROUNDING * self.limit
        for span, amount in self._spans.items():
            excess -= amount
            if excess <= 0:
                return min(back_s, (span + 1) * self._width_s + self._keep_s - now)
        return min(back_s, all_back_s)


class Buckets:
    """Several quotas, taken from together: from all of them, or from none.

    Costs are given in the order of the limits. Those of a request that came before a limit was adopted lack its own.
    """

    def __init__(self, limits: Sequence[Limit], *, least_burst_s: float = 0.0) -> None:
        self._buckets = [Bucket(limit, least_burst_s=least_burst_s) for limit in limits]

    def attach(self, drawer: object) -> None:
        """It has at hand all that there is."""

    def wait_s(self, costs: Sequence[float], now: float) -> float:
        """Seconds until all ``costs`` can be taken."""
        longest = 0.0
        for bucket, cost in zip(self._buckets, costs, strict=False):
            wait_s = bucket.wait_s(cost, now)
            if wait_s > longest:
                longest = wait_s
        return longest

    def take(self, costs: Sequence[float], now: float) -> Charge:
        for bucket, cost in zip(self._buckets, costs, strict=False):
            bucket.take(cost, now)
        return Charge(now, costs, [bucket.charged for bucket in self._buckets])

    def recall(self, costs: Sequence[float], at: float, now: float) -> None:
        for bucket, cost in zip(self._buckets, costs, strict=False):
            if now - at <= bucket.window_s:
                bucket.recall(cost, at)

    def give_back(self, charge: Charge, amounts: Sequence[float], now: float, *, sent: bool = True) -> None:
        for bucket, cost, amount in zip(self._buckets, charge.costs, amounts, strict=False):
            bucket.give_back(cost, amount, charge.at, now, sent=sent)

    def sync(self, index: int, reading: Reading, charge: Charge, now: float) -> None:
        # A limit that was adopted since had charged nothing then.
        charged = charge.charged[index] if index < len(charge.charged) else 0.0
        self._buckets[index].sync(reading, charged, charge.at, now)

    def adopt(self, index: int, limit: Limit) -> None:
        """Keep a limit that nobody configured, as the provider says it is; its burst is all of it."""
        if index == len(self._buckets):
            self._buckets.append(Bucket(limit))
        else:
            self._buckets[index].resize(limit.amount)

    def pause(self, seconds: float, reason: str, now: float) -> None:
        """The limiter above knows how long; there is nobody else to tell."""
