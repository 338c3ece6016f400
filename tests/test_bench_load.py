"""Load on a server with slots and a fixed service time, in virtual time: what it does is known exactly."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, cycle

import pytest

from runner.bench.levels import LevelFacts, Mode, Within, level_facts
from runner.bench.load import Answer, ClosedLoop, Extent, Load, OpenLoop
from runner.bench.records import Sample, Span
from runner.bench.verdict import Standing, verdict_on
from runner.config import Arrivals, BenchConfig
from virtual_time import now, other_tasks, virtual_time

SERVICE_S = 0.25


@dataclass
class Server:
    """So many slots, each taking so long for a request; the others wait in line."""

    slots: int
    service_s: Iterator[float] = field(default_factory=lambda: cycle([SERVICE_S]))
    fails: Iterator[bool] = field(default_factory=lambda: cycle([False]))
    most: int = 0
    at_work: int = 0

    def __post_init__(self) -> None:
        self._free = asyncio.Semaphore(self.slots)

    async def ask(self) -> Answer:
        began = now()
        self.at_work += 1
        self.most = max(self.most, self.at_work)
        async with self._free:
            await asyncio.sleep(next(self.service_s))
        self.at_work -= 1
        failed = next(self.fails)
        return Answer(
            row=0,
            service_time_s=now() - began,
            completion_tokens=None if failed else 10,
            prompt_tokens=None if failed else 5,
            error="InternalServerError" if failed else None,
        )


def extent(requests: int | None = 100, *, warmup: int = 5, duration_s: float | None = None) -> Extent:
    return Extent(warmup=warmup, requests=requests, duration_s=duration_s)


async def measured(
    load: Load, server: Server, level: float, how_much: Extent | None = None
) -> tuple[Span, list[Sample]]:
    samples: list[Sample] = []
    span = await load.measure(level, 1, ask=server.ask, extent=how_much or extent(), take=samples.append)
    return span, samples


def closed_loop() -> ClosedLoop:
    return ClosedLoop(clock=time.perf_counter)


def facts_of(span: Span, samples: Sequence[Sample], mode: Mode = Mode.closed) -> LevelFacts:
    return level_facts(mode, [(span, samples)], within=Within())


@pytest.mark.parametrize("slots", [1, 8, 100])
def test_throughput_and_latency_are_those_of_the_server(slots: int) -> None:
    @virtual_time
    async def measure() -> None:
        server = Server(slots)
        levels = []
        async with closed_loop() as load:
            for level in (1, 2, 4, 8, 16, 32, 100, 200):
                span, samples = await measured(load, server, level)
                facts = facts_of(span, samples)
                expected = min(level, slots) / SERVICE_S
                assert facts.requests_per_s.value == pytest.approx(expected, rel=0.001)
                median = facts.percentile("latency_s", 50)
                assert median is not None
                assert median.value == pytest.approx(max(1, level / slots) * SERVICE_S, rel=0.05)
                levels.append(facts)
        verdict = verdict_on(levels, BenchConfig())
        assert (verdict.level, verdict.override) == (slots, f"limits.concurrency={slots}")
        assert verdict.standing in (Standing.found, Standing.unresolved)

    measure()


@virtual_time
async def test_slots_are_handed_on_from_the_warm_up_to_the_measuring() -> None:
    server = Server(8)
    async with closed_loop() as load:
        span, samples = await measured(load, server, 4)

    assert span.in_flight == pytest.approx(4)
    assert min(sample.started_s for sample in samples) < 0  # began in the warm-up
    assert len(span.unfinished) == 3  # the drain is left out
    assert len(samples) == 100


@virtual_time
async def test_the_wave_of_first_requests_is_not_measured() -> None:
    slow_start = chain([5.0] * 8, cycle([SERVICE_S]))
    server = Server(8, service_s=slow_start)
    async with closed_loop() as load:
        _, samples = await measured(load, server, 8)

    assert max(sample.latency_s for sample in samples) == pytest.approx(SERVICE_S)


@virtual_time
async def test_a_level_begins_when_no_request_of_the_last_one_is_left() -> None:
    """One request of the first level takes 20 s, and keeps a slot of the second one so long."""
    slow = chain([SERVICE_S] * 20, [20.0], cycle([SERVICE_S]))
    async with closed_loop() as load:
        server = Server(100, service_s=slow)
        await measured(load, server, 16, extent(20))
        span, _ = await measured(load, server, 4, extent(10))

    assert now() > 20
    assert span.in_flight == pytest.approx(4)


@virtual_time
async def test_a_level_never_has_more_requests_in_flight_than_it_says() -> None:
    server = Server(100)
    async with closed_loop() as load:
        await measured(load, server, 7)

    assert server.most == 7


@virtual_time
async def test_a_duration_ends_a_level_too() -> None:
    async with closed_loop() as load:
        span, samples = await measured(load, Server(2), 2, extent(None, duration_s=10.1))

    assert span.window_s == pytest.approx(10.1)
    assert len(samples) == pytest.approx(80, abs=1)


@virtual_time
async def test_no_request_is_left_when_the_load_is_over() -> None:
    async with closed_loop() as load:
        await measured(load, Server(4), 4)

    assert other_tasks() == set()


@virtual_time
async def test_what_asking_raises_ends_the_measuring() -> None:
    async def ask() -> Answer:
        await asyncio.sleep(0.1)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        async with closed_loop() as load:
            await load.measure(4, 1, ask=ask, extent=extent(), take=lambda sample: None)
    with pytest.raises(ZeroDivisionError):
        async with OpenLoop(arrivals=Arrivals.constant) as open_loop:
            await open_loop.measure(4, 1, ask=ask, extent=extent(), take=lambda sample: None)


@virtual_time
async def test_failures_are_counted_by_class_and_are_no_throughput() -> None:
    server = Server(8, fails=cycle([False, False, False, True]))
    async with closed_loop() as load:
        facts = facts_of(*await measured(load, server, 8, extent(400)))

    assert facts.errors == {"InternalServerError": 100}
    assert facts.requests_per_s.value == pytest.approx(8 / SERVICE_S * 0.75, rel=0.01)
    with_failures = facts.percentile("latency_with_failures_s", 95)
    assert with_failures is not None
    assert with_failures.value == float("inf")
    without = facts.percentile("latency_s", 95)
    assert without is not None
    assert without.value == pytest.approx(SERVICE_S)


@virtual_time
async def test_a_rate_below_the_server_s_is_kept() -> None:
    load = OpenLoop(arrivals=Arrivals.constant, clock=time.perf_counter)
    facts = facts_of(*await measured(load, Server(8), 16), Mode.open)

    assert facts.requests_per_s.value == pytest.approx(16, rel=0.02)
    assert facts.requests == 100
    assert verdict_on([facts], BenchConfig(rate=16)).override == "limits.rpm=960"


@virtual_time
async def test_a_rate_is_kept_by_a_server_that_takes_long_for_each_request() -> None:
    """Forty requests are in flight before the first one is answered: the window opens with them."""
    load = OpenLoop(arrivals=Arrivals.constant, clock=time.perf_counter)
    facts = facts_of(*await measured(load, Server(100, service_s=cycle([2.0])), 20), Mode.open)

    assert facts.requests_per_s.value == pytest.approx(20, rel=0.02)
    assert facts.audit.in_flight == pytest.approx(40, rel=0.05)
    assert verdict_on([facts], BenchConfig(rate=20)).level == 20


@virtual_time
async def test_latency_of_a_rate_counts_from_when_a_request_was_to_be_sent() -> None:
    """At twice the server's rate, request n waits for n more than it should: none is spared by being sent late."""
    load = OpenLoop(arrivals=Arrivals.constant, clock=time.perf_counter)
    span, samples = await measured(load, Server(1), 8, extent(100, warmup=0))
    latencies = [sample.latency_s for sample in samples if sample.started_s >= 0]

    assert len(latencies) == 100
    assert latencies[-1] == pytest.approx(SERVICE_S + 99 * SERVICE_S / 2, rel=0.05)
    facts = facts_of(span, samples, Mode.open)
    assert facts.requests_per_s.value == pytest.approx(4, rel=0.05)
    assert verdict_on([facts], BenchConfig(rate=8)).standing is Standing.none_passes


