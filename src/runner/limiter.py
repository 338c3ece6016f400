"""The rate limiter: a provider's quota, used to the last token and never passed."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from dataclasses import dataclass
from itertools import islice
from typing import Literal, Protocol

from runner.bucket import DAY_S, MINUTE_S, Buckets, Charge, Limit
from runner.config import LimitsConfig
from runner.errors import BadRequestError, ConfigError, InsufficientQuotaError
from runner.estimate import Estimate
from runner.quota import Reading, readings
from runner.types import TokenUsage

GRANT_INTERVAL_S = 0.005
"""Grants that come due within so many seconds are given together: one timer does not cap the rate."""

_LONG_PAUSE_S = 1.0
"""A longer pause is waited out without a slot."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What those take who wait."""

    need: Sequence[float]  # the first in line
    all: Sequence[float]


class Drawer(Protocol):
    """For whom a quota draws what it does not have at hand. Its methods may be called from any thread."""

    def demand(self) -> Demand | None:
        """Who waits; None: nobody does."""
        ...

    def wake(self) -> None:
        """There is something to take, or it is known when there will be."""
        ...

    def pause_heard(self, seconds: float, reason: str) -> None:
        """Somebody else who shares the quota was told to pause."""
        ...

    def trouble(self, reason: str) -> None:
        """Why nothing can be taken for now; empty: that is over."""
        ...


class Quota(Protocol):
    """Where a `RateLimiter` takes from. It is called under the limiter's lock, and never waits."""

    def attach(self, drawer: Drawer) -> None:
        """Work for this limiter."""
        ...

    def wait_s(self, costs: Sequence[float], now: float) -> float:
        """Seconds until ``costs`` can be taken, as far as one can tell; infinity: the limiter will be woken."""
        ...

    def take(self, costs: Sequence[float], now: float) -> Charge:
        """Take ``costs``, for which there is no wait."""
        ...

    def recall(self, costs: Sequence[float], at: float, now: float) -> None:
        """Charge what this program took at ``at``, before there was this quota, if it is not known already."""
        ...

    def give_back(self, charge: Charge, amounts: Sequence[float], now: float, *, sent: bool = True) -> None:
        """Take ``amounts`` off a charge; below zero it is a debt. ``sent``: the provider has counted the request."""
        ...

    def sync(self, index: int, reading: Reading, charge: Charge, now: float) -> None:
        """Take in what the headers of the answer to ``charge`` say about a limit."""
        ...

    def adopt(self, index: int, limit: Limit) -> None:
        """Keep a limit that the provider named and nobody configured."""
        ...

    def pause(self, seconds: float, reason: str, now: float) -> None:
        """Tell everyone who shares the quota."""
        ...


class Slot(Protocol):
    """What a waiting request gives back meanwhile."""

    def aside(self) -> AbstractAsyncContextManager[None]: ...


