"""The simulated provider as a transport: a real HTTP server on loopback that lives as long as its client."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from runner.config import SimulatorConfig
from runner.simulator import Simulator
from runner.transports.direct import DirectTransport
from runner.types import Request, Response


class SimulatedTransport:
    """A `Client` that starts a `Simulator` at its first request and speaks to it over HTTP.

    Choose it for trying things out without a key or a network: what is simulated is the model, not the wire.
    """

    def __init__(
        self,
        config: SimulatorConfig,
        *,
        model: str,
        api_key: str | None = None,
        params: Mapping[str, Any] | None = None,
        timeout_s: float,
    ) -> None:
        self._simulator = Simulator(config)
        self._model = model
        self._api_key = api_key
        self._params = params
        self._timeout_s = timeout_s
        self._direct: DirectTransport | None = None
        self._starting = asyncio.Lock()

    async def send(self, request: Request) -> Response:
        direct = self._direct or await self._start()
        return await direct.send(request)

    async def aclose(self) -> None:
        if self._direct is not None:
            await self._direct.aclose()
            await self._simulator.aclose()

    async def _start(self) -> DirectTransport:
        async with self._starting:
            if self._direct is None:
                try:
                    await self._simulator.start()
                except BaseException:
                    await self._simulator.aclose()
                    raise
                self._direct = DirectTransport(
                    model=self._model,
                    api_base=self._simulator.url,
                    api_key=self._api_key,
                    params=self._params,
                    timeout_s=self._timeout_s,
                )
        return self._direct
