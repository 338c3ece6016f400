"""The simulated provider: a real HTTP server that speaks OpenAI's wire format at a provider's pace.

    async with Simulator(SimulatorConfig(latency_s=0.1, slots=8)) as simulator:
        ...  # requests to simulator.url

    python -m runner.simulator --port 8900 --latency-s 0.1 --faults.http-429 0.1

Choose it wherever a test, a benchmark or a first try needs a provider whose behaviour is known: what a request is
answered, how long it takes and which fault it meets follow from the seed and the request alone, and a client's books
can be checked against its own (``GET /ledger``).

Rules of the simulated world:

- A token is four characters, and no text has less than one. An image, a sound or a file in a prompt counts 85.
- A request is refused by key, form and limits, in this order, before a fault or an answer is drawn for it.
- The limits are a sliding minute. A request is charged its prompt and its ``max_tokens``, or what will be answered
  where it sets none. A request that is refused is not counted (OpenAI does count it); one that meets a fault is.
- Faults are exclusive: one draw a request, by seed, body and how often that body came, so that a retry may succeed.
  The HTTP errors and ``error_200`` come at once and cost nothing. ``hang`` delays an otherwise good answer.
  ``reset``, ``truncated`` and ``invalid_json`` spoil an answer that was computed and charged.
- A client that goes away frees its slot at once; what it had begun is charged.
- The ledger counts every POST below ``/v1``. A body is known by the BLAKE2b-8 of its bytes, a multipart body by that
  of its bytes without the boundary, which is drawn anew for each request.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import difflib
import io
import math
import random
import re
import signal
import socket
import struct
import sys
import time
import wave
from array import array
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from hashlib import blake2b
from pathlib import Path
from statistics import NormalDist
from types import NoneType
from typing import Any, TypeVar, get_args, get_type_hints

import orjson
from aiohttp import web

from runner.config import FaultsConfig, SimulatorConfig
from runner.errors import ConfigError

SETTINGS = {
    "seed": "what all draws start from: the same seed and request give the same answer, latency and fault",
    "latency_s": "mean service time of a request, in seconds",
    "latency_spread": "relative standard deviation of the service time (lognormal); 0 for a constant one",
    "ttft_s": "seconds to the first token; default: 40 % of the service time",
    "itl_s": "seconds between tokens; the service time is then ttft + itl x (output tokens - 1), without spread",
    "slots": "requests in service at once, the others wait in line; default: no bound",
    "rpm": "requests per sliding minute; default: no limit",
    "tpm": "tokens per sliding minute; default: no limit",
    "output_tokens": "length of an answer that no key, echo or schema determines, in tokens, approximately",
    "answers": "JSONL file with `question` and `answer`; a prompt that holds a question gets its answer; default: the"
    " quickstart's",
    "accuracy": "share of the known questions, 0 to 1, that are answered right",
    "embedding_size": "dimensions of an embedding, unless the request says otherwise",
    "api_key": "the only key that is let in; default: everyone is",
    "faults.http_429": "share of the requests that gets a 429 with a short retry-after-ms",
    "faults.http_500": "share that gets a 500",
    "faults.http_502": "share that gets a 502 with a proxy's HTML page",
    "faults.http_503": "share that gets a 503",
    "faults.http_529": "share that gets a 529, as Anthropic's API does when overloaded",
    "faults.reset": "share whose connection is reset (RST) in place of the answer, or halfway through a stream",
    "faults.hang": "share that is left without an answer for hang_s",
    "faults.truncated": "share whose answer breaks off in the middle",
    "faults.invalid_json": "share that gets a 200 with half a JSON document",
    "faults.error_200": "share that gets a 200 with an error in it",
    "hang_s": "how long a hanging request waits, in seconds",
    "usd_per_million_prompt_tokens": "price of the ledger's cost_usd",
    "usd_per_million_completion_tokens": "price of the ledger's cost_usd",
}
"""What each field of `SimulatorConfig` means."""

MAX_REQUEST_BYTES = 2**28
WINDOW_S = 60.0
FAULT_RETRY_AFTER_MS = 20
CHARS_PER_TOKEN = 4
TOKENS_PER_ATTACHMENT = 85
MAX_DEPTH = 6  # of an invented JSON document, where its schema lets it end

T = TypeVar("T")


class Simulator:
    """A simulated provider that listens from `start` (or ``async with``) to `aclose`.

    - ``GET /v1/models``: names with a behaviour of their own (``echo``); any other name is served too.
    - ``POST /v1/chat/completions``: also streamed; ``n``, token limits, ``response_format``, forced ``tool_choice``.
    - ``POST /v1/completions``: also streamed; one prompt or several, ``n``, ``max_tokens``.
    - ``POST /v1/responses``: ``max_output_tokens``, ``text.format``, forced ``tool_choice``.
    - ``POST /v1/embeddings``: a unit vector a text; ``dimensions``, ``encoding_format``.
    - ``POST /v1/audio/transcriptions``: ``json`` and ``verbose_json``.
    - ``GET /ledger``: what was asked, answered and charged since the start or the last reset; see `Ledger`.
    - ``GET /ledger/requests``: ``{hash of the body: {asked, answered}}``.
    - ``GET /ledger/prompts``: ``{last user message, input text or file name: {asked, answered}}``.
    - ``POST /ledger/reset``: begins a new ledger; requests under way stay with the old one, and faults are drawn as if
      no body had been seen.
    - ``POST /settings``: changes the settings that its JSON names; answers all of them but the key.

    Args:
        config: The settings to begin with.
        host: Where to listen.
        port: 0 for any free one; `url` tells which.

    Raises:
        ConfigError: A setting is impossible, or the answer key cannot be read.
    """

    def __init__(self, config: SimulatorConfig, *, host: str = "127.0.0.1", port: int = 0) -> None:
        self._address = (host, port)
        self._server: web.Server | None = None
        self._listener: asyncio.Server | None = None
        self._slots = Slots(config.slots)
        self._minute = SlidingMinute()
        self._ledger = Ledger()
        self._in_flight = 0
        check(config)
        self._apply(config, AnswerKey.read(config.answers))

    @property
    def url(self) -> str:
        """The base URL for clients: ``http://127.0.0.1:PORT/v1``."""
        host, port = self._address
        return f"http://{host}:{port}/v1"

    async def start(self) -> None:
        """Begin to listen.

        Raises:
            OSError: The address is taken.
        """
        loop = asyncio.get_running_loop()
        self._server = web.Server(
            self._handle,
            request_factory=_request,
            handler_cancellation=True,
            access_log=None,
        )
        # A burst of connections beyond the backlog would be retried by TCP after a whole second.
        self._listener = await loop.create_server(self._server, *self._address, backlog=4096)
        self._address = (self._address[0], self._listener.sockets[0].getsockname()[1])

    async def aclose(self) -> None:
        """Stop at once: requests under way are dropped."""
        if self._server is None or self._listener is None:
            return
        self._listener.close()
        self._server.pre_shutdown()
        await self._server.shutdown(timeout=0.01)
        await self._listener.wait_closed()
        self._server = self._listener = None

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
        config = changed(self._config, changes)
        check(config)
        self._apply(config, AnswerKey.read(config.answers) if "answers" in changes else self._model.key)

    def _apply(self, config: SimulatorConfig, key: AnswerKey) -> None:
        self._model = Model(config, key)
        self._config = config
        self._faults = _cumulative(config.faults)
        self._slots.resize(config.slots)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        method, path = request.method, request.path
        if method == "POST" and path.startswith("/v1/"):
            return await self._call(request)
        try:
            return _json_response(await self._control(request, method, path))
        except Refusal as refusal:
            return web.Response(status=refusal.status, body=refusal.body, headers=refusal.headers)

    async def _control(self, request: web.BaseRequest, method: str, path: str) -> Any:
        """What is asked about the simulator rather than of the model."""
        match method, path:
            case "GET", "/v1/models":
                self._authorise(request)
                models = ("echo", "simulated")
                entries = [{"id": name, "object": "model", "created": 0, "owned_by": "runner"} for name in models]
                return {"object": "list", "data": entries}
            case "GET", "/ledger":
                live = {"in_flight": self._in_flight, "in_service": self._slots.held}
                return {**self._ledger.totals(), **live}
            case "GET", "/ledger/requests":
                return self._ledger.by_hash
            case "GET", "/ledger/prompts":
                return self._ledger.by_prompt
            case "POST", "/ledger/reset":
                self._ledger = Ledger()
                return {}
            case "POST", "/settings":
                try:
                    self.configure(_json_object(await request.read()))
                except ConfigError as error:
                    raise invalid(str(error)) from None
                return {name: value for name, value in _as_dict(self._config).items() if name != "api_key"}
            case "GET", path if path in ENDPOINTS:
                raise Refusal(405, f"Not allowed to GET on {path}. (HINT: Perhaps you meant to use POST?)")
        raise Refusal(404, f"Invalid URL ({method} {path})")

    async def _call(self, request: web.BaseRequest) -> web.StreamResponse:
        """One request of the model: counted in flight from here until its last byte is handed over."""
        call = Call(request=request, config=self._config, ledger=self._ledger)
        self._in_flight += 1
        call.ledger.requests += 1
        call.ledger.in_flight_peak = max(call.ledger.in_flight_peak, self._in_flight)
        try:
            try:
                return await self._answer(call)
            except Refusal as refusal:
                return await call.send(refusal.status, refusal.body, refusal.headers)
        except (asyncio.CancelledError, ConnectionError):
            call.ledger.abandoned += 1
            raise
        finally:
            self._in_flight -= 1

    async def _answer(self, call: Call) -> web.StreamResponse:
        await call.read()
        self._authorise(call.request)
        endpoint = ENDPOINTS.get(call.request.path)
        if endpoint is None:
            raise Refusal(404, f"Invalid URL (POST {call.request.path})")
        body, identity = call.parse()
        try:
            reply = endpoint(self._model, body, identity)
        except ValueError as error:
            raise invalid(f"Invalid schema: {error}", code="invalid_json_schema") from None
        call.ask(reply.prompts)
        self._admit(call, reply)
        fault = self._draw_fault(call)
        if fault is not None:
            call.ledger.faults[fault] += 1
            if fault in _AT_ONCE:
                raise _AT_ONCE[fault](reply)
            if fault == "hang":
                await asyncio.sleep(call.config.hang_s)
        pace = Pace.of(call.config, identity, reply.steps)
        async with self._slots.hold(pace.total_s) as begun:
            call.charge(reply)
            call.ledger.in_service_peak = max(call.ledger.in_service_peak, self._slots.held)
            if reply.frames is not None:
                return await call.stream(reply, pace, begun, fault)
            await _sleep_until(begun + pace.total_s)
        return await call.answer(reply, fault)

    def _authorise(self, request: web.BaseRequest) -> None:
        key = self._config.api_key
        if key is not None and request.headers.get("authorization") != f"Bearer {key}":
            raise Refusal(
                401,
                "Incorrect API key provided. You can find your API key at https://platform.openai.com/account/api-keys.",
                code="invalid_api_key",
            )

    def _admit(self, call: Call, reply: Reply) -> None:
        rpm, tpm = call.config.rpm, call.config.tpm
        if rpm is None and tpm is None:
            return
        now = asyncio.get_running_loop().time()
        wait_s = self._minute.wait_s(now, reply.charge, rpm=rpm, tpm=tpm)
        if wait_s == 0:
            self._minute.add(now, reply.charge)
        call.headers.update(self._minute.headers(now, rpm=rpm, tpm=tpm))
        if wait_s == math.inf:
            raise Refusal(
                429,
                f"Request too large for {reply.model} on tokens per min (TPM): Limit {tpm}, Requested {reply.charge}."
                " The input or output tokens must be reduced in order to run successfully.",
                kind="tokens",
                code="rate_limit_exceeded",
            )
        if wait_s > 0:
            raise rate_limited(reply.model, wait_s)

    def _draw_fault(self, call: Call) -> str | None:
        if not self._faults:
            return None
        drawn = uniform(call.config.seed, "fault", call.digest, call.count.asked)
        return next((name for name, bound in self._faults if drawn < bound), None)