class RateLimiter:
    """Limits of requests and tokens, per minute and per day, all reserved at once.

    Grants are first come, first served: a large request is never overtaken by small ones. In any window of a minute
    (a day) no more is granted than the limit, the first one included: what was settled counts as what it used. A
    minute's limit is spread over the minute, a day's may be used as fast as the other limits allow.

    What the provider's headers say is left counts where it is less; it never lifts a limit above the one given here.
    Limits per minute that are not given here are taken from the headers, so that even without any the requests slow
    down before they are refused.

    One limiter may be used from several event loops and threads.

    Args:
        requests_per_minute, tokens_per_minute: None: as the provider's headers say. Likewise for the others.
        requests_per_day, tokens_per_day: Per 24 hours. None: no such limit.
        max_request_burst: Requests that may go out at once after a pause; 2 % of a minute's, at least 1, by default.
        max_token_burst: Likewise for tokens. A request that needs more waits until it has been saved up.
        header_bucket_scope: Which window the headers speak of; ``auto``: as their limit and reset suggest.
        input_tokens_per_minute, output_tokens_per_minute: For providers that count them apart.
        reads_headers: Whether the headers of answers count at all.
        quota: Where to take from, if not from a quota of this process's own. It must have been made for these limits.
    """

    def __init__(
        self,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        requests_per_day: float | None = None,
        tokens_per_day: float | None = None,
        max_request_burst: float | None = None,
        max_token_burst: float | None = None,
        header_bucket_scope: Literal["auto", "minute", "day"] = "auto",
        *,
        input_tokens_per_minute: float | None = None,
        output_tokens_per_minute: float | None = None,
        reads_headers: bool = True,
        quota: Quota | None = None,
    ) -> None:
        if header_bucket_scope not in ("auto", "minute", "day"):
            raise ConfigError(f"header_bucket_scope={header_bucket_scope!r}: choose one of auto, minute, day")
        limits = LimitsConfig(
            rpm=requests_per_minute,
            tpm=tokens_per_minute,
            rpd=requests_per_day,
            tpd=tokens_per_day,
            itpm=input_tokens_per_minute,
            otpm=output_tokens_per_minute,
            max_request_burst=max_request_burst,
            max_token_burst=max_token_burst,
        )
        self._limits = limits_of(limits)
        self._scope = header_bucket_scope
        self._reads_headers = reads_headers
        self._own = quota is None
        self._quota: Quota = Buckets(self._limits, least_burst_s=2 * GRANT_INTERVAL_S) if quota is None else quota
        self._quota.attach(self)
        self._configured = len(self._limits)
        self._index = {limit.name: index for index, limit in enumerate(self._limits)}
        self.counts_tokens = self._knows_tokens()
        """Whether an estimate of a request's tokens matters at all."""
        self._lock = threading.Lock()
        self._waiting: deque[_Waiter] = deque()
        self._paused_until = -math.inf
        self._pause_reason = ""
        self._was_paused = False  # and somebody was told
        self._trouble = ""
        self._last_grants = -math.inf
        self._timer: _Timer | None = None
        self._poked: asyncio.AbstractEventLoop | None = None

    @classmethod
    def of(
        cls,
        limits: LimitsConfig,
        *,
        reads_headers: bool = True,
        quota: Quota | None = None,
    ) -> RateLimiter:
        """The limiter that a configuration describes."""
        return cls(
            requests_per_minute=limits.rpm,
            tokens_per_minute=limits.tpm,
            requests_per_day=limits.rpd,
            tokens_per_day=limits.tpd,
            max_request_burst=limits.max_request_burst,
            max_token_burst=limits.max_token_burst,
            header_bucket_scope=limits.header_bucket_scope.value,
            input_tokens_per_minute=limits.itpm,
            output_tokens_per_minute=limits.otpm,
            reads_headers=reads_headers,
            quota=quota,
        )

    async def acquire(
        self, estimated_tokens: Estimate | float = 0.0, *, patience_s: float = math.inf, slot: Slot | None = None
    ) -> RateLimiterAcquisitionHandle:
        """Reserve one request and its tokens, waiting until every limit has room for them.

        Args:
            estimated_tokens: The tokens it will take; a plain number is their total.
            patience_s: How long a wait for the quota is worth it; a queue before it does not count.
            slot: What to give back while a long pause lasts.

        Raises:
            BadRequestError: The estimate exceeds a limit as a whole, so that it would wait for ever.
            InsufficientQuotaError: There is no quota for longer than ``patience_s``; the message says until when.
        """
        while True:
            if slot is not None:
                await self.outlast_pause(patience_s=patience_s, slot=slot)
            charge = await self._reserve(estimated_tokens, patience_s, steps_aside=slot is not None)
            if charge is not None:
                tokens = estimated_tokens
                if isinstance(tokens, Estimate):
                    tokens = tokens.prompt_tokens + tokens.completion_tokens
                return RateLimiterAcquisitionHandle(limiter=self, estimated_tokens=tokens, charge=charge)

    async def outlast_pause(self, *, patience_s: float = math.inf, slot: Slot | None = None) -> None:
        """Wait a long pause out, without ``slot`` meanwhile. A short one is left to `acquire`.

        Raises:
            InsufficientQuotaError: It lasts longer than ``patience_s``.
        """
        if not self.is_in_long_pause:
            return
        async with slot.aside() if slot is not None else nullcontext():
            while (paused_s := self.paused_s) > 0:
                if paused_s > patience_s:
                    raise self._exhausted(paused_s)
                await asyncio.sleep(min(paused_s, _LONGEST_SLEEP_S))

    async def adjust(
        self,
        handle: RateLimiterAcquisitionHandle,
        actual_tokens: float,
        response_headers: Mapping[str, str] | None = None,
    ) -> None:
        """Settle a reservation at ``actual_tokens`` in total, and take in what the answer's headers say.

        A request that failed was still a request: with ``actual_tokens=0`` its tokens come back and it counts. One
        that was never sent is given back whole by `refund`.
        """
        if not actual_tokens >= 0:
            raise ConfigError(f"actual_tokens={actual_tokens}: a number of at least 0")
        headers = {name.lower(): value for name, value in (response_headers or {}).items()}
        self.settle(handle, Estimate(prompt_tokens=actual_tokens), headers)

    def settle(
        self,
        handle: RateLimiterAcquisitionHandle,
        actual: Estimate | TokenUsage,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Replace a reservation by what was really used; what was used beyond it is a debt that later requests pay."""
        if isinstance(actual, TokenUsage):
            actual = Estimate(prompt_tokens=actual.prompt_tokens, completion_tokens=actual.completion_tokens)
        if self._limits:
            with self._lock:
                now = time.monotonic()
                charge = handle.charge
                back = [cost - used for cost, used in zip(charge.costs, self._costs(actual), strict=False)]
                self._quota.give_back(charge, back, now)
                self._grant_soon(now)
        if headers:
            self.heed(handle, headers)

    def recall(self, used: Estimate, *, requests: float = 1.0, age_s: float) -> None:
        """Count requests that were sent before there was this limiter, by an earlier process of a run for example.

        The limits are taken to have been kept then. Where there are several, the oldest are to be recalled first.

        Args:
            used: The tokens of all of them.
            age_s: How long ago they were sent.
        """
        if self._limits:
            with self._lock:
                now = time.monotonic()
                self._quota.recall(self._costs(used, requests), now - max(0.0, age_s), now)

    @property
    def memory_s(self) -> float:
        """The longest window of a limit; 0 where there is none."""
        return max((limit.window_s for limit in self._limits), default=0.0)

    def refund(self, handle: RateLimiterAcquisitionHandle) -> None:
        """Give a reservation back: the request never reached the provider."""
        with self._lock:
            now = time.monotonic()
            self._quota.give_back(handle.charge, handle.charge.costs, now, sent=False)
            self._grant_soon(now)

    def heed(self, handle: RateLimiterAcquisitionHandle, headers: Mapping[str, str]) -> None:
        """Take in what the headers of an answer say about the quota; a reservation stays what it is.

        Args:
            headers: Names in lower case or case-insensitive.
        """
        found = readings(headers) if self._reads_headers else None
        if not found:
            return
        with self._lock:
            now = time.monotonic()
            for reading in found:
                index = self._index_of(reading)
                if index is not None:
                    self._quota.sync(index, reading, handle.charge, now)
            self._grant_soon(now)

    def refused(self, handle: RateLimiterAcquisitionHandle) -> None:
        """Take in that the provider refused a request and did not say what is left: nothing, of what is used most.

        So a limit that was set too high is found. Where less than half of every limit is used, none of them is why.
        """
        with self._lock:
            now = time.monotonic()
            used = [
                (charged / limit.amount, index)
                for index, (limit, charged) in enumerate(zip(self._limits, handle.charge.charged, strict=False))
                if limit.window_s == MINUTE_S
            ]
            share, index = max(used, default=(0.0, 0))
            if share >= 0.5:
                nothing = Reading(kind=_KINDS[self._limits[index].name], remaining=0, limit=None, reset_s=None)
                self._quota.sync(index, nothing, handle.charge, now)

    def pause(self, seconds: float, reason: str = "") -> None:
        """Grant nothing for so long: the provider said that it is enough."""
        with self._lock:
            now = time.monotonic()
            self._pause(seconds, reason, now)
            self._quota.pause(seconds, reason, now)
            self._grant(now)

    @property
    def paused_s(self) -> float:
        """How much longer nothing is granted; 0 where nothing is in the way."""
        return max(0.0, self._paused_until - time.monotonic())

    @property
    def is_in_long_pause(self) -> bool:
        """Whether nothing is granted for so long that it is worth to give a slot back."""
        return self.paused_s > _LONG_PAUSE_S

    @property
    def held_up_s(self) -> float:
        """How much longer nothing is granted, be it for a pause or because the quota is used, as far as is known."""
        with self._lock:
            timer = self._timer
            due_s = timer.due - time.monotonic() if timer is not None and self._waiting else 0.0
        return max(self.paused_s, due_s)

    @property
    def paused_until(self) -> float | None:
        """Unix time at which the pause ends; None: there is none."""
        paused_s = self.paused_s
        return time.time() + paused_s if paused_s > 0 else None

    @property
    def pause_reason(self) -> str:
        """Why nothing is granted, in the provider's words; empty where nothing is in the way."""
        return self._trouble or (self._pause_reason if self.paused_s > 0 else "")

    # For the quota

    def demand(self) -> Demand | None:
        with self._lock:
            if time.monotonic() < self._paused_until:
                return None
            waiting = [waiter.costs for waiter in islice(self._waiting, _MOST_AT_ONCE) if not waiter.gone]
            return Demand(need=waiting[0], all=list(map(sum, zip(*waiting, strict=True)))) if waiting else None

    def wake(self) -> None:
        with self._lock:
            self._grant(time.monotonic())

    def pause_heard(self, seconds: float, reason: str) -> None:
        with self._lock:
            now = time.monotonic()
            self._pause(seconds, reason, now)
            self._grant(now)

    def trouble(self, reason: str) -> None:
        self._trouble = reason

    # Reserving

    async def _reserve(self, estimated: Estimate | float, patience_s: float, *, steps_aside: bool) -> Charge | None:
        """The charge, once it is granted. None: a long pause has begun, and the caller is to stand aside."""
        with self._lock:
            now = time.monotonic()
            at_once = not self._waiting and now >= self._paused_until
            costs = self._costs(estimated if isinstance(estimated, Estimate) else Estimate(prompt_tokens=estimated))
            self._reject_what_never_fits(costs)
            if at_once and self._quota.wait_s(costs, now) <= 0:
                return self._quota.take(costs, now)
            waiter = _Waiter(costs, patience_s, steps_aside=steps_aside)
            self._waiting.append(waiter)
            self._grant(now)
        try:
            return await waiter.granted
        except asyncio.CancelledError:
            with self._lock:
                now = time.monotonic()
                waiter.gone = True
                if waiter.charge is not None:  # granted in the same moment
                    self._quota.give_back(waiter.charge, waiter.charge.costs, now, sent=False)
                self._grant(now)
            raise

    def _costs(self, estimate: Estimate, requests: float = 1.0) -> list[float]:
        prompt, completion = estimate.prompt_tokens, estimate.completion_tokens
        by_kind = {"requests": requests, "tokens": prompt + completion, "input": prompt, "output": completion}
        return [by_kind[_KINDS[limit.name]] for limit in self._limits]

    def _reject_what_never_fits(self, costs: list[float]) -> None:
        for index, limit in enumerate(self._limits):
            if costs[index] <= limit.amount:
                continue
            if index >= self._configured:  # the provider shall say so itself
                costs[index] = limit.amount
                continue
            raise BadRequestError(
                f"the request needs about {costs[index]:,.0f} of limits.{limit.name}={limit.amount:,.0f} and would"
                f" wait for ever: shorten it, lower request.max_tokens, or raise limits.{limit.name}"
            )

    def _exhausted(self, wait_s: float) -> InsufficientQuotaError:
        days = [f"limits.{limit.name}={limit.amount:,.0f}" for limit in self._limits if limit.window_s == DAY_S]
        reason = self.pause_reason or f"{' or '.join(days) or 'the quota'} is used up"
        until = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + wait_s))
        return InsufficientQuotaError(f"{reason}; requests can go on at {until}", retry_after_s=wait_s)

    # Headers

    def _index_of(self, reading: Reading) -> int | None:
        """Which limit a reading speaks of. One of a minute that nobody configured is adopted."""
        minute, day = _NAMES[reading.kind]
        name = day if day is not None and self._is_of_a_day(reading, minute, day) else minute
        index = self._index.get(name)
        if index is not None and index < self._configured:
            return index
        if not self._own or name != minute or reading.limit is None:
            return None
        limit = Limit(name=name, amount=reading.limit, window_s=MINUTE_S, burst=reading.limit)
        if index is None:
            index = self._index[name] = len(self._limits)
            self._limits = [*self._limits, limit]
            self.counts_tokens = self._knows_tokens()
        elif self._limits[index] == limit:
            return index
        self._limits = [*self._limits[:index], limit, *self._limits[index + 1 :]]
        self._quota.adopt(index, limit)
        return index

    def _is_of_a_day(self, reading: Reading, minute: str, day: str) -> bool:
        if self._scope != "auto":
            return self._scope == "day"
        amounts = {name: self._limits[index].amount for name, index in self._index.items() if index < self._configured}
        if reading.limit is not None and amounts.get(minute) != amounts.get(day):
            if reading.limit == amounts.get(day):
                return True
            if reading.limit == amounts.get(minute):
                return False
        return reading.is_of_a_day

    def _knows_tokens(self) -> bool:
        return any(_KINDS[limit.name] != "requests" for limit in self._limits)

    # Granting, under the lock

    def _pause(self, seconds: float, reason: str, now: float) -> None:
        if now + seconds > self._paused_until:
            if now >= self._paused_until and seconds > _LONG_PAUSE_S:
                level = logging.INFO if self._was_paused and seconds <= _LONGEST_SLEEP_S else logging.WARNING
                self._was_paused = True
                _log.log(level, "no request goes out for %.0f s%s", seconds, f" ({reason})" if reason else "")
            self._paused_until = now + seconds
            self._pause_reason = reason

    def _grant_soon(self, now: float) -> None:
        """Grant what has become possible; where much comes back at once, not for each piece of it."""
        if not self._waiting:
            return
        due = self._last_grants + GRANT_INTERVAL_S
        if now >= due or now < self._last_grants:
            self._grant(now)
        else:
            self._call_at(due, now, self._waiting[0])

    def _grant(self, now: float) -> None:
        """Grant all that is due, in order, and see to it that the next one is granted when it is due."""
        self._last_grants = now
        while self._waiting:
            head = self._waiting[0]
            if head.gone or head.loop.is_closed():
                self._waiting.popleft()
                continue
            wait_s = self._quota.wait_s(head.costs, now)
            paused_s = self._paused_until - now
            if paused_s > 0:
                wait_s = max(paused_s, wait_s if wait_s < math.inf else 0.0)
            if wait_s <= 0:
                self._waiting.popleft()
                head.charge = self._quota.take(head.costs, now)
                if not head.tell(head.charge):
                    self._quota.give_back(head.charge, head.costs, now, sent=False)
                continue
            if wait_s > _LONG_PAUSE_S and self._send_away(wait_s, paused_s):
                continue
            if wait_s < math.inf:
                self._call_at(now + max(wait_s, GRANT_INTERVAL_S), now, head)
            return

    def _send_away(self, wait_s: float, paused_s: float) -> bool:
        """Tell those for whom the wait is too long, and those who would rather wait elsewhere, so that they go."""
        staying: deque[_Waiter] = deque()
        for waiter in self._waiting:
            if waiter.patience_s < wait_s < math.inf:
                waiter.tell(self._exhausted(wait_s))
            elif waiter.steps_aside and paused_s > _LONG_PAUSE_S:
                waiter.tell(None)
            else:
                staying.append(waiter)
        some_went = len(staying) < len(self._waiting)
        self._waiting = staying
        return some_went

    def _call_at(self, due: float, now: float, head: _Waiter) -> None:
        """Have `_grant` called at ``due``, by the event loop in which the head of the queue waits."""
        timer = self._timer
        if head.thread != threading.get_ident():
            if self._poked is not head.loop:
                self._poked = head.loop
                with suppress(RuntimeError):  # closed in this moment
                    head.loop.call_soon_threadsafe(self._on_poke)
        elif timer is None or timer.loop is not head.loop or timer.due > due:
            if timer is not None and timer.loop is head.loop:
                timer.handle.cancel()
            handle = head.loop.call_later(due - now, self._on_timer)
            self._timer = _Timer(loop=head.loop, due=due, handle=handle)

    def _on_timer(self) -> None:
        with self._lock:
            self._timer = None
            self._grant(time.monotonic())

    def _on_poke(self) -> None:
        with self._lock:
            self._poked = None
            self._grant(time.monotonic())


