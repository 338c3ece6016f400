from __future__ import annotations

import asyncio

import pytest

from runner.adaptive import Adaptive
from runner.concurrency import Window
from runner.errors import (
    AuthenticationError,
    InsufficientQuotaError,
    InternalServerError,
    RateLimitError,
    RequestError,
    ServiceUnavailableError,
    Timeout,
)
from runner.tuner import Tuner
from runner.types import Generation, GenerationRequest, Request, Response, TokenUsage
from virtual_time import virtual_time


class Provider:
    """Ends each request as it is told."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.usage: TokenUsage | None = None
        self.is_closed = False

    async def send(self, request: Request) -> Response:
        await asyncio.sleep(0.1)
        if self.error is not None:
            raise self.error
        return Response(output=Generation(text="hi"), model_id="m", request_id=None, usage=self.usage, headers={})

    async def aclose(self) -> None:
        self.is_closed = True


async def limit_after(error: RequestError, *, requests: int = 20) -> int:
    """The window after so many requests at once ended so; it had 8 slots."""
    provider = Provider()
    window = Window(4)
    client = Adaptive(provider, Tuner(window))
    provider.error = error
    tasks = [asyncio.create_task(client.send(GenerationRequest(input="hello"))) for _ in range(requests)]
    await asyncio.sleep(0.05)
    window.limit = 8
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        assert outcome is error
    return window.limit


@pytest.mark.parametrize(
    "error", [RateLimitError("no", status=429), ServiceUnavailableError("no", status=529), Timeout("late")]
)
@virtual_time
async def test_what_says_that_it_is_too_much_makes_the_window_smaller(error: RequestError) -> None:
    assert await limit_after(error) < 8


@pytest.mark.parametrize(
    "error",
    [InsufficientQuotaError("no money", status=429), AuthenticationError("no", status=401), InternalServerError("oh")],
)
@virtual_time
async def test_other_failures_say_nothing_about_the_window(error: RequestError) -> None:
    assert await limit_after(error) == 8


@virtual_time
async def test_a_request_that_is_cancelled_is_no_longer_in_flight() -> None:
    window = Window(4)
    tuner = Tuner(window)
    task = asyncio.create_task(Adaptive(Provider(), tuner).send(GenerationRequest(input="hello")))
    await asyncio.sleep(0.05)
    task.cancel()
    await asyncio.wait([task])
    assert tuner.sent().in_flight == 1


@virtual_time
async def test_an_answer_passes_and_closing_does_too() -> None:
    provider = Provider()
    client = Adaptive(provider, Tuner(Window(4)))
    provider.usage = TokenUsage(total_tokens=5)
    response = await client.send(GenerationRequest(input="hello"))
    await client.aclose()
    assert response.usage is provider.usage
    assert provider.is_closed