class Refusal(Exception):
    """An HTTP answer other than the one asked for, by default in the form of OpenAI's errors."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
    ) -> None:
        super().__init__(message)
        error = {"message": message, "type": kind, "param": param, "code": code}
        self.status = status
        self.body = orjson.dumps({"error": error}) if body is None else body
        self.headers = {"content-type": "application/json", **(headers or {})}


def invalid(message: str, *, param: str | None = None, code: str | None = None) -> Refusal:
    """A 400: the request is malformed."""
    return Refusal(400, message, param=param, code=code)


def rate_limited(model: str, wait_s: float) -> Refusal:
    """A 429 that says when to come back, in whole seconds and in milliseconds."""
    wait_ms = math.ceil(wait_s * 1000)
    return Refusal(
        429,
        f"Rate limit reached for {model}. Please try again in {duration_text(wait_s)}.",
        kind="requests",
        code="rate_limit_exceeded",
        headers={"retry-after": str(math.ceil(wait_s)), "retry-after-ms": str(wait_ms)},
    )


_AT_ONCE: dict[str, Callable[[Reply], Refusal]] = {
    "http_429": lambda reply: Refusal(
        429,
        f"Rate limit reached for {reply.model}. Please try again in {FAULT_RETRY_AFTER_MS}ms.",
        kind="requests",
        code="rate_limit_exceeded",
        headers={"retry-after-ms": str(FAULT_RETRY_AFTER_MS)},
    ),
    "http_500": lambda reply: Refusal(
        500, "The server had an error while processing your request. Sorry about that!", kind="server_error"
    ),
    "http_502": lambda reply: Refusal(
        502,
        "Bad Gateway",
        headers={"content-type": "text/html"},
        body=b"<html>\r\n<head><title>502 Bad Gateway</title></head>\r\n<body>\r\n<center><h1>502 Bad Gateway</h1>"
        b"</center>\r\n<hr><center>nginx</center>\r\n</body>\r\n</html>\r\n",
    ),
    "http_503": lambda reply: Refusal(
        503, "The engine is currently overloaded, please try again later.", kind="service_unavailable_error"
    ),
    "http_529": lambda reply: Refusal(
        529, "Overloaded", body=b'{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}'
    ),
    "error_200": lambda reply: _error_200(reply),
}


def _error_200(reply: Reply) -> Refusal:
    refusal = Refusal(200, "The model failed to generate an answer.", kind="server_error", code="internal_error")
    if reply.frames is None:
        return refusal
    event = b"data: %b\n\n" % refusal.body
    return Refusal(200, str(refusal), headers={"content-type": "text/event-stream"}, body=event)


@dataclass(slots=True, kw_only=True)
class Call:
    """One request of the model on its way through the simulator."""

    request: web.BaseRequest
    config: SimulatorConfig  # as it was when the request came
    ledger: Ledger
    raw: bytes = b""
    digest: str = ""  # how the ledger knows the body
    count: Count = field(default_factory=lambda: Count())
    prompts: list[Count] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)  # of whatever is answered

    async def read(self) -> None:
        self.raw = await self.request.read()
        material = self.raw.replace(boundary, b"") if (boundary := self._boundary()) else self.raw
        self.digest = blake2b(material, digest_size=8).hexdigest()
        self.count = self.ledger.by_hash[self.digest]
        self.count.asked += 1
        self.headers["x-request-id"] = f"req_{self.digest}{self.count.asked:08x}"

    def parse(self) -> tuple[dict[str, Any], str]:
        """The body, and the hash of what it asks for: the same however it is spelled and delivered."""
        if boundary := self._boundary():
            return _multipart(self.raw, boundary), self.digest
        body = _json_object(self.raw)
        asked = {key: value for key, value in body.items() if key not in ("stream", "stream_options")}
        return body, blake2b(orjson.dumps(asked, option=orjson.OPT_SORT_KEYS), digest_size=12).hexdigest()

    def ask(self, prompts: Iterable[str]) -> None:
        self.prompts = [self.ledger.by_prompt[prompt] for prompt in prompts]
        for prompt in self.prompts:
            prompt.asked += 1

    def charge(self, reply: Reply) -> None:
        ledger, config = self.ledger, self.config
        ledger.prompt_tokens += reply.prompt_tokens
        ledger.completion_tokens += reply.completion_tokens
        ledger.cost_usd += reply.prompt_tokens * config.usd_per_million_prompt_tokens / 1e6
        ledger.cost_usd += reply.completion_tokens * config.usd_per_million_completion_tokens / 1e6

    async def answer(self, reply: Reply, fault: str | None) -> web.StreamResponse:
        body = orjson.dumps(reply.document(self._id))
        if fault == "reset":
            return self._reset()
        if fault == "truncated":
            return await self._break_off(body)
        if fault == "invalid_json":
            return await self.send(200, body[: len(body) // 2])
        response = await self.send(200, body)
        self._answered()
        return response

    async def stream(self, reply: Reply, pace: Pace, begun: float, fault: str | None) -> web.StreamResponse:
        """Send the reply token by token, each at its time; those that are due together go in one write."""
        assert reply.frames is not None
        response = web.StreamResponse(headers={"content-type": "text/event-stream", **self.headers})
        frames: Iterable[bytes] = reply.frames(self._id)
        if fault == "invalid_json":
            frames = (b'data: {"id": "chatcmpl-\n\n', b"data: [DONE]\n\n")
        breaks_at = reply.steps // 2 if fault in ("reset", "truncated") else -1
        loop = asyncio.get_running_loop()
        due_together: list[bytes] = []
        for step, frame in enumerate(frames):
            wait_s = begun + pace.at_s(step) - loop.time()
            if wait_s > 0:
                await self._flush(response, due_together)
                await asyncio.sleep(wait_s)
            if step == breaks_at:
                await self._flush(response, [*due_together, frame[: len(frame) // 2] if fault == "truncated" else b""])
                return self._reset() if fault == "reset" else self._hang_up(response)
            due_together.append(frame)
        await self._flush(response, due_together)
        await _sleep_until(begun + pace.total_s)  # a single token comes before the end
        await response.write_eof()
        if fault != "invalid_json":
            self._answered()
        return response

    async def send(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> web.StreamResponse:
        """A whole answer, handed to the transport."""
        response = web.Response(
            status=status, body=body, headers={"content-type": "application/json", **self.headers, **(headers or {})}
        )
        await response.prepare(self.request)
        await response.write_eof()
        self.ledger.by_status[str(status)] += 1
        return response

    @property
    def _id(self) -> str:
        return f"{self.digest}{self.count.asked:08x}"

    def _boundary(self) -> bytes:
        """What separates the parts of a multipart body; empty for every other body."""
        kind, _, rest = self.request.headers.get("content-type", "").partition(";")
        found = _BOUNDARY.search(rest) if kind.strip().lower() == "multipart/form-data" else None
        return found[1].encode() if found else b""

    def _answered(self) -> None:
        self.ledger.answered += 1
        for count in (self.count, *self.prompts):
            count.answered += 1

    async def _flush(self, response: web.StreamResponse, frames: list[bytes]) -> None:
        if not response.prepared:
            await response.prepare(self.request)
            self.ledger.by_status["200"] += 1
        data = b"".join(frames)
        frames.clear()
        if data:
            await response.write(data)

    async def _break_off(self, body: bytes) -> web.StreamResponse:
        length = {"content-type": "application/json", "content-length": str(len(body))}
        response = web.StreamResponse(headers={**self.headers, **length})
        await self._flush(response, [body[: len(body) // 2]])
        return self._hang_up(response)

    def _hang_up(self, response: web.StreamResponse) -> web.StreamResponse:
        """Close the connection after what was written, in the middle of the answer."""
        response.force_close()
        if (transport := self.request.transport) is not None:
            transport.close()
        return response

    def _reset(self) -> web.StreamResponse:
        """Close the connection with a RST: without lingering, the socket's buffers are thrown away."""
        if (transport := self.request.transport) is not None:
            connection: socket.socket = transport.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            transport.abort()
        return web.Response()


