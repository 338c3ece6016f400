"""The router: which of several deployments answers a request."""

from __future__ import annotations

import random
from collections.abc import Mapping
from itertools import accumulate

from runner.types import Client, Request, Response


class Router:
    """A `Client` that spreads requests over deployments by weight (LiteLLM's ``simple-shuffle``).

    A retry goes through it again, and so may reach another deployment.

    Args:
        deployments: Clients by label.
        weights: Share of the requests by label, relative to the others; 1 where none is given.
        seed: Makes the choice repeatable.
    """

    def __init__(
        self, deployments: Mapping[str, Client], *, weights: Mapping[str, float] | None = None, seed: int | None = None
    ) -> None:
        self._clients = list(deployments.values())
        self._cumulative = list(accumulate((weights or {}).get(label, 1.0) for label in deployments))
        self._random = random.Random(seed)

    async def send(self, request: Request) -> Response:
        [client] = self._random.choices(self._clients, cum_weights=self._cumulative)
        return await client.send(request)

    async def aclose(self) -> None:
        for client in self._clients:
            await client.aclose()
