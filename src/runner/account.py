"""The account: limits that hold for all deployments together."""

from __future__ import annotations

import time
from collections.abc import Callable

from runner.errors import ConnectError, RequestError
from runner.limiter import Estimate, RateLimiter
from runner.types import Client, Request, Response, TokenUsage


class Account:
    """A `Client` that also reserves from a quota that several deployments share.

    It stands around a deployment's own `Limited`, which keeps the books of the attempt and obeys the deployment's
    pauses: a refusal there is no reason to pause the others.

    Args:
        client: One deployment, under its own limits.
        limiter: The account's quota.
        estimate: What a request is expected to take.
    """

    def __init__(self, client: Client, limiter: RateLimiter, estimate: Callable[[Request], Estimate]) -> None:
        self._client = client
        self._limiter = limiter
        self._estimate = estimate

    async def send(self, request: Request) -> Response:
        queued = time.perf_counter()
        handle = await self._limiter.acquire(self._estimate(request) if self._limiter.counts_tokens else 0.0)
        request.trace.queue_wait_s += time.perf_counter() - queued
        try:
            response = await self._client.send(request)
        except ConnectError:
            handle.refund()
            raise
        except RequestError as error:
            if error.billing == "free":
                handle.settle(TokenUsage())
            raise
        except BaseException:
            if not request.trace.on_the_wire:
                handle.refund()
            raise
        if response.usage is not None:
            handle.settle(response.usage)
        return response

    async def aclose(self) -> None:
        await self._client.aclose()
