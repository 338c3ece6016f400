"""The stack over real servers: what its layers do together."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from aiohttp import web

from harness import Asked, refusal, serving, shout
from runner.concurrency import Window
from runner.config import (
    DeploymentConfig,
    DeploymentLimitsConfig,
    FaultsConfig,
    LimitsConfig,
    RetryConfig,
    RoutingConfig,
    SimulatorConfig,
    TransportKind,
)
from runner.earlier import Sent
from runner.errors import ConfigError, InsufficientQuotaError
from runner.estimate import Estimate
from runner.limiter import RateLimiter
from runner.simulator import Simulator
from runner.stack import Limiters, Stack, open_limiters, open_stack
from runner.types import EmbeddingRequest, Endpoint, GenerationRequest, Request
from virtual_time import virtual_time


def stack(
    deployments: dict[str, DeploymentConfig],
    *,
    limits: LimitsConfig | None = None,
    limiters: Limiters | None = None,
    **routing: Any,
) -> Stack:
    return open_stack(
        deployments,
        limits=limits or LimitsConfig(),
        retry=RetryConfig(base_s=0.01),
        routing=RoutingConfig(**routing),
        simulator=SimulatorConfig(latency_s=0.001),
        window=Window(32),
        limiters=limiters,
    )


def at(url: str, **settings: Any) -> DeploymentConfig:
    return DeploymentConfig(model="openai_like/m", api_base=url, **settings)


def broken(asked: Asked) -> web.Response:
    return refusal(500, "server_error", "oops")


KINDS: dict[str, Callable[[], Request]] = {
    "chat": lambda: GenerationRequest(input="hi"),
    "text": lambda: GenerationRequest(input="hi", endpoint=Endpoint.text_completion),
    "responses": lambda: GenerationRequest(input="hi", endpoint=Endpoint.responses),
    "embeddings": lambda: EmbeddingRequest(texts=["hi"]),
}


@pytest.mark.parametrize("transport", [TransportKind.direct, TransportKind.litellm])
@pytest.mark.parametrize("kind", KINDS)
async def test_every_kind_of_request_is_failed_over(kind: str, transport: TransportKind) -> None:
    broken_one = SimulatorConfig(faults=FaultsConfig(http_500=1.0))
    async with Simulator(broken_one) as east, Simulator(SimulatorConfig(latency_s=0.0)) as west:
        fleet = stack(
            {
                label: DeploymentConfig(model="openai/m", api_key="sk-1", api_base=url, transport=transport)
                for label, url in (("east", east.url), ("west", west.url))
            },
            strategy="least-busy",
        )
        request = KINDS[kind]()
        await fleet.send(request)
        await fleet.aclose()

    assert request.trace.deployment == "west"
    assert [(attempt.deployment, attempt.error) for attempt in request.trace.failures] == [
        ("east", "InternalServerError")
    ]


async def answered_soon(fleet: Stack, count: int) -> Counter[str]:
    """How many of so many requests each deployment answers in half a second."""
    requests = [GenerationRequest(input="hi") for _ in range(count)]
    tasks = [asyncio.create_task(fleet.send(request)) for request in requests]
    done, late = await asyncio.wait(tasks, timeout=0.5)
    for task in late:
        task.cancel()
    await asyncio.wait(tasks)
    await fleet.aclose()
    return Counter(request.trace.deployment for request, task in zip(requests, tasks, strict=True) if task in done)


def test_a_deployment_that_cannot_be_served_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^deployments\.a: model='hosted_vllm/m' needs the server's address"):
        stack({"a": DeploymentConfig(model="hosted_vllm/m")})
    with pytest.raises(ConfigError, match=r"^model='hosted_vllm/m' needs the server's address"):
        stack({"hosted_vllm/m": DeploymentConfig(model="hosted_vllm/m")})


async def test_the_limits_of_the_account_hold_for_all_deployments_together() -> None:
    async with serving() as east, serving() as west:
        fleet = stack({"east": at(east.url), "west": at(west.url)}, limits=LimitsConfig(rpm=60))
        answered = await answered_soon(fleet, 20)
    assert 1 <= sum(answered.values()) <= 2


async def test_a_deployment_is_held_by_its_own_limits_beside_those_of_the_account() -> None:
    own = DeploymentLimitsConfig(rpm=60)
    async with serving() as east, serving() as west:
        fleet = stack({"east": at(east.url, limits=own), "west": at(west.url)}, limits=LimitsConfig(rpm=60_000))
        answered = await answered_soon(fleet, 40)
    assert 1 <= answered["east"] <= 2
    assert answered["west"] > 10


async def test_a_deployments_own_concurrency_bounds_it() -> None:
    most = Counter[str]()
    async with serving(lambda asked: 0.05) as east, serving(lambda asked: 0.05) as west:
        fleet = stack({"east": at(east.url, limits=DeploymentLimitsConfig(concurrency=2)), "west": at(west.url)})
        tasks = [asyncio.create_task(fleet.send(GenerationRequest(input="hi"))) for _ in range(20)]
        while not all(task.done() for task in tasks):
            most |= Counter({label: each.in_flight for label, each in fleet.deployments().items()})
            await asyncio.sleep(0.002)
        await fleet.aclose()

    assert most["east"] == 2
    assert most["west"] > 2


async def test_a_deployments_own_concurrency_may_be_found() -> None:
    async with serving(lambda asked: 0.01) as east, serving(lambda asked: 0.01) as west:
        own = DeploymentLimitsConfig(concurrency="auto")
        fleet = stack({"east": at(east.url, limits=own), "west": at(west.url, limits=own)}, strategy="least-busy")
        await asyncio.gather(*(fleet.send(GenerationRequest(input="hi")) for _ in range(200)))
        await fleet.aclose()

    assert len(east.requests) + len(west.requests) == 200
    assert min(len(east.requests), len(west.requests)) > 40


async def test_deployments_may_be_simulated_and_of_several_models() -> None:
    fleet = stack({"a": DeploymentConfig(model="simulated/echo"), "b": DeploymentConfig(model="simulated/other")})
    models = {(await fleet.send(GenerationRequest(input="hi"))).model_id for _ in range(20)}
    await fleet.aclose()
    assert models == {"echo", "other"}


async def test_a_fallback_is_another_model_and_says_so() -> None:
    async with serving(broken) as east, serving() as last:
        fleet = stack({"east": at(east.url), "last": at(last.url, order=1)}, strategy="least-busy")
        requests = [GenerationRequest(input=f"row {number}") for number in range(40)]
        outcomes = await asyncio.gather(*map(fleet.send, requests), return_exceptions=True)
        await fleet.aclose()

    answered = [
        request for request, outcome in zip(requests, outcomes, strict=True) if not isinstance(outcome, Exception)
    ]
    assert len(answered) > 30
    assert {request.trace.deployment for request in answered} == {"last"}


async def test_an_outage_is_told_and_waited_out(caplog: pytest.LogCaptureFixture) -> None:
    storm = asyncio.Event()

    def answer(asked: Asked) -> web.Response:
        return refusal(529, "overloaded_error", "Overloaded") if storm.is_set() else shout(asked)

    async with serving(answer) as provider:
        alone = stack({"only": at(provider.url)}, cooldown_s=0.2)
        await alone.send(GenerationRequest(input="hi"))
        storm.set()
        waiting = [asyncio.create_task(alone.send(GenerationRequest(input=f"{n}"))) for n in range(20)]
        async with asyncio.timeout(20):
            while not caplog.messages:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        storm.clear()
        await asyncio.gather(*waiting)
        await alone.aclose()

    out, back = caplog.messages
    assert out.startswith("the deployment is out, and requests wait for up to 600 s")
    assert "HTTP 529" in out
    assert back.startswith("answers come again")


# Limiters


def fleet_of(**limits: DeploymentLimitsConfig) -> dict[str, DeploymentConfig]:
    models = {"east": "hosted_vllm/m", "west": "hosted_vllm/m"}
    return {label: DeploymentConfig(model=model, limits=limits.get(label)) for label, model in models.items()}


def test_a_deployment_alone_is_held_by_the_limits_of_the_run() -> None:
    limiters = open_limiters({"only": DeploymentConfig(model="hosted_vllm/m")}, LimitsConfig(rpm=60))
    assert limiters.account is None
    assert limiters.of["only"].paused_s == 0


def test_several_keep_the_limits_of_the_run_together() -> None:
    assert open_limiters(fleet_of(), LimitsConfig(rpm=60)).account is not None
    assert open_limiters(fleet_of(), LimitsConfig()).account is None
    alone = {"only": DeploymentConfig(model="hosted_vllm/m", limits=DeploymentLimitsConfig(rpm=6))}
    assert open_limiters(alone, LimitsConfig(rpm=60)).account is not None


def test_a_pause_of_one_deployment_is_no_others() -> None:
    limiters = open_limiters(fleet_of(), LimitsConfig(rpm=60))
    limiters.of["east"].pause(60)
    assert limiters.of["east"].paused_s > 0
    assert limiters.of["west"].paused_s == 0
    assert limiters.account is not None
    assert limiters.account.paused_s == 0


async def test_limiters_that_are_kept_go_on_in_the_next_stack_of_the_same_account_and_limits() -> None:
    kept: dict[Hashable, RateLimiter] = {}
    first = open_limiters(fleet_of(), LimitsConfig(rpm=60), kept=kept)
    again = open_limiters(fleet_of(), LimitsConfig(rpm=60, concurrency=8), kept=kept)
    other_limits = open_limiters(fleet_of(), LimitsConfig(rpm=90), kept=kept)
    other_model = {label: replace(each, model="hosted_vllm/other") for label, each in fleet_of().items()}
    other = open_limiters(other_model, LimitsConfig(rpm=60), kept=kept)

    assert again == first
    assert other_limits.account is not first.account
    assert other.account is not first.account
    assert other.of["east"] is not first.of["east"]
    assert first.of["east"] is not first.of["west"]


@virtual_time
async def test_what_was_sent_before_counts_where_it_went_and_where_that_is_not_known_everywhere() -> None:
    own = DeploymentLimitsConfig(rpm=60)
    for deployment, has_room in (("east", {"west"}), (None, set()), ("gone", {"east", "west"})):
        fleet, limits = {label: at("http://h/v1", limits=own) for label in ("east", "west")}, LimitsConfig(rpm=600)
        limiters = open_limiters(fleet, limits)
        client = stack(fleet, limits=limits, limiters=limiters)
        assert client.memory_s == 60
        client.recall([Sent(age_s=0.0, deployment=deployment, requests=60, used=Estimate())])

        assert {label for label, limiter in limiters.of.items() if await grants_soon(limiter)} == has_room
        assert limiters.account is not None
        assert await grants_soon(limiters.account)
        client.recall([Sent(age_s=0.0, deployment=deployment, requests=600, used=Estimate())])
        assert not await grants_soon(limiters.account)


async def grants_soon(limiter: RateLimiter) -> bool:
    with suppress(InsufficientQuotaError):
        await limiter.acquire(patience_s=30.0)
        return True
    return False
