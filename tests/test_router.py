from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from runner.config import RetryConfig
from runner.errors import InternalServerError
from runner.retry import Retrying
from runner.router import Router
from runner.types import Generation, GenerationRequest, Request, Response


class Replica:
    """A client that answers with its own name."""

    def __init__(self, name: str, error: Exception | None = None) -> None:
        self.name = name
        self.error = error
        self.requests: list[Request] = []
        self.closed = False

    async def send(self, request: Request) -> Response:
        self.requests.append(request)
        if self.error is not None:
            raise self.error
        return Response(output=Generation(text=self.name), model_id="m", request_id=None, usage=None, headers={})

    async def aclose(self) -> None:
        self.closed = True


def fleet(*names: str) -> dict[str, Replica]:
    return {name: Replica(name) for name in names}


async def chosen(router: Router, times: int = 1) -> list[str]:
    """Which replicas answer so many requests."""
    answers = [(await router.send(GenerationRequest(input="?"))).output for _ in range(times)]
    return [answer.text for answer in answers if isinstance(answer, Generation)]


async def test_requests_are_spread_by_weight() -> None:
    router = Router(fleet("a", "b", "c"), weights={"a": 6.0, "b": 3.0, "c": 1.0}, seed=1)
    counts = Counter(await chosen(router, 5_000))
    assert counts["a"] == pytest.approx(3_000, rel=0.1)
    assert counts["b"] == pytest.approx(1_500, rel=0.1)
    assert counts["c"] == pytest.approx(500, rel=0.2)


async def test_without_weights_all_replicas_get_the_same_share() -> None:
    counts = Counter(await chosen(Router(fleet("a", "b"), seed=1), 2_000))
    assert counts["a"] == pytest.approx(1_000, rel=0.1)


async def test_a_replica_without_a_weight_weighs_one() -> None:
    counts = Counter(await chosen(Router(fleet("a", "b"), weights={"a": 3.0}, seed=1), 2_000))
    assert counts["b"] == pytest.approx(500, rel=0.2)


async def test_a_replica_of_weight_zero_gets_nothing() -> None:
    counts = Counter(await chosen(Router(fleet("a", "b"), weights={"a": 0.0, "b": 1.0}, seed=1), 500))
    assert counts == {"b": 500}


async def test_the_same_seed_makes_the_same_choices() -> None:
    first = await chosen(Router(fleet("a", "b", "c"), seed=7), 50)
    assert await chosen(Router(fleet("a", "b", "c"), seed=7), 50) == first
    assert await chosen(Router(fleet("a", "b", "c"), seed=8), 50) != first


async def test_a_failure_comes_through_and_is_not_sent_elsewhere() -> None:
    replicas = {"a": Replica("a", InternalServerError("oops")), "b": Replica("b")}
    router = Router(replicas, weights={"b": 0.0})
    with pytest.raises(InternalServerError):
        await router.send(GenerationRequest(input="?"))
    assert replicas["b"].requests == []


async def test_a_retry_may_reach_another_replica() -> None:
    replicas = {"a": Replica("a", InternalServerError("oops")), "b": Replica("b")}
    client = Retrying(Router(replicas, seed=3), RetryConfig(max_retries=50, base_s=0.0))
    answers = await asyncio.gather(*(client.send(GenerationRequest(input="?")) for _ in range(20)))
    assert len(answers) == 20
    assert replicas["a"].requests


async def test_closing_closes_every_replica() -> None:
    replicas = fleet("a", "b", "c")
    await Router(replicas).aclose()
    assert all(replica.closed for replica in replicas.values())
