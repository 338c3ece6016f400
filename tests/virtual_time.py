"""Virtual time: an event loop whose clock jumps to the next timer as soon as nothing else is left to do.

Minutes pass in microseconds, and a test that waits for something that never comes fails at once.
"""

from __future__ import annotations

import asyncio
import functools
import selectors
import time
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec
from unittest import mock

P = ParamSpec("P")

START = 1_000.0
"""What every clock shows when a test begins, seconds."""


def virtual_time(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run an async test in virtual time. The clocks of `time` show it too."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        loop = VirtualTimeLoop()
        clocks = mock.patch.multiple(time, time=loop.time, monotonic=loop.time, perf_counter=loop.time)
        with asyncio.Runner(loop_factory=lambda: loop) as runner, clocks:
            runner.run(test(*args, **kwargs))

    return run


def now() -> float:
    """Virtual seconds since the test began."""
    return asyncio.get_running_loop().time() - START


async def settle() -> None:
    """Let everything happen that needs no time to pass."""
    await asyncio.sleep(1e-6)


def block(seconds: float) -> None:
    """Hold the event loop up, as code does that computes for so long."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    loop.advance(seconds)


def other_tasks() -> set[asyncio.Task[Any]]:
    """Tasks that are alive beside the caller's own."""
    current = asyncio.current_task()
    return {task for task in asyncio.all_tasks() if task is not current}


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop for code that waits for timers and for itself only: no threads, no network."""

    def __init__(self) -> None:
        self._clock = _Clock()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now

    def advance(self, seconds: float) -> None:
        self._clock.now += seconds


class _Clock(selectors.DefaultSelector):
    """Where a loop waits: here the wait is over at once, and the clock is put forward instead."""

    def __init__(self) -> None:
        super().__init__()
        self.now = START

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = super().select(0)
        if not events:
            if timeout is None:
                raise RuntimeError("everything waits and nothing is due: this test would hang")
            self.now += max(0.0, timeout)
        return events
