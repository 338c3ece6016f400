"""Deployments in virtual time: servers that do as they are told, and the routing stack over them."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

from runner.concurrency import Window
from runner.config import RetryConfig
from runner.errors import APIConnectionError, RequestError
from runner.limited import Limited
from runner.limiter import RateLimiter
from runner.retry import Retrying
from runner.router import Hedged, Recallable, Replica, Router, strategy_of
from runner.types import Generation, GenerationRequest, Request, Response, TokenUsage
from virtual_time import now


class Server:
    """A client that answers with its own name, after ``latency_s``, so many requests at once."""

    def __init__(self, name: str, *, latency_s: float = 0.1, slots: int = 1000, spread: float = 0.0) -> None:
        self.name = name
        self.latency_s = latency_s
        self.spread = spread
        self.error: RequestError | None = None
        """What it says to everything."""
        self.hanging = asyncio.Event()
        self.hanging.set()
        """Cleared: it says nothing until it is set."""
        self.asked: list[float] = []
        self.answered: list[float] = []
        self.texts: list[str] = []
        self.closed = False
        self._slots = asyncio.Semaphore(slots)
        self._random = random.Random(name)
        self._alive = asyncio.Event()

    async def send(self, request: Request) -> Response:
        self.asked.append(now())
        assert isinstance(request, GenerationRequest)
        self.texts.append(str(request.input))
        if self.error is not None:
            await asyncio.sleep(0.001)
            raise self.error
        async with self._slots:
            await asyncio.sleep(self.latency_s * (1 + self.spread * self._random.uniform(-1, 1)))
            await self.hanging.wait()
        if self.error is not None:
            raise APIConnectionError("the connection broke")
        self.answered.append(now())
        usage = TokenUsage(prompt_tokens=10, completion_tokens=10, total_tokens=20)
        return Response(output=Generation(text=self.name), model_id="m", request_id=None, usage=usage, headers={})

    async def aclose(self) -> None:
        self.closed = True


class Fleet:
    """The stack over some servers: a router, or all of it."""

    def __init__(
        self,
        *servers: Server,
        strategy: str = "simple-shuffle",
        settings: dict[str, dict[str, Any]] | None = None,
        max_retries: int = 3,
        hedge: bool = False,
        **options: Any,
    ) -> None:
        self.replicas = {
            server.name: _replica(server, several=len(servers) > 1, **(settings or {}).get(server.name, {}))
            for server in servers
        }
        replicas = list(self.replicas.values())
        self.window = Window(1_000_000)
        self.router = Router(
            replicas,
            strategy=strategy_of(strategy, replicas),
            is_full=lambda: self.window.active >= self.window.limit,
            **options,
        )
        self.client = Retrying(
            Hedged(self.router) if hedge else self.router,
            RetryConfig(max_retries=max_retries),
            max_wait_s=options.get("max_wait_s", 600.0),
        )

    async def ask(self, text: str = "?") -> str:
        """Who answers."""
        return _name(await self.client.send(asking(text)))

    async def ask_router(self) -> str:
        return _name(await self.router.send(asking()))

    async def ask_many(self, count: int, *, at_once: int) -> Counter[str]:
        """How many requests each one answers, of so many, with so many in flight."""
        answered: Counter[str] = Counter()
        self.window.limit = at_once

        left = iter(range(count))

        async def work() -> None:
            async with self.window:
                for number in left:
                    answered[await self.ask(f"question {number}")] += 1

        async with asyncio.TaskGroup() as tasks:
            for _ in range(at_once):
                tasks.create_task(work())
        return answered

    def state(self, name: str) -> str:
        return self.router.snapshot()[name].state


def servers(names: Sequence[str], **settings: Any) -> list[Server]:
    return [Server(name, **settings) for name in names]


def asking(text: str = "?") -> GenerationRequest:
    return GenerationRequest(input=text)


def _replica(server: Server, *, several: bool, concurrency: int | None = None, **settings: Any) -> Replica:
    recall = Recallable(server) if several else None
    limited = Limited(recall or server, RateLimiter(), label=server.name)
    window = Window(concurrency) if concurrency else None
    return Replica(server.name, limited, recall=recall, window=window, **settings)


def _name(response: Response) -> str:
    assert isinstance(response.output, Generation)
    return response.output.text
