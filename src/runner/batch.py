"""The scheduling loop: bounded, lazy on its input, cancelled cleanly. Every batch of the project runs through it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from itertools import islice
from typing import Generic, TypeVar

from runner.concurrency import Window
from runner.errors import RunStopped

T = TypeVar("T")


class Stop:
    """A request to end a batch early: no further item is taken, what is at work is finished."""

    def __init__(self) -> None:
        self.reason: RunStopped | None = None
        self._listeners: list[Callable[[], None]] = []

    def __call__(self, reason: RunStopped) -> None:
        """Ask for the end. The first reason counts."""
        self.reason = self.reason or reason
        for listener in self._listeners:
            listener()

    def listen(self, listener: Callable[[], None]) -> None:
        """Have ``listener`` called when the end is asked for, or now if it was."""
        self._listeners.append(listener)
        if self.reason is not None:
            listener()


async def run_batch(
    chunks: AsyncIterator[Sequence[T]],
    work: Callable[[T], Awaitable[None]],
    *,
    window: Window,
    stop: Stop | None = None,
) -> None:
    """Do ``work`` for every item, as many at once as ``window`` has slots.

    Workers take an item when they are free, so nothing waits in a queue, and at most two chunks are held.
    ``work`` treats the failure of an item as a value; whatever it raises is a bug or the end of the run: the other
    workers are cancelled and the exception goes on to the caller. An error of ``chunks`` does so too, once the items
    before it are taken. Cancelling this call cancels all work.

    Batches that share a window make progress side by side: one that has no slot waits in line for its first.

    Args:
        chunks: The items in order, in chunks of the caller's choice, read one chunk ahead.
        work: Called once an item.
        window: Holds one slot for each item at work.
        stop: Ends the batch early once it is called.
    """
    await _Batch(chunks, work, window).run(stop)


async def chunked(items: Iterable[T] | AsyncIterable[T], size: int) -> AsyncIterator[Sequence[T]]:
    """The items in lists of ``size``, read as they are asked for."""
    if isinstance(items, AsyncIterable):
        chunk: list[T] = []
        async for item in items:
            chunk.append(item)
            if len(chunk) == size:
                yield chunk
                chunk = []
        if chunk:
            yield chunk
        return
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


class _Batch(Generic[T]):
    """A batch at work: a feeder reads chunk after chunk, workers take the items of the last one."""

    def __init__(
        self, chunks: AsyncIterator[Sequence[T]], work: Callable[[T], Awaitable[None]], window: Window
    ) -> None:
        self._chunks = chunks
        self._work = work
        self._window = window
        self._items: deque[T] = deque()
        self._workers = 0
        self._starting = 0  # workers that have not taken their first item yet
        self._ended = False
        self._feeder_needed = asyncio.Event()

    async def run(self, stop: Stop | None) -> None:
        self._window.add_filler(self._fill)
        try:
            async with asyncio.TaskGroup() as self._tasks:
                self._feeder = self._tasks.create_task(self._feed())
                if stop is not None:
                    stop.listen(self._end)
                try:
                    await asyncio.wait([self._feeder])
                except asyncio.CancelledError:
                    self._end()
                    raise
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        finally:
            self._window.remove_filler(self._fill)
            if isinstance(self._chunks, AsyncGenerator):
                await self._chunks.aclose()

    def _end(self) -> None:
        """Let no further item be taken."""
        self._ended = True
        self._items.clear()
        self._feeder.cancel()

    async def _feed(self) -> None:
        try:
            async for chunk in self._chunks:
                await self._all_taken()
                if self._ended:  # by the source itself, which is not interrupted in its own step
                    return
                self._items.extend(chunk)
                self._fill()
        finally:
            await self._all_taken()

    async def _all_taken(self) -> None:
        """Wait until the last chunk is used up; while the batch has no slot, wait in line for one."""
        while self._items:
            if self._workers:
                self._feeder_needed.clear()
                await self._feeder_needed.wait()
            else:
                await self._window.enter()
                self._start_worker()

    def _fill(self) -> None:
        while self._starting < len(self._items) and self._window.try_enter():
            self._start_worker()

    def _start_worker(self) -> None:
        """Have a worker use the slot that was just entered."""
        self._workers += 1
        self._starting += 1
        # A callback and no `finally`, which a task that is cancelled before its first step would not come to.
        self._tasks.create_task(self._take_items()).add_done_callback(self._worker_ended)

    async def _take_items(self) -> None:
        self._starting -= 1
        try:
            while self._items:
                item = self._items.popleft()
                if not self._items:
                    self._feeder_needed.set()
                await self._work(item)
                if self._window.crowded:
                    return
        except asyncio.CancelledError as error:
            self._end()
            task = asyncio.current_task()
            if task is not None and not task.cancelling():
                raise RuntimeError("something that work awaited was cancelled") from error
            raise
        except BaseException:
            self._end()
            raise

    def _worker_ended(self, worker: asyncio.Task[None]) -> None:
        self._workers -= 1
        if not self._workers:
            self._feeder_needed.set()
        self._window.leave()
