"""The client that obeys a limiter: what it reserves, how reservations end, and what a provider then sees."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Mapping
from typing import Any

import pytest

from runner.account import Account
from runner.concurrency import Window
from runner.config import RetryConfig, TokenEstimates
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
    RowError,
    ServiceUnavailableError,
    Timeout,
)
from runner.estimate import Estimate, Estimator
from runner.limited import Limited
from runner.limiter import RateLimiter, RateLimiterAcquisitionHandle, Slot
from runner.quota import retry_after_s
from runner.retry import Retrying
from runner.simulator.quota import SlidingMinute
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
from virtual_time import now, settle, virtual_time

MINUTE, HOUR = 60.0, 3600.0


def used(prompt: int = 0, completion: int = 0) -> TokenUsage:
    return TokenUsage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


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

    async def acquire(
        self, estimated_tokens: Estimate | float = 0.0, *, patience_s: float = math.inf, slot: Slot | None = None
    ) -> RateLimiterAcquisitionHandle:
        assert isinstance(estimated_tokens, Estimate)
        self.reserved.append(estimated_tokens)
        return await super().acquire(estimated_tokens, patience_s=patience_s, slot=slot)

    def settle(
        self,
        handle: RateLimiterAcquisitionHandle,
        actual: Estimate | TokenUsage,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.events.append(f"settled {actual.prompt_tokens:g}+{actual.completion_tokens:g}")
        super().settle(handle, actual, headers)

    def refund(self, handle: RateLimiterAcquisitionHandle) -> None:
        self.events.append("refunded")
        super().refund(handle)

    def pause(self, seconds: float, reason: str = "") -> None:
        self.events.append(f"paused {seconds:g} s")
        super().pause(seconds, reason)


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
async def test_a_request_that_cannot_be_written_costs_no_quota_and_is_not_on_the_wire() -> None:
    own, shared, request = Ledger(), Ledger(), asking()
    client = Account(Limited(Provider(RowError("NaN")), own, label="a"), shared, own=own)
    with pytest.raises(RowError):
        await client.send(request)
    assert (own.events, shared.events) == (["refunded"], ["refunded"])
    assert not request.trace.on_the_wire


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
    await Limited(Provider(), ledger, label="a", estimator=Estimator(default_output_tokens=7)).send(request_)
    assert ledger.reserved == [Estimate(prompt_tokens=prompt, completion_tokens=completion)]


@virtual_time
async def test_a_request_that_can_never_fit_is_not_sent() -> None:
    provider = Provider()
    with pytest.raises(BadRequestError, match=r"lower request\.max_tokens, or raise limits\."):
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


# A pause


@virtual_time
async def test_a_request_that_waits_out_a_pause_holds_no_slot() -> None:
    window = Window(1)
    limiter = RateLimiter(requests_per_minute=600)
    paused = Limited(Provider(), limiter, label="a", slot=window)
    served: list[str] = []

    async def ask(name: str, client: Limited) -> None:
        async with window:
            await client.send(asking())
            served.append(f"{name} at {now():.0f} s")

    limiter.pause(30)
    async with asyncio.TaskGroup() as group:
        group.create_task(ask("paused", paused))
        await settle()
        group.create_task(ask("another", Limited(Provider(), RateLimiter(), label="b")))
    assert served == ["another at 0 s", "paused at 30 s"]


@virtual_time
async def test_a_pause_sends_those_aside_who_wait_already() -> None:
    window = Window(2)
    limiter = RateLimiter(requests_per_minute=6)
    client = Limited(Provider(), limiter, label="a", slot=window)
    await limiter.acquire()

    async def ask() -> None:
        async with window:
            await client.send(asking())

    async with asyncio.TaskGroup() as group:
        for _ in range(2):
            group.create_task(ask())
        await settle()
        assert window.active == 2
        limiter.pause(100)
        await settle()
        assert window.active == 0
    assert now() == pytest.approx(110, abs=1)


@virtual_time
async def test_a_pause_says_until_when_and_why() -> None:
    limiter = RateLimiter()
    refusing = Limited(Provider(RateLimitError("slow down", retry_after_s=90)), limiter, label="east")
    assert (limiter.paused_until, limiter.pause_reason) == (None, "")
    with pytest.raises(RateLimitError):
        await refusing.send(asking())
    assert limiter.paused_until == pytest.approx(time.time() + 90)
    assert limiter.pause_reason == "east: slow down"
    await asyncio.sleep(91)
    assert (limiter.paused_until, limiter.pause_reason) == (None, "")


@virtual_time
async def test_a_hint_of_hours_says_when_requests_can_go_on() -> None:
    refused = RateLimitError("Day used up.", status=429, retry_after_s=5 * HOUR, headers={"a": "b"})
    client = Limited(Provider(refused), RateLimiter(), label="a")
    with pytest.raises(InsufficientQuotaError, match=r"^Day used up; requests can go on at \d{4}-") as error:
        await client.send(asking())
    assert (error.value.status, error.value.retry_after_s, error.value.headers) == (429, 5 * HOUR, {"a": "b"})


@virtual_time
async def test_a_days_quota_that_is_empty_is_no_matter_of_the_short_hint_beside_it() -> None:
    headers = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-limit-requests": "200"}
    headers["x-ratelimit-reset-requests"] = "23h50m0s"
    refused = RateLimitError("slow down", retry_after_s=20, headers=headers)
    with pytest.raises(InsufficientQuotaError):
        await Limited(Provider(refused), RateLimiter(), label="a").send(asking())


@virtual_time
async def test_all_who_wait_for_a_quota_that_is_gone_for_hours_are_told() -> None:
    limiter = RateLimiter(requests_per_minute=60)
    provider = Provider(RateLimitError("enough", retry_after_s=2 * HOUR), seconds=3)
    client = Limited(provider, limiter, label="a")
    outcomes = await asyncio.gather(*(client.send(asking()) for _ in range(9)), return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {InsufficientQuotaError}
    assert now() < 10
    with pytest.raises(InsufficientQuotaError, match="enough; requests can go on at"):
        await client.send(asking())


@virtual_time
async def test_a_day_limit_of_our_own_that_is_used_up_says_so() -> None:
    client = Limited(Provider(), RateLimiter(requests_per_day=2), label="a")
    for _ in range(2):
        await client.send(asking())
    with pytest.raises(InsufficientQuotaError, match=r"limits\.rpd=2 is used up; requests can go on at"):
        await client.send(asking())


# Against a provider that enforces the same limits in a sliding minute


class Enforcing:
    """A provider with limits, whose requests take a while to arrive, and its answers longer."""

    def __init__(self, *, rpm: int = 600, tpm: int = 100_000, headers: bool = True) -> None:
        self.minute = SlidingMinute()
        self.rpm, self.tpm, self.says = rpm, tpm, headers
        self.random = random.Random(1)
        self.admitted = self.refused = self.tokens = 0

    async def send(self, request: Request) -> Response:
        assert isinstance(request, GenerationRequest)
        await asyncio.sleep(self.random.uniform(0.01, 0.06))
        at = asyncio.get_running_loop().time()
        prompt, longest = len(request.input) // 4 + 7, request.params["max_tokens"]
        wait_s = self.minute.wait_s(at, prompt + longest, rpm=self.rpm, tpm=self.tpm)
        if not wait_s:
            self.minute.add(at, prompt + longest)
        headers = self.minute.headers(at, rpm=self.rpm, tpm=self.tpm) if self.says else {}
        if wait_s:
            self.refused += 1
            headers |= {"retry-after": str(math.ceil(wait_s))} if self.says else {}
            hint_s = retry_after_s(headers, None, now=at)
            raise RateLimitError("slow down", status=429, retry_after_s=hint_s, headers=headers)
        self.admitted += 1
        self.tokens += prompt + longest
        await asyncio.sleep(self.random.uniform(0.5, 3.0))
        usage = used(prompt, self.random.randint(1, longest))
        return Response(output=Generation(text=""), model_id="m", request_id=None, usage=usage, headers=headers)

    async def aclose(self) -> None:
        pass


async def ten_minutes(provider: Enforcing, limiter: RateLimiter, sizes: tuple[int, ...]) -> list[RequestError]:
    """Send requests of mixed ``sizes``, as many as the limiter lets through; the failures."""
    window = Window(64)
    estimator = Estimator.of(TokenEstimates.ratio, model="simulated/m")
    client = Retrying(Limited(provider, limiter, label="a", estimator=estimator, slot=window), RetryConfig())
    choice = random.Random(2)
    failed: list[RequestError] = []

    async def work() -> None:
        while True:
            size = choice.choice(sizes)
            async with window:
                try:
                    await client.send(GenerationRequest(input="x" * 2 * size, params={"max_tokens": size}))
                except RequestError as error:
                    failed.append(error)

    async with asyncio.timeout(10 * MINUTE + 1), asyncio.TaskGroup() as group:
        workers = [group.create_task(work()) for _ in range(64)]
        await asyncio.sleep(10 * MINUTE)
        for worker in workers:
            worker.cancel()
    return failed


MIXED, SMALL = (20, 120, 800), (20, 30, 40)
"""Sizes at which the tokens, or the requests, are the tighter limit."""


@pytest.mark.parametrize("headers", [True, False], ids=["headers", "no headers"])
@pytest.mark.parametrize("sizes", [MIXED, SMALL], ids=["mixed", "small"])
@virtual_time
async def test_ten_minutes_use_the_tighter_limit_and_meet_no_refusal(sizes: tuple[int, ...], headers: bool) -> None:
    provider = Enforcing(headers=headers)
    failed = await ten_minutes(provider, RateLimiter(600, 100_000), sizes)
    assert (provider.refused, failed) == (0, [])
    assert max(provider.admitted / 6_000, provider.tokens / 1_000_000) >= 0.97


@pytest.mark.parametrize("headers", [True, False], ids=["headers", "no headers"])
@pytest.mark.parametrize("sizes", [MIXED, SMALL], ids=["mixed", "small"])
@virtual_time
async def test_limits_set_too_high_waste_few_requests_and_lose_none(sizes: tuple[int, ...], headers: bool) -> None:
    provider = Enforcing(headers=headers)
    failed = await ten_minutes(provider, RateLimiter(720, 120_000), sizes)
    assert failed == []
    assert provider.refused < 0.05 * provider.admitted
    assert max(provider.admitted / 6_000, provider.tokens / 1_000_000) >= 0.97


@pytest.mark.parametrize("sizes", [MIXED, SMALL], ids=["mixed", "small"])
@virtual_time
async def test_without_limits_of_ours_the_headers_slow_us_down(sizes: tuple[int, ...]) -> None:
    provider = Enforcing()
    failed = await ten_minutes(provider, RateLimiter(), sizes)
    assert failed == []
    assert provider.refused < 0.02 * provider.admitted
    assert max(provider.admitted / 6_000, provider.tokens / 1_000_000) >= 0.97