@dataclass(frozen=True, slots=True)
class Pace:
    """When the tokens of one answer are due, in seconds after its service began."""

    ttft_s: float
    gap_s: float  # between tokens
    total_s: float

    @classmethod
    def of(cls, config: SimulatorConfig, identity: str, steps: int) -> Pace:
        latency_s = config.latency_s
        if config.latency_spread and latency_s:
            variance = math.log1p(config.latency_spread**2)
            normal = _NORMAL.inv_cdf(uniform(config.seed, "latency", identity))
            latency_s *= math.exp(math.sqrt(variance) * normal - variance / 2)
        ttft_s = 0.4 * latency_s if config.ttft_s is None else config.ttft_s
        if config.itl_s is not None:
            return cls(ttft_s, config.itl_s, ttft_s + config.itl_s * (steps - 1))
        total_s = max(latency_s, ttft_s)
        return cls(ttft_s, (total_s - ttft_s) / max(1, steps - 1), total_s)

    def at_s(self, step: int) -> float:
        return self.ttft_s + self.gap_s * step


class Slots:
    """At most ``limit`` requests in service (None: any number), first come first served.

    A request that had to wait begins at the instant at which its predecessor was due to end, not when the event loop
    came round to it. So the throughput under load is exactly ``limit / service time``, however late timers fire.
    """

    def __init__(self, limit: int | None) -> None:
        self.held = 0
        self._limit = limit
        self._waiting: deque[asyncio.Future[float]] = deque()

    def resize(self, limit: int | None) -> None:
        """Change the bound. Fewer slots are reached as those in service end."""
        self._limit = limit
        if self._waiting:
            self._grant(asyncio.get_running_loop().time())

    @asynccontextmanager
    async def hold(self, service_s: float) -> AsyncIterator[float]:
        """A slot for ``service_s`` seconds; yields the loop's time at which the service began."""
        loop = asyncio.get_running_loop()
        begun = await self._acquire(loop)
        try:
            yield begun
        finally:
            self.held -= 1
            self._grant(min(loop.time(), begun + service_s))

    async def _acquire(self, loop: asyncio.AbstractEventLoop) -> float:
        arrived = loop.time()
        if not self._waiting and self._is_free():
            self.held += 1
            return arrived
        turn: asyncio.Future[float] = loop.create_future()
        self._waiting.append(turn)
        try:
            return max(arrived, await turn)
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # granted and cancelled in the same round of the loop
                self.held -= 1
                self._grant(turn.result())
            raise

    def _grant(self, at: float) -> None:
        while self._waiting and self._is_free():
            turn = self._waiting.popleft()
            if not turn.done():
                self.held += 1
                turn.set_result(at)

    def _is_free(self) -> bool:
        return self._limit is None or self.held < self._limit


