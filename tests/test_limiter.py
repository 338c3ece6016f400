from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.config import LimitsConfig
from runner.errors import (
    APIConnectionError,
    APIResponseError,
    AuthenticationError,
    BadRequestError,
    ConnectError,
    InsufficientQuotaError,
    InternalServerError,
    RateLimitError,
    RequestError,
    ServiceUnavailableError,
    Timeout,
)
from runner.limiter import Estimate, Limited, RateLimiter, RateLimiterAcquisitionHandle
from runner.types import (
    EmbeddingRequest,
    Generation,
    GenerationRequest,
    Request,
    Response,
    TokenPrice,
    TokenUsage,
    TranscriptionRequest,
)
from virtual_time import now, other_tasks, settle, virtual_time

MINUTE, DAY = 60.0, 86_400.0


def used(prompt: int = 0, completion: int = 0) -> TokenUsage:
    return TokenUsage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


async def waits(limiter: RateLimiter, estimate: Estimate | float = 0.0) -> float:
    """Seconds that the next request has to wait; it is kept."""
    began = now()
    await limiter.acquire(estimate)
    return now() - began


async def exhausted(limiter: RateLimiter, estimate: Estimate | float) -> RateLimiter:
    """The limiter after a request of this size was granted to it."""
    await limiter.acquire(estimate)
    return limiter


async def grants_within(limiter: RateLimiter, seconds: float, estimate: Estimate | float = 0.0) -> list[float]:
    """When requests of one size are granted under constant load."""
    granted: list[float] = []

    async def load() -> None:
        while True:
            await limiter.acquire(estimate)
            granted.append(now())

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(load(), seconds)
    return granted


# The limit


@pytest.mark.parametrize("rpm", [1, 2, 7, 10, 60, 500, 6_000])
@virtual_time
async def test_the_whole_limit_is_used_and_never_passed(rpm: int) -> None:
    granted = await grants_within(RateLimiter(requests_per_minute=rpm), 10 * MINUTE)
    assert 0.97 * 10 * rpm <= len(granted) <= 10 * rpm
    assert most_in_window(granted, MINUTE) <= rpm


@pytest.mark.parametrize("size", [10, 250, 2_000, 10_000, 25_000])
@virtual_time
async def test_the_whole_token_limit_is_used_and_never_passed(size: int) -> None:
    granted = await grants_within(RateLimiter(tokens_per_minute=100_000), 10 * MINUTE, size)
    assert 970_000 <= len(granted) * size <= 1_000_000
    assert most_in_window(granted, MINUTE) * size <= 100_000


@virtual_time
async def test_sizes_that_do_not_divide_the_limit_never_pass_it() -> None:
    granted = await grants_within(RateLimiter(tokens_per_minute=100_000), 10 * MINUTE, 30_000)
    assert most_in_window(granted, MINUTE) == 3
    assert len(granted) >= 29


@pytest.mark.parametrize("burst", [1, 10, 100])
@virtual_time
async def test_the_limit_is_used_and_kept_whatever_may_burst(burst: int) -> None:
    granted = await grants_within(RateLimiter(requests_per_minute=100, max_request_burst=burst), 10 * MINUTE)
    assert sum(1 for at in granted if at < 0.5) == burst
    assert 970 <= len(granted) <= 1_000
    assert most_in_window(granted, MINUTE) <= 100


@virtual_time
async def test_one_timer_does_not_cap_the_rate() -> None:
    granted = await grants_within(RateLimiter(requests_per_minute=60_000, max_request_burst=1), 10.0)
    assert len(granted) == pytest.approx(10_000, rel=0.03)


@virtual_time
async def test_after_a_pause_no_more_than_the_burst_goes_out_at_once() -> None:
    limiter = RateLimiter(requests_per_minute=600, tokens_per_minute=60_000, max_token_burst=5_000)
    await asyncio.sleep(10 * MINUTE)
    granted = await grants_within(limiter, 0.05)
    assert len(granted) == 12
    granted = await grants_within(limiter, 10.0, 100)
    assert len(granted) == pytest.approx(100, abs=2)


async def answered_within(
    limiter: RateLimiter, seconds: float, *, reserved: float, spent: int, service_s: float
) -> int:
    """How many requests of one size are answered under constant load."""
    answered = 0

    async def request() -> None:
        nonlocal answered
        handle = await limiter.acquire(reserved)
        await asyncio.sleep(service_s)
        handle.settle(used(spent))
        answered += 1

    async def load() -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(3_000):
                group.create_task(request())

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(load(), seconds)
    return answered


