"""The tuner against modelled servers, in virtual time: it is told nothing of what they can do."""

from __future__ import annotations

import asyncio
import logging
import math
import random
import re
import resource
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

import pytest

from runner.adaptive import Adaptive
from runner.batch import run_batch
from runner.concurrency import Window
from runner.config import LimitsConfig, RetryConfig
from runner.errors import RateLimitError, RequestError, ServiceUnavailableError, Timeout
from runner.limited import Limited
from runner.limiter import RateLimiter
from runner.retry import Retrying
from runner.simulator.service import Slots, sleep_until
from runner.tuner import Ticket, Tuner
from runner.types import Generation, GenerationRequest, Request, Response, TokenUsage
from virtual_time import now, settle, virtual_time


def constant(draw: random.Random) -> int:
    return 100


def mixed(draw: random.Random) -> int:
    """Short and long answers."""
    return draw.choice((20, 20, 60, 300))


@dataclass(kw_only=True)
class Server:
    """A provider with so many slots, at which an answer of 100 tokens takes ``latency_s``, more or less.

    ``batch``: requests in service at which each one is half as fast, as on a GPU, while all together still gain.
    """

    seed: int
    slots: int | None = None
    latency_s: float = 0.5
    tokens: Callable[[random.Random], int] = constant
    batch: float = math.inf
    refuse: Callable[[Server], RequestError | None] = lambda server: None
    counts: bool = True  # whether it says how many tokens there were

    in_flight: int = 0
    sent: int = 0
    answers: list[tuple[float, int]] = field(default_factory=list)  # when, tokens
    refusals: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)
        self.line = Slots(self.slots)

    async def send(self, request: Request) -> Response:
        self.sent += 1
        self.in_flight += 1
        try:
            if (error := self.refuse(self)) is not None:
                await asyncio.sleep(0.002)
                self.refusals.append(now())
                raise error
            tokens = self.tokens(self.draw)
            await self._serve(self.latency_s * tokens / 100 * self.draw.uniform(0.7, 1.3))
        finally:
            self.in_flight -= 1
        self.answers.append((now(), tokens))
        usage = TokenUsage(completion_tokens=tokens, total_tokens=tokens) if self.counts else None
        return Response(output=Generation(text=""), model_id="m", request_id=None, usage=usage, headers={})

    async def aclose(self) -> None: ...

    async def _serve(self, seconds: float) -> None:
        async with self.line.hold(seconds) as begun:
            if self.batch == math.inf:
                await sleep_until(begun + seconds)
            while self.batch < math.inf and seconds > 1e-9:
                slowness = 1 + self.line.held / self.batch
                step = min(seconds * slowness, 0.1)
                await asyncio.sleep(step)
                seconds -= step / slowness

    def tokens_per_s(self, begin: float, end: float) -> float:
        return sum(tokens for when, tokens in self.answers if begin <= when < end) / (end - begin)

    def share(self, begin: float, end: float, *, slots: int) -> float:
        """Throughput, relative to what so many busy slots give."""
        return self.tokens_per_s(begin, end) / (slots * 100 / self.latency_s)


@dataclass(kw_only=True)
class Run:
    """What a batch without an end saw in so many seconds."""

    server: Server
    window: Window
    windows: list[tuple[float, int]]

    def between(self, begin: float, end: float) -> list[int]:
        return [limit for when, limit in self.windows if begin <= when < end]


async def run(
    server: Server,
    *,
    seconds: float,
    maximum: int = 1024,
    fixed: int | None = None,
    events: Sequence[tuple[float, Callable[[], None]]] = (),
) -> Run:
    """Keep ``server`` busy for so long, through the stack that a run has; ``events`` happen at their times."""
    window = Window(fixed or 4)
    client = Adaptive(server, Tuner(window, maximum=maximum)) if fixed is None else server
    limited = Limited(client, RateLimiter(), label="m")
    stack = Retrying(limited, RetryConfig(max_retries=1_000, base_s=1.0, cap_s=2.0), slot=window)
    seen = Run(server=server, window=window, windows=[])

    async def chunks() -> AsyncIterator[Sequence[None]]:
        while now() < seconds:
            yield [None] * 256

    async def work(item: None) -> None:
        if now() < seconds:
            await stack.send(GenerationRequest(input="hello"))

    async def watch() -> None:
        while True:
            seen.windows.append((now(), window.limit))
            await asyncio.sleep(0.25)

    async def happen() -> None:
        for when, event in events:
            await asyncio.sleep(when - now())
            event()

    others = [asyncio.create_task(watch()), asyncio.create_task(happen())]
    try:
        async with asyncio.timeout(seconds + 60):
            await run_batch(chunks(), work, window=window)
    finally:
        for other in others:
            other.cancel()
    return seen


# Servers that never refuse


