"""One request of the model: how it is read, and how its answer is sent."""

from __future__ import annotations

import asyncio
import re
import socket
import struct
from collections.abc import Iterable, Mapping
from hashlib import blake2b

import orjson
from aiohttp import web

from runner.config import SimulatorConfig
from runner.simulator.body import Body, read_form, read_json
from runner.simulator.endpoints import Reply
from runner.simulator.ledger import Count, Ledger
from runner.simulator.service import Pace, sleep_until


class Call:
    """One request of the model. ``config`` and ``ledger`` are those it came under, whatever is changed meanwhile."""

    def __init__(self, request: web.BaseRequest, config: SimulatorConfig, ledger: Ledger) -> None:
        self.request = request
        self.config = config
        self.ledger = ledger
        self.headers: dict[str, str] = {}  # of whatever is answered
        self._number = ledger.arrive(asyncio.get_running_loop().time())
        self._counts: list[Count] = []  # of the body and of each prompt in it

    async def read(self) -> None:
        raw = await self.request.content.read()
        found = _MULTIPART.match(self.request.headers.get("content-type", ""))
        self._raw, self._boundary = raw, found[1].encode() if found else b""
        self.digest = blake2b(raw.replace(self._boundary, b"") if found else raw, digest_size=8).hexdigest()
        self.expect([self.ledger.bodies[self.digest]])
        self.attempt = self._counts[0].asked
        self._id = f"{self.digest}{self.attempt:08x}"
        self.headers["x-request-id"] = f"req_{self._id}"

    def parse(self) -> Body:
        if self._boundary:
            return Body(read_form(self._raw, self._boundary), self.digest, self._id)
        fields = read_json(self._raw)
        asked = {name: value for name, value in fields.items() if name not in ("stream", "stream_options")}
        identity = blake2b(orjson.dumps(asked, option=orjson.OPT_SORT_KEYS), digest_size=12).hexdigest()
        return Body(fields, identity, self._id)

    def expect(self, counts: Iterable[Count]) -> None:
        """Note what is asked; it is answered when the answer is."""
        for count in counts:
            count.asked += 1
            self._counts.append(count)

    async def answer(self, reply: Reply, pace: Pace, begun: float, fault: str | None) -> web.StreamResponse:
        """Charge the reply and send it at its pace, if no fault spoils it."""
        self.ledger.charge(self._number, reply.prompt_tokens, reply.completion_tokens, self.config)
        if reply.frames is not None:
            return await self._stream(reply.frames, reply.steps // 2, pace, begun, fault)
        await sleep_until(begun + pace.total_s)
        body = reply.document.encode() if isinstance(reply.document, str) else orjson.dumps(reply.document)
        if isinstance(reply.document, str):
            self.headers["content-type"] = "text/plain; charset=utf-8"
        half = body[: len(body) // 2]
        match fault:
            case "reset":
                return self._hang_up(web.Response(), fault)
            case "truncated":
                self.headers["content-length"] = str(len(body))
                return self._hang_up(await self.send(200, half), fault)
            case "invalid_json":
                return await self.send(200, half)
        response = await self.send(200, body)
        self._answered()
        return response

    async def send(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> web.StreamResponse:
        """Hand a whole answer to the transport."""
        kind = {"content-type": "application/json"}
        response = web.Response(status=status, body=body, headers={**kind, **self.headers, **(headers or {})})
        await response.prepare(self.request)
        await response.write_eof()
        self.ledger.by_status[str(status)] += 1
        return response

    async def _stream(
        self, frames: Iterable[bytes], middle: int, pace: Pace, begun: float, fault: str | None
    ) -> web.StreamResponse:
        """Send each frame at its time; those that are due together go in one write."""
        response = web.StreamResponse(headers={"content-type": "text/event-stream", **self.headers})
        await response.prepare(self.request)
        self.ledger.by_status["200"] += 1
        if fault == "invalid_json":
            frames = (b'data: {"id": "chatcmpl-\n\n', b"data: [DONE]\n\n")
        loop, due = asyncio.get_running_loop(), bytearray()
        for step, frame in enumerate(frames):
            wait_s = begun + pace.at_s(step) - loop.time()
            if wait_s > 0:
                await response.write(due)
                due = bytearray()
                await asyncio.sleep(wait_s)
            if step == middle and fault in ("reset", "truncated"):
                await response.write(due + frame[: len(frame) // 2])
                return self._hang_up(response, fault)
            due += frame
        await response.write(due)
        await sleep_until(begun + pace.total_s)
        await response.write_eof()
        if fault != "invalid_json":
            self._answered()
        return response

    def _answered(self) -> None:
        self.ledger.answered += 1
        for count in self._counts:
            count.answered += 1

    def _hang_up(self, response: web.StreamResponse, fault: str) -> web.StreamResponse:
        """Close the connection in the middle of the answer, for a reset by a RST."""
        response.force_close()
        if (transport := self.request.transport) is not None and fault == "reset":
            # Without lingering, what is left in the socket's buffers is thrown away.
            connection: socket.socket = transport.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            transport.abort()
        elif transport is not None:
            transport.close()
        return response


_MULTIPART = re.compile(r'\s*multipart/form-data\s*;.*?boundary="?([^";]+)', re.IGNORECASE)
