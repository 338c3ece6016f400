from __future__ import annotations

import asyncio

from runner.metrics import Meter, Snapshot
from runner.types import Trace
from runner.watchdog import Watchdog
from virtual_time import START, block, now, virtual_time


def snapshot(*, answers: int = 100, latency_s: float = 0.5) -> Snapshot:
    meter = Meter()
    for _ in range(answers):
        meter.answered(None, cost_usd=None, latency_s=latency_s, queue_wait_s=0.0)
    return meter.snapshot()


def in_flight(*, row: int, since: float) -> Trace:
    """A request that was sent so many seconds ago."""
    return Trace(row=row, deployment="gpu-0", on_the_wire=True, sent_at=START + now() - since)


async def beat(watchdog: Watchdog, seconds: float, *, stall_s: float = 0.0) -> list[str]:
    """Let it watch for so long, with a stall in each pause; what it had to say."""
    notes: list[str] = []
    until = now() + seconds
    while now() < until:
        if stall_s:
            asyncio.get_running_loop().call_soon(block, stall_s)
        await watchdog.rest(0.2)
        notes += watchdog.notes(snapshot(answers=0), [])
    return notes


@virtual_time
async def test_a_loop_that_is_on_time_is_not_worth_a_word() -> None:
    watchdog = Watchdog()
    assert await beat(watchdog, 60) == []
    assert watchdog.lag_s < 0.001


@virtual_time
async def test_a_loop_that_stays_late_is_told_with_what_to_do() -> None:
    watchdog = Watchdog()
    [note] = await beat(watchdog, 30, stall_s=0.7)
    assert "0.5 s late" in note
    assert "limits.concurrency" in note
    assert 0.45 < watchdog.lag_s < 0.55


@virtual_time
async def test_it_is_told_again_after_a_minute_if_it_goes_on() -> None:
    assert len(await beat(Watchdog(), 100, stall_s=0.7)) == 2


@virtual_time
async def test_one_stall_is_shown_and_not_told() -> None:
    watchdog = Watchdog()
    assert await beat(watchdog, 0.5, stall_s=2.0) == []
    assert watchdog.lag_s > 1.5
    assert await beat(watchdog, 20) == []
    assert watchdog.lag_s < 0.001


@virtual_time
async def test_a_request_far_past_the_p99_is_named_once_with_its_age() -> None:
    watchdog = Watchdog()
    requests = [in_flight(row=17, since=42.0), in_flight(row=18, since=1.0)]
    [note] = watchdog.notes(snapshot(), requests)
    assert "row 17 has been waiting for gpu-0 for 42 s" in note
    assert list(watchdog.notes(snapshot(), requests)) == []


@virtual_time
async def test_while_requests_go_on_being_slow_they_are_named_once_a_minute() -> None:
    watchdog = Watchdog()
    notes: list[str] = []
    for row in range(90):
        notes += watchdog.notes(snapshot(), [in_flight(row=row, since=42.0)])
        await asyncio.sleep(1)
    assert [note.split(" has")[0] for note in notes] == ["row 0", "row 60"]


@virtual_time
async def test_what_is_slow_is_a_matter_of_what_the_others_take() -> None:
    requests = [in_flight(row=17, since=42.0)]
    assert list(Watchdog().notes(snapshot(latency_s=20.0), requests)) == []
    assert list(Watchdog().notes(snapshot(latency_s=0.001), [in_flight(row=1, since=9.0)])) == []


@virtual_time
async def test_a_few_answers_are_no_measure() -> None:
    assert list(Watchdog().notes(snapshot(answers=10), [in_flight(row=17, since=42.0)])) == []


@virtual_time
async def test_a_request_that_waits_for_its_turn_is_not_slow() -> None:
    waiting = in_flight(row=17, since=42.0)
    waiting.on_the_wire = False
    assert list(Watchdog().notes(snapshot(), [waiting])) == []


@virtual_time
async def test_many_slow_requests_are_summed_up() -> None:
    requests = [in_flight(row=row, since=60.0 - row) for row in range(40)]
    notes = list(Watchdog().notes(snapshot(), requests))
    assert [note.split(" has")[0] for note in notes[:3]] == ["row 0", "row 1", "row 2"]
    assert notes[3] == "and so have 37 more"
    assert len(notes) == 4
