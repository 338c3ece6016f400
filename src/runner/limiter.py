"""The rate limiter: a provider's quota, used to the last token and never passed; and the client that obeys it."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from runner.config import LimitsConfig
from runner.errors import BadRequestError, ConnectError, RequestError
from runner.types import (
    Client,
    EmbeddingRequest,
    GenerationRequest,
    Request,
    Response,
    TokenPrice,
    TokenUsage,
)

_MINUTE_S = 60.0
_DAY_S = 86_400.0
_BURST_SHARE = 0.02
"""Default burst, as a share of a minute's limit."""

_SPANS = 240
"""Spans of time that a window is divided into; grants leave it a span at a time."""

_GRANT_INTERVAL_S = 0.005
"""Grants that come due within so many seconds are given together: one timer does not cap the rate."""

_ROUNDING = 1e-9
"""Share of a limit by which sums of floats may be wrong."""

_RESERVED_OUTPUT_KEYS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
_CHARACTERS_PER_TOKEN = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What one request is expected to take from the quota."""

    prompt_tokens: float = 0.0
    completion_tokens: float = 0.0


class RateLimiter:
    """Token buckets over requests and tokens, per minute and per day, all reserved at once.

    Grants are first come, first served: a large request is never overtaken by small ones. In any window of a minute
    (a day) no more is granted than the limit, the first one included: what was settled counts as what it used. A
    minute's limit is spread over the minute, a day's may be used as fast as the other limits allow. Time is the
    running event loop's.

    Args:
        requests_per_minute, tokens_per_minute: None: no such limit. Likewise for the others.
        requests_per_day, tokens_per_day: Per 24 hours.
        input_tokens_per_minute, output_tokens_per_minute: For providers that count them apart.
        max_request_burst: Requests that may go out at once after a pause; 2 % of a minute's, at least 1, by default.
        max_token_burst: Likewise for tokens. A request that needs more waits until it has been saved up.
    """

    def __init__(
        self,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        requests_per_day: float | None = None,
        tokens_per_day: float | None = None,
        max_request_burst: float | None = None,
        max_token_burst: float | None = None,
        *,
        input_tokens_per_minute: float | None = None,
        output_tokens_per_minute: float | None = None,
    ) -> None:
        quotas = (
            ("rpm", requests_per_minute, _MINUTE_S, max_request_burst, _requests),
            ("tpm", tokens_per_minute, _MINUTE_S, max_token_burst, _tokens),
            ("itpm", input_tokens_per_minute, _MINUTE_S, max_token_burst, _prompt_tokens),
            ("otpm", output_tokens_per_minute, _MINUTE_S, max_token_burst, _completion_tokens),
            ("rpd", requests_per_day, _DAY_S, requests_per_day, _requests),
            ("tpd", tokens_per_day, _DAY_S, tokens_per_day, _tokens),
        )
        self._buckets = [
            _Bucket(name=name, limit=limit, window_s=window_s, burst=burst, cost=cost)
            for name, limit, window_s, burst, cost in quotas
            if limit is not None
        ]
        self.counts_tokens = any(bucket.cost is not _requests for bucket in self._buckets)
        """Whether an estimate of a request's tokens matters at all."""
        self._waiting: deque[_Waiter] = deque()
        self._paused_until = 0.0
        self._timer: asyncio.TimerHandle | None = None

    @classmethod
    def of(cls, limits: LimitsConfig) -> RateLimiter:
        """The limiter that a configuration describes."""
        return cls(
            requests_per_minute=limits.rpm,
            tokens_per_minute=limits.tpm,
            requests_per_day=limits.rpd,
            tokens_per_day=limits.tpd,
            max_request_burst=limits.max_request_burst,
            max_token_burst=limits.max_token_burst,
            input_tokens_per_minute=limits.itpm,
            output_tokens_per_minute=limits.otpm,
        )

    async def acquire(self, estimate: Estimate | float = 0.0) -> RateLimiterAcquisitionHandle:
        """Reserve one request and its tokens, waiting until every bucket has them.

        Args:
            estimate: The tokens it will take; a plain number is their total.

        Raises:
            BadRequestError: The estimate exceeds a limit as a whole, so that it would wait for ever.
        """
        now = asyncio.get_running_loop().time()
        at_once = not self._waiting and now >= self._paused_until
        if at_once and not self._buckets:
            return RateLimiterAcquisitionHandle(self, ())
        if not isinstance(estimate, Estimate):
            estimate = Estimate(prompt_tokens=float(estimate))
        costs = [bucket.cost(estimate) for bucket in self._buckets]
        self._reject_what_never_fits(costs)
        charges = self._take(costs, now) if at_once else None
        if charges is None:
            charges = await self._turn(costs)
        return RateLimiterAcquisitionHandle(self, charges)

    def pause(self, seconds: float) -> None:
        """Grant nothing for so long: the provider said that it is enough."""
        self._paused_until = max(self._paused_until, asyncio.get_running_loop().time() + seconds)

    def settle(self, handle: RateLimiterAcquisitionHandle, usage: TokenUsage) -> None:
        """Replace a reservation by what was really used; a level below zero is a debt that later requests wait for."""
        if not self._buckets:
            return
        actual = Estimate(prompt_tokens=usage.prompt_tokens, completion_tokens=usage.completion_tokens)
        now = asyncio.get_running_loop().time()
        for bucket, charge in zip(self._buckets, handle.charges, strict=True):
            bucket.give_back(charge, charge.cost - bucket.cost(actual), now)
        self._grant()

    def refund(self, handle: RateLimiterAcquisitionHandle) -> None:
        """Give a reservation back: the request never reached the provider."""
        self._give_back(handle.charges)
        self._grant()

    def _reject_what_never_fits(self, costs: Sequence[float]) -> None:
        for bucket, cost in zip(self._buckets, costs, strict=True):
            if cost > bucket.limit:
                raise BadRequestError(
                    f"the request needs about {cost:,.0f} of limits.{bucket.name}={bucket.limit:,.0f} and would wait"
                    " for ever: shorten it, lower max_tokens, or raise the limit"
                )

    def _take(self, costs: Sequence[float], now: float) -> Sequence[Charge] | None:
        """Take ``costs`` from all buckets, or from none."""
        for bucket, cost in zip(self._buckets, costs, strict=True):
            if bucket.wait_s(cost, now) > 0:
                return None
        return [bucket.take(cost, now) for bucket, cost in zip(self._buckets, costs, strict=True)]

    def _give_back(self, charges: Sequence[Charge]) -> None:
        now = asyncio.get_running_loop().time()
        for bucket, charge in zip(self._buckets, charges, strict=True):
            bucket.give_back(charge, charge.cost, now)

    async def _turn(self, costs: Sequence[float]) -> Sequence[Charge]:
        waiter = _Waiter(costs=costs, granted=asyncio.get_running_loop().create_future())
        self._waiting.append(waiter)
        self._grant()
        try:
            return await waiter.granted
        except asyncio.CancelledError:
            if not waiter.granted.cancelled():  # granted in the same moment
                self._give_back(waiter.granted.result())
            self._grant()
            raise

    def _grant(self) -> None:
        """Grant all that is due, in order, and see to it that the next one is granted when it is due."""
        if not self._waiting and self._timer is None:
            return
        loop = asyncio.get_running_loop()
        now = loop.time()
        while self._waiting:
            head = self._waiting[0]
            if not head.granted.cancelled():
                charges = self._take(head.costs, now) if now >= self._paused_until else None
                if charges is None:
                    break
                head.granted.set_result(charges)
            self._waiting.popleft()
        due = now + self._delay(now) if self._waiting else None
        if self._timer is not None and (due is None or due < self._timer.when()):
            self._timer.cancel()
            self._timer = None
        if self._timer is None and due is not None:
            self._timer = loop.call_at(due, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._grant()

    def _delay(self, now: float) -> float:
        """Seconds until the first in the queue can be granted."""
        head = self._waiting[0]
        waits = [bucket.wait_s(cost, now) for bucket, cost in zip(self._buckets, head.costs, strict=True)]
        return max([_GRANT_INTERVAL_S, self._paused_until - now, *waits])


@dataclass(frozen=True, slots=True)
class RateLimiterAcquisitionHandle:
    """A reservation. End it with `settle` once the usage is known, or with `refund` if nothing was sent."""

    limiter: RateLimiter
    charges: Sequence[Charge]  # one a bucket

    def settle(self, usage: TokenUsage) -> None:
        self.limiter.settle(self, usage)

    def refund(self) -> None:
        self.limiter.refund(self)


class Charge(NamedTuple):
    """What a request was charged in one bucket, and where it is written down."""

    cost: float
    span: _Span


class Limited:
    """A `Client` that reserves before it sends and settles after, and waits while the provider asks for a pause.

    Args:
        client: The transport of one deployment.
        limiter: Its quota.
        label: The deployment's name, noted in the trace.
        price: Noted in the trace, for the cost of the answer.
        default_output_tokens: Reserved for an answer where the request sets no maximum.
        pause_s: How long a refusal without a hint pauses everyone.
    """

    def __init__(
        self,
        client: Client,
        limiter: RateLimiter,
        *,
        label: str,
        price: TokenPrice | None = None,
        default_output_tokens: int = 0,
        pause_s: float = 1.0,
    ) -> None:
        self._client = client
        self._limiter = limiter
        self._label = label
        self._price = price
        self._default_output_tokens = default_output_tokens
        self._pause_s = pause_s

    async def send(self, request: Request) -> Response:
        trace = request.trace
        trace.deployment = self._label
        trace.price = self._price
        queued = time.perf_counter()
        handle = await self._limiter.acquire(self._estimate(request))
        sent = time.perf_counter()
        trace.queue_wait_s += sent - queued
        trace.on_the_wire = True  # and stays so where this is cancelled
        try:
            response = await self._client.send(request)
        except RequestError as error:
            trace.on_the_wire = False
            self._settle_failure(handle, error)
            raise
        finally:
            trace.service_time_s = time.perf_counter() - sent
        trace.on_the_wire = False
        if response.usage is not None:
            handle.settle(response.usage)
        return response

    async def aclose(self) -> None:
        await self._client.aclose()

    def _settle_failure(self, handle: RateLimiterAcquisitionHandle, error: RequestError) -> None:
        """Providers count failed requests, but not the tokens of those they refused; what is unknown stays reserved."""
        if isinstance(error, ConnectError):
            handle.refund()
        elif error.billing == "free":
            handle.settle(TokenUsage())
        if error.pauses:
            self._limiter.pause(self._pause_s if error.retry_after_s is None else error.retry_after_s)

    def _estimate(self, request: Request) -> Estimate:
        if not self._limiter.counts_tokens:
            return _NOTHING
        return estimate_of(request, default_output_tokens=self._default_output_tokens)


def estimate_of(request: Request, *, default_output_tokens: int) -> Estimate:
    """The tokens that ``request`` will take."""
    if isinstance(request, GenerationRequest):
        reserved = next(
            (request.params[key] for key in _RESERVED_OUTPUT_KEYS if request.params.get(key) is not None),
            default_output_tokens,
        )
        return Estimate(
            prompt_tokens=_characters(request.input) / _CHARACTERS_PER_TOKEN,
            completion_tokens=float(reserved) * int(request.params.get("n") or 1),
        )
    if isinstance(request, EmbeddingRequest):
        return Estimate(prompt_tokens=sum(map(len, request.texts)) / _CHARACTERS_PER_TOKEN)
    return _NOTHING


_NOTHING = Estimate()


def _characters(content: Any) -> int:
    """Characters of text in an input of any form; images and other media count as none."""
    if isinstance(content, str):
        return len(content)
    if isinstance(content, dict):
        return sum(_characters(content.get(key)) for key in ("content", "text", "input", "instructions"))
    if isinstance(content, list):
        return sum(map(_characters, content))
    return 0


class _Bucket:
    """One quota. A level that fills up steadily paces what is taken, a log of the last window keeps it to the limit."""

    __slots__ = (
        "burst",
        "ceiling",
        "charged",
        "cost",
        "level",
        "limit",
        "name",
        "rate",
        "spans",
        "updated",
        "window_s",
    )

    def __init__(
        self, *, name: str, limit: float, window_s: float, burst: float | None, cost: Callable[[Estimate], float]
    ) -> None:
        self.name = name
        self.limit = limit
        self.window_s = window_s
        self.cost = cost
        self.rate = limit / window_s
        default = max(1.0, limit * _BURST_SHARE)
        self.burst = min(limit, max(default if burst is None else burst, 2 * self.rate * _GRANT_INTERVAL_S))
        self.level = self.ceiling = self.burst
        self.updated: float | None = None
        self.spans: deque[_Span] = deque()
        self.charged = 0.0  # in all spans

    def wait_s(self, cost: float, now: float) -> float:
        """Seconds until ``cost`` can be taken. One that exceeds the burst is saved up for."""
        self._update(now)
        self.ceiling = max(self.burst, cost)
        pace_s = max(0.0, (cost - self.level) / self.rate)
        excess = self.charged + cost - self.limit
        if excess <= _ROUNDING * self.limit:
            return pace_s
        for span in self.spans:
            excess -= span.amount
            if excess <= _ROUNDING * self.limit:
                break
        return max(pace_s, span.end + self.window_s - now)

    def take(self, cost: float, now: float) -> Charge:
        if not self.spans or now - self.spans[-1].begin > self.window_s / _SPANS:
            self.spans.append(_Span(now))
        span = self.spans[-1]
        span.end = now
        span.amount += cost
        self.charged += cost
        self.level -= cost
        self.ceiling = self.burst
        return Charge(cost, span)

    def give_back(self, charge: Charge, amount: float, now: float) -> None:
        """Take ``amount`` off a charge; below zero it is a debt. What has left the window is too late to be used."""
        self._update(now)
        amount = max(amount, charge.cost - self.limit)  # a debt beyond the limit is a server's nonsense
        if charge.span.counts:
            charge.span.amount -= amount
            self.charged -= amount
            self.level += amount
        else:
            self.level += min(0.0, amount)

    def _update(self, now: float) -> None:
        if self.updated is not None and now > self.updated:
            self.level = max(self.level, min(self.ceiling, self.level + (now - self.updated) * self.rate))
        self.updated = now
        while self.spans and self.spans[0].end + self.window_s <= now:
            span = self.spans.popleft()
            span.counts = False
            self.charged -= span.amount
        if not self.spans:
            self.charged = 0.0  # rounding adds up


class _Span:
    """What was taken in a short span of time."""

    __slots__ = ("amount", "begin", "counts", "end")

    def __init__(self, begin: float) -> None:
        self.begin = self.end = begin
        self.amount = 0.0
        self.counts = True  # False: it has left the window


class _Waiter:
    __slots__ = ("costs", "granted")

    def __init__(self, *, costs: Sequence[float], granted: asyncio.Future[Sequence[Charge]]) -> None:
        self.costs = costs
        self.granted = granted


def _requests(estimate: Estimate) -> float:
    return 1.0


def _tokens(estimate: Estimate) -> float:
    return estimate.prompt_tokens + estimate.completion_tokens


def _prompt_tokens(estimate: Estimate) -> float:
    return estimate.prompt_tokens


def _completion_tokens(estimate: Estimate) -> float:
    return estimate.completion_tokens