@virtual_time
async def test_a_client_that_falls_behind_does_not_hide_it() -> None:
    stalls = iter([0.0] * 50 + [3.0] + [0.0] * 100)
    stalled_s = 0.0
    server = Server(100)

    async def ask() -> Answer:
        nonlocal stalled_s
        stalled_s += next(stalls)
        return await server.ask()

    load = OpenLoop(arrivals=Arrivals.constant, clock=lambda: time.perf_counter() + stalled_s)
    samples: list[Sample] = []
    await load.measure(10, 1, ask=ask, extent=extent(80, warmup=0), take=samples.append)

    late = sorted(sample.latency_s for sample in samples)[-20:]
    assert late[-1] == pytest.approx(3 + SERVICE_S, abs=0.2)
    assert late[0] > 1  # those that were to be sent meanwhile


@virtual_time
async def test_random_arrivals_have_the_rate_on_average_and_repeat_themselves() -> None:
    load = OpenLoop(arrivals=Arrivals.poisson, clock=time.perf_counter)
    first, _ = await measured(load, Server(100), 50, extent(2000))
    again, _ = await measured(load, Server(100), 50, extent(2000))

    assert 2000 / first.window_s == pytest.approx(50, rel=0.07)
    assert again.window_s == pytest.approx(first.window_s)


@virtual_time
async def test_a_duration_ends_a_rate_too() -> None:
    load = OpenLoop(arrivals=Arrivals.constant, clock=time.perf_counter)
    span, samples = await measured(load, Server(100), 10, extent(None, duration_s=5))

    assert span.window_s == pytest.approx(5)
    assert sum(sample.started_s >= 0 for sample in samples) == 50
