"""The account: limits that hold for all deployments together."""

from __future__ import annotations

import time

from runner.concurrency import keeps_slot
from runner.errors import ConnectError, RequestError, RowError
from runner.estimate import NOTHING, Estimate, Estimator
from runner.limited import PATIENCE_S
from runner.limiter import RateLimiter, RateLimiterAcquisitionHandle, Slot
from runner.types import Client, Request, Response


class Account:
    """A `Client` that also reserves from a quota that several deployments share.

    It stands around a deployment's own `Limited`, which keeps the books of the attempt and obeys the deployment's
    pauses: a refusal there is no reason to pause the others. A day's quota that is used up is an
    `InsufficientQuotaError`, as it is there.

    Args:
        client: One deployment, under its own limits.
        limiter: The account's quota.
        estimator: What a request is expected to take.
        own: The deployment's own limiter. A long pause there is waited out before the quota is drawn from: what was
            drawn and not sent at once would go out in a later minute, beside all that was drawn then.
        slot: What a request gives back while a long pause lasts, and keeps while it has drawn: those who wait for the
            quota may have all the others.
    """

    def __init__(
        self,
        client: Client,
        limiter: RateLimiter,
        *,
        own: RateLimiter,
        estimator: Estimator | None = None,
        slot: Slot | None = None,
    ) -> None:
        self._client = client
        self._limiter = limiter
        self._own = own
        self._estimator = estimator or Estimator()
        self._slot = slot

    async def send(self, request: Request) -> Response:
        trace = request.trace
        queued = time.perf_counter()
        estimate = self._estimator.estimate(request) if self._limiter.counts_tokens else NOTHING
        try:
            handle = await self._draw(estimate)
        finally:
            trace.queue_wait_s += time.perf_counter() - queued
        trace.sent_at = 0.0
        kept = keeps_slot.set(True)
        try:
            response = await self._client.send(request)
        except BaseException as error:
            if not trace.sent_at or isinstance(error, (ConnectError, RowError)):
                handle.refund()
            elif isinstance(error, RequestError) and error.billing == "free":
                handle.settle(NOTHING)
            raise
        finally:
            keeps_slot.reset(kept)
        if response.usage is not None:
            handle.settle(self._estimator.counted(estimate, response.usage))
        return response

    async def aclose(self) -> None:
        await self._client.aclose()

    async def _draw(self, estimate: Estimate) -> RateLimiterAcquisitionHandle:
        """Reserve from the quota what can be sent now."""
        while True:
            await self._own.outlast_pause(patience_s=PATIENCE_S, slot=self._slot)
            handle = await self._limiter.acquire(estimate, patience_s=PATIENCE_S, slot=self._slot)
            if not self._own.is_in_long_pause:
                return handle
            handle.refund()
