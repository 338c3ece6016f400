from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from runner.account import Account
from runner.concurrency import Window
from runner.config import RetryConfig
from runner.errors import (
    ConnectError,
    InsufficientQuotaError,
    NoDeploymentError,
    RequestError,
    ServiceUnavailableError,
    Timeout,
)
from runner.estimate import Estimator
from runner.limited import Limited
from runner.limiter import RateLimiter
from runner.retry import Retrying
from runner.router import Replica, Router
from virtual_fleet import Server, asking
from virtual_time import now, virtual_time


def account(
    server: Server, limiter: RateLimiter, own: RateLimiter | None = None, window: Window | None = None
) -> Account:
    own = own or RateLimiter()
    client = Limited(server, own, label=server.name, slot=window)
    return Account(client, limiter, own=own, estimator=Estimator(default_output_tokens=100), slot=window)


async def asked_within(client: Account, count: int) -> float:
    """Seconds that so many requests take, whatever comes of them."""
    began = now()
    for _ in range(count):
        with suppress(RequestError):
            await client.send(asking())
    return now() - began


@virtual_time
async def test_deployments_share_one_quota() -> None:
    limiter = RateLimiter(requests_per_minute=60)
    east, west = (account(Server(name, latency_s=0.0), limiter) for name in ("east", "west"))
    await asyncio.gather(asked_within(east, 30), asked_within(west, 30))
    assert now() == pytest.approx(59, abs=2)


@virtual_time
async def test_what_waits_for_a_deployment_s_pause_leaves_the_quota_to_others() -> None:
    limiter, paused, window = RateLimiter(requests_per_minute=4, max_request_burst=4), RateLimiter(), Window(2)
    paused.pause(5.0, "enough")
    servers = [Server("east", latency_s=0.0), Server("west", latency_s=0.0)]
    east, west = account(servers[0], limiter, paused, window), account(servers[1], limiter, window=window)

    async def ask(client: Account) -> float:
        async with window:
            await client.send(asking())
            return now()

    sent = await asyncio.gather(*(ask(east) for _ in range(4)), *(ask(west) for _ in range(8)))
    assert sum(at < 60 for at in sent) == 4
    assert sum(at < 120 for at in sent) == 8


@virtual_time
async def test_what_was_really_used_is_charged() -> None:
    client = account(Server("east", latency_s=0.0), RateLimiter(tokens_per_minute=1_200))
    assert await asked_within(client, 50) == pytest.approx(50, abs=5)  # 20 tokens each, and not 100


@pytest.mark.parametrize(
    ("error", "is_charged"),
    [(ConnectError("nobody"), False), (ServiceUnavailableError("busy"), False), (Timeout("slow"), True)],
)
@virtual_time
async def test_a_failure_is_charged_if_it_may_have_cost_something(error: RequestError, is_charged: bool) -> None:
    server = Server("east")
    server.error = error
    client = account(server, RateLimiter(tokens_per_minute=6_000))
    assert (await asked_within(client, 100) > 30) is is_charged


@virtual_time
async def test_a_request_that_is_cancelled_before_it_was_sent_is_not_charged() -> None:
    limiter, own = RateLimiter(requests_per_minute=1), RateLimiter()
    client = account(Server("east", latency_s=0.0), limiter, own)
    own.pause(2)
    sent = asyncio.create_task(client.send(asking()))
    await asyncio.sleep(1)
    sent.cancel()
    await asyncio.sleep(1)
    assert await asked_within(client, 1) < 1


@virtual_time
async def test_a_request_that_its_deployments_own_limits_keep_back_is_not_charged() -> None:
    limiter = RateLimiter(requests_per_minute=60)
    full = account(Server("east"), limiter, RateLimiter(requests_per_day=1))
    assert await asked_within(full, 30) < 5


@virtual_time
async def test_the_wait_is_queue_wait() -> None:
    client = account(Server("east", latency_s=0.0), RateLimiter(requests_per_minute=60))
    requests = [asking() for _ in range(5)]
    await asyncio.gather(*map(client.send, requests))
    assert requests[-1].trace.queue_wait_s > 1


@virtual_time
async def test_a_days_quota_that_is_used_up_is_an_error_at_once_for_all() -> None:
    limiter = RateLimiter(requests_per_day=1)
    router = Router([Replica(name, account(Server(name), limiter)) for name in ("east", "west")])
    client = Retrying(router, RetryConfig())
    await client.send(asking())
    with pytest.raises(InsufficientQuotaError, match=r"limits\.rpd=1 is used up; requests can go on at"):
        await client.send(asking())
    with pytest.raises((InsufficientQuotaError, NoDeploymentError)):
        await client.send(asking())
    assert now() < 1
