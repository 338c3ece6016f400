"""Load: requests kept in flight (closed loop), or sent at a rate (open loop), and measured once it is steady.

A level begins with a warm-up, whose requests hand their slots to those that are measured: nothing is drained between,
so no wave of first requests is measured. The window opens and closes while requests are in flight.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol, TypeAlias

from runner.batch import run_batch
from runner.bench.audit import Pulse, Reading
from runner.bench.records import Sample, Span
from runner.concurrency import Window
from runner.config import Arrivals

MOST_IN_FLIGHT = 4096
"""Requests at once in an open loop. Where it is reached, it is the client that waits."""

_TICKETS = 256


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came of one request, but for when. See `records.Sample`."""

    row: int
    queue_wait_s: float = 0.0
    service_time_s: float = 0.0
    ttft_s: float | None = None
    itl_s: float | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    cost_usd: float | None = None
    retries: int = 0
    error: str | None = None


Ask: TypeAlias = Callable[[], Awaitable[Answer]]
"""Sends the next request. A failed one is an answer; whatever it raises ends the benchmark."""

Take: TypeAlias = Callable[[Sample], None]
"""Gets each request that ends after the window has opened."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """How much is measured at a level: until the first of both ends comes."""

    warmup: int  # requests that end before, at least
    requests: int | None  # None: until the time is over
    duration_s: float | None  # None: until so many requests


class Load(Protocol):
    """A way to put load on a server. Use it as ``async with``."""

    @property
    def in_flight(self) -> int:
        """Requests at work now."""
        ...

    async def measure(self, level: float, repeat: int, *, ask: Ask, extent: Extent, take: Take) -> Span:
        """Bring the load to ``level`` and measure it there."""
        ...

    async def __aenter__(self) -> Load: ...
    async def __aexit__(self, *exc_info: object) -> None: ...


class ClosedLoop:
    """As many requests in flight as the level says: who has an answer asks again at once.

    The load stays where it is between two measurements. What the window's end finds in flight is not measured, but
    noted: it counts for the throughput, and not for the latencies.
    """

    def __init__(self, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._window = Window(1)
        self._pulse = Pulse()
        self.in_flight = 0
        self._batch: asyncio.Task[None] | None = None
        self._course: _Course
        self._ask: Ask

    async def __aenter__(self) -> ClosedLoop:
        await self._pulse.__aenter__()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._pulse.__aexit__(*exc_info)
        if self._batch is not None:
            self._batch.cancel()
            await asyncio.wait([self._batch])

    async def measure(self, level: float, repeat: int, *, ask: Ask, extent: Extent, take: Take) -> Span:
        slots = int(level)
        warmup = max(extent.warmup, slots)
        over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        ended = 0

        def on_end(now: float) -> None:
            nonlocal ended
            ended += 1
            if course.has_closed:
                return
            if not course.has_opened:
                if ended >= warmup and self.in_flight == course.in_flight:  # none is left of the last level
                    ended = 0
                    course.open(now)
                    if extent.duration_s is not None:
                        timer.append(asyncio.get_running_loop().call_later(extent.duration_s, close))
            elif ended == extent.requests:
                close()

        def close() -> None:
            if not over.done():
                course.close(self._clock())
                over.set_result(None)

        timer: list[asyncio.TimerHandle] = []
        course = _Course(pulse=self._pulse, clock=self._clock, take=take, on_end=on_end)
        self._course, self._ask = course, ask
        self._window.limit = slots
        if self._batch is None:
            self._batch = asyncio.create_task(run_batch(_tickets(), self._fly, window=self._window))
        try:
            await asyncio.wait([self._batch, over], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for handle in timer:
                handle.cancel()
        if not over.done():
            self._batch.result()
            raise RuntimeError("the load ended by itself")
        return course.span(level, repeat)

    async def _fly(self, ticket: int) -> None:
        course = self._course
        flight = course.begin(self._clock())
        self.in_flight += 1
        try:
            answer = await self._ask()
        finally:
            self.in_flight -= 1
        course.end(flight, answer)


class OpenLoop:
    """Requests sent at a rate, whether the others have been answered or not.

    Latency counts from the moment at which a request was to be sent, so that a server that falls behind cannot hide
    it. All requests that were to be sent within the window are waited for. It opens when the warm-up's requests have
    ended, so that as many are in flight as the rate brings about; those that end in it count for the throughput, and
    not for the latencies.

    Args:
        arrivals: Evenly spaced, or at random with the same mean (a Poisson process, the same for each repeat).
    """

    def __init__(self, *, arrivals: Arrivals, clock: Callable[[], float] = time.perf_counter) -> None:
        self.in_flight = 0
        self._arrivals = arrivals
        self._clock = clock

    async def __aenter__(self) -> OpenLoop:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        return None

    async def measure(self, level: float, repeat: int, *, ask: Ask, extent: Extent, take: Take) -> Span:
        async with Pulse() as pulse:
            course = _Course(pulse=pulse, clock=self._clock, take=take, late=True)

            async def fly(due: float) -> None:
                flight = course.begin(due)
                self.in_flight = course.in_flight
                course.end(flight, await ask())

            await run_batch(self._schedule(level, repeat, extent, course), fly, window=Window(MOST_IN_FLIGHT))
            return course.span(level, repeat)

    async def _schedule(
        self, rate: float, repeat: int, extent: Extent, course: _Course
    ) -> AsyncIterator[Sequence[float]]:
        """When each request is to be sent, handed on at that time."""
        end = float("inf")
        sent = 0  # in the window
        due = self._clock()
        for pause_s in self._pauses(rate, repeat):
            due += pause_s
            await asyncio.sleep(due - self._clock())
            if not course.has_opened and course.ended >= extent.warmup:
                course.open(due)
                end = due + (extent.duration_s or float("inf"))
            if course.has_opened:
                if sent == extent.requests or due >= end:
                    course.close(due)
                    return
                sent += 1
            yield [due]

    def _pauses(self, rate: float, repeat: int) -> Iterator[float]:
        draw = random.Random(f"{rate} {repeat}")
        while True:
            yield draw.expovariate(rate) if self._arrivals is Arrivals.poisson else 1 / rate


async def _tickets() -> AsyncIterator[Sequence[int]]:
    """Something to do, for ever."""
    while True:
        yield range(_TICKETS)


class _Course:
    """One measurement on its way: what is in flight, and the window.

    Args:
        late: Whether what ends after the window has closed is taken too.
        on_end: Called with the time when a request has ended.
    """

    def __init__(
        self,
        *,
        pulse: Pulse,
        clock: Callable[[], float],
        take: Take,
        late: bool = False,
        on_end: Callable[[float], None] | None = None,
    ) -> None:
        self._pulse = pulse
        self._clock = clock
        self._take = take
        self._late = late
        self._on_end = on_end
        self._flights: dict[int, float] = {}  # when those in flight started
        self._begun = 0
        self._opened = self._closed = float("nan")
        self._started_at = 0.0
        self._area = 0.0  # requests in flight × seconds, in the window
        self._area_until = 0.0
        self._most = 0
        self._unfinished: tuple[float, ...] = ()
        self._reading: Reading | None = None
        self.ended = 0
        self.has_opened = False
        self.has_closed = False

    @property
    def in_flight(self) -> int:
        return len(self._flights)

    def open(self, now: float) -> None:
        self.has_opened = True
        self._opened = self._area_until = now
        self._started_at = time.time()
        self._most = len(self._flights)
        self._pulse.begin()

    def close(self, now: float) -> None:
        self._integrate(now)
        self.has_closed = True
        self._closed = now
        self._reading = self._pulse.reading()
        if not self._late:
            self._unfinished = tuple(started - self._opened for started in self._flights.values())

    def begin(self, started: float) -> int:
        self._integrate(started)
        self._begun += 1
        self._flights[self._begun] = started
        self._most = max(self._most, len(self._flights))
        return self._begun

    def end(self, flight: int, answer: Answer) -> None:
        now = self._clock()
        self._integrate(now)
        started = self._flights.pop(flight)
        self.ended += 1
        if self.has_opened and (self._late or not self.has_closed):
            self._take(Sample(started_s=started - self._opened, ended_s=now - self._opened, **vars(answer)))
        if self._on_end is not None:
            self._on_end(now)

    def span(self, level: float, repeat: int) -> Span:
        assert self._reading is not None
        window_s = self._closed - self._opened
        return Span(
            level=level,
            repeat=repeat,
            window_s=window_s,
            unfinished=self._unfinished,
            in_flight=self._area / window_s if window_s > 0 else 0.0,
            most_in_flight=self._most,
            started_at=self._started_at,
            **asdict(self._reading),
        )

    def _integrate(self, now: float) -> None:
        if self.has_opened and not self.has_closed:
            self._area += len(self._flights) * (now - self._area_until)
            self._area_until = now
