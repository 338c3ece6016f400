"""A background event loop: synchronous code calls asynchronous code in scripts, threads and notebooks."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from functools import wraps
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class BackgroundLoop:
    """An event loop on a daemon thread, started at its first use. May be used from many threads at once."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._process = os.getpid()
        self._closed = False
        self._starting = threading.Lock()

    @property
    def started(self) -> bool:
        return self._loop is not None

    def run(self, work: Coroutine[Any, Any, R]) -> R:
        """Run ``work`` to its end and return its result. Ctrl-C cancels it.

        Raises:
            RuntimeError: The loop was closed, or belongs to the process that this one was forked from.
        """
        try:
            loop = self._running()
        except RuntimeError:
            work.close()
            raise
        outcome: Future[R] = asyncio.run_coroutine_threadsafe(work, loop)
        try:
            return outcome.result()
        except KeyboardInterrupt:
            outcome.cancel()
            with suppress(CancelledError, Exception):
                outcome.result()
            raise

    def close(self) -> None:
        """Stop the loop and its thread; who still waits for an answer gets a CancelledError. Safe to call twice."""
        self._closed = True
        if self._loop is not None and self._thread is not None and self._process == os.getpid():
            asyncio.run_coroutine_threadsafe(_cancel_the_others(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
            self._loop = None

    def _running(self) -> asyncio.AbstractEventLoop:
        if self._process != os.getpid():
            raise RuntimeError("this LMClient was made before a fork: make a new one in the child process")
        with self._starting:
            if self._closed:
                raise RuntimeError("this LMClient is closed: make a new one")
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._loop.run_forever, name="runner", daemon=True)
                self._thread.start()
            if threading.current_thread() is self._thread:
                raise RuntimeError("a synchronous method cannot be called from within a callback: await its a… twin")
            return self._loop


async def _cancel_the_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    if others:
        await asyncio.wait(others)


def synchronous(method: Callable[P, Coroutine[Any, Any, R]]) -> Callable[P, R]:
    """The synchronous twin of an asynchronous method, with its signature and documentation.

    The method's object has a `BackgroundLoop` as ``background``, where the twin runs the method.
    """

    @wraps(method)
    def twin(*args: P.args, **kwargs: P.kwargs) -> R:
        background: BackgroundLoop = args[0].background  # type: ignore[attr-defined]
        return background.run(method(*args, **kwargs))

    twin.__name__ = method.__name__.removeprefix("a")
    twin.__qualname__ = method.__qualname__.replace(method.__name__, twin.__name__)
    return twin
