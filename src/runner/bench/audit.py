"""The audit: whether a benchmark measured the server, or this program."""

from __future__ import annotations

import asyncio
import math
import time
from array import array
from dataclasses import dataclass

from runner.metrics import percentile

_BEAT_S = 0.01
_TIMER_S = 0.001
"""How late a timer may be without anybody's fault: epoll counts milliseconds."""


class Pulse:
    """Takes the event loop's pulse: how late it comes to what is due, and how much of a core its thread uses.

    Use it as ``async with``; `begin` starts over, so that what was before does not count.
    """

    async def __aenter__(self) -> Pulse:
        self.begin()
        self._beating = asyncio.create_task(self._beat())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._beating.cancel()
        await asyncio.wait([self._beating])

    def begin(self) -> None:
        self._lags = array("d")
        self._began = time.perf_counter()
        self._cpu = time.thread_time()

    def reading(self) -> Reading:
        """What it was since `begin`."""
        passed = time.perf_counter() - self._began
        lags = sorted(self._lags)
        return Reading(
            cpu_share=(time.thread_time() - self._cpu) / passed if passed > 0 else 0.0,
            lag_mean_s=math.fsum(lags) / len(lags) if lags else 0.0,
            lag_p99_s=percentile(lags, 99) or 0.0,
        )

    async def _beat(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + _BEAT_S
            await asyncio.sleep(_BEAT_S)
            self._lags.append(max(0.0, loop.time() - due - _TIMER_S))


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a `Pulse` found. See `records.Span`."""

    cpu_share: float
    lag_mean_s: float
    lag_p99_s: float