@dataclass(frozen=True, slots=True, kw_only=True)
class RateLimiterAcquisitionHandle:
    """A reservation. End it with `settle` once the usage is known, or with `refund` if nothing was sent."""

    limiter: RateLimiter
    estimated_tokens: float
    charge: Charge

    def settle(self, actual: Estimate | TokenUsage, headers: Mapping[str, str] | None = None) -> None:
        self.limiter.settle(self, actual, headers)

    def refund(self) -> None:
        self.limiter.refund(self)


def limits_of(limits: LimitsConfig) -> list[Limit]:
    """The limits of a configuration that are set, in the order in which costs are given."""
    amounts = (
        ("rpm", limits.rpm, MINUTE_S, limits.max_request_burst),
        ("tpm", limits.tpm, MINUTE_S, limits.max_token_burst),
        ("itpm", limits.itpm, MINUTE_S, limits.max_token_burst),
        ("otpm", limits.otpm, MINUTE_S, limits.max_token_burst),
        ("rpd", limits.rpd, DAY_S, limits.rpd),
        ("tpd", limits.tpd, DAY_S, limits.tpd),
    )
    return [
        Limit(name=name, amount=amount, window_s=window_s, burst=burst)
        for name, amount, window_s, burst in amounts
        if amount is not None
    ]


