from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise

import pytest

from runner import errors
from runner.concurrency import Window
from runner.config import RetryConfig
from runner.errors import (
    BadRequestError,
    ConnectError,
    InternalServerError,
    RateLimitError,
    RequestError,
    RowError,
    ServiceUnavailableError,
    Timeout,
)
from runner.retry import Retrying, failed_attempt
from runner.types import Attempt, Generation, GenerationRequest, Request, Response, Trace
from virtual_time import START, now, other_tasks, settle, virtual_time

ANSWER = Response(output=Generation(text="yes"), model_id="m", request_id=None, usage=None, headers={})

RETRIED = {
    "ConflictError",
    "APIConnectionError",
    "ConnectError",
    "Timeout",
    "RateLimitError",
    "InternalServerError",
    "ServiceUnavailableError",
    "APIResponseError",
    "WorkerError",
}
TURNED_AWAY = {"ConnectError", "RateLimitError", "ServiceUnavailableError"}
GIVEN_UP = {
    "RequestError",
    "BadRequestError",
    "ContextWindowExceededError",
    "ContentPolicyViolationError",
    "RequestTooLargeError",
    "AuthenticationError",
    "PermissionDeniedError",
    "NotFoundError",
    "InsufficientQuotaError",
    "NoDeploymentError",
}


class Provider:
    """Fails as it is told, one error an attempt, and then answers."""

    def __init__(self, *failures: BaseException, seconds: float = 0.0) -> None:
        self.failures = list(failures)
        self.seconds = seconds
        self.attempts: list[float] = []
        self.closed = False

    async def send(self, request: Request) -> Response:
        self.attempts.append(now())
        request.trace.deployment = f"replica {len(self.attempts)}"
        await asyncio.sleep(self.seconds)
        request.trace.service_time_s = self.seconds
        if self.failures:
            raise self.failures.pop(0)
        return ANSWER

    async def aclose(self) -> None:
        self.closed = True


def asking(trace: Trace | None = None) -> GenerationRequest:
    return GenerationRequest(input="?", trace=trace or Trace())


def quickly(max_retries: int = 3) -> RetryConfig:
    return RetryConfig(max_retries=max_retries, base_s=0.0)


def test_the_error_tree_is_the_one_that_is_tested_here() -> None:
    kinds = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, RequestError)}
    assert kinds == RETRIED | GIVEN_UP


@pytest.mark.parametrize("name", sorted(RETRIED))
@virtual_time
async def test_what_another_attempt_may_heal_is_tried_again(name: str) -> None:
    provider = Provider(getattr(errors, name)("broken"))
    assert await Retrying(provider, quickly()).send(asking()) is ANSWER
    assert len(provider.attempts) == 2


@pytest.mark.parametrize("name", sorted(GIVEN_UP))
@virtual_time
async def test_what_no_attempt_heals_is_given_up_at_once(name: str) -> None:
    error = getattr(errors, name)("broken")
    provider = Provider(error)
    request = asking()
    with pytest.raises(RequestError) as caught:
        await Retrying(provider, quickly()).send(request)
    assert caught.value is error
    assert len(provider.attempts) == 1
    assert request.trace.failures == []


@pytest.mark.parametrize("error", [RowError("a row"), ZeroDivisionError("a bug"), asyncio.CancelledError()])
@virtual_time
async def test_what_is_no_failed_request_comes_through(error: BaseException) -> None:
    provider = Provider(error)
    with pytest.raises(type(error)):
        await Retrying(provider, quickly()).send(asking())
    assert len(provider.attempts) == 1


@pytest.mark.parametrize("max_retries", [0, 1, 3])
@virtual_time
async def test_after_so_many_retries_the_last_error_comes_out(max_retries: int) -> None:
    failures = [InternalServerError(f"number {n}") for n in range(10)]
    provider = Provider(*failures)
    request = asking()
    with pytest.raises(InternalServerError) as caught:
        await Retrying(provider, quickly(max_retries)).send(request)
    assert caught.value is failures[max_retries]
    assert len(provider.attempts) == 1 + max_retries
    assert request.trace.retries == max_retries


