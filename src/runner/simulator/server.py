"""The server: its life, its routes, and the way of a request through it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import orjson
from aiohttp import web

from runner.config import SimulatorConfig
from runner.errors import ConfigError
from runner.simulator.body import Body, read_json
from runner.simulator.call import Call
from runner.simulator.endpoints import ENDPOINTS, Reply
from runner.simulator.faults import Refusal, crowded, http_fault, rate_limited
from runner.simulator.ledger import Ledger
from runner.simulator.model import AnswerKey, Model
from runner.simulator.quota import SlidingMinute
from runner.simulator.service import Pace, Slots
from runner.simulator.settings import changed, check
from runner.simulator.text import uniform

MODELS = ("echo", "simulated")


class Simulator:
    """A simulated provider that listens from `start` (or ``async with``) to `aclose`.

    Below ``/v1`` it serves ``models`` (any other name is served too), ``chat/completions``, ``completions``,
    ``responses``, ``embeddings`` and ``audio/transcriptions``. Beside it:

    - ``GET /ledger``: what came and went since the start or the last ``POST /ledger/reset``; see `Ledger`.
    - ``GET /ledger/requests`` and ``/ledger/prompts``: ``{hash of the body, or user's text: {asked, answered}}``.
    - ``GET /ledger/arrivals``: ``{at, tokens}``, when each request came (seconds of the host's monotonic clock) and
      what it was charged.
    - ``POST /settings``: changes the settings that its JSON names; answers all of them but the key.

    A setting that is impossible, or an answer key that cannot be read, is a `ConfigError`.
    """

    def __init__(self, config: SimulatorConfig, *, host: str = "127.0.0.1", port: int = 0) -> None:
        self._address = (host, port)
        self._runner: web.ServerRunner | None = None
        self._slots = Slots(config.slots)
        self._minute = SlidingMinute()
        self._ledger = Ledger()
        self._in_flight = 0
        self._apply(config)

    @property
    def url(self) -> str:
        """The base URL for clients: ``http://127.0.0.1:PORT/v1``."""
        return "http://{}:{}/v1".format(*self._address)

    async def start(self) -> None:
        """Begin to listen. An address that is taken is an `OSError`."""
        server = web.Server(self._handle, handler_cancellation=True, access_log=None)
        self._runner = web.ServerRunner(server, shutdown_timeout=0.01)
        await self._runner.setup()
        # A burst of connections beyond the backlog would be retried by TCP after a whole second.
        await web.TCPSite(self._runner, *self._address, backlog=4096).start()
        self._address = (self._address[0], self._runner.addresses[0][1])

    async def aclose(self) -> None:
        """Stop at once: requests under way are dropped."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def __aenter__(self) -> Simulator:
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    def configure(self, changes: Mapping[str, Any]) -> None:
        """Change settings while running, from the next request on: ``{"slots": 4, "faults": {"hang": 0.1}}``.

        Raises:
            ConfigError: A setting is unknown or impossible; then none is changed.
        """
        self._apply(changed(self._config, changes), None if "answers" in changes else self._model.key)

    def _apply(self, config: SimulatorConfig, key: AnswerKey | None = None) -> None:
        check(config)
        self._model = Model(config, key or AnswerKey.read(config.answers))
        self._config = config
        self._faults = list(zip(vars(config.faults), accumulate(vars(config.faults).values()), strict=True))
        self._slots.resize(config.slots)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.method == "POST" and request.path.startswith("/v1/"):
            return await self._serve(Call(request, self._config, self._ledger))
        try:
            document = await self._control(request, request.method, request.path)
        except Refusal as refusal:
            return web.Response(status=refusal.status, body=refusal.body, headers=refusal.headers)
        return web.Response(body=orjson.dumps(document), content_type="application/json")

    async def _control(self, request: web.BaseRequest, method: str, path: str) -> Any:
        """What is asked about the simulator rather than of the model."""
        match method, path:
            case "GET", "/v1/models":
                self._authorise(request)
                entries = [{"id": name, "object": "model", "created": 0, "owned_by": "runner"} for name in MODELS]
                return {"object": "list", "data": entries}
            case "GET", "/ledger":
                return self._ledger.totals() | {"in_flight": self._in_flight, "in_service": self._slots.held}
            case "GET", "/ledger/requests":
                return self._ledger.bodies
            case "GET", "/ledger/prompts":
                return self._ledger.prompts
            case "GET", "/ledger/arrivals":
                return {"at": list(self._ledger.arrived), "tokens": list(self._ledger.took)}
            case "POST", "/ledger/reset":
                self._ledger = Ledger()
                return {}
            case "POST", "/settings":
                try:
                    self.configure(read_json(await request.read()))
                except ConfigError as error:
                    raise Refusal(str(error)) from None
                return {name: value for name, value in vars(self._config).items() if name != "api_key"}
            case "GET", path if path in ENDPOINTS:
                raise Refusal(f"Not allowed to GET on {path}. (HINT: Perhaps you meant to use POST?)", status=405)
        raise Refusal(f"Invalid URL ({method} {path})", status=404)

    async def _serve(self, call: Call) -> web.StreamResponse:
        """One request of the model: counted in flight from here until its last byte is handed over."""
        ledger = call.ledger
        self._in_flight += 1
        ledger.in_flight_peak = max(ledger.in_flight_peak, self._in_flight)
        try:
            try:
                await call.read()
                return await self._answer(call)
            except Refusal as refusal:
                return await call.send(refusal.status, refusal.body, refusal.headers)
        except asyncio.CancelledError:
            ledger.abandoned += 1
            raise
        except ConnectionError:
            ledger.abandoned += 1
            return web.Response()  # nobody is there to read it
        finally:
            self._in_flight -= 1

    async def _answer(self, call: Call) -> web.StreamResponse:
        self._authorise(call.request)
        if (endpoint := ENDPOINTS.get(call.request.path)) is None:
            raise Refusal(f"Invalid URL (POST {call.request.path})", status=404)
        body = call.parse()
        try:
            reply = endpoint(self._model, body)
        except ValueError as error:
            raise Refusal(f"Invalid schema: {error}", code="invalid_json_schema") from None
        call.expect(call.ledger.prompts[prompt] for prompt in reply.prompts)
        call.ledger.note_beginning(body.beginning)
        self._admit(call, body, reply)
        if fault := self._draw_fault(call):
            call.ledger.faults[fault] += 1
            streamed = reply.frames is not None
            if refusal := http_fault(fault, body.model, streamed=streamed, retry_after=call.config.retry_after):
                raise refusal
            if fault == "hang":
                await asyncio.sleep(call.config.hang_s)
        pace = Pace.of(call.config, body.identity, reply.steps)
        if fault == "slow":
            pace = pace.times(call.config.slow_factor)
        async with self._slots.hold(pace.total_s) as begun:
            call.ledger.in_service_peak = max(call.ledger.in_service_peak, self._slots.held)
            return await call.answer(reply, pace, begun, fault)

    def _authorise(self, request: web.BaseRequest) -> None:
        key = self._config.api_key
        if key is not None and request.headers.get("authorization") != f"Bearer {key}":
            where = "You can find your API key at https://platform.openai.com/account/api-keys."
            raise Refusal(f"Incorrect API key provided. {where}", status=401, code="invalid_api_key")

    def _admit(self, call: Call, body: Body, reply: Reply) -> None:
        most = call.config.max_in_flight
        if most is not None and self._in_flight > most:
            raise crowded(body.model, most)
        rpm, tpm = call.config.rpm, call.config.tpm
        if rpm is None and tpm is None:
            return
        now = asyncio.get_running_loop().time()
        tokens = reply.prompt_tokens + (len(reply.choices) * (body.max_tokens or 0) or reply.completion_tokens)
        wait_s = self._minute.wait_s(now, tokens, rpm=rpm, tpm=tpm)
        if wait_s == 0:
            self._minute.add(now, tokens)
        call.headers |= self._minute.headers(now, rpm=rpm, tpm=tpm)
        if wait_s == math.inf:
            message = f"Request too large for {body.model} on tokens per min (TPM): Limit {tpm}, Requested {tokens}."
            raise Refusal(message, status=429, type="tokens", code="rate_limit_exceeded")
        if wait_s > 0:
            call.headers["retry-after"] = str(math.ceil(wait_s))
            raise rate_limited(body.model, wait_s)

    def _draw_fault(self, call: Call) -> str | None:
        if self._faults[-1][1] == 0:
            return None
        drawn = uniform(call.config.seed, "fault", call.digest, call.attempt)
        return next((name for name, bound in self._faults if drawn < bound), None)
