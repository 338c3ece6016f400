"""Group commit: what is handed in together is made durable together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from typing import Generic, TypeVar

T = TypeVar("T")

_GROUP_SIZE = 256
"""Entries that may wait for their commit before those who hand in have to wait too: beside what is in flight, what a
kill can cost at most."""

_GROUP_DELAY_S = 0.01
"""How long a group gathers before it is committed: what a kill costs mostly, and what a commit is shared by."""


class GroupCommit(Generic[T]):
    """Commits what is handed in, each entry once, in groups: while one is being committed, the next one gathers.

    The commits are done by a task of its own, which nobody cancels: whoever waits for one may be cancelled, and
    neither loses nor doubles an entry by it.

    Args:
        commit: Makes entries durable, all of them or none.
        on_commit: Called with them afterwards.
    """

    def __init__(
        self, commit: Callable[[Sequence[T]], Awaitable[None]], on_commit: Callable[[Sequence[T]], None]
    ) -> None:
        self._commit = commit
        self._on_commit = on_commit
        self._pending: list[T] = []
        self._handed_in = 0
        self._durable = 0
        self._hurry = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._ended = asyncio.Event()  # set, and replaced, when a commit has ended
        self._failure: Exception | None = None

    async def put_all(self, entries: Iterable[T]) -> None:
        """Hand in ``entries``, all of them before waiting; wait only while too much is waiting.

        Raises:
            Exception: What a commit failed with. What was handed in before waits in memory for `flush`.
        """
        for entry in entries:
            self._hand_in(entry)
        if len(self._pending) >= _GROUP_SIZE:
            await self._until(self._handed_in - _GROUP_SIZE + 1)

    async def put_durably(self, entries: Iterable[T]) -> None:
        """Hand in ``entries``, and return when they are durable. Where this is cancelled, they become so all the same.

        Raises:
            Exception: As `put_all`.
        """
        for entry in entries:
            self._hand_in(entry)
        await self._until(self._handed_in)

    async def flush(self) -> None:
        """Return when all that was handed in is durable. After a failure, try once more.

        Raises:
            Exception: As `put_all`.
        """
        self._hurry.set()
        if self._pending and self._failure is not None:
            self._failure = None
            self._start()
        await self._until(self._handed_in)

    def _hand_in(self, entry: T) -> None:
        if self._failure is not None:
            raise self._failure
        self._pending.append(entry)
        self._handed_in += 1
        if self._task is None or self._task.done():
            self._start()

    def _start(self) -> None:
        self._task = asyncio.create_task(self._work())

    async def _until(self, count: int) -> None:
        """Wait until so many of all entries are durable."""
        while self._durable < count:
            if self._failure is not None:
                raise self._failure
            await self._ended.wait()

    async def _work(self) -> None:
        """Commit one group. What could not be committed stays pending."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_GROUP_DELAY_S):
                await self._hurry.wait()
        self._hurry.clear()
        group = self._pending[:]
        try:
            await self._commit(group)
            del self._pending[: len(group)]
            self._durable += len(group)
            self._on_commit(group)
        except Exception as failure:  # whoever hands in or waits is told
            self._failure = failure
        else:
            if self._pending:
                self._start()
        finally:
            self._ended.set()
            self._ended = asyncio.Event()
