from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.config import LimitsConfig
from runner.errors import BadRequestError, ConfigError, InsufficientQuotaError
from runner.estimate import Estimate
from runner.limiter import RateLimiter, RateLimiterAcquisitionHandle
from runner.types import TokenUsage
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
        st.none() | st.sampled_from([-1, 0, 1, 30, 10**9]),  # what the headers of its answer say is left
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
    requests: list[tuple[float, float, float, float | None, float, str, int | None]],
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

    async def request(
        number: int, prompt: float, completion: float, service_s: float, ending: str, left: int | None
    ) -> None:
        handle = await limiter.acquire(Estimate(prompt_tokens=prompt, completion_tokens=completion))
        served.append(number)
        costs = {"rpm": 1.0, "tpm": prompt + completion, "otpm": completion, "rpd": 1.0}
        grants.append(grant := Grant(now(), costs))
        for name, (limit, window_s) in limits.items():
            charged = sum(each.costs[name] for each in grants if now() - each.at < window_s - 1e-6)
            assert limit is None or charged <= limit + 1e-6, (name, charged)
        await asyncio.sleep(service_s)
        if left is not None and ending != "refunded":
            limiter.heed(handle, openai(left, reset="20s") | openai(left, reset="1h", kind="requests"))
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


@pytest.mark.parametrize("limits", [LimitsConfig(tpm=100), LimitsConfig(tpd=100)])
@virtual_time
async def test_an_estimate_that_can_never_fit_fails_at_once(limits: LimitsConfig) -> None:
    limiter = RateLimiter.of(limits)
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


@virtual_time
async def test_how_long_nothing_is_granted_is_known() -> None:
    limiter = RateLimiter(requests_per_minute=6, max_request_burst=1)
    assert limiter.held_up_s == 0
    await limiter.acquire()
    assert limiter.held_up_s == 0  # nobody waits
    waiting = asyncio.create_task(limiter.acquire())
    await asyncio.sleep(1)
    assert limiter.held_up_s == pytest.approx(9, abs=0.1)
    limiter.pause(30)
    assert limiter.held_up_s == pytest.approx(30, abs=0.1)
    await waiting
    assert limiter.held_up_s == 0


# What was sent before


@given(
    rpm=st.sampled_from([3, 10, 60, 600]),
    worked_s=st.sampled_from([0.5, 10.0, 59.0, 100.0]),
    away_s=st.sampled_from([0.0, 1.0, 30.0, 59.0, 70.0]),
)
@virtual_time
async def test_a_limiter_that_recalls_what_was_sent_before_it_goes_on_as_the_same_one_would(
    rpm: int, worked_s: float, away_s: float
) -> None:
    before = await grants_within(RateLimiter(rpm), worked_s)
    await asyncio.sleep(away_s)
    limiter = RateLimiter(rpm)
    for at in before:
        limiter.recall(Estimate(), age_s=now() - at)
    began = now()
    after = [began + each - began for each in await grants_within(limiter, 2 * MINUTE)]

    assert most_in_window([*before, *after], MINUTE) <= rpm
    assert len([at for at in after if at >= began + MINUTE]) >= 0.9 * rpm - 1


@virtual_time
async def test_what_is_recalled_counts_in_the_windows_that_it_was_sent_in_and_never_beyond_the_limit() -> None:
    limiter = RateLimiter(requests_per_minute=10, tokens_per_day=1_000, max_request_burst=10)
    limiter.recall(Estimate(prompt_tokens=500, completion_tokens=450), requests=900, age_s=DAY / 2)
    limiter.recall(Estimate(), requests=30, age_s=20)

    assert await waits(limiter, 50) == pytest.approx(40, abs=1)  # ten of the thirty leave the minute
    assert await waits(limiter, 50) == pytest.approx(DAY / 2, rel=0.02)


@virtual_time
async def test_what_is_recalled_after_a_grant_counts_in_its_own_window() -> None:
    limiter = RateLimiter(requests_per_minute=10, max_request_burst=10)
    await asyncio.sleep(100)
    for _ in range(4):
        await limiter.acquire()
    limiter.recall(Estimate(), requests=6, age_s=50)
    limiter.recall(Estimate(), requests=1, age_s=70)

    assert await waits(limiter) == pytest.approx(10, abs=1)
    assert len(await grants_within(limiter, 40)) == 5
    assert await waits(limiter) == pytest.approx(10, abs=1)


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