@virtual_time
async def test_an_error_that_cannot_be_retried_ends_the_retries() -> None:
    provider = Provider(Timeout("slow"), BadRequestError("no"), Timeout("slow"))
    request = asking()
    with pytest.raises(BadRequestError, match="no"):
        await Retrying(provider, quickly()).send(request)
    assert len(provider.attempts) == 2
    assert [failed.error for failed in request.trace.failures] == ["Timeout"]


@virtual_time
async def test_an_answer_at_once_costs_no_wait() -> None:
    request = asking()
    await Retrying(Provider(), RetryConfig()).send(request)
    assert now() == 0
    assert request.trace.retries == 0


# How long


async def waits(config: RetryConfig, failures: Sequence[RequestError]) -> list[float]:
    """Seconds between the attempts."""
    began = now()
    provider = Provider(*failures)
    await Retrying(provider, config).send(asking())
    times = [at - began for at in provider.attempts]
    return [later - earlier for earlier, later in pairwise(times)]


@virtual_time
async def test_the_wait_is_random_up_to_a_bound_that_doubles_to_a_cap() -> None:
    config = RetryConfig(max_retries=6, base_s=1.0, cap_s=10.0)
    seen = [await waits(config, [InternalServerError("oops")] * 6) for _ in range(200)]
    for attempt, bound in enumerate([1.0, 2.0, 4.0, 8.0, 10.0, 10.0]):
        column = [row[attempt] for row in seen]
        assert 0 <= min(column) < 0.2 * bound
        assert 0.8 * bound < max(column) <= bound + 1e-6


@virtual_time
async def test_the_servers_hint_is_a_floor_and_the_jitter_comes_on_top() -> None:
    config = RetryConfig(max_retries=1, base_s=4.0)
    seen = [(await waits(config, [RateLimitError("slow", retry_after_s=30.0)]))[0] for _ in range(100)]
    assert 30.0 <= min(seen) < 31.0
    assert 33.0 < max(seen) <= 34.0 + 1e-6


@virtual_time
async def test_a_hint_beyond_the_cap_is_obeyed() -> None:
    config = RetryConfig(max_retries=1, base_s=1.0, cap_s=5.0)
    [wait] = await waits(config, [ServiceUnavailableError("busy", retry_after_s=500.0)])
    assert 500.0 <= wait <= 501.0 + 1e-6


@virtual_time
async def test_a_hint_of_zero_leaves_the_jitter() -> None:
    config = RetryConfig(max_retries=1, base_s=1.0)
    assert max([(await waits(config, [RateLimitError("slow", retry_after_s=0.0)]))[0] for _ in range(50)]) > 0


@virtual_time
async def test_each_attempt_waits_for_the_hint_of_its_own_failure() -> None:
    config = RetryConfig(max_retries=2, base_s=0.0)
    failures = [RateLimitError("slow", retry_after_s=7.0), InternalServerError("oops")]
    assert await waits(config, failures) == [pytest.approx(7.0), pytest.approx(0.0)]


# The ledger


@virtual_time
async def test_every_attempt_that_is_followed_by_another_is_entered_in_the_trace() -> None:
    provider = Provider(ConnectError("nobody"), Timeout("slow", status=408), RateLimitError("stop"), seconds=2.0)
    request = asking()
    await Retrying(provider, quickly()).send(request)
    expected = [
        Attempt(
            number=1,
            deployment="replica 1",
            started_at=START,
            service_time_s=2.0,
            error="ConnectError",
            message="nobody",
            status=None,
            cost_usd=0.0,
        ),
        Attempt(
            number=2,
            deployment="replica 2",
            started_at=START + 2,
            service_time_s=2.0,
            error="Timeout",
            message="slow",
            status=408,
            cost_usd=None,
        ),
        Attempt(
            number=3,
            deployment="replica 3",
            started_at=START + 4,
            service_time_s=2.0,
            error="RateLimitError",
            message="stop",
            status=None,
            cost_usd=0.0,
        ),
    ]
    assert request.trace.failures == expected


