from __future__ import annotations

import asyncio

import pytest

from runner.concurrency import Window
from runner.errors import BadRequestError, InternalServerError
from runner.limited import Limited
from runner.limiter import RateLimiter
from runner.router import Circuit, Hedged, Replica, Router, strategy_of
from runner.router.hedge import SHARE
from runner.types import Attempt, Request, Response, Trace
from virtual_fleet import Fleet, Server, asking, servers
from virtual_time import now, other_tasks, settle, virtual_time


@virtual_time
async def test_a_late_request_is_asked_elsewhere_and_the_first_answer_counts() -> None:
    a, b = servers("ab", spread=0.2)
    fleet = Fleet(a, b, strategy="least-busy", hedge=True)
    await fleet.ask_many(400, at_once=4)
    asked = len(a.asked) + len(b.asked)
    fleet.replicas["b"].enter(now(), Trace())
    a.latency_s = 10.0
    began = now()
    request = asking()
    await fleet.client.send(request)
    assert now() - began < 0.3
    assert len(a.asked) + len(b.asked) == asked + 2
    assert (request.trace.deployment, request.trace.on_the_wire) == ("b", False)
    assert request.trace.service_time_s == pytest.approx(0.1, rel=0.3)
    [entry] = request.trace.failures
    assert (entry.error, entry.deployment, entry.cost_usd) == ("Hedged", "a", None)
    await settle()
    assert fleet.replicas["a"].in_flight == 0
    assert len(other_tasks()) == 0


@virtual_time
async def test_the_first_replica_may_win_all_the_same() -> None:
    a, b = servers("ab", spread=0.2)
    fleet = Fleet(a, b, strategy="least-busy", hedge=True)
    await fleet.ask_many(400, at_once=4)
    fleet.replicas["b"].enter(now(), Trace())
    a.latency_s, b.latency_s = 0.2, 10.0
    request = asking()
    await fleet.client.send(request)
    assert request.trace.deployment == "a"
    assert len(request.trace.failures) == 1


@virtual_time
async def test_the_ledger_knows_before_the_second_request_is_sent() -> None:
    a, b = servers("ab", spread=0.2)
    fleet = Fleet(a, b, strategy="least-busy", hedge=True)
    await fleet.ask_many(400, at_once=4)
    fleet.replicas["b"].enter(now(), Trace())
    a.latency_s = 10.0
    before = len(b.asked)
    ledger: list[int] = []

    async def enter(attempt: Attempt) -> None:
        ledger.append(len(b.asked) - before)

    request = asking()
    request.trace.on_failure = enter
    await fleet.client.send(request)
    assert ledger == [0]


@virtual_time
async def test_no_more_than_one_in_twenty_is_asked_twice() -> None:
    a, b = servers("ab", spread=0.2)
    fleet = Fleet(a, b, hedge=True)
    await fleet.ask_many(200, at_once=4)
    b.latency_s = 0.5
    await fleet.ask_many(2_000, at_once=16)
    assert 2_200 < len(a.asked) + len(b.asked) <= 2_200 * (1 + SHARE)


@virtual_time
async def test_stragglers_are_cut_off() -> None:
    def worst(times: list[float]) -> float:
        return sorted(times)[int(0.99 * len(times))]

    async def times(*, hedge: bool) -> list[float]:
        fleet_of = servers("abcd", spread=0.2)
        fleet = Fleet(*fleet_of, hedge=hedge)
        taken: list[float] = []

        async def work(numbers: range) -> None:
            for number in numbers:
                latency_s = 2.0 if number % 50 == 7 else 0.1
                for server in fleet_of:
                    server.latency_s = latency_s
                began = now()
                asked = asyncio.ensure_future(fleet.ask())
                await settle()
                for server in fleet_of:
                    server.latency_s = 0.1
                await asked
                taken.append(now() - began)

        await asyncio.gather(*(work(range(start, 2_000, 8)) for start in range(8)))
        return taken[500:]

    assert worst(await times(hedge=False)) > 3 * worst(await times(hedge=True))


@virtual_time
async def test_nothing_is_hedged_before_it_is_known_what_late_is() -> None:
    a, b = servers("ab", latency_s=5.0)
    fleet = Fleet(a, b, hedge=True)
    await fleet.ask_many(40, at_once=4)
    assert len(a.asked) + len(b.asked) == 40


@virtual_time
async def test_a_failure_is_outlasted_by_the_other_attempt() -> None:
    a, b = servers("ab", spread=0.2)
    fleet = Fleet(a, b, strategy="least-busy", hedge=True)
    await fleet.ask_many(400, at_once=4)
    fleet.replicas["b"].enter(now(), Trace())
    a.latency_s, b.latency_s = 0.3, 1.0
    request = asking()
    asked = len(a.asked) + len(b.asked)
    sent = asyncio.create_task(fleet.client.send(request))
    await asyncio.sleep(0.1)
    a.error = InternalServerError("oops")
    await sent
    assert request.trace.deployment == "b"
    assert len(a.asked) + len(b.asked) == asked + 2


@virtual_time
async def test_a_refusal_is_raised_as_without_hedging() -> None:
    a, b = servers("ab", spread=0.2)
    fleet = Fleet(a, b, hedge=True)
    await fleet.ask_many(400, at_once=4)
    a.error = b.error = BadRequestError("no")
    with pytest.raises(BadRequestError):
        await fleet.ask()


