"""Slices of a shared quota, as a `RateLimiter` takes from them."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace

from runner.bucket import Charge, Limit
from runner.limiter import Demand, Drawer
from runner.quota import Reading
from runner.sharing.ledger import LEASE_S, SLICE_S, Heard, Order, Return, SharedQuota, Slice

_RETURN_S = 0.1
"""How long what comes back is gathered before it is told."""

_RETRY_S = 0.5
_IDLE_S = 1.0
_LONG_WAIT_S = 1.0

_log = logging.getLogger(__name__)


class Leases:
    """A `Quota` that is drawn in slices from one that several processes share, by a thread of its own.

    A request takes from the slice that is there, without a word to the others. What is settled or refunded, what
    headers said and pauses are told with the next draw, or a little later. The thread ends when there is nothing to
    do, and begins again; what a slice still held has been given back by then.

    Where the shared quota cannot be reached nothing is taken, and its return is waited for.
    """

    def __init__(self, shared: SharedQuota) -> None:
        self._shared = shared
        self._holder = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._drawer: Drawer | None = None
        self._lock = threading.Lock()
        self._slice = _Purse(len(shared.limits))
        self._news = _News()
        self._version = 0
        self._seen: Sequence[float] = self._slice.charged
        self._ask_at = -math.inf  # the ledger has nothing for us before
        self._wait_until = -math.inf  # it will have something then
        self._trouble = ""
        self._thread: threading.Thread | None = None
        self._stirred = False  # something has happened since the thread looked
        self._asleep_until = -math.inf
        self._alarm = threading.Event()

    def attach(self, drawer: Drawer) -> None:
        self._drawer = drawer

    def wait_s(self, costs: Sequence[float], now: float) -> float:
        with self._lock:
            if self._slice.holds(costs, now):
                return 0.0
            self._stir(max(now, self._ask_at))
            wait_s = self._wait_until - now
            return wait_s if wait_s > _LONG_WAIT_S else math.inf

    def take(self, costs: Sequence[float], now: float) -> Charge:
        with self._lock:
            self._slice.take(costs)
            return Charge(self._slice.at, costs, self._slice.charged)

    def recall(self, costs: Sequence[float], at: float, now: float) -> None:
        """What others share has been counted for all of them, by whoever took it."""

    def give_back(self, charge: Charge, amounts: Sequence[float], now: float, *, sent: bool = True) -> None:
        limits = self._shared.limits  # a debt beyond the limit is a server's nonsense
        amounts = [
            max(amount, cost - limit.amount) for amount, cost, limit in zip(amounts, charge.costs, limits, strict=True)
        ]
        if any(amounts):
            with self._lock:
                self._news.add_return(charge.at, amounts, sent, now)
                self._stir(self._news.due)

    def sync(self, index: int, reading: Reading, charge: Charge, now: float) -> None:
        with self._lock:
            said = Heard(index, reading.remaining, reading.reset_s, charge.charged[index], charge.at)
            self._news.add_heard(said, now)
            self._stir(self._news.due)

    def adopt(self, index: int, limit: Limit) -> None:
        """Only what is configured is shared."""

    def pause(self, seconds: float, reason: str, now: float) -> None:
        with self._lock:
            self._news.add_pause(seconds, reason, now)
            self._stir(now)

    # The thread that draws

    def _stir(self, due: float) -> None:
        """Something has happened that the thread is to look at when it is ``due``."""
        self._stirred = True
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._draw, name="runner-limits", daemon=True)
            self._thread.start()
        elif due < self._asleep_until:
            self._alarm.set()

    def _draw(self) -> None:
        drawer = self._drawer
        assert drawer is not None
        while True:
            with self._lock:
                self._stirred = False
            demand = drawer.demand()
            now = time.monotonic()
            with self._lock:
                order, due = self._next_order(demand, now)
                if order is None:
                    if self._stirred:
                        continue
                    self._alarm.clear()
                    self._asleep_until = due
            if order is not None:
                self._exchange(order, drawer)
                continue
            rung = self._alarm.wait(min(max(0.0, due - now), _IDLE_S))
            with self._lock:
                self._asleep_until = -math.inf
                if due == math.inf and not rung and not self._stirred:
                    self._thread = None
                    break
        self._shared.close()

    def _next_order(self, demand: Demand | None, now: float) -> tuple[Order | None, float]:
        """What there is to tell and to ask now, or when there will be something."""
        order = Order(holder=self._holder, version=self._version, seen=self._seen)
        if self._trouble:  # see whether it is over, without anything that could be lost
            return (order, now) if now >= self._ask_at else (None, self._ask_at)
        draws = demand is not None and not self._slice.holds(demand.need, now)
        spent = self._slice.until if self._slice.has_some else math.inf
        due = min(self._ask_at if draws else math.inf, self._news.due, spent)
        if due > now:
            return None, due
        draws = draws and self._ask_at <= now
        if (draws or spent <= now) and (left := self._slice.empty()):
            self._news.add_return(self._slice.at, left, False, now)
        order = self._news.told(order, now)
        if draws and demand is not None:
            soon = self._slice.expected(SLICE_S, now)
            order = replace(order, need=demand.need, want=[sum(each) for each in zip(demand.all, soon, strict=True)])
        return order, now

    def _exchange(self, order: Order, drawer: Drawer) -> None:
        began = time.monotonic()
        try:
            got = self._shared.exchange(order)
        except OSError as error:
            with self._lock:
                news, self._trouble = not self._trouble, str(error)
                self._ask_at = began + _RETRY_S
                self._news.restore(order, began)
            if news:
                _log.warning("no request goes out meanwhile: %s", error)
                drawer.trouble(str(error))
            return
        with self._lock:
            was_over, self._trouble = bool(self._trouble), ""
            self._version, self._seen = got.version, got.charged
            self._ask_at = began + got.ask_again_s
            self._wait_until = began + got.wait_s
            if got.amounts is not None:
                self._slice.fill(got, until=began + LEASE_S, now=began)
        if was_over:
            _log.warning("the shared limits are there again")
            drawer.trouble("")
        if got.lost:
            _log.warning("the shared limits were forgotten: the last minute's count as used up")
        if got.paused_s > 0:
            drawer.pause_heard(got.paused_s, got.reason)
        if got.amounts is not None or got.wait_s > _LONG_WAIT_S:
            drawer.wake()


class _Purse:
    """A slice, and what is left of it."""

    def __init__(self, limits: int) -> None:
        self.at = 0.0  # drawn, by the ledger's time
        self.until = -math.inf  # to be used, by ours
        self.charged: Sequence[float] = [0.0] * limits
        self._left = [0.0] * limits
        self._taken = [0.0] * limits
        self._flow = [0.0] * limits  # taken a second
        self._filled_at = -math.inf

    @property
    def has_some(self) -> bool:
        return any(self._left)

    def holds(self, costs: Sequence[float], now: float) -> bool:
        if now >= self.until:
            return False
        return all(left >= cost * (1 - 1e-9) for left, cost in zip(self._left, costs, strict=True))

    def take(self, costs: Sequence[float]) -> None:
        self._left = [max(0.0, left - cost) for left, cost in zip(self._left, costs, strict=True)]
        self._taken = [taken + cost for taken, cost in zip(self._taken, costs, strict=True)]

    def fill(self, got: Slice, *, until: float, now: float) -> None:
        assert got.amounts is not None
        self.at, self.until, self.charged = got.at, until, got.charged
        self._left = list(got.amounts)
        self._filled_at = now
        self._taken = [0.0] * len(self._taken)

    def empty(self) -> list[float] | None:
        """Take out what is left; None: nothing."""
        left, self._left = self._left, [0.0] * len(self._left)
        return left if any(left) else None

    def expected(self, seconds: float, now: float) -> list[float]:
        """What will be taken in so many seconds, if it goes on as since the last slice."""
        elapsed_s = max(0.01, now - self._filled_at)
        self._flow = [(flow + taken / elapsed_s) / 2 for flow, taken in zip(self._flow, self._taken, strict=True)]
        return [flow * seconds for flow in self._flow]


class _News:
    """What the others have not been told yet."""

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._returns: dict[tuple[float, bool], list[float]] = {}  # by when the slice was drawn, and whether it is sent
        self._heard: dict[int, Heard] = {}
        self._pause: tuple[float, str] | None = None  # until when, and why
        self.due = math.inf  # they are to be told

    def add_return(self, at: float, amounts: Sequence[float], sent: bool, now: float) -> None:
        known = self._returns.get((at, sent), [0.0] * len(amounts))
        self._returns[at, sent] = [sum(each) for each in zip(known, amounts, strict=True)]
        self.due = min(self.due, now + _RETURN_S)

    def add_heard(self, said: Heard, now: float) -> None:
        known = self._heard.get(said.number)
        if known is None or said.at >= known.at:
            self._heard[said.number] = said
        self.due = min(self.due, now + _RETURN_S)

    def add_pause(self, seconds: float, reason: str, now: float) -> None:
        if self._pause is None or now + seconds > self._pause[0]:
            self._pause = now + seconds, reason
        self.due = now

    def told(self, order: Order, now: float) -> Order:
        """``order`` with the news in it; they are none any more."""
        until, reason = self._pause or (now, "")
        order = replace(
            order,
            returns=[Return(at, amounts, sent) for (at, sent), amounts in self._returns.items()],
            heard=list(self._heard.values()),
            pause_s=max(0.0, until - now),
            reason=reason,
        )
        self._forget()
        return order

    def restore(self, order: Order, now: float) -> None:
        """An order may not have been heard. What it gave back is not given back again, as perhaps it was."""
        for back in order.returns:
            debts = [min(0.0, amount) for amount in back.amounts]
            if any(debts):
                self.add_return(back.at, debts, back.sent, now)
        for said in order.heard:
            self.add_heard(said, now)
        if order.pause_s > 0:
            self.add_pause(order.pause_s, order.reason, now)