@virtual_time
async def test_what_settlements_give_back_is_used_too() -> None:
    limiter = RateLimiter(tokens_per_minute=100_000)
    answered = await answered_within(limiter, 10 * MINUTE, reserved=2_000, spent=1_000, service_s=1.0)
    assert 970_000 <= answered * 1_000 <= 1_000_000


@virtual_time
async def test_estimates_that_are_far_too_high_do_not_bring_requests_to_a_crawl() -> None:
    limiter = RateLimiter(tokens_per_minute=10_000)
    answered = await answered_within(limiter, 10 * MINUTE, reserved=2_000, spent=100, service_s=3.0)
    assert answered >= 400


def most_in_window(granted: list[float], window_s: float) -> int:
    """The largest number of grants in any window [t, t + window_s)."""
    first = most = 0
    for last, at in enumerate(granted):
        while at - granted[first] >= window_s - 1e-6:
            first += 1
        most = max(most, last - first + 1)
    return most


@dataclass
class Grant:
    """What was granted, and what of it is still charged."""

    at: float
    costs: dict[str, float]


SIZES = st.sampled_from([0.0, 1.0, 5.0, 20.0, 40.0, 100.0])

REQUESTS = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.0, 0.0, 0.1, 1.0, 7.0, 30.0, 100.0]),  # seconds after the one before
        SIZES,  # prompt tokens
        SIZES,  # completion tokens
        st.none() | st.sampled_from([0.0, 0.1, 2.0, 45.0]),  # is cancelled, so long after it came
        st.sampled_from([0.0, 0.5, 10.0, 90.0]),  # service time
        st.sampled_from(["settled", "used up", "refused", "refunded", "unknown"]),
    ),
    min_size=1,
    max_size=60,
)