@virtual_time
async def test_cancelling_cancels_both() -> None:
    a, b = servers("ab", spread=0.2)
    fleet = Fleet(a, b, strategy="least-busy", hedge=True)
    await fleet.ask_many(400, at_once=4)
    a.latency_s = b.latency_s = 60.0
    sent = asyncio.create_task(fleet.client.send(asking()))
    await asyncio.sleep(5)
    assert fleet.replicas["a"].in_flight + fleet.replicas["b"].in_flight == 2
    sent.cancel()
    await settle()
    assert sent.cancelled()
    assert fleet.replicas["a"].in_flight + fleet.replicas["b"].in_flight == 0


@virtual_time
async def test_an_answer_counts_as_on_its_way_until_it_is_handed_on() -> None:
    a, b = servers("ab", spread=0.2)
    fleet = Fleet(a, b, strategy="least-busy", hedge=True)
    await fleet.ask_many(400, at_once=4)
    fleet.replicas["b"].enter(now(), Trace())
    a.latency_s, b.latency_s = 1.0, 60.0
    request = asking()
    answered = len(a.answered)
    sent = asyncio.create_task(fleet.client.send(request))
    await asyncio.sleep(0.5)
    while not sent.done():
        assert request.trace.on_the_wire
        await asyncio.sleep(0 if len(a.answered) > answered else 0.01)
    assert not request.trace.on_the_wire


@virtual_time
async def test_where_both_fail_the_request_waits_for_another_try_and_knows_both() -> None:
    for first_s, second_s in ((0.4, 1.0), (1.0, 0.4)):
        a, b = servers("ab", spread=0.2)
        fleet = Fleet(a, b, strategy="least-busy", hedge=True)
        await fleet.ask_many(400, at_once=4)
        fleet.replicas["b"].enter(now(), Trace())
        a.latency_s, b.latency_s = first_s, second_s
        request = asking()
        sent = asyncio.create_task(fleet.client.send(request))
        await asyncio.sleep(0.3)
        a.error = b.error = InternalServerError("oops")
        while len(request.trace.failures) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        assert not request.trace.on_the_wire
        assert not request.trace.at_once
        assert [(entry.error, entry.deployment) for entry in request.trace.failures] == [
            ("Hedged", "a"),
            ("APIConnectionError", "b"),
        ]
        sent.cancel()


@virtual_time
async def test_where_both_fail_a_third_is_asked_at_once() -> None:
    a, b, c = servers("abc", spread=0.2)
    fleet = Fleet(a, b, c, strategy="least-busy", hedge=True)
    await fleet.ask_many(600, at_once=4)
    for name in "bcc":
        fleet.replicas[name].enter(now(), Trace())
    a.latency_s, b.latency_s = 0.4, 1.0
    request = asking()
    began = now()
    sent = asyncio.create_task(fleet.client.send(request))
    await asyncio.sleep(0.3)
    a.error = b.error = InternalServerError("oops")
    await sent
    assert request.trace.deployment == "c"
    assert now() - began < 1.6


@virtual_time
async def test_the_times_of_the_pieces_are_those_of_the_answer_that_counts() -> None:
    class Streaming(Server):
        async def send(self, request: Request) -> Response:
            request.trace.ttft_s, request.trace.chunk_times = self.latency_s, (self.latency_s,)
            return await super().send(request)

    a, b = Streaming("a", spread=0.2), Streaming("b", spread=0.2)
    fleet = Fleet(a, b, strategy="least-busy", hedge=True)
    await fleet.ask_many(400, at_once=4)
    fleet.replicas["b"].enter(now(), Trace())
    a.latency_s = 10.0
    request = asking()
    await fleet.client.send(request)
    assert (request.trace.ttft_s, request.trace.chunk_times) == (0.1, (0.1,))


@virtual_time
async def test_the_failure_of_a_hedged_request_counts_against_its_replica() -> None:
    a, b = servers("ab", spread=0.2)
    one_failure_opens_it = Circuit(budget=1.0)
    fleet = Fleet(a, b, strategy="least-busy", hedge=True, settings={"a": {"circuit": one_failure_opens_it}})
    await fleet.ask_many(400, at_once=4)
    fleet.replicas["b"].enter(now(), Trace())
    a.latency_s, b.latency_s = 0.5, 1.0
    request = asking()
    sent = asyncio.create_task(fleet.client.send(request))
    await asyncio.sleep(0.3)
    a.error = InternalServerError("oops")
    await sent
    assert [entry.error for entry in request.trace.failures] == ["Hedged"]
    assert fleet.state("a") == "out"


@virtual_time
async def test_a_second_attempt_that_waits_for_quota_leaves_the_slot_to_the_first() -> None:
    window = Window(1)
    a, b = servers("ab", spread=0.2)
    limiters = [RateLimiter(), RateLimiter()]
    replicas = [
        Replica(server.name, Limited(server, limiter, label=server.name, slot=window))
        for server, limiter in zip((a, b), limiters, strict=True)
    ]
    client = Hedged(Router(replicas, strategy=strategy_of("least-busy", replicas)))
    for _ in range(400):
        await client.send(asking())
    a.latency_s, b.latency_s = 10.0, 0.1
    replicas[1].enter(now(), Trace())
    async with window:
        sent = asyncio.create_task(client.send(asking()))
        await settle()
        limiters[1].pause(60.0, "busy")
        await asyncio.sleep(1)
        assert [replica.in_flight for replica in replicas] == [1, 2]
        assert window.active == 1
        await sent
    assert window.active == 0
