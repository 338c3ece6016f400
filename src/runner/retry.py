"""Retries: whether and when a failed request is tried again. The one retry layer there is."""

from __future__ import annotations

import asyncio
import time
from contextlib import nullcontext

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, wait_random_exponential
from tenacity.stop import stop_base
from tenacity.wait import wait_base

from runner.config import RetryConfig
from runner.errors import APIResponseError, RequestError
from runner.limited import PATIENCE_S
from runner.limiter import Slot
from runner.types import Attempt, Client, Request, Response, Trace


class Retrying:
    """A `Client` that sends a request again where its error class says that this can help.

    408, 409, every 5xx, timeouts, lost connections and garbage count: after ``max_retries`` of them the last one is
    raised. Where the deployment turned the request away (429, 503, 529, nobody listening) nothing was done or charged:
    that does not count, and goes on for ``max_wait_s``, beside the pauses that the server asks for. Refusals of the
    request itself are raised at once. With ``max_retries=0``, everything is.

    Between attempts the request holds no slot and no reservation: each attempt goes through the whole stack below.
    Where that has another deployment at hand (``trace.at_once``), there is no wait.

    Args:
        client: The stack below.
        config: How often, and how long to wait.
        slot: What to give back while waiting; None where the caller holds nothing.
        max_wait_s: How long a request is tried again that is only turned away. Pauses that the server asks for do not
            count, up to `PATIENCE_S` in all.
    """

    def __init__(
        self, client: Client, config: RetryConfig, *, slot: Slot | None = None, max_wait_s: float = 600.0
    ) -> None:
        self._client = client
        self._config = config
        self._slot = slot
        self._max_wait_s = max_wait_s

    async def send(self, request: Request) -> Response:
        started = time.time()
        try:
            return await self._client.send(request)
        except RequestError as error:
            if self._config.max_retries == 0 or not _may_help(request.trace, error):
                raise
            failed = error
        return await self._retry(request, failed, started)

    async def aclose(self) -> None:
        await self._client.aclose()

    async def _retry(self, request: Request, first: RequestError, started: float) -> Response:
        """Go on after a first failure. The policies are tenacity's; success without a failure never comes here."""
        failures = [first]
        trace = request.trace

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
            failed = failed_attempt(trace, error, not_before=started)
            trace.failures.append(failed)
            if trace.on_failure is not None:
                await trace.on_failure(failed)

        backoff = HintThenJitter(base_s=self._config.base_s, cap_s=self._config.cap_s)
        policy = AsyncRetrying(
            retry=retry_if_exception(lambda error: isinstance(error, RequestError) and _may_help(trace, error)),
            stop=_Enough(trace, max_retries=self._config.max_retries, max_wait_s=self._max_wait_s),
            wait=lambda state: 0.0 if trace.at_once else backoff(state),
            before_sleep=note,
            sleep=self._rest,
            reraise=True,
        )
        return await policy(attempt)

    async def _rest(self, seconds: float) -> None:
        if seconds > 0:
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
        hint = error.retry_after_s if isinstance(error, RequestError) else None
        return (hint or 0.0) + float(self._jitter(retry_state))


class _Enough(stop_base):
    """Stop after so many failures that count, or where being turned away has lasted, or would last, for too long.

    The time that the server asked for does not count while it is within the patience for pauses, as all others wait it
    out too. One request's; while all deployments are out, it is the router that says when to stop waiting.
    """

    def __init__(self, trace: Trace, *, max_retries: int, max_wait_s: float) -> None:
        self._trace = trace
        self._left = max_retries
        self._max_wait_s = max_wait_s
        self._pauses_s = 0.0

    def __call__(self, retry_state: RetryCallState) -> bool:
        error = retry_state.outcome.exception() if retry_state.outcome else None
        if isinstance(error, RequestError) and error.turned_away:
            if self._trace.at_once:
                return False
            self._pauses_s += error.retry_after_s or 0.0
            waited_s = (retry_state.seconds_since_start or 0.0) + retry_state.upcoming_sleep
            return self._pauses_s > PATIENCE_S or waited_s - self._pauses_s >= self._max_wait_s
        self._left -= 1
        return self._left < 0


def _may_help(trace: Trace, error: RequestError) -> bool:
    if trace.garbled and isinstance(error, APIResponseError):
        return False
    return error.retryable or trace.at_once


def failed_attempt(trace: Trace, error: RequestError, *, not_before: float = 0.0) -> Attempt:
    """The ledger's entry for the attempt that ``error`` has just ended, and that did not begin before that time."""
    return Attempt(
        number=trace.retries + 1,
        deployment=trace.deployment,
        started_at=max(not_before, time.time() - trace.service_time_s),
        service_time_s=trace.service_time_s,
        error=type(error).__name__,
        message=str(error),
        status=error.status,
        cost_usd=0.0 if error.billing == "free" else None,
    )