class SlidingMinute:
    """The requests and tokens admitted in the last 60 seconds. ``now`` is in seconds, on any one clock."""

    def __init__(self) -> None:
        self._admitted: deque[tuple[float, int]] = deque()
        self._tokens = 0

    def wait_s(self, now: float, tokens: int, *, rpm: int | None, tpm: int | None) -> float:
        """Seconds until a request of so many tokens fits, if no other comes: 0 at once, infinity never."""
        self._forget(now)
        if tpm is not None and tokens > tpm:
            return math.inf
        requests_over = 0.0 if rpm is None else len(self._admitted) + 1 - rpm
        tokens_over = 0.0 if tpm is None else self._tokens + tokens - tpm
        freed_at = now
        for admitted_at, spent in self._admitted:
            if requests_over <= 0 and tokens_over <= 0:
                break
            requests_over -= 1
            tokens_over -= spent
            freed_at = admitted_at + WINDOW_S
        return freed_at - now

    def add(self, now: float, tokens: int) -> None:
        """Count an admitted request."""
        self._admitted.append((now, tokens))
        self._tokens += tokens

    def headers(self, now: float, *, rpm: int | None, tpm: int | None) -> dict[str, str]:
        """OpenAI's rate-limit headers. A reset is the time until the window is empty, as OpenAI's is."""
        self._forget(now)
        reset = duration_text(self._admitted[-1][0] + WINDOW_S - now) if self._admitted else "0s"
        headers = {}
        for name, limit, used in (("requests", rpm, len(self._admitted)), ("tokens", tpm, self._tokens)):
            if limit is not None:
                headers[f"x-ratelimit-limit-{name}"] = str(limit)
                headers[f"x-ratelimit-remaining-{name}"] = str(max(0, limit - used))
                headers[f"x-ratelimit-reset-{name}"] = reset
        return headers

    def _forget(self, now: float) -> None:
        while self._admitted and self._admitted[0][0] + WINDOW_S <= now:
            self._tokens -= self._admitted.popleft()[1]


def duration_text(seconds: float) -> str:
    """A duration in OpenAI's notation, rounded up to milliseconds: ``120ms``, ``1.5s``, ``6m0s``."""
    milliseconds = math.ceil(round(seconds * 1000, 6))
    if 0 < milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    return (f"{hours}h" if hours else "") + (f"{minutes}m" if hours or minutes else "") + f"{rest / 1000:.10g}s"


@dataclass(slots=True)
class Count:
    """How often something was asked, and answered to the last byte."""

    asked: int = 0
    answered: int = 0


@dataclass(slots=True, kw_only=True)
class Ledger:
    """The simulator's books. One entry is kept for each body and each prompt, until the ledger is reset."""

    requests: int = 0
    answered: int = 0  # good answers whose last byte was handed to the transport
    abandoned: int = 0  # the client left first
    in_flight_peak: int = 0  # requests under way at once, waiting ones included
    in_service_peak: int = 0  # requests that held a slot at once
    prompt_tokens: int = 0  # charged
    completion_tokens: int = 0  # charged
    cost_usd: float = 0.0
    by_status: Counter[str] = field(default_factory=Counter)  # as sent; a reset has none
    faults: Counter[str] = field(default_factory=Counter)
    by_hash: defaultdict[str, Count] = field(default_factory=lambda: defaultdict(Count))
    by_prompt: defaultdict[str, Count] = field(default_factory=lambda: defaultdict(Count))

    def totals(self) -> dict[str, Any]:
        return {
            "requests": self.requests,
            "answered": self.answered,
            "abandoned": self.abandoned,
            "in_flight_peak": self.in_flight_peak,
            "in_service_peak": self.in_service_peak,
            "tokens": {"prompt": self.prompt_tokens, "completion": self.completion_tokens},
            "cost_usd": self.cost_usd,
            "by_status": dict(self.by_status),
            "faults": dict(self.faults),
        }