@virtual_time
async def test_a_failure_is_in_the_ledger_before_the_next_attempt_begins() -> None:
    provider = Provider(InternalServerError("first"), InternalServerError("second"))
    ledger: list[tuple[str, int]] = []

    async def enter(attempt: Attempt) -> None:
        await asyncio.sleep(5)
        ledger.append((attempt.message, len(provider.attempts)))

    await Retrying(provider, quickly()).send(asking(Trace(on_failure=enter)))
    assert ledger == [("first", 1), ("second", 2)]
    assert provider.attempts == [pytest.approx(at) for at in (0.0, 5.0, 10.0)]


@virtual_time
async def test_the_last_failure_is_left_to_the_caller() -> None:
    entered: list[Attempt] = []

    async def enter(attempt: Attempt) -> None:
        entered.append(attempt)

    with pytest.raises(Timeout):
        await Retrying(Provider(*[Timeout("slow")] * 9), quickly(1)).send(asking(Trace(on_failure=enter)))
    assert [attempt.number for attempt in entered] == [1]


@virtual_time
async def test_a_ledger_that_cannot_be_written_ends_the_request() -> None:
    async def enter(attempt: Attempt) -> None:
        raise errors.StoreError("the disk is full")

    provider = Provider(Timeout("slow"))
    with pytest.raises(errors.StoreError):
        await Retrying(provider, quickly()).send(asking(Trace(on_failure=enter)))
    assert len(provider.attempts) == 1


@virtual_time
async def test_an_attempt_that_just_ended_began_its_service_time_ago() -> None:
    await asyncio.sleep(10)
    trace = Trace(deployment="east", service_time_s=4.0)
    attempt = failed_attempt(trace, RateLimitError("stop", status=429))
    assert (attempt.number, attempt.started_at, attempt.status) == (1, START + 6, 429)


# The slot


@virtual_time
async def test_the_slot_is_free_while_a_request_waits_and_taken_again_for_the_attempt() -> None:
    window = Window(1)
    provider = Provider(RateLimitError("slow", retry_after_s=10.0), seconds=1.0)
    client = Retrying(provider, quickly(), slot=window)

    async def ask() -> None:
        async with window:
            await client.send(asking())
            assert window.active == 1

    asked = asyncio.create_task(ask())
    await asyncio.sleep(0.5)
    assert window.active == 1
    await asyncio.sleep(1)
    assert window.active == 0
    async with window:
        await asyncio.sleep(15)
        assert len(provider.attempts) == 1
    await asked
    assert provider.attempts[1] == pytest.approx(16.5)
    assert window.active == 0


@virtual_time
async def test_the_slot_is_kept_until_the_ledger_is_written() -> None:
    taken: list[int] = []
    slot = RecordingSlot()

    async def enter(attempt: Attempt) -> None:
        taken.append(slot.aside_now)

    await Retrying(Provider(Timeout("slow")), RetryConfig(), slot=slot).send(asking(Trace(on_failure=enter)))
    assert (taken, slot.times) == ([0], 1)


class RecordingSlot:
    """A slot that counts how often it is given back."""

    def __init__(self) -> None:
        self.times = 0
        self.aside_now = 0

    @asynccontextmanager
    async def aside(self) -> AsyncIterator[None]:
        self.times += 1
        self.aside_now += 1
        try:
            yield
        finally:
            self.aside_now -= 1


@virtual_time
async def test_without_retries_the_slot_is_never_given_back() -> None:
    slot = RecordingSlot()
    with pytest.raises(Timeout):
        await Retrying(Provider(Timeout("slow")), quickly(0), slot=slot).send(asking())
    assert slot.times == 0


