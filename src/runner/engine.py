"""Engines: the client stack at work, one for each event loop that a client is used on."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

from runner.concurrency import Window
from runner.types import Client, Request, Response


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """A client stack and its slots."""

    client: Client
    window: Window
    first: asyncio.Lock = field(default_factory=asyncio.Lock)  # held while it is found out whether anybody listens

    async def send(self, request: Request) -> Response:
        """Answer ``request`` as soon as there is a slot for it.

        Raises:
            RequestError: The request failed.
        """
        async with self.window:
            request.trace.queue_wait_s += time.perf_counter() - request.trace.started
            return await self.client.send(request)


class Engines:
    """The engines of one client. Connections and slots belong to an event loop, so that each loop has its own.

    An engine is closed with its loop, if not before: `asyncio.run` closes the asynchronous generators that are left.

    Args:
        make: A new engine for the running loop.
    """

    def __init__(self, make: Callable[[], Engine]) -> None:
        self._make = make
        self._engines: dict[asyncio.AbstractEventLoop, tuple[Engine, AsyncGenerator[None, None]]] = {}
        self._lock = threading.Lock()

    async def current(self) -> Engine:
        """The engine of the running loop."""
        loop = asyncio.get_running_loop()
        if loop not in self._engines:
            with self._lock:
                self._engines = {known: engine for known, engine in self._engines.items() if not known.is_closed()}
                engine = self._make()
                self._engines[loop] = engine, _closing(engine)
            await anext(self._engines[loop][1])
        return self._engines[loop][0]

    async def aclose(self) -> None:
        """Close the engine of the running loop."""
        with self._lock:
            _, closing = self._engines.pop(asyncio.get_running_loop(), (None, None))
        if closing is not None:
            await closing.aclose()

    def close(self) -> None:
        """Have the other loops close theirs, as soon as they come to it."""
        with self._lock:
            engines, self._engines = self._engines, {}
        for loop, (_, closing) in engines.items():
            if loop.is_running():
                asyncio.run_coroutine_threadsafe(_close(closing), loop)


async def _closing(engine: Engine) -> AsyncGenerator[None, None]:
    try:
        yield
    finally:
        await engine.client.aclose()


async def _close(closing: AsyncGenerator[None, None]) -> None:
    await closing.aclose()