# Endpoints: what is asked, and how the answer is written down


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What one request will be answered."""

    model: str
    prompts: tuple[str, ...]  # what the ledger knows it by
    prompt_tokens: int
    completion_tokens: int = 0
    steps: int = 1  # tokens of the longest choice: how many turns of the model it takes
    charge: int  # tokens, against the limit
    document: Callable[[str], Any]  # the JSON answer, given its id
    frames: Callable[[str], Iterator[bytes]] | None = None  # the streamed answer, a part each step


def chat_completions(model: Model, body: dict[str, Any], identity: str) -> Reply:
    messages = _required(body, "messages", list)
    prompt, prompt_tokens = _conversation(messages)
    ask = Ask(
        model=_required(body, "model", str),
        prompt=prompt,
        identity=identity,
        max_tokens=_positive(body, "max_completion_tokens", _positive(body, "max_tokens")),
        schema=_response_schema(body.get("response_format")),
        tool=_forced_tool(body),
    )
    choices = model.answers(ask, _positive(body, "n") or 1)
    named = isinstance(body.get("tool_choice"), dict)

    def finish_reason(choice: Choice) -> str:
        # OpenAI says "stop" where the caller named the function, "tool_calls" where the model chose it.
        return "length" if choice.is_cut else "tool_calls" if choice.tool and not named else "stop"

    def message(choice: Choice) -> dict[str, Any]:
        said: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None, "annotations": []}
        if choice.tool:
            function = {"name": choice.tool, "arguments": choice.text}
            said |= {"content": None, "tool_calls": [{"id": choice.call_id, "type": "function", "function": function}]}
        return said

    def entry(choice: Choice) -> dict[str, Any]:
        return {
            "index": choice.index,
            "message": message(choice),
            "logprobs": None,
            "finish_reason": finish_reason(choice),
        }

    def delta(choice: Choice, said: dict[str, Any], finished: str | None = None) -> dict[str, Any]:
        return {"index": choice.index, "delta": said, "logprobs": None, "finish_reason": finished}

    def deltas(choice: Choice, step: int) -> Iterator[dict[str, Any]]:
        piece = choice.piece(step)
        if choice.tool is None:
            if step == 0:
                yield delta(choice, {"role": "assistant", "content": "", "refusal": None})
            yield delta(choice, {"content": piece})
        elif step == 0:
            call = {"index": 0, "id": choice.call_id, "type": "function"}
            function = {"name": choice.tool, "arguments": piece}
            yield delta(choice, {"role": "assistant", "content": None, "tool_calls": [{**call, "function": function}]})
        else:
            yield delta(choice, {"tool_calls": [{"index": 0, "function": {"arguments": piece}}]})
        if step == choice.tokens - 1:
            yield delta(choice, {}, finish_reason(choice))

    wire = _Wire(id="chatcmpl-", object="chat.completion", chunk="chat.completion.chunk", entry=entry, deltas=deltas)
    return _text_reply(body, ask, (prompt,), prompt_tokens, choices, wire)


def completions(model: Model, body: dict[str, Any], identity: str) -> Reply:
    prompts = _texts(body, "prompt")
    n = _positive(body, "n") or 1
    choices: list[Choice] = []
    for number, prompt in enumerate(prompts):
        ask = Ask(
            model=_required(body, "model", str),
            prompt=prompt,
            identity=f"{identity}.{number}" if number else identity,
            max_tokens=_positive(body, "max_tokens"),
        )
        choices += [replace(choice, index=len(choices) + choice.index) for choice in model.answers(ask, n)]

    def finish_reason(choice: Choice) -> str:
        return "length" if choice.is_cut else "stop"

    def entry(choice: Choice) -> dict[str, Any]:
        return {
            "text": choice.text,
            "index": choice.index,
            "logprobs": None,
            "finish_reason": finish_reason(choice),
        }

    def deltas(choice: Choice, step: int) -> Iterator[dict[str, Any]]:
        said = {"text": choice.piece(step), "index": choice.index, "logprobs": None, "finish_reason": None}
        yield said
        if step == choice.tokens - 1:
            yield {**said, "text": "", "finish_reason": finish_reason(choice)}

    wire = _Wire(id="cmpl-", object="text_completion", chunk="text_completion", entry=entry, deltas=deltas)
    return _text_reply(body, ask, tuple(prompts), sum(map(tokens_in, prompts)), choices, wire)


def responses(model: Model, body: dict[str, Any], identity: str) -> Reply:
    if body.get("stream"):
        raise invalid("The simulator does not stream responses.", param="stream", code="unsupported_value")
    given = body.get("input")
    if not isinstance(given, str | list) or not given:
        raise _missing("input")
    instructions = body.get("instructions") or ""
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    prompt, prompt_tokens = _conversation([*items, {"role": "developer", "content": instructions}])
    layout = body.get("text") or {}
    ask = Ask(
        model=_required(body, "model", str),
        prompt=prompt,
        identity=identity,
        max_tokens=_positive(body, "max_output_tokens"),
        schema=_response_schema(layout.get("format")),
        tool=_forced_tool(body),
    )
    [choice] = model.answers(ask, 1)
    status = "incomplete" if choice.is_cut else "completed"

    def output(reply_id: str) -> dict[str, Any]:
        if choice.tool:
            call = {"call_id": choice.call_id, "name": choice.tool, "arguments": choice.text}
            return {"type": "function_call", "id": f"fc_{reply_id}", "status": status, **call}
        content = [{"type": "output_text", "text": choice.text, "annotations": [], "logprobs": []}]
        return {"type": "message", "id": f"msg_{reply_id}", "status": status, "role": "assistant", "content": content}

    def document(reply_id: str) -> dict[str, Any]:
        return {
            "id": f"resp_{reply_id}",
            "object": "response",
            "created_at": int(time.time()),
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if choice.is_cut else None,
            "instructions": instructions or None,
            "max_output_tokens": ask.max_tokens,
            "metadata": body.get("metadata") or {},
            "model": ask.model,
            "output": [output(reply_id)],
            "parallel_tool_calls": body.get("parallel_tool_calls", True),
            "previous_response_id": body.get("previous_response_id"),
            "reasoning": {"effort": None, "summary": None},
            "store": body.get("store", True),
            "temperature": body.get("temperature", 1.0),
            "text": {"format": {"type": "text"}, **layout},
            "tool_choice": body.get("tool_choice", "auto"),
            "tools": body.get("tools") or [],
            "top_p": body.get("top_p", 1.0),
            "truncation": body.get("truncation", "disabled"),
            "usage": {
                "input_tokens": prompt_tokens,
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": choice.tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": prompt_tokens + choice.tokens,
            },
            "user": body.get("user"),
        }

    return Reply(
        model=ask.model,
        prompts=(prompt,),
        prompt_tokens=prompt_tokens,
        completion_tokens=choice.tokens,
        steps=choice.tokens,
        charge=prompt_tokens + (ask.max_tokens or choice.tokens),
        document=document,
    )


def embeddings(model: Model, body: dict[str, Any], identity: str) -> Reply:
    name = _required(body, "model", str)
    texts = _texts(body, "input")
    size = _positive(body, "dimensions")
    packed = body.get("encoding_format", "float") == "base64"
    prompt_tokens = sum(map(tokens_in, texts))

    def document(reply_id: str) -> dict[str, Any]:
        vectors = [model.vector(name, text, size) for text in texts]
        values = [base64.b64encode(array("f", vector)).decode() for vector in vectors] if packed else vectors
        return {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": value}
                for index, value in enumerate[list[float] | str](values)
            ],
            "model": name,
            "usage": {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens},
        }

    return Reply(model=name, prompts=tuple(texts), prompt_tokens=prompt_tokens, charge=prompt_tokens, document=document)


def transcriptions(model: Model, body: dict[str, Any], identity: str) -> Reply:
    file = _required(body, "file", Upload)
    layout = body.get("response_format", "json")
    if layout not in ("json", "verbose_json"):
        raise invalid(f"The simulator does not write {layout!r}.", param="response_format", code="unsupported_value")
    ask = Ask(model=_required(body, "model", str), prompt=file.name, identity=identity)
    [choice] = model.answers(ask, 1)
    duration_s = file.duration_s
    heard = math.ceil(duration_s * 10)  # audio tokens, ten a second

    def document(reply_id: str) -> dict[str, Any]:
        if layout == "json":
            details = {"text_tokens": 0, "audio_tokens": heard}
            total = heard + choice.tokens
            counted = {"input_tokens": heard, "input_token_details": details, "output_tokens": choice.tokens}
            return {"text": choice.text, "usage": {"type": "tokens", **counted, "total_tokens": total}}
        return {
            "task": "transcribe",
            "language": body.get("language") or "english",
            "duration": duration_s,
            "text": choice.text,
            "segments": [
                {
                    "id": 0,
                    "seek": 0,
                    "start": 0.0,
                    "end": duration_s,
                    "text": choice.text,
                    "tokens": [],
                    "temperature": 0.0,
                    "avg_logprob": -0.2,
                    "compression_ratio": 1.2,
                    "no_speech_prob": 0.0,
                }
            ],
            "usage": {"type": "duration", "seconds": math.ceil(duration_s)},
        }

    return Reply(
        model=ask.model,
        prompts=(file.name,),
        prompt_tokens=heard,
        completion_tokens=choice.tokens,
        steps=choice.tokens,
        charge=heard + choice.tokens,
        document=document,
    )


ENDPOINTS: dict[str, Callable[[Model, dict[str, Any], str], Reply]] = {
    "/v1/chat/completions": chat_completions,
    "/v1/completions": completions,
    "/v1/responses": responses,
    "/v1/embeddings": embeddings,
    "/v1/audio/transcriptions": transcriptions,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """A file in a multipart body."""

    name: str
    data: bytes

    @property
    def duration_s(self) -> float:
        """As a WAV file says; of any other, its length at 128 kbit/s."""
        try:
            with wave.open(io.BytesIO(self.data)) as audio:
                return float(audio.getnframes() / audio.getframerate())
        except (wave.Error, EOFError, ZeroDivisionError):
            return round(len(self.data) / 16_000, 3)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wire:
    """How one of the two completion endpoints writes its answers."""

    id: str  # prefix
    object: str
    chunk: str  # the object of a streamed part
    entry: Callable[[Choice], dict[str, Any]]
    deltas: Callable[[Choice, int], Iterator[dict[str, Any]]]


def _text_reply(
    body: dict[str, Any], ask: Ask, prompts: tuple[str, ...], prompt_tokens: int, choices: Sequence[Choice], wire: _Wire
) -> Reply:
    completion_tokens = sum(choice.tokens for choice in choices)
    steps = max(choice.tokens for choice in choices)
    usage = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }

    def head(reply_id: str, kind: str) -> dict[str, Any]:
        return {
            "id": wire.id + reply_id,
            "object": kind,
            "created": int(time.time()),
            "model": ask.model,
            "system_fingerprint": "fp_simulated",
        }

    def document(reply_id: str) -> dict[str, Any]:
        return {**head(reply_id, wire.object), "choices": [wire.entry(choice) for choice in choices], "usage": usage}

    def frames(reply_id: str) -> Iterator[bytes]:
        options = body.get("stream_options") or {}
        counts = bool(options.get("include_usage"))
        event = head(reply_id, wire.chunk) | ({"usage": None} if counts else {})
        for step in range(steps):
            parts = [part for choice in choices if step < choice.tokens for part in wire.deltas(choice, step)]
            events = [{**event, "choices": [part]} for part in parts]
            if step == steps - 1 and counts:
                events.append({**event, "choices": [], "usage": usage})
            frame = b"".join(b"data: %b\n\n" % orjson.dumps(entry) for entry in events)
            yield frame + b"data: [DONE]\n\n" if step == steps - 1 else frame

    return Reply(
        model=ask.model,
        prompts=prompts,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        steps=steps,
        charge=prompt_tokens + (ask.max_tokens * len(choices) if ask.max_tokens else completion_tokens),
        document=document,
        frames=frames if body.get("stream") else None,
    )


def _json_object(raw: bytes) -> dict[str, Any]:
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise invalid(f"We could not parse the JSON body of your request: {error}") from None
    if not isinstance(body, dict):
        raise invalid("The JSON body of your request is no object.")
    return body


def _multipart(raw: bytes, boundary: bytes) -> dict[str, Any]:
    """The fields of a form: texts, and files as `Upload`."""
    form: dict[str, Any] = {}
    for part in (b"\r\n" + raw).split(b"\r\n--" + boundary)[1:-1]:
        head, _, data = part.partition(b"\r\n\r\n")
        names = dict(_PART_NAME.findall(head.decode("utf-8", "replace")))
        if "name" not in names:
            raise invalid("We could not parse the form of your request: a part has no name.")
        file = "filename" in names
        form[names["name"]] = Upload(name=names["filename"], data=data) if file else data.decode("utf-8", "replace")
    return form


_BOUNDARY = re.compile(r'boundary="?([^";]+)')
_PART_NAME = re.compile(r'\b(name|filename)="([^"]*)"')


def _required(body: Mapping[str, Any], name: str, kind: type[T]) -> T:
    value = body.get(name)
    if not isinstance(value, kind) or not value:
        raise _missing(name)
    return value


def _missing(name: str) -> Refusal:
    return invalid(f"Missing required parameter: '{name}'.", param=name, code="missing_required_parameter")


def _positive(body: Mapping[str, Any], name: str, default: int | None = None) -> int | None:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, int) or value < 1:
        message = f"Invalid '{name}': integer below minimum value. Expected a value >= 1, but got {value} instead."
        raise invalid(message, param=name, code="integer_below_min_value")
    return value


def _texts(body: Mapping[str, Any], name: str) -> list[str]:
    """A text or several. Token ids stand for the text that lists them."""
    given = body.get(name)
    if isinstance(given, list) and given and all(isinstance(item, int) for item in given):
        given = [given]
    texts = given if isinstance(given, list) else [given]
    if not texts or not all(isinstance(text, str | list) and text for text in texts):
        raise _missing(name)
    return [text if isinstance(text, str) else str(text) for text in texts]


def _conversation(messages: Sequence[Any]) -> tuple[str, int]:
    """The text of the last message that is the user's, and the tokens of them all."""
    prompt, chars, attachments = "", 0, 0
    for message in messages:
        if not isinstance(message, dict):
            raise invalid("Invalid type for a message: expected an object.", code="invalid_type")
        content = message.get("content")
        text = content if isinstance(content, str) else ""
        if isinstance(content, list):
            texts = [part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)]
            attachments += len(content) - len(texts)
            text = "\n".join(texts)
        chars += len(text)
        if message.get("role") == "user":
            prompt = text
    return prompt, max(1, math.ceil(chars / CHARS_PER_TOKEN)) + TOKENS_PER_ATTACHMENT * attachments


