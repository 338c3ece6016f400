from __future__ import annotations

import asyncio
import re
from itertools import pairwise

import pytest

from runner.errors import (
    AuthenticationError,
    BadRequestError,
    ConnectError,
    InternalServerError,
    NoDeploymentError,
    RateLimitError,
    ServiceUnavailableError,
)
from runner.estimate import Estimator
from runner.limited import Limited
from runner.limiter import RateLimiter
from runner.router import Replica, Router
from runner.router.router import UNREACHABLE_S
from runner.types import Attempt, GenerationRequest, Trace
from virtual_fleet import Fleet, Server, asking, servers
from virtual_time import now, other_tasks, settle, virtual_time


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the router told."""
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


# Failover


@virtual_time
async def test_a_request_that_a_replica_fails_is_answered_by_another_at_once() -> None:
    a, b = servers("ab")
    a.error = InternalServerError("oops")
    fleet = Fleet(a, b, strategy="least-busy")
    request = asking()
    await fleet.client.send(request)
    assert now() == pytest.approx(0.101)
    assert request.trace.deployment == "b"
    assert [(failed.deployment, failed.error) for failed in request.trace.failures] == [("a", "InternalServerError")]


@virtual_time
async def test_a_failed_attempt_is_in_the_ledger_before_the_next_replica_is_asked() -> None:
    a, b = servers("ab")
    a.error = InternalServerError("oops")
    ledger: list[tuple[str, int]] = []

    async def enter(attempt: Attempt) -> None:
        ledger.append((attempt.deployment, len(b.asked)))

    request = GenerationRequest(input="?", trace=Trace(on_failure=enter))
    await Fleet(a, b, strategy="least-busy").client.send(request)
    assert ledger == [("a", 0)]


@virtual_time
async def test_no_replica_is_asked_twice_while_there_are_others() -> None:
    fleet_of = servers("abcd")
    for server in fleet_of[:3]:
        server.error = InternalServerError("oops")
    fleet = Fleet(*fleet_of)
    for _ in range(3):
        assert await fleet.ask() == "d"
    assert all(len(server.asked) <= 3 for server in fleet_of[:3])


@virtual_time
async def test_once_all_have_failed_it_a_request_waits_as_with_one_server() -> None:
    a, b = servers("ab")
    a.error = b.error = InternalServerError("oops")
    with pytest.raises(InternalServerError):
        await Fleet(a, b, max_retries=5).ask()
    assert len(a.asked) == len(b.asked) == 3
    assert now() > 0.1


@virtual_time
async def test_what_is_wrong_with_the_request_is_not_sent_elsewhere() -> None:
    a, b = servers("ab")
    a.error = BadRequestError("no such parameter")
    fleet = Fleet(a, b, strategy="least-busy")
    with pytest.raises(BadRequestError):
        await fleet.ask()
    assert not b.asked
    assert fleet.state("a") == "up"


@virtual_time
async def test_without_failover_a_failed_request_waits_for_its_turn() -> None:
    a, b = servers("ab")
    a.error = InternalServerError("oops")
    fleet = Fleet(a, b, strategy="least-busy", failover=False)
    with pytest.raises(InternalServerError):
        await fleet.ask_router()
    request = asking()
    await fleet.client.send(request)
    assert not request.trace.at_once


@virtual_time
async def test_a_refused_replica_is_paused_and_the_others_go_on() -> None:
    a, b = servers("ab")
    fleet = Fleet(a, b, strategy="least-busy")
    a.error = RateLimitError("slow down", retry_after_s=7.0)
    await fleet.ask_many(20, at_once=4)
    assert len(a.asked) <= 4
    assert fleet.state("a") == "paused"
    assert now() < 2
    a.error = None
    await asyncio.sleep(7)
    assert set(await fleet.ask_many(4, at_once=4)) == {"a", "b"}


@virtual_time
async def test_a_long_pause_is_told(caplog: pytest.LogCaptureFixture) -> None:
    a, b = servers("ab")
    fleet = Fleet(a, b, strategy="least-busy")
    a.error = RateLimitError("quota", retry_after_s=300.0)
    await fleet.ask_many(20, at_once=8)
    assert "a asks for a pause of 300 s: quota" in warnings(caplog)


@virtual_time
async def test_a_replica_with_a_wrong_key_is_left_alone_and_costs_no_row() -> None:
    a, b = servers("ab")
    a.error = AuthenticationError("no such key")
    fleet = Fleet(a, b, strategy="least-busy")
    answered = await fleet.ask_many(100, at_once=4)
    assert answered == {"b": 100}
    assert len(a.asked) < 10
    assert fleet.state("a") == "out"


@virtual_time
async def test_a_wrong_key_everywhere_is_an_error_at_once() -> None:
    a, b = servers("ab")
    a.error = b.error = AuthenticationError("no such key")
    fleet = Fleet(a, b)
    for _ in range(5):
        with pytest.raises(AuthenticationError):
            await fleet.ask()
    assert now() < 1


# Outages


@virtual_time
async def test_a_dead_replica_is_asked_once_in_a_while_only() -> None:
    a, b = servers("ab")
    a.error = ConnectError("nobody listens")
    fleet = Fleet(a, b)
    answered = await fleet.ask_many(1000, at_once=4)
    assert answered == {"b": 1000}
    assert now() > 20
    assert len(a.asked) < 20
    assert all(later - earlier <= 2.2 for earlier, later in pairwise(a.asked))


@pytest.mark.parametrize("strategy", ["simple-shuffle", "least-busy", "cost-based-routing", "prefix-affinity"])
@virtual_time
async def test_one_that_returns_is_used_again_soon(strategy: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    a, b = servers("ab")
    fleet = Fleet(a, b, strategy=strategy)
    a.error = InternalServerError("oops")
    asking_on = asyncio.create_task(fleet.ask_many(10_000, at_once=32))
    await asyncio.sleep(10)
    assert fleet.state("a") == "out"
    a.error = None
    await asyncio.sleep(3)
    assert fleet.state("a") == "up"
    asking_on.cancel()
    out, back = [message for message in caplog.messages if message.startswith("a is")]
    assert out.startswith("a is out: InternalServerError")
    assert back == "a is back"


@virtual_time
async def test_while_all_are_out_requests_wait_and_it_is_told(caplog: pytest.LogCaptureFixture) -> None:
    fleet_of = servers("ab")
    fleet = Fleet(*fleet_of)
    await fleet.ask_many(10, at_once=2)
    began = now()
    for server in fleet_of:
        server.error = ServiceUnavailableError("HTTP 529: Overloaded")
    asked = asyncio.create_task(fleet.ask_many(200, at_once=20))
    await asyncio.sleep(60)
    assert not asked.done()
    for server in fleet_of:
        server.error = None
    assert sum((await asked).values()) == 200
    assert now() - began < 65
    out, back = warnings(caplog)
    assert "all 2 deployments are out" in out
    assert "600 s (routing.max_wait_s): a: HTTP 529: Overloaded; b: HTTP 529: Overloaded" in out
    assert re.fullmatch("answers come again, after (5[5-9]|6[0-3]) s", back)


@virtual_time
async def test_a_deployment_that_comes_and_goes_is_told_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    server = Server("a")
    fleet = Fleet(server)
    asked = asyncio.create_task(fleet.ask_many(20_000, at_once=20))
    for _ in range(12):
        await asyncio.sleep(2)
        server.error = ServiceUnavailableError("HTTP 529: Overloaded")
        await asyncio.sleep(6)
        server.error = None
    await asked
    told = warnings(caplog)
    assert [("out" in each, "again" in each) for each in told] == [(True, False), (False, True)] * 2


@virtual_time
async def test_a_storm_costs_a_request_a_row_and_little_more() -> None:
    server = Server("a")
    fleet = Fleet(server)
    asked = asyncio.create_task(fleet.ask_many(1000, at_once=32))
    await asyncio.sleep(1)
    server.error = ServiceUnavailableError("HTTP 529: Overloaded")
    await asyncio.sleep(60)
    server.error = None
    assert await asked == {"a": 1000}
    assert len(server.asked) < 1_200
    assert next(at for at in server.answered if at > 61) < 66


@virtual_time
async def test_after_an_outage_the_deployment_is_not_run_over() -> None:
    server = Server("a", latency_s=1.0)
    fleet = Fleet(server)
    await fleet.ask()
    server.error = ServiceUnavailableError("busy")
    asked = asyncio.create_task(fleet.ask_many(200, at_once=100))
    await asyncio.sleep(20)
    server.error = None
    refused = len(server.asked)
    await asyncio.sleep(4)
    by_second = [sum(at // 1 == second for at in server.asked[refused:]) for second in range(21, 26)]
    assert max(by_second) <= 34
    await asked


@virtual_time
async def test_waiting_ends_after_max_wait_s_with_an_error_that_says_why() -> None:
    a, b = servers("ab")
    fleet = Fleet(a, b, max_wait_s=50.0, max_retries=6)
    await fleet.ask_many(20, at_once=4)
    a.error, b.error = ServiceUnavailableError("HTTP 503: full"), ConnectError("cannot connect to b")
    began = now()
    with pytest.raises(NoDeploymentError, match="a: HTTP 503: full; b: cannot connect to b"):
        await fleet.ask()
    assert 50 <= now() - began < 80
    with pytest.raises(NoDeploymentError):  # and those that come later do not wait all over again
        await fleet.ask()
    assert now() - began < 85


@virtual_time
async def test_a_pause_is_waited_out_by_all_however_short_the_wait_for_those_that_are_out() -> None:
    a, b = servers("ab")
    fleet = Fleet(a, b, max_wait_s=50.0)
    a.error = b.error = RateLimitError("slow down", retry_after_s=900.0)
    early = asyncio.create_task(fleet.ask())
    await asyncio.sleep(5)
    a.error = b.error = None
    late = asyncio.create_task(fleet.ask())
    assert {await early, await late} <= {"a", "b"}
    assert now() == pytest.approx(900, abs=5)


@virtual_time
async def test_those_that_come_long_after_an_outage_are_patient_again() -> None:
    server = Server("a")
    fleet = Fleet(server, max_wait_s=50.0)
    await fleet.ask()
    server.error = ServiceUnavailableError("HTTP 503: full")
    with pytest.raises(NoDeploymentError):
        await fleet.ask()
    await asyncio.sleep(600)
    asked = asyncio.create_task(fleet.ask())
    await asyncio.sleep(20)
    server.error = None
    assert await asked == "a"


@virtual_time
async def test_an_address_where_nobody_ever_listened_is_given_half_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    server = Server("a")
    server.error = ConnectError("cannot connect")
    with pytest.raises(NoDeploymentError, match="cannot connect"):
        await Fleet(server).ask()
    assert UNREACHABLE_S <= now() < UNREACHABLE_S + 5
    assert "requests wait for up to 30 s (no connection was ever made): cannot connect" in warnings(caplog)[0]


@virtual_time
async def test_a_server_that_was_there_before_is_waited_for() -> None:
    server = Server("a")
    fleet = Fleet(server, max_retries=1)
    await fleet.ask()
    server.error = ConnectError("cannot connect")
    asked = asyncio.create_task(fleet.ask())
    await asyncio.sleep(300)
    server.error = None
    assert await asked == "a"


@virtual_time
async def test_without_retries_nothing_is_sent_again() -> None:
    a, b = servers("ab")
    a.error = b.error = ConnectError("cannot connect")
    with pytest.raises(ConnectError):
        await Fleet(a, b, max_retries=0).ask()
    assert len(a.asked) + len(b.asked) == 1


@virtual_time
async def test_rows_that_no_attempt_answers_fail_even_if_they_are_the_last_ones() -> None:
    """What always fails through its own fault is no outage."""
    server = Server("a")
    fleet = Fleet(server)
    await fleet.ask_many(50, at_once=8)
    server.error = InternalServerError("the prompt breaks the template")
    outcomes = await asyncio.gather(*(fleet.ask() for _ in range(6)), return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {InternalServerError}
    assert now() < 30


@virtual_time
async def test_a_request_that_is_cancelled_while_it_waits_leaves_nothing_behind() -> None:
    server = Server("a")
    fleet = Fleet(server)
    server.error = ConnectError("cannot connect")
    waiting = [asyncio.create_task(fleet.ask()) for _ in range(5)]
    await asyncio.sleep(5)
    for task in waiting[1:]:
        task.cancel()
    server.error = None
    assert await waiting[0] == "a"
    await fleet.client.aclose()
    await settle()
    assert not other_tasks()
    assert fleet.replicas["a"].in_flight == 0


@virtual_time
async def test_what_waits_for_quota_or_never_fits_it_does_not_show_that_a_server_is_back() -> None:
    server = Server("a")
    limiter = RateLimiter(tokens_per_minute=1_000)
    replica = Replica("a", Limited(server, limiter, label="a", estimator=Estimator(default_output_tokens=1)))
    router = Router([replica])
    replica.circuit.trip(ServiceUnavailableError("busy"))
    await asyncio.sleep(1)
    with pytest.raises(BadRequestError, match="wait for ever"):
        await router.send(asking("far too long " * 1_000))
    assert router.snapshot()["a"].state == "out"
    limiter.pause(20.0, "busy")
    asked = [asyncio.create_task(router.send(asking())) for _ in range(40)]
    await asyncio.sleep(15)
    assert router.snapshot()["a"].state == "out"
    assert (replica.in_flight, len(server.asked)) == (1, 0)
    await asyncio.gather(*asked)
    assert router.snapshot()["a"].state == "up"


@virtual_time
async def test_a_replica_that_asks_for_no_pause_is_not_said_to(caplog: pytest.LogCaptureFixture) -> None:
    server = Server("a", latency_s=60.0)
    fleet = Fleet(server)
    fleet.replicas["a"].circuit.trip(ServiceUnavailableError("HTTP 503: full"))
    await fleet.ask_many(8, at_once=8)
    assert [line for line in warnings(caplog) if "HTTP 503: full" in line]
    assert not [line for line in warnings(caplog) if "asks for a pause" in line]


# Limits of their own


@virtual_time
async def test_a_replica_gets_no_more_at_once_than_its_window_holds() -> None:
    a, b = servers("ab", latency_s=1.0)
    fleet = Fleet(a, b, settings={"a": {"concurrency": 3}, "b": {"concurrency": 5}})
    asked = asyncio.create_task(fleet.ask_many(80, at_once=40))
    await asyncio.sleep(0.5)
    assert (len(a.asked), len(b.asked)) == (3, 5)
    assert await asked == {"a": 30, "b": 50}
    assert now() == pytest.approx(10)


@virtual_time
async def test_those_who_wait_are_served_in_their_order() -> None:
    server = Server("a", latency_s=1.0)
    fleet = Fleet(server, settings={"a": {"concurrency": 2}})
    done: list[int] = []

    async def ask(number: int) -> None:
        await fleet.ask()
        done.append(number)

    await asyncio.gather(*(ask(number) for number in range(9)))
    assert done == sorted(done)


@virtual_time
async def test_the_wait_for_a_replica_is_queue_wait() -> None:
    fleet = Fleet(Server("a", latency_s=2.0), settings={"a": {"concurrency": 1}})
    first, second = asking(), asking()
    await asyncio.gather(fleet.client.send(first), fleet.client.send(second))
    assert first.trace.queue_wait_s == 0
    assert second.trace.queue_wait_s == pytest.approx(2.0)
    assert second.trace.service_time_s == pytest.approx(2.0)


# Order


@virtual_time
async def test_a_fallback_is_asked_only_while_all_others_are_out() -> None:
    a, b, last = servers(["a", "b", "last"])
    fleet = Fleet(a, b, last, settings={"last": {"order": 1}})
    assert set(await fleet.ask_many(100, at_once=8)) == {"a", "b"}
    a.error = ConnectError("cannot connect")
    assert set(await fleet.ask_many(100, at_once=8)) == {"b"}
    b.error = ConnectError("cannot connect")
    assert set(await fleet.ask_many(100, at_once=8)) == {"last"}
    b.error = None
    await asyncio.sleep(3)
    await fleet.ask_many(20, at_once=8)
    last.asked.clear()
    assert set(await fleet.ask_many(100, at_once=8)) == {"b"}
    assert not last.asked


@virtual_time
async def test_one_failure_of_the_only_server_is_no_reason_for_the_fallback() -> None:
    a, last = servers(["a", "last"])
    fleet = Fleet(a, last, settings={"last": {"order": 1}})
    await fleet.ask()
    a.error = InternalServerError("oops")
    asked = asyncio.create_task(fleet.ask())
    await settle()
    await asyncio.sleep(0.002)
    a.error = None
    assert await asked == "a"
    assert not last.asked


# Hanging and slow replicas


@virtual_time
async def test_a_replica_that_hangs_is_drained_and_its_requests_are_answered_elsewhere() -> None:
    a, b, c = servers("abc", spread=0.2)
    fleet = Fleet(a, b, c)
    asked = asyncio.create_task(fleet.ask_many(9000, at_once=30))
    await asyncio.sleep(3)
    a.hanging.clear()
    await asyncio.sleep(20)
    assert fleet.state("a") == "out"
    assert fleet.replicas["a"].in_flight <= 1
    before = len(a.asked)
    a.hanging.set()
    states = []
    while not asked.done():
        states.append(fleet.state("a"))
        await asyncio.sleep(0.5)
    assert "up" in states
    assert sum((await asked).values()) == 9000
    assert len(a.asked) > before + 100


@virtual_time
async def test_a_long_answer_is_not_called_back_while_its_replica_answers_others() -> None:
    a, b = servers("ab", latency_s=0.1)
    fleet = Fleet(a, b, strategy="least-busy")
    await fleet.ask_many(100, at_once=4)
    a.latency_s = b.latency_s = 60.0
    long_one = asyncio.create_task(fleet.ask("long"))
    await asyncio.sleep(0.01)
    a.latency_s = b.latency_s = 0.1
    others = asyncio.create_task(fleet.ask_many(2000, at_once=4))
    await long_one
    assert [*a.texts, *b.texts].count("long") == 1
    await others


@virtual_time
async def test_a_long_answer_alone_at_its_replica_survives_since_a_probe_is_answered() -> None:
    a, b = servers("ab", latency_s=0.1)
    fleet = Fleet(a, b, settings={"a": {"weight": 1e-6}})
    await fleet.ask_many(100, at_once=4)
    a.latency_s = b.latency_s = 60.0
    fleet.replicas["b"].paused_until = now() + 1e9
    long_one = asyncio.create_task(fleet.ask("long"))
    await asyncio.sleep(0.01)
    a.latency_s = b.latency_s = 0.1
    fleet.replicas["b"].paused_until = 0.0
    others = asyncio.create_task(fleet.ask_many(2000, at_once=2))
    assert await long_one == "a"
    assert [*a.texts, *b.texts].count("long") == 1
    await others


@virtual_time
async def test_when_nobody_answers_nobody_is_to_blame() -> None:
    a, b = servers("ab")
    fleet = Fleet(a, b)
    await fleet.ask_many(100, at_once=4)
    a.hanging.clear()
    b.hanging.clear()
    asked = asyncio.create_task(fleet.ask_many(10, at_once=10))
    await asyncio.sleep(100)
    assert fleet.state("a") == fleet.state("b") == "up"
    assert len(a.asked) + len(b.asked) == 110
    a.hanging.set()
    b.hanging.set()
    await asked


@virtual_time
async def test_a_replica_ten_times_slower_than_its_peers_is_left_alone_until_it_has_recovered() -> None:
    a, b, c = servers("abc", spread=0.2)
    fleet = Fleet(a, b, c)
    asked = asyncio.create_task(fleet.ask_many(100_000, at_once=30))
    await asyncio.sleep(5)
    a.latency_s = 3.0
    await asyncio.sleep(15)
    assert fleet.state("a") == "slow"
    before = len(a.asked)
    await asyncio.sleep(10)
    assert len(a.asked) - before <= 5
    a.latency_s = 0.1
    await asyncio.sleep(8)
    assert fleet.state("a") == "up"
    asked.cancel()


@virtual_time
async def test_a_slow_replica_is_better_than_none() -> None:
    a, b = servers("ab")
    fleet = Fleet(a, b)
    fleet.replicas["a"].slow, fleet.replicas["a"].trial_at = True, 1e9
    b.error = ConnectError("cannot connect")
    assert set(await fleet.ask_many(50, at_once=4)) == {"a"}


# What is shown


@virtual_time
async def test_a_snapshot_says_how_each_one_does() -> None:
    a, b = servers("ab", latency_s=0.5)
    fleet = Fleet(a, b, settings={"a": {"weight": 3.0}})
    await fleet.ask_many(400, at_once=20)
    await asyncio.sleep(1)
    b.error = ConnectError("cannot connect")
    await fleet.ask_many(20, at_once=20)
    up, out = fleet.router.snapshot().values()
    assert (up.state, out.state) == ("up", "out")
    assert up.answered + out.answered == 420
    assert up.in_flight == out.in_flight == 0
    assert up.share == pytest.approx(0.75, abs=0.08)
    assert up.latency_p50_s == pytest.approx(0.5)
    assert up.requests_per_s > out.requests_per_s
    assert set(out.errors) == {"ConnectError"}
    assert out.failed == sum(out.errors.values())


@virtual_time
async def test_closing_closes_every_replica() -> None:
    fleet_of = servers("abc")
    fleet = Fleet(*fleet_of)
    await fleet.ask()
    await fleet.client.aclose()
    assert all(server.closed for server in fleet_of)


@virtual_time
async def test_closing_fails_those_who_wait_and_those_who_would() -> None:
    server = Server("a")
    server.error = ConnectError("cannot connect")
    fleet = Fleet(server)
    waiting = [asyncio.create_task(fleet.ask()) for _ in range(3)]
    await asyncio.sleep(0.1)
    await fleet.client.aclose()
    for task in [*waiting, asyncio.create_task(fleet.ask())]:
        with pytest.raises(NoDeploymentError, match="closed"):
            await task
    assert now() < 1