# What the provider's headers say


def openai(remaining: object, limit: object = 60_000, reset: object = "60s", kind: str = "tokens") -> dict[str, str]:
    """OpenAI's headers of one quota."""
    values = {"limit": limit, "remaining": remaining, "reset": reset}
    return {f"x-ratelimit-{name}-{kind}": str(value) for name, value in values.items()}


async def room(limiter: RateLimiter, most: int = 60_000) -> int:
    """Tokens that may go out at once."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        try:
            (await asyncio.wait_for(limiter.acquire(middle), 1e-4)).refund()
            low = middle
        except TimeoutError:
            high = middle - 1
    return low


@pytest.mark.parametrize(
    "headers",
    [
        openai(1_000, reset="0s"),
        openai(-1),
        openai(1_000, limit=0),
        openai("many"),
        openai("nan"),
        openai("1e999"),
        openai(1_000, reset="soon"),
        openai(1_000, reset="-5s"),
        openai(9_999_999),
        {"x-ratelimit-remaining-tokens": ""},
    ],
    ids=str,
)
@virtual_time
async def test_nonsensical_headers_never_cost_an_answer(headers: dict[str, str]) -> None:
    limiter = RateLimiter(tokens_per_minute=60_000)
    handle = await limiter.acquire(100)
    await limiter.adjust(handle, 100, headers)
    assert await waits(limiter, 100) <= 1


@virtual_time
async def test_the_case_of_a_headers_name_does_not_matter() -> None:
    limiter = RateLimiter(tokens_per_minute=60_000)
    await limiter.adjust(await limiter.acquire(100), 100, {"X-RateLimit-Remaining-Tokens": "0"})
    assert await waits(limiter, 100) > 4


@virtual_time
async def test_what_is_in_flight_stays_reserved_when_headers_are_read() -> None:
    limiter = RateLimiter(tokens_per_minute=60_000, max_token_burst=60_000)
    handles = [await limiter.acquire(1_000) for _ in range(50)]
    await limiter.adjust(handles[0], 1_000, openai(59_000))
    assert await room(limiter) == 10_000


@virtual_time
async def test_where_the_provider_leaves_less_that_counts_and_what_was_sent_since_is_taken_off() -> None:
    limiter = RateLimiter(tokens_per_minute=60_000, max_token_burst=60_000)
    first, *_ = [await limiter.acquire(1_000) for _ in range(11)]
    await limiter.adjust(first, 1_000, openai(20_000))
    assert await room(limiter) == 10_000


@virtual_time
async def test_headers_never_lift_a_limit_above_ours() -> None:
    limiter = RateLimiter(tokens_per_minute=60_000, max_token_burst=60_000)
    handle = await limiter.acquire(10_000)
    await limiter.adjust(handle, 10_000, openai(999_999, limit=1_000_000))
    assert await room(limiter) == 50_000


@virtual_time
async def test_an_older_header_that_arrives_later_is_ignored() -> None:
    limiter = RateLimiter(tokens_per_minute=60_000, max_token_burst=60_000)
    old = await limiter.acquire(1_000)
    await asyncio.sleep(1)
    new = await limiter.acquire(1_000)
    await limiter.adjust(new, 1_000, openai(30_000))
    await limiter.adjust(old, 1_000, openai(45_000))
    assert await room(limiter) == 30_000


@virtual_time
async def test_a_newer_header_gives_back_what_an_older_one_held_back() -> None:
    limiter = RateLimiter(tokens_per_minute=60_000, max_token_burst=60_000)
    await limiter.adjust(await limiter.acquire(1_000), 1_000, openai(0))
    assert await room(limiter) == 0
    await asyncio.sleep(20)
    later = await limiter.acquire(0)
    await limiter.adjust(later, 0, openai(40_000))
    assert await room(limiter) == 40_000


@virtual_time
async def test_what_the_provider_holds_back_returns_by_the_time_it_named() -> None:
    limiter = RateLimiter(tokens_per_minute=60_000, max_token_burst=60_000)
    await limiter.adjust(await limiter.acquire(0), 0, openai(0, reset="30s"))
    await asyncio.sleep(4)
    assert await room(limiter) == 0
    await asyncio.sleep(13.5)
    assert await room(limiter) == pytest.approx(30_000, rel=0.01)
    await asyncio.sleep(13)
    assert await room(limiter) == 60_000


@virtual_time
async def test_what_is_settled_is_not_taken_for_what_the_provider_gave_back() -> None:
    limiter = RateLimiter(tokens_per_minute=60_000, max_token_burst=60_000)
    first, second = [await limiter.acquire(20_000) for _ in range(2)]
    await limiter.adjust(second, 20_000, openai(20_000))  # both are charged in full there
    first.settle(used(1_000))
    assert await room(limiter) == 20_000


@pytest.mark.parametrize("kind", ["requests", "tokens", "input-tokens", "output-tokens"])
@virtual_time
async def test_anthropics_headers_are_read(kind: str) -> None:
    limiter = RateLimiter(
        requests_per_minute=100, tokens_per_minute=100, input_tokens_per_minute=100, output_tokens_per_minute=100
    )
    handle = await limiter.acquire(Estimate(prompt_tokens=1, completion_tokens=1))
    reset = datetime.fromtimestamp(time.time() + 10, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    name = f"anthropic-ratelimit-{kind}"
    handle.settle(used(1, 1), {f"{name}-limit": "100", f"{name}-remaining": "0", f"{name}-reset": reset})
    assert await waits(limiter, Estimate(prompt_tokens=1, completion_tokens=1)) == pytest.approx(5, abs=1)


@virtual_time
async def test_a_nearly_full_day_quota_is_not_taken_for_the_minutes() -> None:
    """Groq's requests are of the day, and soon full again while few are used."""
    limiter = RateLimiter(requests_per_minute=30, requests_per_day=14_000)
    handle = await limiter.acquire()
    handle.settle(used(), openai(20, limit=14_400, reset="86280s", kind="requests"))
    assert len(await grants_within(limiter, 10 * MINUTE)) < 20 + 14_400 / 86_400 * 600
    limiter = RateLimiter(requests_per_minute=30, requests_per_day=14_400)
    handle = await limiter.acquire()
    handle.settle(used(), openai(14_370, limit=14_400, reset="2m59.56s", kind="requests"))
    handle.settle(used(), openai(14_390, limit=14_400, reset="60s", kind="requests"))
    assert len(await grants_within(limiter, 10 * MINUTE)) >= 290


