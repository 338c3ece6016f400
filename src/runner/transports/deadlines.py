"""Time limits for many requests on one timer."""

from __future__ import annotations

import asyncio
from types import TracebackType


class Deadlines:
    """Bounds how long blocks of code may take, as `asyncio.timeout` does, for a fraction of its cost.

    A timer of its own for each request, which hardly ever fires, costs a tenth of a request. Blocks with the same
    limit end in the order in which they began, so one timer a limit, set to the oldest block, serves them all.
    Belongs to one event loop.

        with deadlines.within(30.0): ...  # raises TimeoutError after 30 s
    """

    def __init__(self) -> None:
        self._queues: dict[float, _Queue] = {}

    def within(self, seconds: float) -> _Deadline:
        """A block of the running task that is cancelled after ``seconds``, and raises `TimeoutError` then."""
        queue = self._queues.get(seconds)
        if queue is None:
            if len(self._queues) >= _MOST_QUEUES:
                self._queues = {limit: queue for limit, queue in self._queues.items() if queue.waiting}
            queue = self._queues[seconds] = _Queue(seconds)
        return _Deadline(queue)

    def close(self) -> None:
        """Let go of the timers. Blocks that are open lose their limits."""
        for queue in self._queues.values():
            queue.close()
        self._queues.clear()


_MOST_QUEUES = 64


class _Queue:
    """The blocks with one limit, the oldest first. Knows its loop, as it takes a system call to find out."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.loop = asyncio.get_running_loop()
        self.waiting: dict[_Deadline, float] = {}  # when each is due, in the loop's time
        self._timer: asyncio.TimerHandle | None = None

    def enter(self, deadline: _Deadline) -> None:
        due = self.waiting[deadline] = self.loop.time() + self.seconds
        if self._timer is None:
            self._timer = self.loop.call_at(due, self._expire)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expire(self) -> None:
        """End what is due. The timer was set for a block that may have ended long since."""
        self._timer = None
        now = self.loop.time()
        for deadline, due in list(self.waiting.items()):
            if due > now:
                self._timer = self.loop.call_at(due, self._expire)
                break
            del self.waiting[deadline]
            deadline.expire()


class _Deadline:
    __slots__ = ("_cancelling", "_expired", "_queue", "_task")

    def __init__(self, queue: _Queue) -> None:
        self._queue = queue
        self._expired = False

    def __enter__(self) -> None:
        task = asyncio.current_task(self._queue.loop)
        assert task is not None
        self._task = task
        self._cancelling = task.cancelling()
        self._queue.enter(self)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._queue.waiting.pop(self, None)
        # A task that somebody else cancelled meanwhile stays cancelled: theirs is the stronger wish.
        if self._expired and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise TimeoutError from error

    def expire(self) -> None:
        self._expired = True
        self._task.cancel()
