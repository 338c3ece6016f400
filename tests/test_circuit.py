from __future__ import annotations

import asyncio
import time

import pytest

from runner.errors import (
    ConnectError,
    InternalServerError,
    RequestError,
    ServiceUnavailableError,
    Timeout,
)
from runner.router import Circuit
from runner.router.circuit import Sent
from runner.types import Trace
from virtual_time import virtual_time

BROKEN = InternalServerError("oops")
BUSY = ServiceUnavailableError("busy")
NOBODY = ConnectError("nobody listens")


def on_the_wire() -> Trace:
    return Trace(on_the_wire=True, sent_at=time.perf_counter())


def ask(circuit: Circuit, error: RequestError | None = None, *, again: bool = False) -> None:
    """Send a request and have it end at once."""
    now = time.monotonic()
    assert circuit.admits(now)
    mark = circuit.sent(now, on_the_wire())
    if error is None:
        circuit.answered(mark)
    else:
        circuit.failed(mark, error, lasted_s=0.1, again=again)


def fail_until_open(circuit: Circuit, error: RequestError = BROKEN) -> int:
    """How many failures it takes."""
    for count in range(1, 1_000):
        ask(circuit, error)
        if not circuit.closed:
            return count
    raise AssertionError("it never opens")


async def next_probe(circuit: Circuit) -> float:
    """Seconds until it admits a request."""
    began = time.monotonic()
    while not circuit.admits(time.monotonic()):  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    return time.monotonic() - began


# Opening


@virtual_time
async def test_ten_failures_in_a_row_open_it() -> None:
    assert fail_until_open(Circuit()) == 10


@virtual_time
async def test_an_answer_between_begins_the_row_anew() -> None:
    circuit = Circuit()
    for _ in range(5):
        for _ in range(9):
            ask(circuit, BROKEN)
        ask(circuit)
    assert circuit.closed


@virtual_time
async def test_nobody_at_the_address_opens_it_at_once() -> None:
    circuit = Circuit()
    ask(circuit)
    await asyncio.sleep(1)
    assert fail_until_open(circuit, NOBODY) == 1


@virtual_time
async def test_a_connection_that_was_not_made_while_others_are_answered_is_no_outage() -> None:
    circuit = Circuit()
    mark = circuit.sent(time.monotonic(), on_the_wire())
    await asyncio.sleep(1)
    ask(circuit)
    circuit.failed(mark, NOBODY, lasted_s=1.0, again=False)
    assert circuit.closed


@virtual_time
async def test_three_refusals_over_two_seconds_open_it() -> None:
    circuit = Circuit()
    ask(circuit, BUSY, again=True)
    ask(circuit, BUSY, again=True)
    await asyncio.sleep(2)
    assert fail_until_open(circuit, BUSY) == 1
    assert circuit.cause is BUSY


@virtual_time
async def test_requests_that_fail_again_and_again_are_their_own_fault() -> None:
    circuit = Circuit()
    for _ in range(500):
        ask(circuit, BROKEN, again=True)
        await asyncio.sleep(0.1)
    assert circuit.closed


@virtual_time
async def test_the_retry_budget_is_used_up_by_more_failures_than_one_in_six() -> None:
    for answers, opens in ((4, True), (6, False)):
        circuit = Circuit(budget=100)
        for _ in range(100):
            if circuit.closed:
                ask(circuit, BROKEN)
            for _ in range(answers):
                if circuit.closed:
                    ask(circuit)
        assert circuit.closed is not opens


@virtual_time
async def test_a_timeout_takes_twice_as_much_from_the_budget() -> None:
    def until_open(error: RequestError) -> int:
        circuit = Circuit(budget=200)
        for count in range(1, 1_000):
            ask(circuit, error)
            if not circuit.closed:
                return count
            ask(circuit)
        raise AssertionError("it never opens")

    assert until_open(Timeout("slow")) < 0.55 * until_open(BROKEN)


# Probing


@virtual_time
async def test_an_open_circuit_admits_one_request_after_a_pause() -> None:
    circuit = Circuit()
    fail_until_open(circuit)
    now = time.monotonic()
    assert not circuit.admits(now)
    assert 0.35 < await next_probe(circuit) <= 0.52
    circuit.sent(time.monotonic(), on_the_wire())
    assert not circuit.admits(time.monotonic())
    assert not circuit.answering