@pytest.mark.parametrize(("scope", "held_back"), [("minute", True), ("day", False), ("auto", False)])
@virtual_time
async def test_the_scope_says_which_window_the_headers_speak_of(
    scope: Literal["minute", "day", "auto"], held_back: bool
) -> None:
    limiter = RateLimiter(requests_per_minute=60, header_bucket_scope=scope)
    handle = await limiter.acquire()
    handle.settle(used(), openai(0, limit=1_000, reset="5h", kind="requests"))
    assert (await waits(limiter) > 4) is held_back


def test_another_scope_is_refused() -> None:
    with pytest.raises(ConfigError, match="choose one of auto, minute, day"):
        RateLimiter(header_bucket_scope="hour")  # type: ignore[arg-type]


@virtual_time
async def test_without_limits_those_that_the_headers_name_are_kept() -> None:
    limiter = RateLimiter()
    handle = await limiter.acquire()
    handle.settle(used(), openai(59, limit=60, reset="1s", kind="requests"))
    granted = await grants_within(limiter, 10 * MINUTE)
    assert most_in_window(granted, MINUTE) <= 60
    assert len(granted) >= 0.97 * 600
    assert not limiter.counts_tokens
    (await limiter.acquire()).settle(used(), openai(59_000))
    assert limiter.counts_tokens