def _response_schema(layout: Any) -> dict[str, Any] | None:
    """The schema that a ``response_format`` (chat) or ``text.format`` (responses) asks for; None for plain text."""
    kind = layout.get("type") if isinstance(layout, dict) else None
    if kind == "json_object":
        return {"type": "object", "properties": {"answer": {"type": "string"}}}
    if kind != "json_schema":
        return None
    schema = layout.get("json_schema", layout).get("schema")
    if not isinstance(schema, dict):
        raise _missing("response_format.json_schema.schema")
    return schema


def _forced_tool(body: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """Name and parameter schema of the function that must be called; None where the model is free."""
    choice = body.get("tool_choice")
    if choice != "required" and not isinstance(choice, dict):
        return None
    functions = [tool.get("function", tool) for tool in body.get("tools") or () if isinstance(tool, dict)]
    wanted = choice.get("function", choice).get("name") if isinstance(choice, dict) else None
    for function in functions:
        if wanted is None or function.get("name") == wanted:
            return str(function.get("name")), function.get("parameters") or {"type": "object"}
    raise invalid(f"Tool choice {wanted or 'required'!r} is not among the tools.", param="tool_choice")


# The model: what is answered


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What a model is asked for, whichever the endpoint."""

    model: str
    prompt: str  # what the user said last
    identity: str  # hash of everything that is asked
    max_tokens: int | None = None
    schema: dict[str, Any] | None = None  # of the JSON document to answer
    tool: tuple[str, dict[str, Any]] | None = None  # the function to call, and the schema of its arguments


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One answer of a model."""

    index: int
    text: str  # or the arguments of the call
    is_cut: bool = False
    tool: str | None = None
    call_id: str = ""

    @property
    def tokens(self) -> int:
        return tokens_in(self.text)

    def piece(self, step: int) -> str:
        return self.text[step * CHARS_PER_TOKEN : (step + 1) * CHARS_PER_TOKEN]


class Model:
    """Says what the simulated provider's models say. The same question gets the same answer."""

    def __init__(self, config: SimulatorConfig, key: AnswerKey) -> None:
        self.key = key
        self._seed = config.seed
        self._output_tokens = config.output_tokens
        self._accuracy = config.accuracy
        self._embedding_size = config.embedding_size

    def answers(self, ask: Ask, n: int) -> list[Choice]:
        """``n`` answers, each cut to ``max_tokens``.

        A known question is answered by the key; otherwise ``echo`` repeats the prompt and other models talk. A schema
        gets a document with that answer in it.
        """
        return [self._choice(ask, index) for index in range(n)]

    def vector(self, model: str, text: str, size: int | None = None) -> list[float]:
        """The text's embedding: of unit length, the same for the same text."""
        normal = random.Random(f"{self._seed}\0{model}\0{text}").gauss
        values = [normal(0.0, 1.0) for _ in range(size or self._embedding_size)]
        norm = math.sqrt(sum(value * value for value in values))
        return [value / norm for value in values]

    def _choice(self, ask: Ask, index: int) -> Choice:
        drawn = uniform(self._seed, "text", ask.identity, index)
        known = self._known(ask)
        name, schema = ask.tool or (None, ask.schema)
        if schema is not None:
            text = orjson.dumps(document_for(schema, text=known or filler(6, drawn), number=drawn)).decode()
        elif known is not None:
            text = known
        elif ask.model.rpartition("/")[2] == "echo":
            text = f"echo: {ask.prompt}"
        else:
            text = filler(self._output_tokens, drawn)
        size = len(text) if ask.max_tokens is None else ask.max_tokens * CHARS_PER_TOKEN
        return Choice(
            index=index,
            text=text[:size],
            is_cut=size < len(text),
            tool=name,
            call_id=f"call_{ask.identity}{index}" if name else "",
        )

    def _known(self, ask: Ask) -> str | None:
        question = self.key.find(ask.prompt)
        if question is None:
            return None
        answer = self.key.answers[question]
        if uniform(self._seed, "accuracy", ask.model, question) < self._accuracy:
            return answer
        others = [other for other in self.key.distinct if other != answer]
        return others[int(uniform(self._seed, "wrong", ask.model, question) * len(others))] if others else None


class AnswerKey:
    """Questions and their answers, found within a prompt without looking at every question.

    A question of at least ``2w - 1`` characters covers, wherever it stands in a prompt, one of the prompt's blocks of
    ``w`` characters that begin at a multiple of ``w``. So the blocks at the first ``w`` offsets of each question are
    indexed, and a prompt is searched in as many steps as it has blocks.
    """

    def __init__(self, answers: Mapping[str, str]) -> None:
        self.answers = dict(answers)
        self.distinct = sorted(set(answers.values()))
        places: defaultdict[int, defaultdict[str, set[tuple[int, int]]]] = defaultdict(lambda: defaultdict(set))
        for question in self.answers:
            width = min(8, 1 << ((len(question) + 1) // 2).bit_length() - 1)
            for offset in range(width):
                places[width][question[offset : offset + width]].add((offset, len(question)))
        self._places = {
            width: {block: tuple(found) for block, found in blocks.items()} for width, blocks in places.items()
        }

    @classmethod
    def read(cls, path: str | None) -> AnswerKey:
        """The key in a JSONL file with ``question`` and ``answer``; None: the quickstart's, or an empty one.

        Raises:
            ConfigError: It cannot be read; names the file and the line.
        """
        source = Path(path) if path else Path(__file__).parent / "data" / "quickstart.jsonl"
        if path is None and not source.exists():
            return cls({})
        try:
            lines = source.read_bytes().splitlines()
        except OSError as error:
            raise ConfigError(f"simulator.answers={path}: {error.strerror}") from None
        answers: dict[str, str] = {}
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = orjson.loads(line)
                question, answer = str(row["question"]).strip(), str(row["answer"])
            except (ValueError, KeyError, TypeError):
                raise ConfigError(
                    f"simulator.answers: {source}:{number} is no JSON object with `question` and `answer`"
                ) from None
            if question:
                answers[question] = answer
        return cls(answers)

    def find(self, prompt: str) -> str | None:
        """The question in the prompt: of several the one that ends last (others are examples), the longest of these."""
        best = (0, 0, "")
        for width, blocks in self._places.items():
            for start in range(0, len(prompt) - width + 1, width):
                for offset, length in blocks.get(prompt[start : start + width], ()):
                    begin = start - offset
                    if begin >= 0 and (text := prompt[begin : begin + length]) in self.answers:
                        best = max(best, (begin + len(text), len(text), text))
        return best[2] or None


def document_for(schema: Any, *, text: str, number: float) -> Any:
    """A JSON value that satisfies a simple schema.

    Known are types, ``properties``, ``items``, ``enum``, ``const``, ``$ref``, ``anyOf``, ``oneOf``, ``allOf``, the
    bounds of numbers, strings and arrays, and the usual formats. ``pattern``, ``not`` and conditions are ignored.

    Args:
        schema: JSON schema.
        text: What strings say, and numbers where it is one.
        number: Draws where several values would do, 0 to 1.

    Raises:
        ValueError: It is no JSON schema, or one that nothing finite satisfies.
    """

    def value(node: Any, depth: int) -> Any:
        if not isinstance(node, dict):
            return text
        if "$ref" in node:
            return value(_resolve(schema, node["$ref"]), depth + 1)
        if "const" in node:
            return node["const"]
        if "enum" in node:
            options = node["enum"]
            return next((o for o in options if str(o) == text), options[int(number * len(options))])
        if branches := node.get("anyOf") or node.get("oneOf"):
            # A schema that contains itself has a way out of the circle in one of its branches.
            ranked = sorted(branches, key=lambda branch: branch.get("type") == "null", reverse=depth > MAX_DEPTH)
            return value(ranked[0], depth + 1)
        if "allOf" in node:
            return value(_merged(schema, node), depth)
        match _type_of(node):
            case "object":
                needed = node.get("required", ())
                children = {**{name: {} for name in needed}, **node.get("properties", {})}
                named = children.items() if depth <= MAX_DEPTH else [(name, children[name]) for name in needed]
                return {name: value(child, depth + 1) for name, child in named}
            case "array":
                fixed = node.get("prefixItems", [])
                wanted = 1 if depth <= MAX_DEPTH else 0
                size = min(max(wanted, node.get("minItems", 0), len(fixed)), node.get("maxItems", math.inf))
                items = [*fixed, *[node.get("items", {})] * (size - len(fixed))]
                return [value(child, depth + 1) for child in items[:size]]
            case "integer":
                return int(_number(node, text, number, step=1))
            case "number":
                return _number(node, text, number, step=0)
            case "boolean":
                return text.strip().lower() in ("true", "yes") or number >= 0.5
            case "null":
                return None
        return _string(node, text)

    try:
        return value(schema, 0)
    except (AttributeError, IndexError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None


def _type_of(node: Mapping[str, Any]) -> str:
    kinds = node.get("type") or ("object" if "properties" in node else "array" if "items" in node else "string")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    return str(next((kind for kind in kinds if kind != "null"), "null"))


def _resolve(schema: Any, reference: str) -> Any:
    """The part of the schema at a local JSON pointer, ``#/$defs/NAME``."""
    node = schema
    for name in reference.split("/")[1:]:
        node = node.get(name.replace("~1", "/").replace("~0", "~"), {})
    return node


def _merged(schema: Any, node: Mapping[str, Any]) -> dict[str, Any]:
    """A schema that says at once what the parts of ``allOf`` say."""
    merged = {name: value for name, value in node.items() if name != "allOf"}
    for part in node["allOf"]:
        part = _resolve(schema, part["$ref"]) if "$ref" in part else part
        properties = {**merged.get("properties", {}), **part.get("properties", {})}
        required = [*merged.get("required", ()), *part.get("required", ())]
        merged = {**merged, **part, "required": required} | ({"properties": properties} if properties else {})
    return merged


def _number(node: Mapping[str, Any], text: str, drawn: float, *, step: float) -> float:
    step = node.get("multipleOf", step)
    margin = step or 1e-3
    low: float = max(node.get("minimum", -math.inf), node.get("exclusiveMinimum", -math.inf) + margin)
    high: float = min(node.get("maximum", math.inf), node.get("exclusiveMaximum", math.inf) - margin)
    try:
        said = float(text)
    except ValueError:
        said = math.nan
    if low <= said <= high and (not step or said % step == 0):
        return said  # NaN, in place of no number, is within no bounds
    if low == -math.inf:
        low = 0.0 if high >= 0 else high - 100
    high = min(high, low + 100)
    if not step:
        return round(low + drawn * (high - low), 3) if high - low > 1e-2 else (low + high) / 2
    first = math.ceil(low / step)
    several = max(0, math.floor(high / step) - first)
    return float((first + int(drawn * (several + 1))) * step)


def _string(node: Mapping[str, Any], text: str) -> str:
    text = _FORMATS.get(node.get("format", ""), text)
    least = node.get("minLength", 0)
    while len(text) < least:
        text = f"{text} {text}" if text else "x" * least
    return text[: node.get("maxLength", len(text))]


_FORMATS = {
    "date": "2025-01-31",
    "date-time": "2025-01-31T12:00:00Z",
    "time": "12:00:00Z",
    "duration": "P1D",
    "email": "someone@example.com",
    "hostname": "example.com",
    "ipv4": "192.0.2.1",
    "ipv6": "2001:db8::1",
    "uri": "https://example.com/",
    "uuid": "123e4567-e89b-42d3-a456-426614174000",
}


def filler(tokens: int, drawn: float) -> str:
    """About so many tokens of text (no more), a different one for each draw from 0 to 1."""
    size = tokens * CHARS_PER_TOKEN
    count = len(_SENTENCES)
    first, stride = divmod(int(drawn * count * (count - 1)), count - 1)
    parts: list[str] = []
    length = 0
    while length <= size:
        parts.append(_SENTENCES[(first + len(parts) * (stride + 1)) % count])
        length += len(parts[-1]) + 1
    text = " ".join(parts)[:size]
    cut = max(text.rfind(" "), text.rfind(". ") + 1)
    return text[:cut].rstrip(" ,") if cut > 0 else text


# Their number is prime: any stride visits each of them before one comes again.
_SENTENCES = (
    "The morning train was almost empty when it left the harbour.",
    "Most of the work had been done the evening before.",
    "A light wind carried the smell of bread across the square.",
    "Nobody could say exactly when the bridge had been built.",
    "She wrote the numbers down and compared them with the list.",
    "The second attempt went better than anyone had expected.",
    "Rain is likely in the north, while the coast stays dry.",
    "There are several ways to answer that, and none is perfect.",
    "The garden behind the library is open until sunset.",
    "His grandfather repaired clocks in a small shop by the river.",
    "In short, the results agree with what was known already.",
    "The committee will meet again in the first week of spring.",
    "Two of the samples were kept for a later comparison.",
    "It helps to begin with the simplest case and go on from there.",
    "The old map showed a path that no longer exists.",
    "After lunch the children went down to the beach.",
    "A good example is worth more than a long explanation.",
    "The lamp in the hallway had been left on all night.",
    "Prices rose a little in autumn and fell again by winter.",
    "He packed two books, a coat and a bag of apples.",
    "The measurement was repeated at three different sites.",
    "Every village along the road has its own market day.",
    "The answer depends on what is meant by the question.",
    "Snow covered the roofs and muffled every sound.",
    "They agreed to share the cost and split the work.",
    "Water boils at a lower temperature in the mountains.",
    "The letter arrived a week later, without a stamp.",
    "A careful reader will notice the difference at once.",
    "The orchestra tuned their instruments in silence.",
    "Further details can be found in the second part.",
    "The boat turned slowly and headed for the open sea.",
)


def tokens_in(text: str) -> int:
    """The simulated tokenizer's count: one for each four characters begun, and at least one."""
    return max(1, math.ceil(len(text) / CHARS_PER_TOKEN))


def uniform(*parts: object) -> float:
    """A number between 0 and 1, both excluded, that follows from the parts alone."""
    digest = blake2b("\0".join(map(str, parts)).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return ((int.from_bytes(digest, "big") >> 12) + 0.5) / 2**52


_NORMAL = NormalDist()


# Settings and the command


def check(config: SimulatorConfig) -> None:
    """Reject settings that no provider could have.

    Raises:
        ConfigError: The first one found.
    """
    for name in ("slots", "rpm", "tpm", "output_tokens", "embedding_size"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ConfigError(f"simulator.{name}={value}: at least 1")
    for name in ("latency_s", "latency_spread", "ttft_s", "itl_s", "hang_s"):
        value = getattr(config, name)
        if value is not None and not 0 <= value < math.inf:
            raise ConfigError(f"simulator.{name}={value}: at least 0")
    if not 0 <= config.accuracy <= 1:
        raise ConfigError(f"simulator.accuracy={config.accuracy}: a share between 0 and 1")
    rates = _as_dict(config.faults)
    for name, rate in rates.items():
        if not 0 <= rate <= 1:
            raise ConfigError(f"simulator.faults.{name}={rate}: a share between 0 and 1")
    if sum(rates.values()) > 1 + 1e-9:
        raise ConfigError(f"simulator.faults: the shares add up to {sum(rates.values()):g}, more than all requests")


def changed(config: T, changes: Mapping[str, Any], prefix: str = "") -> T:
    """A copy of a settings dataclass with ``changes``, which nests as the dataclass does.

    Raises:
        ConfigError: A name is no field, or a value is of the wrong type.
    """
    hints = get_type_hints(type(config))
    values: dict[str, Any] = {}
    for name, value in changes.items():
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=1)
            raise ConfigError(f"unknown setting {prefix + name!r}." + (f" Did you mean {near[0]!r}?" if near else ""))
        kinds = get_args(hints[name]) or (hints[name],)
        current = getattr(config, name)
        if is_dataclass(current) and isinstance(value, Mapping):
            value = changed(current, value, f"{prefix}{name}.")
        elif float in kinds and type(value) is int:
            value = float(value)
        elif type(value) not in kinds:
            allowed = " or ".join("null" if kind is NoneType else kind.__name__ for kind in kinds)
            raise ConfigError(f"{prefix}{name}={value!r}: expected {allowed}")
        values[name] = value
    return replace(config, **values)  # type: ignore[type-var]


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m runner.simulator``: serve until SIGINT or SIGTERM.

    Returns:
        0 after a signal, 2 if the address cannot be used. Bad options exit with 2.
    """
    parser = _parser()
    options = vars(parser.parse_args(argv))
    host, port = options.pop("host"), options.pop("port")
    changes: dict[str, Any] = {}
    for path, value in options.items():
        group, _, name = path.rpartition(".")
        (changes.setdefault(group, {}) if group else changes)[name] = value
    try:
        simulator = Simulator(changed(SimulatorConfig(), changes), host=host, port=port)
    except ConfigError as error:
        parser.error(str(error))
    try:
        asyncio.run(_serve(simulator))
    except OSError as error:
        print(f"simulator: cannot listen at {host}:{port}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    """An option for each setting, under its name."""
    parser = argparse.ArgumentParser(
        prog="python -m runner.simulator",
        description="Serve a simulated provider with OpenAI's HTTP interface.",
        epilog="GET /ledger counts what was asked and answered; POST /settings changes settings while it runs.",
        allow_abbrev=False,
    )
    parser.add_argument("--host", default="127.0.0.1", help="where to listen (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8900, help="0 for any free port (default: %(default)s)")
    for path, kind, default in _options(SimulatorConfig()):
        shown = "" if default is None else f" (default: {default:g})"
        parser.add_argument(
            "--" + path.replace("_", "-"),
            dest=path,
            type=kind,
            metavar=kind.__name__.upper(),
            default=argparse.SUPPRESS,
            help=SETTINGS[path].replace("%", "%%") + shown,
        )
    return parser


def _options(config: Any, prefix: str = "") -> Iterator[tuple[str, type, Any]]:
    hints = get_type_hints(type(config))
    for entry in fields(config):
        value = getattr(config, entry.name)
        if is_dataclass(value):
            yield from _options(value, f"{prefix}{entry.name}.")
        else:
            kinds = get_args(hints[entry.name]) or (hints[entry.name],)
            yield prefix + entry.name, next(kind for kind in kinds if kind is not NoneType), value


async def _serve(simulator: Simulator) -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    async with simulator:
        print(f"simulator: listening at {simulator.url}", flush=True)
        await stopped.wait()


def _cumulative(faults: FaultsConfig) -> list[tuple[str, float]]:
    """The faults that occur, each with the upper bound of its share of the draws."""
    bounds: list[tuple[str, float]] = []
    for name, rate in _as_dict(faults).items():
        if rate:
            bounds.append((name, rate + (bounds[-1][1] if bounds else 0.0)))
    return bounds


def _as_dict(config: Any) -> dict[str, Any]:
    return {entry.name: getattr(config, entry.name) for entry in fields(config)}


def _json_response(document: Any) -> web.Response:
    return web.Response(body=orjson.dumps(document), content_type="application/json")


def _request(message: Any, payload: Any, protocol: Any, writer: Any, task: asyncio.Task[None]) -> web.BaseRequest:
    """aiohttp's own factory, save that files may be larger than a megabyte."""
    loop = asyncio.get_running_loop()
    return web.BaseRequest(message, payload, protocol, writer, task, loop, client_max_size=MAX_REQUEST_BYTES)


async def _sleep_until(when: float) -> None:
    delay = when - asyncio.get_running_loop().time()
    if delay > 0:
        await asyncio.sleep(delay)


if __name__ == "__main__":
    sys.exit(main())
