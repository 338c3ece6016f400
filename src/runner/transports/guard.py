"""What LiteLLM's HTTP client is kept from while it serves a request of ours.

It follows redirects, with the key in them; it reads answers of any size; and it sends a request again whose connection
broke, which may have been paid for.
"""

from __future__ import annotations

import asyncio
import functools
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import httpx

from runner import errors
from runner.transports import wire


@dataclass(slots=True, kw_only=True)
class Exchange:
    """One request of ours on LiteLLM's client."""

    max_response_bytes: int  # larger answers are refused; a compressed one counts as what it unpacks to
    watch: Callable[[bytes], None] | None = None  # given the parts of a good answer as they come
    headers: Mapping[str, str] = field(default_factory=dict)  # of the last answer


_current: ContextVar[Exchange | None] = ContextVar("exchange", default=None)


@contextmanager
def exchange(ours: Exchange) -> Iterator[Exchange]:
    """What this task sends meanwhile is guarded."""
    token = _current.set(ours)
    try:
        yield ours
    finally:
        _current.reset(token)


def guard(transport: type[Any]) -> None:
    """Watch over what passes through an httpx ``transport`` within an `exchange`, and over nothing else.

    Only POST requests are guarded: what else is fetched (the images of a prompt) takes no key along.
    """
    if hasattr(transport.handle_async_request, "__wrapped__"):
        return
    passed_on: Callable[[Any, httpx.Request], Awaitable[httpx.Response]] = transport.handle_async_request

    @functools.wraps(passed_on)
    async def handle_async_request(self: Any, request: httpx.Request) -> httpx.Response:
        ours = _current.get()
        if ours is None or request.method != "POST":
            return await passed_on(self, request)
        request.headers["accept-encoding"] = "gzip"
        try:
            response = await passed_on(self, request)
        except (httpx.ConnectError, httpx.RemoteProtocolError) as error:
            if _never_connected(error):
                raise
            raise httpx.ReadError(str(error)) from error.__cause__  # which LiteLLM does not send again after
        ours.headers = response.headers
        if 300 <= response.status_code < 400:
            await response.aclose()
            raise wire.error_from(response.status_code, b"", response.headers)
        response.stream = _Bounded(response, ours)
        return response

    transport.handle_async_request = handle_async_request


def _never_connected(error: httpx.RequestError) -> bool:
    """Whether nothing was sent. LiteLLM's client says the same of a connection that was reset later."""
    reason = error.__cause__
    return isinstance(error, httpx.ConnectError) and (
        isinstance(reason, aiohttp.ClientConnectorError)
        or not isinstance(reason, (aiohttp.ClientError, asyncio.CancelledError))
    )


class _Bounded(httpx.AsyncByteStream):
    """The body of a response: unpacked, watched, and not larger than allowed."""

    def __init__(self, response: httpx.Response, ours: Exchange) -> None:
        assert isinstance(response.stream, httpx.AsyncByteStream)
        self._stream = response.stream
        self._status = response.status_code
        self._max_bytes = ours.max_response_bytes
        self._watch = ours.watch if response.status_code == 200 else None
        packed = response.headers.pop("content-encoding", "identity").lower()
        if packed not in ("gzip", "identity"):
            raise errors.APIResponseError(f"the answer is packed as {packed!r}, which nobody asked for", status=200)
        self._unpacker = zlib.decompressobj(_GZIP) if packed == "gzip" else None

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for part in self._stream:
            for piece in self._unpacked(part):
                size += len(piece)
                if size > self._max_bytes:
                    message = f"the answer is larger than {self._max_bytes:,} bytes"
                    raise errors.APIResponseError(message, status=self._status)
                if self._watch is not None:
                    self._watch(piece)
                yield piece
        if self._unpacker is not None and not self._unpacker.eof:
            raise httpx.ReadError("the packed answer breaks off")

    async def aclose(self) -> None:
        await self._stream.aclose()

    def _unpacked(self, part: bytes) -> Iterator[bytes]:
        """What ``part`` holds, in pieces of a bounded size."""
        if self._unpacker is None:
            yield part
            return
        try:
            piece = self._unpacker.decompress(part, _PIECE)
            while piece:
                yield piece
                piece = self._unpacker.decompress(self._unpacker.unconsumed_tail, _PIECE)
        except zlib.error as error:
            raise httpx.ReadError(f"the packed answer is broken: {error}") from None


_GZIP = 16 + zlib.MAX_WBITS
_PIECE = 2**16