@virtual_time
async def test_an_estimate_above_a_limit_that_nobody_configured_is_left_to_the_provider() -> None:
    limiter = RateLimiter()
    (await limiter.acquire()).settle(used(), openai(1_000, limit=1_000))
    await limiter.acquire(5_000)


@virtual_time
async def test_a_refusal_without_headers_shows_a_limit_that_is_set_too_high() -> None:
    limiter = RateLimiter(requests_per_minute=60, max_request_burst=60)
    handles = [await limiter.acquire() for _ in range(40)]
    limiter.refused(handles[-1])
    assert await waits(limiter) > 4


@virtual_time
async def test_a_refusal_while_little_is_used_has_another_reason() -> None:
    limiter = RateLimiter(requests_per_minute=60, max_request_burst=60)
    handles = [await limiter.acquire() for _ in range(20)]
    limiter.refused(handles[-1])
    assert await waits(limiter) == 0


# As infermesh's programs use it


@virtual_time
async def test_a_usage_of_nothing_is_no_failure_and_its_request_counts() -> None:
    limiter = RateLimiter(6)
    for _ in range(6):
        handle = await limiter.acquire(0)
        await limiter.adjust(handle, 0)
    assert now() >= 49


@virtual_time
async def test_a_negative_usage_is_refused() -> None:
    limiter = RateLimiter(6)
    handle = await limiter.acquire(7)
    assert handle.estimated_tokens == 7
    with pytest.raises(ConfigError, match="actual_tokens=-1"):
        await limiter.adjust(handle, -1)


@virtual_time
async def test_a_limit_of_tokens_alone_limits_no_requests() -> None:
    limiter = RateLimiter(tokens_per_minute=6_000)
    assert len(await grants_within(limiter, 1, 0.001)) > 10_000


@virtual_time
async def test_equal_requests_wait_side_by_side() -> None:
    limiter = await exhausted(RateLimiter(tokens_per_minute=60), 60)
    await asyncio.gather(*(limiter.acquire(1) for _ in range(5)))


# Several event loops and threads


def test_a_limiter_serves_several_event_loops_at_once() -> None:
    limiter = RateLimiter(requests_per_minute=12_000, max_request_burst=1)  # 200 a second
    granted: list[int] = []

    async def ask() -> None:
        for _ in range(20):
            (await limiter.acquire(0)).settle(used(1))
            granted.append(threading.get_ident())

    async def load() -> None:
        await asyncio.gather(*(ask() for _ in range(2)))

    threads = [threading.Thread(target=asyncio.run, args=(load(),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(granted) == 120
    assert len(set(granted)) == 3


def test_an_event_loop_that_is_gone_does_not_hold_up_the_others() -> None:
    limiter = RateLimiter(requests_per_minute=600, max_request_burst=1)

    def leave() -> None:
        """Stop a loop in the middle, with its tasks as they are."""
        loop = asyncio.new_event_loop()
        tasks = [loop.create_task(limiter.acquire()) for _ in range(3)]
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
        for task in tasks:
            task._log_destroy_pending = False  # type: ignore[attr-defined]

    thread = threading.Thread(target=leave)
    thread.start()
    thread.join()
    asyncio.run(asyncio.wait_for(limiter.acquire(), 5))


@virtual_time
async def test_patience_ends_where_the_quota_is_gone_for_longer() -> None:
    limiter = RateLimiter(requests_per_day=1)
    await limiter.acquire()
    with pytest.raises(InsufficientQuotaError, match=r"limits\.rpd=1 is used up; requests can go on at"):
        await limiter.acquire(patience_s=3_600)
    assert now() == 0


@virtual_time
async def test_a_queue_does_not_try_ones_patience() -> None:
    limiter = RateLimiter(requests_per_minute=60)
    outcomes = await asyncio.gather(*(limiter.acquire(patience_s=10) for _ in range(100)))
    assert len(outcomes) == 100


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


@virtual_time
async def test_a_usage_beyond_all_measure_is_a_debt_of_one_limit_at_most() -> None:
    limiter = RateLimiter(tokens_per_minute=6000)
    handle = await limiter.acquire(100)
    handle.settle(used(prompt=2**48))
    assert await waits(limiter, 100) <= 2 * MINUTE
