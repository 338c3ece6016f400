"""Retries: whether and when a failed request is tried again. The one retry layer there is."""

from __future__ import annotations

import asyncio
import time
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Protocol

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt, wait_random_exponential
from tenacity.stop import stop_base
from tenacity.wait import wait_base

from runner.config import RetryConfig
from runner.errors import ConnectError, RequestError
from runner.types import Attempt, Client, Request, Response, Trace

UNREACHABLE_S = 30.0
"""How long a request is tried again while nobody listens at the address, however often that is."""

_RECONNECT_CAP_S = 5.0


class Slot(Protocol):
    """What a waiting request gives back meanwhile."""

    def aside(self) -> AbstractAsyncContextManager[None]: ...


class Retrying:
    """A `Client` that sends a request again where its error class says that this can help.

    Between attempts the request holds no slot and no reservation: each attempt goes through the whole stack below.

    Args:
        client: The stack below.
        config: How often, and how long to wait.
        slot: What to give back while waiting; None where the caller holds nothing.
    """

    def __init__(self, client: Client, config: RetryConfig, *, slot: Slot | None = None) -> None:
        self._client = client
        self._config = config
        self._slot = slot

    async def send(self, request: Request) -> Response:
        started = time.time()
        try:
            return await self._client.send(request)
        except RequestError as error:
            if not error.retryable or self._config.max_retries == 0:
                raise
            failed = error
        return await self._retry(request, failed, started)

    async def aclose(self) -> None:
        await self._client.aclose()

    async def _retry(self, request: Request, first: RequestError, started: float) -> Response:
        """Go on after a first failure. The policies are tenacity's; success without a failure never comes here."""
        failures = [first]

        async def attempt() -> Response:
            nonlocal started
            if failures:
                raise failures.pop()
            started = time.time()
            return await self._client.send(request)

        async def note(state: RetryCallState) -> None:
            """Enter the failure in the trace, and in the ledger before the next attempt costs money."""
            error = state.outcome.exception() if state.outcome else None
            assert isinstance(error, RequestError)
            failed = failed_attempt(request.trace, error, started_at=started)
            request.trace.failures.append(failed)
            if request.trace.on_failure is not None:
                await request.trace.on_failure(failed)

        policy = AsyncRetrying(
            retry=retry_if_exception(_is_retryable),
            stop=_EnoughAttempts(1 + self._config.max_retries),
            wait=HintThenJitter(base_s=self._config.base_s, cap_s=self._config.cap_s),
            before_sleep=note,
            sleep=self._rest,
            reraise=True,
        )
        return await policy(attempt)

    async def _rest(self, seconds: float) -> None:
        async with self._slot.aside() if self._slot else nullcontext():
            await asyncio.sleep(seconds)


class HintThenJitter(wait_base):
    """Wait as long as the server asks, then a random time up to an exponentially growing bound (full jitter).

    The hint is a floor and the jitter comes on top, so that those who were told the same time do not return at once.
    See https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/.
    """

    def __init__(self, *, base_s: float, cap_s: float) -> None:
        self._jitter = wait_random_exponential(multiplier=base_s, max=cap_s)

    def __call__(self, retry_state: RetryCallState) -> float:
        error = retry_state.outcome.exception() if retry_state.outcome else None
        jitter = float(self._jitter(retry_state))
        if isinstance(error, ConnectError):
            return min(jitter, _RECONNECT_CAP_S)
        hint = error.retry_after_s if isinstance(error, RequestError) else None
        return (hint or 0.0) + jitter


class _EnoughAttempts(stop_base):
    """Stop after so many attempts; a server that nobody reaches is given some time instead, as it may be restarting."""

    def __init__(self, attempts: int) -> None:
        self._attempts = stop_after_attempt(attempts)

    def __call__(self, retry_state: RetryCallState) -> bool:
        error = retry_state.outcome.exception() if retry_state.outcome else None
        if isinstance(error, ConnectError):
            return (retry_state.seconds_since_start or 0.0) >= UNREACHABLE_S
        return self._attempts(retry_state)


def _is_retryable(error: BaseException) -> bool:
    return isinstance(error, RequestError) and error.retryable


def failed_attempt(trace: Trace, error: RequestError, *, started_at: float | None = None) -> Attempt:
    """The ledger's entry for the attempt that ``error`` has just ended."""
    return Attempt(
        number=trace.retries + 1,
        deployment=trace.deployment,
        started_at=time.time() - trace.service_time_s if started_at is None else started_at,
        service_time_s=trace.service_time_s,
        error=type(error).__name__,
        message=str(error),
        status=error.status,
        cost_usd=0.0 if error.billing == "free" else None,
    )
