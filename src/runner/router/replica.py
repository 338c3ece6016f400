"""A replica: one deployment as the router sees it, and the string that a request to it can be pulled back by."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, deque

from runner.concurrency import Window
from runner.config import LimitsConfig
from runner.errors import ConflictError, RateLimitError, RequestError, Timeout
from runner.metrics import DeploymentSnapshot, percentile
from runner.router.circuit import Circuit, Sent
from runner.types import Client, Request, Response, TokenPrice, TokenUsage, Trace

RECENT = 200
"""How many answers the percentiles look at."""

TRIAL_S = 2.0
"""How long a slow one is left alone between two trials."""

LONG_PAUSE_S = 30.0
"""One that asks for a longer pause counts as out."""

_SMOOTHING = 0.1
_RATE_S = 10.0
_MINUTE_S = 60.0

_FRESH = 1e-3
"""Share of a span for which a count need not be looked at again."""


class Replica:
    """One deployment: what its answers cost, how busy it is, and how it has done lately.

    The router calls `enter` when it gives it a request, then one of `answered`, `failed` and `cancelled`, then `leave`.

    Args:
        label: Its name.
        client: What sends requests to it, under its limits.
        weight: Its share of the work, relative to the others.
        order: Replicas of a higher order are asked only when all those of lower ones are out.
        price: What its answers cost. None: unknown.
        limits: Its own limits, for strategies that look at what is left of them.
        window: Bounds how many requests it gets at once. None: nothing does.
        circuit: Says when it is left alone.
        recall: Pulls back what it does not answer. None: nothing does.
    """

    def __init__(
        self,
        label: str,
        client: Client,
        *,
        weight: float = 1.0,
        order: int = 0,
        price: TokenPrice | None = None,
        limits: LimitsConfig | None = None,
        window: Window | None = None,
        circuit: Circuit | None = None,
        recall: Recallable | None = None,
    ) -> None:
        self.label = label
        self.client = client
        self.weight = weight
        self.order = order
        self.price = price
        self.window = window
        self.circuit = circuit or Circuit()
        self.recall = recall
        self.in_flight = 0
        self.load = 0.0  # requests in flight for its weight
        self.latency_s: float | None = None  # smoothed; None: no answer yet
        self.slow = False  # out of all proportion to its peers
        self.trial_at = 0.0  # when a slow one is tried again
        self.silent_at = -math.inf  # when it was last found to answer nothing
        self.scouted = False  # one request was called back since, to see whether another replica answers it
        self.paused_until = 0.0
        self.answers = 0
        self.failures = 0
        self.misfits = 0  # refusals in a row that every request meets there: a wrong key, an unknown model
        self.recent_s: deque[float] = deque(maxlen=RECENT)  # service times
        self._errors: Counter[str] = Counter()
        self._rate = _Fading(_RATE_S)
        self._limits = limits
        self._requests = _Fading(_MINUTE_S)
        self._tokens = _Fading(_MINUTE_S)

    @property
    def has_room(self) -> bool:
        return self.window is None or self.window.active < self.window.limit

    def is_out(self, now: float) -> bool:
        """Whether waiting for it makes no sense while there are others."""
        return not self.circuit.answering or self.paused_until - now > LONG_PAUSE_S

    def usage(self, now: float) -> float:
        """The share of its own limits that is used up, by the one that is used up most; 0 without limits."""
        limits = self._limits
        if limits is None and self.window is None:
            return 0.0
        shares = [0.0]
        if self.window is not None:
            shares.append(self.in_flight / self.window.limit)
        if limits is not None and limits.rpm:
            shares.append(self._requests.level(now) / limits.rpm)
        if limits is not None and limits.tpm:
            shares.append(self._tokens.level(now) / limits.tpm)
        return max(shares)

    def enter(self, now: float, trace: Trace) -> Sent:
        """Give it a request; there must be room. Returns the circuit's mark, for the outcome."""
        self.in_flight += 1
        self.load = self.in_flight / self.weight
        if self.window is not None:
            self.window.try_enter()
        if self.slow:
            self.trial_at = math.inf  # until its outcome is known
        self._requests.add(1, now)
        return self.circuit.sent(now, trace)

    def answered(self, mark: Sent, trace: Trace, usage: TokenUsage | None) -> None:
        now = time.monotonic()
        self.circuit.answered(mark)
        self.misfits = 0
        self.answers += 1
        self._rate.add(1, now)
        if usage is not None:
            self._tokens.add(usage.total_tokens, now)
        self.recent_s.append(trace.service_time_s)
        self._smooth(trace.service_time_s)

    def failed(self, mark: Sent, trace: Trace, error: RequestError, *, again: bool) -> None:
        """Its request failed, through its fault or not; ``again``: it had failed before it was sent."""
        self.failures += 1
        self._errors[type(error).__name__] += 1
        if is_fault(error):
            self.circuit.failed(mark, error, lasted_s=trace.service_time_s, again=again)
        elif error.systemic:
            self.misfits += 1
            self.circuit.returned(mark)
        elif trace.sent_at:
            self.circuit.answered(mark)  # it is alive
        else:
            self.circuit.returned(mark)  # it was not even asked

    def cancelled(self, mark: Sent, trace: Trace) -> None:
        """Its request came to nothing. Its answer would have taken longer than this."""
        self.circuit.returned(mark)
        if trace.on_the_wire and self.latency_s is not None and trace.service_time_s > self.latency_s:
            self._smooth(trace.service_time_s)

    def leave(self) -> None:
        """Its request has come to an end."""
        self.in_flight -= 1
        self.load = self.in_flight / self.weight
        if self.slow:
            self.trial_at = time.monotonic() + TRIAL_S
        if self.window is not None:
            self.window.leave()

    def pause(self, seconds: float) -> None:
        self.paused_until = max(self.paused_until, time.monotonic() + seconds)

    def snapshot(self, *, answers: int) -> DeploymentSnapshot:
        """How it does, ``answers`` being those of all deployments."""
        now = time.monotonic()
        latencies = sorted(self.recent_s)
        return DeploymentSnapshot(
            state=self._state(now),
            answered=self.answers,
            failed=self.failures,
            share=self.answers / answers if answers else 0.0,
            in_flight=self.in_flight,
            requests_per_s=self._rate.per_second(now),
            latency_p50_s=percentile(latencies, 50),
            latency_p95_s=percentile(latencies, 95),
            errors=dict(self._errors),
        )

    def _state(self, now: float) -> str:
        if not self.circuit.answering:
            return "out"
        if self.paused_until > now:
            return "paused"
        if self.slow:
            return "slow"
        return "up" if self.circuit.closed else "probing"

    def _smooth(self, seconds: float) -> None:
        # One answer says whether a slow replica has recovered.
        share = 1.0 if self.latency_s is None or self.slow else _SMOOTHING
        self.latency_s = share * seconds + (1 - share) * (self.latency_s or 0.0)