@pytest.mark.parametrize("tokens", [constant, mixed])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("slots", [1, 8, 64])
@virtual_time
async def test_slots_that_nobody_told_of_are_used_from_the_tenth_second_on(
    slots: int, seed: int, tokens: Callable[[random.Random], int]
) -> None:
    seen = await run(Server(seed=seed, slots=slots, latency_s=0.4, tokens=tokens), seconds=30)
    assert seen.server.share(10, 30, slots=slots) > 0.9
    assert slots <= max(seen.between(20, 30)) <= 4 * slots + 16


@pytest.mark.parametrize("tokens", [constant, mixed])
@virtual_time
async def test_the_window_does_not_run_away_where_more_requests_bring_nothing(
    tokens: Callable[[random.Random], int],
) -> None:
    seen = await run(Server(seed=1, slots=300, latency_s=0.4, tokens=tokens), seconds=45, maximum=5_000)
    assert seen.server.share(10, 45, slots=300) > 0.9
    assert max(limit for _, limit in seen.windows) < 1_500
    assert 280 <= seen.window.limit <= 700


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("latency_s", [0.2, 0.5])
@virtual_time
async def test_a_change_of_the_slots_is_followed_within_fifteen_seconds(latency_s: float, seed: int) -> None:
    server = Server(seed=seed, slots=64, latency_s=latency_s)
    seen = await run(
        server, seconds=75, events=[(20, lambda: server.line.resize(16)), (45, lambda: server.line.resize(64))]
    )
    assert server.share(35, 45, slots=16) > 0.9
    assert min(seen.between(35, 45)) <= 64  # rather than the hundred or so of before
    assert server.share(53, 60, slots=64) > 0.7
    assert server.share(60, 75, slots=64) > 0.9


@pytest.mark.parametrize("seed", range(3))
@virtual_time
async def test_latency_that_rises_with_the_load_is_no_reason_to_stop(seed: int) -> None:
    """Continuous batching: at 100 in service each is half as fast, and the server still gains."""
    seen = await run(Server(seed=seed, slots=256, latency_s=0.2, batch=100), seconds=30)
    best = await run(Server(seed=seed, slots=256, latency_s=0.2, batch=100), seconds=30, fixed=300)
    assert seen.server.tokens_per_s(10, 30) > 0.9 * best.server.tokens_per_s(10, 30)


@pytest.mark.parametrize("seed", range(3))
@virtual_time
async def test_where_tokens_are_not_counted_requests_are(seed: int) -> None:
    seen = await run(Server(seed=seed, slots=32, counts=False), seconds=30)
    assert seen.server.share(10, 30, slots=32) > 0.9
    assert max(seen.between(20, 30)) <= 160


@virtual_time
async def test_the_window_keeps_to_its_maximum() -> None:
    seen = await run(Server(seed=1, slots=None), seconds=15, maximum=20)
    assert max(limit for _, limit in seen.windows) == 20
    assert seen.server.share(5, 15, slots=20) > 0.8


@virtual_time
async def test_a_batch_begins_with_a_handful_of_requests() -> None:
    server = Server(seed=1, latency_s=30.0)
    batch = asyncio.create_task(run(server, seconds=20))
    await asyncio.sleep(0.4)
    assert server.sent == 4
    await asyncio.sleep(5)
    assert server.sent == 8
    await batch


@virtual_time
async def test_requests_that_do_not_fill_the_window_teach_nothing() -> None:
    server = Server(seed=1, latency_s=0.1)
    window = Window(4)
    client = Adaptive(server, Tuner(window))
    limits = set()
    for _ in range(200):
        await asyncio.gather(*(client.send(GenerationRequest(input="hello")) for _ in range(5)))
        limits.add(window.limit)
    assert limits <= {4, 8}  # eight are tried, and never seen in flight


# Servers that refuse


def above(limit: int) -> Callable[[Server], RequestError | None]:
    """A wall: 429 with so many in flight, without a hint when to come back."""
    return lambda server: RateLimitError("HTTP 429", status=429) if server.in_flight > limit else None


def at_random(share: float, error: RequestError) -> Callable[[Server], RequestError | None]:
    return lambda server: error if server.draw.random() < share else None


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("latency_s", [0.2, 0.5])
@virtual_time
async def test_a_wall_is_kept_to_and_tried_ever_more_seldom(latency_s: float, seed: int) -> None:
    seen = await run(Server(seed=seed, latency_s=latency_s, refuse=above(50)), seconds=60)
    assert seen.server.share(10, 60, slots=50) > 0.9
    assert len(seen.server.refusals) < 40
    assert len([when for when in seen.server.refusals if when > 10]) < 20
    assert max(seen.between(10, 60)) <= 52


@virtual_time
async def test_a_wall_that_moves_is_followed_both_ways() -> None:
    server = Server(seed=1, latency_s=0.2, refuse=above(50))

    def move(limit: int) -> Callable[[], None]:
        return lambda: setattr(server, "refuse", above(limit))

    await run(server, seconds=130, events=[(20, move(20)), (40, move(80))])
    assert server.share(25, 40, slots=20) > 0.8
    assert server.share(110, 130, slots=80) > 0.9


