"""How long a request is served, and how many are at once."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from statistics import NormalDist

from runner.config import SimulatorConfig
from runner.simulator.text import uniform

_NORMAL = NormalDist()


@dataclass(frozen=True, slots=True)
class Pace:
    """When the tokens of one answer are due, in seconds after its service began."""

    ttft_s: float
    gap_s: float  # between tokens
    total_s: float

    @classmethod
    def of(cls, config: SimulatorConfig, identity: str, steps: int) -> Pace:
        """The pace of an answer of ``steps`` tokens to the request that ``identity`` is the hash of."""
        latency_s = config.latency_s
        if config.latency_spread and latency_s:
            variance = math.log1p(config.latency_spread**2)
            normal = _NORMAL.inv_cdf(uniform(config.seed, "latency", identity))
            latency_s *= math.exp(math.sqrt(variance) * normal - variance / 2)
        ttft_s = 0.4 * latency_s if config.ttft_s is None else config.ttft_s
        if config.itl_s is not None:
            return cls(ttft_s, config.itl_s, ttft_s + config.itl_s * (steps - 1))
        total_s = max(latency_s, ttft_s)
        return cls(ttft_s, (total_s - ttft_s) / max(1, steps - 1), total_s)

    def times(self, factor: float) -> Pace:
        return Pace(self.ttft_s * factor, self.gap_s * factor, self.total_s * factor)

    def at_s(self, step: int) -> float:
        return min(self.ttft_s + self.gap_s * step, self.total_s)


class Slots:
    """At most ``limit`` requests in service (None: any number), first come first served.

    A request that had to wait begins at the instant at which its predecessor was due to end, not when the event loop
    came round to it. So the throughput under load is exactly ``limit / service time``, however late timers fire.
    """

    def __init__(self, limit: int | None) -> None:
        self.held = 0
        self._limit = limit
        self._waiting: deque[asyncio.Future[float]] = deque()

    def resize(self, limit: int | None) -> None:
        """Change the bound. Fewer slots are reached as those in service end."""
        self._limit = limit
        if self._waiting:
            self._grant(asyncio.get_running_loop().time())

    @asynccontextmanager
    async def hold(self, service_s: float) -> AsyncIterator[float]:
        """A slot for ``service_s`` seconds; yields the loop's time at which the service began."""
        loop = asyncio.get_running_loop()
        arrived = loop.time()
        turn: asyncio.Future[float] = loop.create_future()
        self._waiting.append(turn)
        self._grant(arrived)
        try:
            yield max(arrived, await turn)
        finally:
            if turn.done() and not turn.cancelled():  # a request that was cancelled in line never held a slot
                self.held -= 1
                self._grant(min(loop.time(), max(arrived, turn.result()) + service_s))

    def _grant(self, at: float) -> None:
        while self._waiting and (self._limit is None or self.held < self._limit):
            turn = self._waiting.popleft()
            if not turn.done():
                self.held += 1
                turn.set_result(at)


async def sleep_until(when: float) -> None:
    """Sleep until the loop's time is ``when``, if it is not yet."""
    delay = when - asyncio.get_running_loop().time()
    if delay > 0:
        await asyncio.sleep(delay)
