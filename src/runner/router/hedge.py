"""Hedging: a request whose answer is late is asked a second time elsewhere."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import replace

from runner.concurrency import keeps_slot
from runner.errors import RequestError
from runner.metrics import percentile
from runner.router.router import Router
from runner.types import Attempt, Request, Response, Trace

SHARE = 0.05
"""Share of the requests that may be asked twice."""

PERCENTILE = 96.0
"""A request that takes longer than so many of 100 is late. The rest has to fit into `SHARE`."""

_RECENT = 1000
_ENOUGH = 50
_EVERY = 50
_BURST = 10.0


class Hedged:
    """A `Client` that asks a second replica where the first one is late, and takes the answer that comes first.

    Choose it where single answers are slow for no reason of their own and the last rows keep a run waiting. It costs
    up to 5 % more requests: the one whose answer was not needed is cancelled, and may be charged all the same. The
    ledger has an entry for it, of unknown cost, from before the second is sent.

    The bound is the 96th percentile of the recent service times (https://dl.acm.org/doi/10.1145/2408776.2408794); what
    was cancelled counts as having taken until then.

    Where both fail, the second failure is the request's, as the ledger has its entry for the first.
    """

    def __init__(self, router: Router) -> None:
        self._router = router
        self._recent_s: deque[float] = deque(maxlen=_RECENT)
        self._seen = 0
        self._late_s: float | None = None  # None: not enough is known
        self._tokens = 0.0

    async def send(self, request: Request) -> Response:
        self._tokens = min(_BURST, self._tokens + SHARE)
        if self._late_s is None:
            return await self._alone(request)
        first = asyncio.ensure_future(self._first(request))
        second: asyncio.Future[Response] | None = None
        trace = Trace()
        try:
            await asyncio.wait([first], timeout=self._late_s)
            while not first.done() and not request.trace.on_the_wire:  # it waits in line
                await asyncio.wait([first], timeout=self._late_s)
            if not first.done() and self._may_hedge(request):
                self._tokens -= 1
                trace = self._second_trace(request)
                await self._enter(request)
                second = asyncio.ensure_future(self._second(replace(request, trace=trace)))
                await asyncio.wait([first, second], return_when=asyncio.FIRST_COMPLETED)
                await _outlast_failure(first, second)
            else:
                await asyncio.wait([first])
        finally:
            await _cancel([first] if second is None else [first, second])
        if first.cancelled() or _is_answered(first):
            self._note(request.trace.service_time_s)
        request.trace.on_the_wire = False
        if second is None or _is_answered(first):
            return first.result()
        if _is_answered(second):
            self._note(trace.service_time_s)
        _take_over(request.trace, trace)
        return second.result()

    async def aclose(self) -> None:
        await self._router.aclose()

    async def _alone(self, request: Request) -> Response:
        response = await self._router.send(request)
        self._note(request.trace.service_time_s)
        return response

    async def _first(self, request: Request) -> Response:
        """Send it, and have it count as on the wire until its outcome is handed on."""
        try:
            response = await self._router.send(request)
        except RequestError:
            request.trace.on_the_wire = True
            raise
        request.trace.on_the_wire = True
        return response

    async def _second(self, request: Request) -> Response:
        keeps_slot.set(True)  # a task's own: the first goes on in it
        return await self._router.send(request)

    def _may_hedge(self, request: Request) -> bool:
        return self._tokens >= 1 and self._router.has_other(replace(request, trace=self._second_trace(request)))

    def _second_trace(self, request: Request) -> Trace:
        trace = request.trace
        return Trace(avoid={*trace.avoid, trace.deployment}, failures=[*trace.failures])

    async def _enter(self, request: Request) -> None:
        """Put an attempt in the ledger for the one of the two that will not be the answer."""
        trace = request.trace
        late_s = self._late_s or 0.0
        attempt = Attempt(
            number=trace.retries + 1,
            deployment=trace.deployment,
            started_at=time.time() - late_s,
            service_time_s=late_s,
            error="Hedged",
            message=f"no answer from {trace.deployment} after {late_s:.3g} s, so another deployment was asked too",
            status=None,
            cost_usd=None,
        )
        trace.failures.append(attempt)
        if trace.on_failure is not None:
            await trace.on_failure(attempt)

    def _note(self, service_time_s: float) -> None:
        self._recent_s.append(service_time_s)
        self._seen += 1
        if self._seen >= _ENOUGH and self._seen % _EVERY == 0:
            self._late_s = percentile(sorted(self._recent_s), PERCENTILE)


def _is_answered(one: asyncio.Future[Response]) -> bool:
    return one.done() and not one.cancelled() and one.exception() is None


async def _outlast_failure(*both: asyncio.Future[Response]) -> None:
    """Where one has failed, wait for the other."""
    open_ones = [one for one in both if not one.done()]
    if open_ones and not any(map(_is_answered, both)):
        await asyncio.wait(open_ones)


async def _cancel(both: list[asyncio.Future[Response]]) -> None:
    if open_ones := [one for one in both if not one.done()]:
        for one in open_ones:
            one.cancel()
        await asyncio.wait(open_ones)
    for one in both:
        if not one.cancelled():
            one.exception()  # is looked at, whichever of the two is returned


def _take_over(trace: Trace, second: Trace) -> None:
    """Make the second attempt's story the request's."""
    trace.deployment = second.deployment
    trace.price = second.price
    trace.queue_wait_s += second.queue_wait_s
    trace.service_time_s = second.service_time_s
    trace.ttft_s = second.ttft_s
    trace.chunk_times = second.chunk_times
    trace.at_once = second.at_once
    trace.avoid = second.avoid