@pytest.mark.parametrize("error", [RateLimitError("HTTP 429", status=429, retry_after_s=0.05), Timeout("late")])
@virtual_time
async def test_refusals_that_do_not_depend_on_the_window_do_not_shrink_it(error: RequestError) -> None:
    seen = await run(Server(seed=1, slots=64, latency_s=0.2, refuse=at_random(0.03, error)), seconds=60)
    assert seen.server.share(20, 60, slots=64) > 0.8


@virtual_time
async def test_a_server_that_is_overloaded_for_a_while_gets_little_and_then_all_again() -> None:
    overloaded = ServiceUnavailableError("HTTP 503", status=503)
    server = Server(seed=1, slots=64, latency_s=0.2)

    def refuse_all(server: Server) -> RequestError | None:
        return overloaded if 20 <= now() < 40 else None

    server.refuse = refuse_all
    seen = await run(server, seconds=70)
    assert max(seen.between(25, 40)) <= 16
    assert server.share(50, 70, slots=64) > 0.9


# One at a time


class Requests:
    """Requests told to a tuner by hand."""

    def __init__(self, *, limit: int) -> None:
        self.window = Window(4)
        self.tuner = Tuner(self.window)
        self.window.limit = limit
        self.tickets: list[Ticket] = []

    def send(self, count: int) -> None:
        self.tickets += [self.tuner.sent() for _ in range(count)]
        self.window.limit = max(self.window.limit, len(self.tickets))


@virtual_time
async def test_refusals_of_one_burst_cut_once() -> None:
    requests = Requests(limit=40)
    requests.send(40)
    for ticket in requests.tickets[30:]:
        requests.tuner.refused(ticket, 429)
    assert requests.window.limit == int(0.85 * 31)  # 31 were in flight when the first one was refused


@virtual_time
async def test_a_refusal_of_a_request_sent_after_the_cut_cuts_again() -> None:
    requests = Requests(limit=40)
    requests.send(40)
    requests.tuner.refused(requests.tickets[-1], 429)
    first = requests.window.limit
    again = requests.tuner.sent()
    requests.tuner.refused(again, 429)
    assert requests.window.limit < first


@virtual_time
async def test_one_timeout_among_many_answers_does_not_cut() -> None:
    requests = Requests(limit=40)
    requests.send(40)
    for ticket in requests.tickets[:20]:
        requests.tuner.answered(ticket, 10)
    before = requests.window.limit
    requests.tuner.timed_out(requests.tickets[20])
    assert requests.window.limit == before


@virtual_time
async def test_the_window_never_closes() -> None:
    window = Window(4)
    tuner = Tuner(window)
    for _ in range(100):
        tuner.refused(tuner.sent(), 429)
    assert window.limit == 1


@virtual_time
async def test_what_is_decided_is_logged_and_noted_at_the_window(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="runner.tuner"):
        seen = await run(Server(seed=1, slots=20, refuse=above(100)), seconds=5)
    messages = [record.getMessage() for record in caplog.records]
    assert any(message.startswith("window 8 -> 16: +") and message.endswith(" % tokens/s") for message in messages)
    assert any(message.endswith(f": {seen.window.why}") for message in messages)


@virtual_time
async def test_the_log_tells_the_window_of_a_deployment_from_the_others(caplog: pytest.LogCaptureFixture) -> None:
    tuner = Tuner(Window(4), label="gpu-0")
    with caplog.at_level(logging.INFO, logger="runner.tuner"):
        tuner.refused(tuner.sent(), 429)
    assert caplog.messages == ["window of gpu-0 4 -> 1: HTTP 429 with 1 in flight"]


# From a configuration


@virtual_time
async def test_a_number_needs_no_tuner() -> None:
    limits = LimitsConfig(concurrency=7)
    window = Window.of(limits)
    assert Tuner.of(limits, window) is None
    assert window.limit == 7


@virtual_time
async def test_the_maximum_respects_the_files_that_a_process_may_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (168, 1024))
    limits = LimitsConfig(concurrency="auto")
    window = Window.of(limits)
    tuner = Tuner.of(limits, window)
    assert tuner is not None
    for _ in range(2_000):
        tickets = [tuner.sent() for _ in range(window.limit)]
        await asyncio.sleep(0.1)
        for ticket in tickets:
            tuner.answered(ticket, 10)
    assert window.limit == (168 - 128) // 2
    await settle()


@virtual_time
async def test_each_line_of_the_log_begins_where_the_last_one_ended(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(server: Server) -> RequestError | None:
        return RateLimitError("no", status=429) if server.in_flight > 20 else None

    with caplog.at_level(logging.INFO, logger="runner.tuner"):
        await run(Server(seed=1, refuse=refuse), seconds=60)

    changes = [re.findall(r"(\d+) -> (\d+)", message)[0] for message in caplog.messages]
    assert len(changes) > 5
    assert [before for before, _ in changes[1:]] == [after for _, after in changes[:-1]]
