"""The window: how many requests are at work at once. A semaphore whose size can change while it is held."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from types import TracebackType

from runner.config import LimitsConfig

_ASIDE_PER_SLOT = 4
"""How many may be aside for each slot there is."""

keeps_slot: ContextVar[bool] = ContextVar("keeps_slot", default=False)
"""Whether this task never steps aside, as it works in a slot that is another one's too, or has what others wait for."""


class Window:
    """Slots for work, handed out first come, first served.

    Use it as ``async with window`` around one piece of work, or let `run_batch` fill it. Work that only waits (for a
    retry, say) steps aside with ``async with window.aside()`` and frees its slot meanwhile.

    Belongs to one event loop.

    Args:
        limit: Slots there are. May be changed at any time: a smaller one takes effect as slots come back.
    """

    def __init__(self, limit: int) -> None:
        self.why = ""
        """Why the limit is what it is, in a few words; empty where it is as it was set."""
        self._limit = limit
        self._active = 0
        self._aside = 0
        self._returning: deque[asyncio.Future[None]] = deque()
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._fillers: list[Callable[[], None]] = []

    @classmethod
    def of(cls, limits: LimitsConfig) -> Window:
        """The window that a configuration begins with; where it says ``auto``, a `Tuner` sets it from there."""
        return cls(SoftStart.FIRST if limits.concurrency == "auto" else limits.concurrency)

    @property
    def limit(self) -> int:
        return self._limit

    @limit.setter
    def limit(self, limit: int) -> None:
        self._limit = limit
        self._hand_over()

    @property
    def active(self) -> int:
        """Slots taken."""
        return self._active

    @property
    def crowded(self) -> bool:
        """Whether somebody waits for a slot, or more are taken than there should be."""
        return self._awaited or self._active > self._limit

    def try_enter(self) -> bool:
        """Take a slot if one is free and nobody was first."""
        if self._awaited or self._active >= self._limit:
            return False
        self._active += 1
        return True

    async def enter(self, *, first: bool = False) -> None:
        """Take a slot, waiting for one; those with ``first`` go before all others that wait."""
        if self.try_enter():
            return
        turn = asyncio.get_running_loop().create_future()
        queue = self._returning if first else self._waiting
        queue.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # the slot came in the same moment
                self.leave()
            elif turn in queue:  # it is not, if a slot has come back since the cancellation
                queue.remove(turn)
            raise

    def leave(self) -> None:
        """Give a slot back."""
        self._active -= 1
        self._hand_over()

    @asynccontextmanager
    async def aside(self) -> AsyncIterator[None]:
        """Give the slot back for a while, and take one again before going on.

        Where many are aside already, it keeps its slot, so that their number stays bounded. So does a task that
        `keeps_slot`. An error, or a cancellation, goes on at once: its slot counts as taken until the holder leaves,
        free or not.
        """
        if keeps_slot.get() or self._aside >= _ASIDE_PER_SLOT * self._limit:
            yield
            return
        self._aside += 1
        self.leave()
        try:
            yield
            await self.enter(first=True)
        except BaseException:
            self._active += 1
            raise
        finally:
            self._aside -= 1

    def add_filler(self, fill: Callable[[], None]) -> None:
        """Have ``fill`` called whenever a slot is free and nobody waits for it."""
        self._fillers.append(fill)

    def remove_filler(self, fill: Callable[[], None]) -> None:
        self._fillers.remove(fill)

    async def __aenter__(self) -> None:
        await self.enter()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.leave()

    @property
    def _awaited(self) -> bool:
        return bool(self._returning or self._waiting)

    def _hand_over(self) -> None:
        while self._awaited and self._active < self._limit:
            turn = (self._returning or self._waiting).popleft()
            if not turn.done():
                self._active += 1
                turn.set_result(None)
        if self._active < self._limit:
            for fill in tuple(self._fillers):
                fill()


class SoftStart:
    """Opens a `Window` step by step until the first answer comes, then at once.

    It starts with a few requests and doubles them every ``step_s``, so that a wrong key or a dead server meets a
    handful of requests and not the whole window, and a healthy one costs no time worth measuring.

    Args:
        target: What it opens to; None: the limit that the window has.
    """

    FIRST = 4

    def __init__(self, window: Window, *, step_s: float = 0.1, target: int | None = None) -> None:
        self._window = window
        self._target = window.limit if target is None else target
        self._step_s = step_s
        self._timer: asyncio.TimerHandle | None = None
        if self._target > self.FIRST:
            window.limit = self.FIRST
            self._timer = asyncio.get_running_loop().call_later(step_s, self._double)

    def open(self) -> None:
        """An answer came: open the window."""
        if self._timer is not None:
            self.close()
            self._window.limit = self._target

    def close(self) -> None:
        """Stop growing."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _double(self) -> None:
        limit = min(2 * self._window.limit, self._target)
        self._timer = None
        if limit < self._target:
            self._timer = asyncio.get_running_loop().call_later(self._step_s, self._double)
        self._window.limit = limit