def is_fault(error: RequestError) -> bool:
    """Whether the deployment failed, rather than refuse a request or ask for a pause."""
    return error.retryable and not isinstance(error, RateLimitError | ConflictError)


class Recallable:
    """A `Client` around a transport, whose requests can be called back when their answers do not come.

    It belongs below the limiter, so that what waits for its quota does not count as unanswered.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._out: dict[asyncio.Timeout, tuple[float, Trace]] = {}  # since when, oldest first
        self._why = ""
        self.heard_at = -math.inf
        """When something came back last, if only an error."""

    async def send(self, request: Request) -> Response:
        scope = asyncio.timeout(None)
        try:
            async with scope:
                self._out[scope] = time.monotonic(), request.trace
                response = await self._client.send(request)
        except TimeoutError:
            if not scope.expired():
                raise
            raise Timeout(self._why) from None
        except RequestError:
            self.heard_at = time.monotonic()
            raise
        finally:
            self._out.pop(scope, None)
        self.heard_at = time.monotonic()
        return response

    async def aclose(self) -> None:
        await self._client.aclose()

    def silent_s(self, now: float) -> float:
        """For how long nothing has come back, although something is out."""
        return now - max(self.heard_at, next(iter(self._out.values()))[0]) if self._out else 0.0

    @property
    def sent_at(self) -> float:
        """When the last of what is out was sent."""
        return next(reversed(self._out.values()))[0] if self._out else -math.inf

    def recall(self, *, unanswered_s: float, why: str, at_most: int | None = None) -> None:
        """End what has been out for so long with a `Timeout` that says ``why``, the oldest first.

        What was called back before stays: it may be what takes so long.
        """
        self._why = why
        now = time.monotonic()
        overdue = [
            (scope, trace)
            for scope, (sent_at, trace) in self._out.items()
            if now - sent_at >= unanswered_s and not trace.called_back
        ]
        for scope, trace in overdue[:at_most]:
            trace.called_back = True
            del self._out[scope]
            scope.reschedule(0.0)


class _Fading:
    """A count that is forgotten at an even pace: it holds about what came in the last ``span_s`` seconds."""

    __slots__ = ("_at", "_level", "_since", "_span_s")

    def __init__(self, span_s: float) -> None:
        self._span_s = span_s
        self._level = 0.0
        self._at = self._since = time.monotonic()

    def add(self, amount: float, now: float) -> None:
        self._level = self.level(now) + amount

    def level(self, now: float) -> float:
        if now - self._at > _FRESH * self._span_s:
            self._level *= math.exp((self._at - now) / self._span_s)
            self._at = now
        return self._level

    def per_second(self, now: float) -> float:
        """The rate, of as much of the span as there has been."""
        seen_s = self._span_s * -math.expm1((self._since - now) / self._span_s)
        return self.level(now) / max(seen_s, 1.0)
