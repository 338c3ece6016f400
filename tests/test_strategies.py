from __future__ import annotations

import time
from collections import Counter
from typing import Any

import pytest

from runner.concurrency import Window
from runner.config import STRATEGIES, DeploymentLimitsConfig
from runner.router import Replica, strategy_of
from runner.types import TokenPrice, TokenUsage, Trace
from virtual_fleet import Fleet, Server, asking
from virtual_time import now, virtual_time


def replica(label: str, *, in_flight: int = 0, latency_s: float | None = None, **settings: Any) -> Replica:
    made = Replica(label, Server(label), **settings)
    made.latency_s = latency_s
    for _ in range(in_flight):
        made.enter(time.monotonic(), Trace())
    return made


def chosen(name: str, *replicas: Replica, times: int = 1) -> Counter[str]:
    strategy = strategy_of(name, replicas)
    return Counter(strategy.pick(replicas, asking()).label for _ in range(times))


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_spreads_requests_over_equal_idle_replicas(name: str) -> None:
    counts = chosen(name, *(replica(label) for label in "abcd"), times=400)
    assert len(counts) == 4
    assert max(counts.values()) < 150


def test_shuffle_follows_the_weights() -> None:
    counts = chosen("simple-shuffle", *(replica(label, weight=float(label)) for label in "631"), times=5_000)
    assert counts["6"] == pytest.approx(3_000, rel=0.1)
    assert counts["3"] == pytest.approx(1_500, rel=0.1)
    assert counts["1"] == pytest.approx(500, rel=0.2)


def test_the_least_busy_is_the_one_with_the_fewest_requests_for_its_weight() -> None:
    assert set(chosen("least-busy", replica("a", in_flight=3), replica("b", in_flight=2), times=5)) == {"b"}
    assert set(chosen("least-busy", replica("a", in_flight=3, weight=2), replica("b", in_flight=2), times=5)) == {"a"}


def test_the_fastest_is_chosen_as_long_as_it_is_not_busy() -> None:
    slow = replica("slow", latency_s=1.0)
    assert set(chosen("latency-based-routing", replica("fast", latency_s=0.2), slow, times=5)) == {"fast"}
    assert set(chosen("latency-based-routing", replica("fast", latency_s=0.2, in_flight=9), slow)) == {"slow"}


def test_a_replica_without_an_answer_counts_as_fast() -> None:
    known = replica("known", latency_s=0.2, in_flight=1)
    assert set(chosen("latency-based-routing", known, replica("new"), times=5)) == {"new"}


@virtual_time
async def test_the_one_with_the_most_of_its_limits_left_is_chosen() -> None:
    by_requests = replica("a", limits=DeploymentLimitsConfig(rpm=10))
    by_tokens = replica("b", limits=DeploymentLimitsConfig(tpm=1_000))
    by_slots = replica("c", window=Window(10))
    for _ in range(4):
        by_requests.enter(time.monotonic(), Trace())
    asked = by_tokens.enter(time.monotonic(), Trace())
    by_tokens.answered(asked, Trace(), TokenUsage(total_tokens=300))
    by_tokens.leave()
    for _ in range(2):
        by_slots.enter(time.monotonic(), Trace())
    all_three = (by_requests, by_tokens, by_slots)
    assert [each.usage(time.monotonic()) for each in all_three] == pytest.approx([0.4, 0.3, 0.2], abs=0.01)
    assert set(chosen("usage-based-routing", *all_three, times=5)) == {"c"}
    for _ in range(7):
        by_slots.enter(time.monotonic(), Trace())
    assert set(chosen("usage-based-routing", *all_three, times=5)) == {"b"}


def test_the_cheapest_is_chosen_and_an_unknown_price_is_the_highest() -> None:
    dear = replica("dear", price=TokenPrice(prompt=3e-6, completion=9e-6))
    cheap = replica("cheap", price=TokenPrice(prompt=1e-6, completion=2e-6), in_flight=50)
    assert set(chosen("cost-based-routing", dear, replica("unknown"), cheap, times=5)) == {"cheap"}


@virtual_time
async def test_least_busy_uses_all_slots_of_unequal_servers() -> None:
    fleet_of = [Server("a", slots=8), Server("b", slots=8), Server("c", slots=2)]
    await Fleet(*fleet_of, strategy="least-busy").ask_many(5400, at_once=54)
    assert 5400 / now() > 0.95 * 180


@virtual_time
async def test_usage_uses_all_slots_of_servers_with_limits() -> None:
    fleet_of = [Server("a", slots=8), Server("b", slots=8), Server("c", slots=2)]
    settings = {"a": {"concurrency": 8}, "b": {"concurrency": 8}, "c": {"concurrency": 2}}
    await Fleet(*fleet_of, strategy="usage-based-routing", settings=settings).ask_many(1800, at_once=54)
    assert 1800 / now() > 0.95 * 180


@virtual_time
async def test_latency_based_routing_finds_the_faster_server() -> None:
    fast, slow = Server("fast", latency_s=0.1), Server("slow", latency_s=0.5)
    answered = await Fleet(fast, slow, strategy="latency-based-routing").ask_many(1000, at_once=4)
    assert answered["fast"] > 900
