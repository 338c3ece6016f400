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
        self._working: set[asyncio.Task[Any]] = set()
        self._closed = False
        self._lock = threading.Lock()

    def require_open(self) -> None:
        """
        Raises:
            RuntimeError: The loop was closed, or belongs to the process that this one was forked from.
        """
        if self._process != os.getpid():
            raise RuntimeError("this LMClient was made before a fork: make a new one in the child process")
        if self._closed:
            raise RuntimeError("this LMClient is closed: make a new one")

    def run(self, work: Coroutine[Any, Any, R]) -> R:
        """Run ``work`` to its end and return its result.

        Ctrl-C cancels it and waits until it has ended; a second Ctrl-C does not wait.

        Raises:
            RuntimeError: As `require_open`, or the call comes from the loop itself and would wait for itself.
        """
        outcome: Future[R] = Future()
        started: list[asyncio.Task[R]] = []

        def start() -> None:
            task = asyncio.get_running_loop().create_task(work)
            self._working.add(task)
            task.add_done_callback(end)
            started.append(task)

        def end(task: asyncio.Task[R]) -> None:
            self._working.discard(task)
            if task.cancelled():
                outcome.set_exception(CancelledError())
            elif error := task.exception():
                outcome.set_exception(error)
            else:
                outcome.set_result(task.result())

        try:
            with self._lock:
                loop = self._running()
                loop.call_soon_threadsafe(start)
        except RuntimeError:
            work.close()
            raise
        try:
            return outcome.result()
        except KeyboardInterrupt:
            loop.call_soon_threadsafe(lambda: started[0].cancel())
            with suppress(CancelledError, Exception):
                outcome.result()
            raise

    def close(self) -> None:
        """Cancel the work that is not done, and end the loop and its thread. Safe to call twice.

        Who still waits for an answer gets a CancelledError.
        """
        with self._lock:
            loop, self._loop, self._closed = self._loop, None, True
            if loop is None or self._thread is None or self._process != os.getpid():
                return
            asyncio.run_coroutine_threadsafe(self._end(), loop)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _running(self) -> asyncio.AbstractEventLoop:
        self.require_open()
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=_serve, args=(self._loop,), name="runner", daemon=True)
            self._thread.start()
        if threading.current_thread() is self._thread:
            raise RuntimeError("a synchronous method cannot be called from within a callback: await its a… twin")
        return self._loop

    async def _end(self) -> None:
        await _cancel(set(self._working))
        asyncio.get_running_loop().stop()


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


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    """Run until the loop is stopped, then wind it up as `asyncio.run` does."""
    is_stopped = False
    while not is_stopped:
        # A task that raises one of these ends the loop's turn, too. Its caller gets it, and the loop goes on.
        with suppress(KeyboardInterrupt, SystemExit):
            loop.run_forever()
            is_stopped = True
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.run_until_complete(_cancel(asyncio.all_tasks(loop)))
    loop.close()


async def _cancel(tasks: set[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)
