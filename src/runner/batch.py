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
    workers are cancelled and the exception goes on to the caller. Cancelling this call cancels all work.

    Args:
        chunks: The items in order, in chunks of the caller's choice, read one chunk ahead.
        work: Called once an item.
        window: Holds one slot for each item at work.
        stop: Ends the batch early once it is called.
    """
    source = _Source(chunks)
    if stop is not None:
        stop.listen(source.end)
    try:
        async with asyncio.TaskGroup() as workers:

            async def worker() -> None:
                try:
                    while not window.crowded:
                        await work(await source.take())
                except _Exhausted:
                    pass
                finally:
                    window.leave()

            def fill() -> None:
                while not source.ended.is_set() and window.try_enter():
                    workers.create_task(worker())

            window.add_filler(fill)
            try:
                fill()
                await source.ended.wait()
            finally:
                window.remove_filler(fill)
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None
    finally:
        await source.aclose()


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


class _Exhausted(Exception):
    """The source has no further item."""


class _Source(Generic[T]):
    """Hands items out one by one to many takers, and reads the next chunk while they are at work."""

    def __init__(self, chunks: AsyncIterator[Sequence[T]]) -> None:
        self.ended = asyncio.Event()
        self._chunks = chunks
        self._buffer: deque[T] = deque()
        self._reading: asyncio.Task[Sequence[T] | None] | None = None

    async def take(self) -> T:
        while not self._buffer:
            if self.ended.is_set():
                raise _Exhausted
            if self._reading is None:
                self._reading = asyncio.create_task(self._read())
            reading = self._reading
            chunk = await asyncio.shield(reading)
            if reading is not self._reading:
                continue  # another taker was first to see this chunk
            if chunk is None:
                self.end()
            else:
                self._buffer.extend(chunk)
                self._reading = asyncio.create_task(self._read())
        return self._buffer.popleft()

    def end(self) -> None:
        self._buffer.clear()
        self.ended.set()

    async def aclose(self) -> None:
        if self._reading is not None and not self._reading.done():
            self._reading.cancel()
            await asyncio.wait([self._reading])
        if isinstance(self._chunks, AsyncGenerator):
            await self._chunks.aclose()

    async def _read(self) -> Sequence[T] | None:
        return await anext(self._chunks, None)
