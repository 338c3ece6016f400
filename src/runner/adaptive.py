"""The adaptive client: lets a `Tuner` see what comes of each request."""

from __future__ import annotations

from runner.errors import InsufficientQuotaError, RateLimitError, ServiceUnavailableError, Timeout
from runner.tuner import Tuner
from runner.types import Client, Request, Response


class Adaptive:
    """A `Client` that tells a tuner of every attempt.

    Stands right above the transport: below the retries, since each attempt is an observation, and below the rate
    limiter, since a request that waits for quota is not in flight. Several deployments that share a window share its
    tuner; one with a window of its own has its own.
    """

    def __init__(self, client: Client, tuner: Tuner) -> None:
        self._client = client
        self._tuner = tuner

    async def send(self, request: Request) -> Response:
        ticket = self._tuner.sent()
        try:
            response = await self._client.send(request)
        except InsufficientQuotaError:  # no window heals that
            self._tuner.left(ticket)
            raise
        except (RateLimitError, ServiceUnavailableError) as error:
            self._tuner.refused(ticket, error.status)
            raise
        except Timeout:
            self._tuner.timed_out(ticket)
            raise
        except BaseException:
            self._tuner.left(ticket)
            raise
        usage = response.usage
        self._tuner.answered(ticket, (usage.total_tokens or None) if usage else None)
        return response

    async def aclose(self) -> None:
        await self._client.aclose()