@virtual_time
async def test_a_request_that_is_cancelled_while_it_waits_is_not_sent_again() -> None:
    window = Window(1)
    provider = Provider(RateLimitError("slow", retry_after_s=10.0))

    async def ask() -> None:
        async with window:
            await Retrying(provider, quickly(), slot=window).send(asking())

    asked = asyncio.create_task(ask())
    await asyncio.sleep(5)
    await window.enter()
    asked.cancel()
    await settle()
    assert asked.cancelled()
    assert (len(provider.attempts), window.active) == (1, 1)
    window.leave()
    assert window.active == 0
    assert not other_tasks()


@virtual_time
async def test_requests_are_retried_independently_of_each_other() -> None:
    client = Retrying(Provider(*[InternalServerError("oops")] * 20, seconds=1.0), RetryConfig(max_retries=20, cap_s=4))
    requests = [asking() for _ in range(10)]
    await asyncio.gather(*map(client.send, requests))
    assert sum(request.trace.retries for request in requests) == 20


@virtual_time
async def test_closing_closes_the_client_below() -> None:
    provider = Provider()
    await Retrying(provider, RetryConfig()).aclose()
    assert provider.closed


# What counts


@pytest.mark.parametrize("name", sorted(TURNED_AWAY))
@virtual_time
async def test_being_turned_away_costs_nothing_and_does_not_count(name: str) -> None:
    provider = Provider(*(getattr(errors, name)("come again") for _ in range(20)))
    assert await Retrying(provider, quickly(max_retries=1)).send(asking()) is ANSWER
    assert len(provider.attempts) == 21


@virtual_time
async def test_a_request_that_is_only_turned_away_is_given_up_after_a_while() -> None:
    provider = Provider(*(RateLimitError("come again") for _ in range(10_000)))
    with pytest.raises(RateLimitError):
        await Retrying(provider, RetryConfig(max_retries=1, cap_s=10.0), max_wait_s=100.0).send(asking())
    assert 80 < provider.attempts[-1] <= 100


@virtual_time
async def test_a_pause_that_the_server_asks_for_is_waited_out_however_short_the_wait_for_one_that_is_out() -> None:
    provider = Provider(*(RateLimitError("come again", retry_after_s=900.0) for _ in range(2)))
    assert await Retrying(provider, quickly(), max_wait_s=100.0).send(asking()) is ANSWER
    assert provider.attempts == [0, 900, 1800]


@virtual_time
async def test_pauses_of_more_than_an_hour_are_not_waited_for() -> None:
    provider = Provider(*(RateLimitError("come again", retry_after_s=900.0) for _ in range(5)))
    with pytest.raises(RateLimitError):
        await Retrying(provider, quickly(), max_wait_s=100.0).send(asking())
    assert now() == 3600


@virtual_time
async def test_failures_count_among_refusals_that_do_not() -> None:
    failures: list[RequestError] = []
    for number in range(5):
        failures += [ServiceUnavailableError("busy"), InternalServerError(f"number {number}")]
    with pytest.raises(InternalServerError, match="number 2"):
        await Retrying(Provider(*failures), quickly(max_retries=2)).send(asking())


class Fleet(Provider):
    """Has another deployment at hand for whatever failed."""

    async def send(self, request: Request) -> Response:
        request.trace.at_once = True
        return await super().send(request)


@virtual_time
async def test_another_deployment_is_asked_at_once_and_with_the_slot() -> None:
    slot = RecordingSlot()
    fleet = Fleet(Timeout("slow"), ServiceUnavailableError("busy", retry_after_s=50.0))
    await Retrying(fleet, RetryConfig(max_retries=1), slot=slot).send(asking())
    assert fleet.attempts == [0, 0, 0]
    assert slot.times == 0


@virtual_time
async def test_what_is_wrong_with_one_deployment_only_is_tried_at_another() -> None:
    assert await Retrying(Fleet(errors.AuthenticationError("no such key")), quickly()).send(asking()) is ANSWER


@virtual_time
async def test_failures_count_elsewhere_too() -> None:
    fleet = Fleet(*(Timeout("slow") for _ in range(10)))
    with pytest.raises(Timeout):
        await Retrying(fleet, quickly(max_retries=3)).send(asking())
    assert len(fleet.attempts) == 4