@given(
    requests=REQUESTS,
    rpm=st.none() | st.sampled_from([1, 3, 10, 50]),
    tpm=st.none() | st.sampled_from([200, 333, 1_000]),
    otpm=st.none() | st.sampled_from([100, 250]),
    rpd=st.none() | st.sampled_from([5, 40]),
    burst=st.none() | st.sampled_from([1, 20, 1_000]),
    pauses=st.lists(st.tuples(st.sampled_from([0.0, 3.0, 50.0]), st.sampled_from([0.0, 1.0, 20.0])), max_size=3),
)
@virtual_time
async def test_in_no_window_more_is_granted_than_the_limit(
    requests: list[tuple[float, float, float, float | None, float, str]],
    rpm: int | None,
    tpm: int | None,
    otpm: int | None,
    rpd: int | None,
    burst: int | None,
    pauses: list[tuple[float, float]],
) -> None:
    limiter = RateLimiter(rpm, tpm, rpd, max_request_burst=burst, max_token_burst=burst, output_tokens_per_minute=otpm)
    limits = {"rpm": (rpm, MINUTE), "tpm": (tpm, MINUTE), "otpm": (otpm, MINUTE), "rpd": (rpd, DAY)}
    grants: list[Grant] = []
    served: list[int] = []

    async def request(number: int, prompt: float, completion: float, service_s: float, ending: str) -> None:
        handle = await limiter.acquire(Estimate(prompt_tokens=prompt, completion_tokens=completion))
        served.append(number)
        costs = {"rpm": 1.0, "tpm": prompt + completion, "otpm": completion, "rpd": 1.0}
        grants.append(grant := Grant(now(), costs))
        for name, (limit, window_s) in limits.items():
            charged = sum(each.costs[name] for each in grants if now() - each.at < window_s - 1e-6)
            assert limit is None or charged <= limit + 1e-6, (name, charged)
        await asyncio.sleep(service_s)
        if ending == "settled":
            costs |= {"tpm": prompt // 2 + completion // 4, "otpm": completion // 4}
            handle.settle(used(int(prompt // 2), int(completion // 4)))
        elif ending == "used up":
            handle.settle(used(int(prompt), int(completion)))
        elif ending == "refused":
            costs |= {"tpm": 0.0, "otpm": 0.0}
            handle.settle(used())
        elif ending == "refunded":
            grant.costs = dict.fromkeys(costs, 0.0)
            handle.refund()

    async def live(number: int, prompt: float, completion: float, cancelled: float | None, *rest: Any) -> None:
        task = asyncio.create_task(request(number, prompt, completion, *rest))
        if cancelled is not None:
            await asyncio.sleep(cancelled)
            task.cancel()
        await asyncio.wait([task])
        if not task.cancelled():
            task.result()

    async def pause() -> None:
        for after, seconds in pauses:
            await asyncio.sleep(after)
            limiter.pause(seconds)

    async with asyncio.TaskGroup() as group:
        group.create_task(pause())
        for number, (after, prompt, completion, cancelled, *rest) in enumerate(requests):
            await asyncio.sleep(after)
            group.create_task(live(number, prompt, completion, cancelled, *rest))
    assert served == sorted(served)
    assert {n for n, details in enumerate(requests) if details[3] is None} <= set(served)
    assert not other_tasks()


@virtual_time
async def test_a_day_and_a_minute_are_kept_together() -> None:
    limiter = RateLimiter(requests_per_minute=10, requests_per_day=25)
    granted = await grants_within(limiter, 2 * DAY)
    assert most_in_window(granted, MINUTE) <= 10
    assert most_in_window(granted, DAY) <= 25
    assert len(granted) == 50


@virtual_time
async def test_what_a_day_allows_may_be_used_at_the_pace_of_the_minute() -> None:
    limiter = RateLimiter(requests_per_minute=60, requests_per_day=1_000)
    granted = await grants_within(limiter, 10 * MINUTE)
    assert len(granted) >= 0.97 * 600


@virtual_time
async def test_input_and_output_are_counted_apart() -> None:
    limiter = RateLimiter(input_tokens_per_minute=600, output_tokens_per_minute=60)
    await limiter.acquire(Estimate(prompt_tokens=0, completion_tokens=60))
    assert await waits(limiter, Estimate(prompt_tokens=12)) == 0
    assert await waits(limiter, Estimate(completion_tokens=1)) > 1


@virtual_time
async def test_without_limits_nobody_waits() -> None:
    limiter = RateLimiter()
    assert not limiter.counts_tokens
    assert len([await limiter.acquire(1e9) for _ in range(1_000)]) == 1_000
    assert now() == 0


def test_a_limiter_knows_whether_tokens_matter_to_it() -> None:
    assert not RateLimiter(requests_per_minute=1, requests_per_day=1).counts_tokens
    assert RateLimiter(tokens_per_day=1).counts_tokens
    assert RateLimiter(output_tokens_per_minute=1).counts_tokens


@pytest.mark.parametrize("name", ["rpm", "tpm", "rpd", "tpd", "itpm", "otpm"])
@virtual_time
async def test_every_limit_of_a_configuration_is_kept(name: str) -> None:
    limits = LimitsConfig()
    setattr(limits, name, 4.0)
    limiter = RateLimiter.of(limits)
    estimate = Estimate(completion_tokens=1) if name == "otpm" else Estimate(prompt_tokens=1)
    assert len(await grants_within(limiter, 50, estimate)) == 4


@virtual_time
async def test_the_bursts_of_a_configuration_are_kept() -> None:
    limits = LimitsConfig(rpm=1_000, tpm=100_000, max_request_burst=7, max_token_burst=300)
    limiter = RateLimiter.of(limits)
    assert len(await grants_within(limiter, 0.01)) == 7
    limiter = RateLimiter.of(limits)
    assert len(await grants_within(limiter, 0.01, 100)) == 3


# The queue


@virtual_time
async def test_a_large_request_is_not_overtaken_by_small_ones() -> None:
    limiter = await exhausted(RateLimiter(tokens_per_minute=1_000), 1_000)
    served: list[int] = []

    async def request(size: int) -> None:
        await limiter.acquire(size)
        served.append(size)

    async with asyncio.TaskGroup() as group:
        for size in (600, 1, 2, 3, 300, 4):
            group.create_task(request(size))
            await settle()
    assert served == [600, 1, 2, 3, 300, 4]


@virtual_time
async def test_a_newcomer_that_would_fit_waits_behind_those_who_wait() -> None:
    limiter = RateLimiter(tokens_per_minute=1_000)
    large = asyncio.create_task(limiter.acquire(900))
    await settle()
    small = asyncio.create_task(limiter.acquire(1))
    await settle()
    assert not small.done()
    await small
    assert large.done()


@pytest.mark.parametrize("limits", [{"tokens_per_minute": 100}, {"tokens_per_day": 100}])
@virtual_time
async def test_an_estimate_that_can_never_fit_fails_at_once(limits: Mapping[str, float]) -> None:
    limiter = RateLimiter(**limits)
    with pytest.raises(BadRequestError, match=r"needs about 101 of limits\.tp[md]=100"):
        await limiter.acquire(101)
    assert now() == 0
    assert await waits(limiter, 1) == 0


@virtual_time
async def test_an_estimate_of_the_whole_limit_is_served_in_time() -> None:
    limiter = RateLimiter(tokens_per_minute=100)
    assert await waits(limiter, 100) <= 62
    assert await waits(limiter, 100) <= 62


@virtual_time
async def test_one_who_stops_waiting_makes_way_for_the_next() -> None:
    limiter = await exhausted(RateLimiter(tokens_per_minute=1_000), 1_000)
    large = asyncio.create_task(limiter.acquire(1_000))
    await settle()
    small = asyncio.create_task(waits(limiter, 1))
    await asyncio.sleep(1)
    large.cancel()
    assert await small < 61
    assert large.cancelled()


@virtual_time
async def test_a_cancellation_leaks_nothing() -> None:
    limiter = RateLimiter(requests_per_minute=60)
    impatient = [asyncio.create_task(limiter.acquire()) for _ in range(1_000)]
    await settle()
    for task in impatient[1:]:
        task.cancel()
    await asyncio.wait(impatient)
    granted = await grants_within(limiter, 10 * MINUTE)
    assert len(granted) >= 0.97 * 600


@virtual_time
async def test_a_cancellation_in_the_moment_of_the_grant_leaks_nothing() -> None:
    limiter = RateLimiter(requests_per_minute=10, max_request_burst=10)
    handles = [await limiter.acquire() for _ in range(10)]
    waiting = [asyncio.create_task(limiter.acquire()) for _ in range(10)]
    await settle()
    for handle in handles:
        handle.refund()  # grants those who wait
    for task in waiting:
        task.cancel()
    await asyncio.wait(waiting)
    assert all(task.cancelled() for task in waiting)
    assert len(await grants_within(limiter, 0.5)) == 10


@virtual_time
async def test_the_moment_of_the_grant_passes_on_to_the_next_when_it_is_cancelled() -> None:
    limiter = RateLimiter(requests_per_minute=1)
    handle = await limiter.acquire()
    impatient = asyncio.create_task(limiter.acquire())
    patient = asyncio.create_task(limiter.acquire())
    await settle()
    handle.refund()
    impatient.cancel()
    await settle()
    assert impatient.cancelled()
    assert patient.done()


def test_a_limiter_serves_one_event_loop_after_the_other() -> None:
    limiter = RateLimiter(requests_per_minute=6)

    @virtual_time
    async def cut_off() -> None:
        limiter.pause(5)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.gather(limiter.acquire(), limiter.acquire(), limiter.acquire()), 1)

    @virtual_time
    async def later() -> None:
        await asyncio.sleep(2)
        assert len(await grants_within(limiter, MINUTE)) >= 6

    cut_off()
    later()


# What becomes of a reservation


def bursting(tokens: float = 1_000) -> RateLimiter:
    return RateLimiter(tokens_per_minute=tokens, max_token_burst=tokens)


@virtual_time
async def test_a_refund_gives_everything_back() -> None:
    limiter = RateLimiter(requests_per_minute=1, tokens_per_minute=1_000, max_token_burst=1_000)
    handle = await limiter.acquire(1_000)
    assert isinstance(handle, RateLimiterAcquisitionHandle)
    handle.refund()
    assert await waits(limiter, 1_000) == 0


@virtual_time
async def test_settling_gives_back_what_was_not_used_but_the_request() -> None:
    limiter = RateLimiter(requests_per_minute=2, tokens_per_minute=1_000, max_request_burst=2, max_token_burst=1_000)
    (await limiter.acquire(1_000)).settle(used(100, 100))
    assert await waits(limiter, 800) == 0
    assert await waits(limiter) == pytest.approx(MINUTE, rel=0.02)


@virtual_time
async def test_what_was_used_beyond_the_reservation_is_a_debt() -> None:
    limiter = bursting()
    (await limiter.acquire(100)).settle(used(1_000, 900))
    began = now()
    await limiter.acquire(100)
    assert now() - began >= MINUTE


@virtual_time
async def test_a_debt_is_paid_and_the_full_rate_returns() -> None:
    limiter = RateLimiter(tokens_per_minute=60_000)
    (await limiter.acquire(600)).settle(used(60_000))
    await asyncio.sleep(2 * MINUTE)
    granted = await grants_within(limiter, 10 * MINUTE, 100)
    assert len(granted) * 100 >= 0.97 * 600_000


@virtual_time
async def test_what_comes_back_serves_those_who_wait_without_delay() -> None:
    limiter = bursting()
    handle = await limiter.acquire(1_000)
    waiting = asyncio.create_task(waits(limiter, 900))
    await asyncio.sleep(5)
    handle.settle(used(100))
    assert await waiting == pytest.approx(5.0, abs=0.01)


@virtual_time
async def test_what_comes_back_in_part_shortens_the_wait() -> None:
    limiter = RateLimiter(tokens_per_minute=6_000)
    handle = await limiter.acquire(3_000)
    waiting = asyncio.create_task(waits(limiter, 4_000))
    await asyncio.sleep(1)
    handle.settle(used(1_000))
    assert await waiting == pytest.approx(20.0, abs=0.5)


@virtual_time
async def test_one_who_stops_waiting_shortens_the_wait_of_the_next() -> None:
    limiter = await exhausted(RateLimiter(tokens_per_minute=6_000), 100)
    large = asyncio.create_task(limiter.acquire(6_000))
    small = asyncio.create_task(waits(limiter, 500))
    await asyncio.sleep(1)
    large.cancel()
    assert await small == pytest.approx(5.0, abs=0.5)


@virtual_time
async def test_a_settlement_a_minute_later_does_not_let_the_limit_be_passed() -> None:
    limiter = RateLimiter(tokens_per_minute=1_000)
    handle = await limiter.acquire(500)
    await asyncio.sleep(5 * MINUTE)
    handle.settle(used())
    granted = await grants_within(limiter, MINUTE - 1, 10)
    assert len(granted) * 10 <= 1_000


@virtual_time
async def test_what_comes_back_after_its_window_is_too_late_to_be_used() -> None:
    limiter = RateLimiter(tokens_per_minute=1_000, max_token_burst=1_000)
    handle = await limiter.acquire(500)
    await asyncio.sleep(MINUTE + 1)
    await limiter.acquire(1_000)
    handle.settle(used())
    assert await waits(limiter, 500) >= MINUTE - 1


@virtual_time
async def test_what_comes_back_from_long_requests_does_not_add_up_to_a_burst() -> None:
    limiter = RateLimiter(tokens_per_minute=1_000)
    handles = [await limiter.acquire(100) for _ in range(5)]
    await asyncio.sleep(5 * MINUTE)
    for handle in handles:
        handle.settle(used())
    assert len(await grants_within(limiter, 0.05, 10)) == 2


# A pause


@virtual_time
async def test_nothing_is_granted_during_a_pause() -> None:
    limiter = RateLimiter(requests_per_minute=600)
    limiter.pause(7)
    assert await waits(limiter) == pytest.approx(7.0, abs=0.01)


@virtual_time
async def test_a_pause_holds_for_those_who_wait_already() -> None:
    limiter = RateLimiter(requests_per_minute=60)
    await limiter.acquire()
    waiting = asyncio.create_task(waits(limiter))
    await settle()
    limiter.pause(30)
    assert await waiting == pytest.approx(30.0, abs=0.1)


@virtual_time
async def test_the_longer_pause_counts() -> None:
    limiter = RateLimiter(requests_per_minute=600)
    limiter.pause(20)
    limiter.pause(1)
    limiter.pause(0)
    assert await waits(limiter) == pytest.approx(20.0, abs=0.01)


@virtual_time
async def test_after_a_pause_requests_go_out_at_the_limiters_rate() -> None:
    limiter = RateLimiter(requests_per_minute=60)
    limiter.pause(30)
    granted = await grants_within(limiter, 40)
    assert min(granted) >= 30
    assert len(granted) <= 12


@virtual_time
async def test_a_pause_without_limits_is_kept_too() -> None:
    limiter = RateLimiter()
    limiter.pause(7)
    assert await waits(limiter) == pytest.approx(7.0, abs=0.01)


# The client that obeys it


ANSWER = Response(output=Generation(text="yes"), model_id="m", request_id=None, usage=used(10, 20), headers={})


class Provider:
    """A client that does as it is told."""

    def __init__(self, outcome: Response | BaseException = ANSWER, seconds: float = 0.0) -> None:
        self.outcome = outcome
        self.seconds = seconds
        self.requests: list[Request] = []
        self.closed = False

    async def send(self, request: Request) -> Response:
        self.requests.append(request)
        await asyncio.sleep(self.seconds)
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome

    async def aclose(self) -> None:
        self.closed = True


class Ledger(RateLimiter):
    """A limiter that writes down what it is asked for."""

    def __init__(self) -> None:
        super().__init__(requests_per_minute=1e6, tokens_per_minute=1e9)
        self.reserved: list[Estimate] = []
        self.events: list[str] = []

    async def acquire(self, estimate: Estimate | float = 0.0) -> RateLimiterAcquisitionHandle:
        assert isinstance(estimate, Estimate)
        self.reserved.append(estimate)
        return await super().acquire(estimate)

    def settle(self, handle: RateLimiterAcquisitionHandle, usage: TokenUsage) -> None:
        self.events.append(f"settled {usage.prompt_tokens}+{usage.completion_tokens}")
        super().settle(handle, usage)

    def refund(self, handle: RateLimiterAcquisitionHandle) -> None:
        self.events.append("refunded")
        super().refund(handle)

    def pause(self, seconds: float) -> None:
        self.events.append(f"paused {seconds:g} s")
        super().pause(seconds)


def asking(text: str = "a prompt of 20 chars", **params: Any) -> GenerationRequest:
    return GenerationRequest(input=text, params=params)


@virtual_time
async def test_an_answer_is_settled_at_what_it_used() -> None:
    ledger = Ledger()
    response = await Limited(Provider(), ledger, label="a").send(asking())
    assert response is ANSWER
    assert ledger.events == ["settled 10+20"]


@virtual_time
async def test_an_answer_without_usage_stays_reserved() -> None:
    ledger = Ledger()
    silent = Response(output=Generation(text=""), model_id="m", request_id=None, usage=None, headers={})
    await Limited(Provider(silent), ledger, label="a").send(asking())
    assert ledger.events == []


@pytest.mark.parametrize(
    ("error", "events"),
    [
        (ConnectError("nobody listens"), ["refunded"]),
        (BadRequestError("no"), ["settled 0+0"]),
        (AuthenticationError("no"), ["settled 0+0"]),
        (ServiceUnavailableError("busy"), ["settled 0+0"]),
        (RateLimitError("slow down"), ["settled 0+0", "paused 1 s"]),
        (RateLimitError("slow down", retry_after_s=17), ["settled 0+0", "paused 17 s"]),
        (RateLimitError("slow down", retry_after_s=0), ["settled 0+0", "paused 0 s"]),
        (InsufficientQuotaError("pay", retry_after_s=5), ["settled 0+0", "paused 5 s"]),
        (APIConnectionError("cut off"), []),
        (Timeout("too long"), []),
        (InternalServerError("oops"), []),
        (APIResponseError("half an answer"), []),
        (asyncio.CancelledError(), []),
        (ZeroDivisionError(), []),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
@virtual_time
async def test_how_a_request_ended_decides_what_becomes_of_its_reservation(
    error: BaseException, events: list[str]
) -> None:
    ledger = Ledger()
    with pytest.raises(type(error)):
        await Limited(Provider(error), ledger, label="a").send(asking())
    assert ledger.events == events


@virtual_time
async def test_a_refusal_pauses_everyone_who_shares_the_limiter() -> None:
    limiter = RateLimiter(requests_per_minute=6_000)
    refusing = Limited(Provider(RateLimitError("slow down", retry_after_s=9)), limiter, label="a")
    answering = Limited(Provider(), limiter, label="b")
    with pytest.raises(RateLimitError):
        await refusing.send(asking())
    request = asking()
    await answering.send(request)
    assert request.trace.queue_wait_s == pytest.approx(9.0, abs=0.01)


@pytest.mark.parametrize(
    ("request_", "prompt", "completion"),
    [
        (asking("x" * 40), 10, 7),
        (asking("x" * 40, max_tokens=100), 10, 100),
        (asking("x" * 40, max_completion_tokens=100), 10, 100),
        (asking("x" * 40, max_output_tokens=100), 10, 100),
        (asking("x" * 40, max_tokens=None), 10, 7),
        (asking("x" * 40, max_tokens=0), 10, 0),
        (asking("x" * 40, max_tokens=100, n=3), 10, 300),
        (asking("x" * 40, n=3), 10, 21),
        (GenerationRequest(input=[{"role": "user", "content": "x" * 40}]), 10, 7),
        (
            GenerationRequest(
                input=[
                    {"role": "system", "content": "x" * 20},
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": "x" * 20},
                            {"type": "image_url", "image_url": {"url": "data:" + "x" * 999}},
                        ],
                    },
                ]
            ),
            10,
            7,
        ),
        (GenerationRequest(input={"input": "x" * 20, "instructions": "x" * 20}), 10, 7),
        (EmbeddingRequest(texts=["x" * 30, "x" * 10]), 10, 0),
        (TranscriptionRequest(audio=b"x" * 1_000), 0, 0),
    ],
)
@virtual_time
async def test_what_is_reserved_follows_from_the_request(request_: Request, prompt: float, completion: float) -> None:
    ledger = Ledger()
    await Limited(Provider(), ledger, label="a", default_output_tokens=7).send(request_)
    assert ledger.reserved == [Estimate(prompt_tokens=prompt, completion_tokens=completion)]


@virtual_time
async def test_a_request_that_can_never_fit_is_not_sent() -> None:
    provider = Provider()
    with pytest.raises(BadRequestError, match="lower max_tokens"):
        await Limited(provider, RateLimiter(tokens_per_minute=100), label="a").send(asking(max_tokens=1_000))
    assert provider.requests == []


@virtual_time
async def test_the_trace_tells_waiting_from_service() -> None:
    limiter = RateLimiter(requests_per_minute=6)
    client = Limited(Provider(seconds=3.0), limiter, label="a")
    first, second = asking(), asking()
    await client.send(first)
    await client.send(second)
    assert first.trace.queue_wait_s == 0
    assert first.trace.service_time_s == pytest.approx(3.0)
    assert second.trace.queue_wait_s == pytest.approx(7.0, abs=0.1)
    assert second.trace.service_time_s == pytest.approx(3.0)


@virtual_time
async def test_waits_add_up_over_attempts_and_the_service_time_is_the_last_ones() -> None:
    limiter = RateLimiter(requests_per_minute=6)
    provider = Provider(InternalServerError("oops"), seconds=2.0)
    client = Limited(provider, limiter, label="a")
    request = asking()
    for _ in range(2):
        with pytest.raises(InternalServerError):
            await client.send(request)
    provider.outcome, provider.seconds = ANSWER, 1.0
    await client.send(request)
    assert request.trace.queue_wait_s == pytest.approx(8.0 + 8.0, abs=0.2)
    assert request.trace.service_time_s == pytest.approx(1.0)


@virtual_time
async def test_the_service_time_of_a_failure_is_known_too() -> None:
    request = asking()
    with pytest.raises(Timeout):
        await Limited(Provider(Timeout("too long"), seconds=5.0), RateLimiter(), label="a").send(request)
    assert request.trace.service_time_s == pytest.approx(5.0)


@virtual_time
async def test_the_trace_names_the_deployment_and_its_price() -> None:
    price = TokenPrice(prompt=1e-6, completion=2e-6)
    request = asking()
    await Limited(Provider(), RateLimiter(), label="east", price=price).send(request)
    assert (request.trace.deployment, request.trace.price) == ("east", price)


@virtual_time
async def test_closing_closes_the_transport() -> None:
    provider = Provider()
    await Limited(provider, RateLimiter(), label="a").aclose()
    assert provider.closed


@virtual_time
async def test_the_errors_of_the_transport_come_through_unchanged() -> None:
    error = RequestError("odd")
    with pytest.raises(RequestError) as caught:
        await Limited(Provider(error), RateLimiter(), label="a").send(asking())
    assert caught.value is error


@virtual_time
async def test_a_usage_beyond_all_measure_is_a_debt_of_one_limit_at_most() -> None:
    limiter = RateLimiter(tokens_per_minute=6000)
    handle = await limiter.acquire(100)
    handle.settle(used(prompt=2**48))
    assert await waits(limiter, 100) <= 2 * MINUTE