_NAMES: Mapping[str, tuple[str, str | None]] = {
    "requests": ("rpm", "rpd"),
    "tokens": ("tpm", "tpd"),
    "input": ("itpm", None),
    "output": ("otpm", None),
}
"""Limits of a minute and of a day, by what they count."""

_KINDS = {name: kind for kind, names in _NAMES.items() for name in names if name is not None}

_MOST_AT_ONCE = 1_000
"""Of those who wait, so many are looked at when a shared quota is drawn from."""

_LONGEST_SLEEP_S = 60.0
"""A pause may be ended, or made longer, by others: look again so often."""


class _Waiter:
    """Someone in the queue, on an event loop of their own."""

    __slots__ = ("charge", "costs", "gone", "granted", "loop", "patience_s", "steps_aside", "thread")

    def __init__(self, costs: Sequence[float], patience_s: float, *, steps_aside: bool) -> None:
        self.costs = costs
        self.patience_s = patience_s
        self.steps_aside = steps_aside
        self.loop = asyncio.get_running_loop()
        self.thread = threading.get_ident()
        self.granted: asyncio.Future[Charge | None] = self.loop.create_future()
        self.charge: Charge | None = None
        self.gone = False  # does not wait any more

    def tell(self, outcome: Charge | InsufficientQuotaError | None) -> bool:
        """End the wait. False: its event loop was closed in this moment, and nobody waits any more."""
        if self.thread == threading.get_ident():
            self._resolve(outcome)
            return True
        try:
            self.loop.call_soon_threadsafe(self._resolve, outcome)
        except RuntimeError:
            return False
        return True

    def _resolve(self, outcome: Charge | InsufficientQuotaError | None) -> None:
        if self.granted.done():
            return
        if isinstance(outcome, InsufficientQuotaError):
            self.granted.set_exception(outcome)
        else:
            self.granted.set_result(outcome)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Timer:
    """A call of `_grant` that is to come."""

    loop: asyncio.AbstractEventLoop
    due: float
    handle: asyncio.TimerHandle