@virtual_time
async def test_the_pauses_between_probes_double_up_to_the_cool_down() -> None:
    circuit = Circuit(cooldown_s=2.0)
    fail_until_open(circuit)
    pauses = []
    for _ in range(5):
        pauses.append(await next_probe(circuit))
        ask(circuit, BROKEN)
    for pause, bound in zip(pauses, [0.5, 1.0, 2.0, 2.0, 2.0], strict=True):
        assert 0.75 * bound < pause <= bound + 0.02


@virtual_time
async def test_a_servers_hint_is_the_least_pause() -> None:
    circuit = Circuit()
    fail_until_open(circuit, ServiceUnavailableError("busy", retry_after_s=30.0))
    assert 30.0 <= await next_probe(circuit) < 30.1


@virtual_time
async def test_answers_let_more_and_more_through_until_it_is_closed() -> None:
    circuit = Circuit()
    fail_until_open(circuit)
    await next_probe(circuit)
    rounds = []
    while not circuit.closed:
        now = time.monotonic()
        marks: list[Sent] = []
        while len(marks) < 20 and circuit.admits(now):
            marks.append(circuit.sent(now, on_the_wire()))
        rounds.append(len(marks))
        for mark in marks:
            circuit.answered(mark)
    assert rounds[:4] == [1, 2, 4, 8]


@virtual_time
async def test_a_failure_on_the_way_back_opens_it_again() -> None:
    circuit = Circuit()
    fail_until_open(circuit)
    await next_probe(circuit)
    ask(circuit)
    ask(circuit, BROKEN)
    assert not circuit.answering
    assert not circuit.admits(time.monotonic())


@virtual_time
async def test_what_was_sent_before_it_opened_does_not_speak_of_now() -> None:
    circuit = Circuit()
    marks = [circuit.sent(time.monotonic(), on_the_wire()) for _ in range(32)]
    for mark in marks[:10]:
        circuit.failed(mark, BROKEN, lasted_s=0.1, again=False)
    await next_probe(circuit)
    for mark in marks[10:]:
        circuit.failed(mark, BROKEN, lasted_s=0.6, again=False)
    assert circuit.admits(time.monotonic())


@virtual_time
async def test_an_old_request_that_is_answered_after_all_has_it_tried_at_once() -> None:
    circuit = Circuit()
    old = circuit.sent(time.monotonic(), on_the_wire())
    fail_until_open(circuit)
    assert not circuit.admits(time.monotonic())
    circuit.answered(old)
    assert circuit.admits(time.monotonic())


@virtual_time
async def test_a_cancelled_probe_makes_room_for_another() -> None:
    circuit = Circuit()
    fail_until_open(circuit)
    await next_probe(circuit)
    mark = circuit.sent(time.monotonic(), on_the_wire())
    assert not circuit.admits(time.monotonic())
    circuit.returned(mark)
    assert circuit.admits(time.monotonic())


@virtual_time
async def test_a_long_answer_is_not_waited_for_where_failures_came_quickly() -> None:
    circuit = Circuit()
    fail_until_open(circuit, BUSY)
    await next_probe(circuit)
    circuit.sent(time.monotonic(), on_the_wire())
    assert 0.9 < await next_probe(circuit) < 1.1
    assert circuit.answering


@virtual_time
async def test_a_probe_that_waits_in_a_queue_counts_from_when_it_is_sent() -> None:
    circuit = Circuit()
    fail_until_open(circuit, BUSY)
    await next_probe(circuit)
    queued = Trace()
    circuit.sent(time.monotonic(), queued)
    await asyncio.sleep(20)
    assert not circuit.admits(time.monotonic())
    assert not circuit.answering
    queued.on_the_wire, queued.sent_at = True, time.perf_counter()
    due = circuit.due(time.monotonic())
    assert 0.9 < await next_probe(circuit) < 1.1
    assert time.monotonic() == pytest.approx(due, abs=0.02)
    assert circuit.answering


@virtual_time
async def test_silence_is_no_answer_where_nothing_came_before() -> None:
    circuit = Circuit()
    fail_until_open(circuit, Timeout("nothing came"))
    await next_probe(circuit)
    circuit.sent(time.monotonic(), on_the_wire())
    await asyncio.sleep(1_000)
    assert not circuit.admits(time.monotonic())


@virtual_time
async def test_it_says_when_it_is_due() -> None:
    circuit = Circuit()
    fail_until_open(circuit)
    due = circuit.due(time.monotonic())
    await next_probe(circuit)
    assert time.monotonic() == pytest.approx(due, abs=0.02)
