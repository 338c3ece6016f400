"""The client that obeys a rate limiter."""

from __future__ import annotations

import time
from collections.abc import Sequence

from runner.errors import ConnectError, InsufficientQuotaError, RequestError, RowError
from runner.estimate import NOTHING, Estimate, Estimator
from runner.limiter import RateLimiter, RateLimiterAcquisitionHandle, Slot
from runner.quota import Reading, readings
from runner.types import Client, Request, Response, TokenPrice

PATIENCE_S = 3600.0
"""A quota that is used up for longer ends a run, which says when it can go on; for less it is waited for."""


class Limited:
    """A `Client` that reserves before it sends and settles after, and waits while the provider asks for a pause.

    A refusal pauses everyone who shares the limiter. One that asks for hours, or says that a day's quota is empty, is
    an `InsufficientQuotaError`: going on is for another run.

    Args:
        client: The transport of one deployment.
        limiter: Its quota.
        label: The deployment's name, noted in the trace.
        estimator: What a request is expected to take.
        price: Noted in the trace, for the cost of the answer.
        pause_s: How long a refusal without a hint pauses everyone.
        slot: What a request gives back while it waits for the end of a pause; None where the caller holds nothing.
    """

    def __init__(
        self,
        client: Client,
        limiter: RateLimiter,
        *,
        label: str,
        estimator: Estimator | None = None,
        price: TokenPrice | None = None,
        pause_s: float = 1.0,
        slot: Slot | None = None,
    ) -> None:
        self._client = client
        self._limiter = limiter
        self._label = label
        self._estimator = estimator or Estimator()
        self._price = price
        self._pause_s = pause_s
        self._slot = slot

    async def send(self, request: Request) -> Response:
        trace = request.trace
        trace.deployment = self._label
        trace.price = self._price
        queued = time.perf_counter()
        estimate = self._estimator.estimate(request) if self._limiter.counts_tokens else NOTHING
        try:
            handle = await self._limiter.acquire(estimate, patience_s=PATIENCE_S, slot=self._slot)
        finally:
            sent = time.perf_counter()
            trace.queue_wait_s += sent - queued
        trace.sent_at = sent
        trace.on_the_wire = True  # and stays so where this is cancelled
        try:
            response = await self._client.send(request)
        except RequestError as error:
            trace.on_the_wire = False
            raise self._settle_failure(handle, error) from error.__cause__
        except RowError:  # it cannot be written, so that nothing was sent
            trace.on_the_wire = False
            handle.refund()
            raise
        finally:
            trace.service_time_s = time.perf_counter() - sent
        trace.on_the_wire = False
        self._settle(handle, estimate, response)
        return response

    async def aclose(self) -> None:
        await self._client.aclose()

    def _settle(self, handle: RateLimiterAcquisitionHandle, estimate: Estimate, response: Response) -> None:
        if response.usage is not None and self._limiter.counts_tokens:
            handle.settle(self._estimator.counted(estimate, response.usage), response.headers)
        else:
            self._limiter.heed(handle, response.headers)

    def _settle_failure(self, handle: RateLimiterAcquisitionHandle, error: RequestError) -> RequestError:
        """Providers count failed requests, but not the tokens of those they refused; what is unknown stays reserved."""
        if isinstance(error, ConnectError):
            handle.refund()
        elif error.billing == "free":
            handle.settle(NOTHING, error.headers)
        else:
            self._limiter.heed(handle, error.headers)
        if not error.pauses:
            return error
        said = readings(error.headers)
        if not said:
            self._limiter.refused(handle)
        hint_s = _hint_s(error, said)
        self._limiter.pause(self._pause_s if hint_s is None else hint_s, f"{self._label}: {error}")
        if hint_s is None or hint_s <= PATIENCE_S or isinstance(error, InsufficientQuotaError):
            return error
        return _used_up(error, hint_s)


def _hint_s(error: RequestError, said: Sequence[Reading]) -> float | None:
    """When the provider wants to be asked again; a day's quota that its headers call empty counts where it is one."""
    empty = [
        reading.reset_s
        for reading in said
        if reading.remaining == 0 and reading.reset_s is not None and reading.is_of_a_day
    ]
    hints = [*empty, *([] if error.retry_after_s is None else [error.retry_after_s])]
    return max(hints, default=None)


def _used_up(error: RequestError, hint_s: float) -> InsufficientQuotaError:
    until = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + hint_s))
    return InsufficientQuotaError(
        f"{error.message.rstrip('.')}; requests can go on at {until}",
        status=error.status,
        retry_after_s=hint_s,
        headers=error.headers,
    )
