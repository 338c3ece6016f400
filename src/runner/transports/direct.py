"""The direct transport: OpenAI's wire format over aiohttp, for servers that speak it unmodified."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp

from runner import errors
from runner.transports import wire
from runner.transports.connections import Answer, Connections
from runner.transports.deadlines import Deadlines
from runner.transports.locality import warn_of_plain_http
from runner.transports.stream import Stream
from runner.types import GenerationRequest, Request, Response

_READ_BUFFER = 2**20  # aiohttp's default of 64 KiB halves the speed of long answers
_LARGE_BODY = 2**20  # what aiohttp writes in pieces, if it is given a file
_LINGER_S = 0.2  # how long an answer that is over may take to end, for the sake of its connection

_NO_TIMEOUT = aiohttp.ClientTimeout()  # `Deadlines` is cheaper


class DirectTransport:
    """A `Client` that speaks to one OpenAI-compatible server.

    Connections are pooled without a limit of their own: how many there are follows from the concurrency above.

    Args:
        model: The model's name as the server knows it.
        api_base: URL up to and including ``/v1``.
        api_key: Bearer token, or None for a server without authentication.
        params: LiteLLM keyword arguments added to every request, under its own.
        timeout_s: How long a request may take, from sending to the last byte.
        max_response_bytes: Larger answers are refused with an `APIResponseError`.

    Raises:
        ConfigError: There is a user in ``api_base`` and a key beside it.
    """

    def __init__(
        self,
        *,
        model: str,
        api_base: str,
        api_key: str | None = None,
        params: Mapping[str, Any] | None = None,
        timeout_s: float = 600.0,
        max_response_bytes: int = wire.MAX_RESPONSE_BYTES,
    ) -> None:
        self._model = model
        self._base = api_base.rstrip("/")
        self._where = wire.address(self._base)
        self._headers = {"accept-encoding": "gzip, identity", "content-type": "application/json"}
        self._secrets = [api_key] if api_key else []
        if api_key and "@" in urlsplit(self._base).netloc:
            raise errors.ConfigError(f"api_base={self._where} holds a user, and there is a key: leave one of them out")
        if api_key:
            self._headers["authorization"] = f"Bearer {api_key}"
        self._params = dict(params or {})
        self._timeout_s = timeout_s
        self._deadlines = Deadlines()
        self._max_response_bytes = max_response_bytes
        self._session: aiohttp.ClientSession | None = None
        self._connections: Connections | None = None  # None: the session is to be asked
        self._closed = False

    async def send(self, request: Request) -> Response:
        params = {**self._params, **request.params} if self._params else request.params
        call = wire.encode(request, self._model, params)
        headers = self._headers_of(call, params)
        timeout_s = self._timeout_s if request.timeout_s is None else request.timeout_s
        stream = None
        if call.streamed and isinstance(request, GenerationRequest):
            stream = Stream(request, choices=params.get("n"))
        try:
            status, payload, answer_headers = await self._post(call, headers, timeout_s, stream)
            if status != 200:
                said = wire.redacted(payload or b"", self._secrets_in(params))
                raise self._with_hint(wire.error_from(status, said, answer_headers))
            answer_headers = {name.lower(): value for name, value in answer_headers.items()}
            if payload is None and stream is not None:
                return wire.response_from(request, stream.body(), answer_headers, model=self._model)
            return wire.decode(request, payload or b"", answer_headers, model=self._model)
        except errors.RequestError as error:
            raise wire.without_secrets(error, self._secrets_in(params)) from None

    async def aclose(self) -> None:
        self._closed = True
        self._deadlines.close()
        if self._session is not None:
            await self._session.close()

    def _with_hint(self, error: errors.RequestError) -> errors.RequestError:
        """The error, and what it most often means: an address that ends too early or too late."""
        meant = wire.meant_base(self._where)
        if not isinstance(error, errors.NotFoundError) or error.status != 404 or meant is None:
            return error
        message = f"{error.message.rstrip('.')}; perhaps its api_base is {meant}"
        return errors.NotFoundError(message, status=error.status, headers=error.headers)

    def _headers_of(self, call: wire.Call, params: Mapping[str, Any]) -> Mapping[str, str]:
        headers = self._headers
        if call.streamed:  # what is packed comes late
            headers = {**headers, "accept-encoding": "identity"}
        if call.content_type != headers["content-type"]:
            headers = {**headers, "content-type": call.content_type}
        if extra := params.get("extra_headers"):
            headers = {**headers, **{name.lower(): str(value) for name, value in extra.items()}}
        return headers

    def _secrets_in(self, params: Mapping[str, Any]) -> list[str]:
        """What no message may hold: the key, and what was sent in its place."""
        return self._secrets + [
            str(value).split()[-1] for value in (params.get("extra_headers") or {}).values() if value
        ]

    async def _post(
        self, call: wire.Call, headers: Mapping[str, str], timeout_s: float, stream: Stream | None
    ) -> tuple[int, bytes | None, Mapping[str, str]]:
        """Send, and read the whole answer: status, body (None: it is in ``stream``) and headers.

        Redirects are not followed, so that the key stays with its host. A stream that breaks after its answer was
        whole is no loss.
        """
        session = self._session or self._connect()
        answer_headers: Mapping[str, str] = {}

        async def read(answer: Answer) -> tuple[int, bytes | None]:
            nonlocal answer_headers
            answer_headers = answer.headers
            if stream is None or answer.status != 200:
                return answer.status, await self._read(answer)
            await self._follow(answer, stream)
            return 200, None

        try:
            with self._deadlines.within(timeout_s):
                if self._connections is not None and len(call.body) <= _LARGE_BODY:
                    others = None if headers is self._headers else headers
                    status, payload = await self._connections.post(call.path, call.body, read, headers=others)
                else:
                    status, payload = await self._post_through(session, call, headers, read)
            return status, payload, answer_headers
        except TimeoutError:
            failure: errors.RequestError = errors.Timeout(f"no answer from {self._where} within {timeout_s:g} s")
        except aiohttp.ClientConnectorError as error:
            failure = errors.ConnectError(f"cannot connect to {self._where}: {error.strerror or error}")
        except (aiohttp.ClientError, aiohttp.http.HttpProcessingError, OSError) as error:
            failure = errors.APIConnectionError(
                f"the connection to {self._where} broke before the answer was whole ({type(error).__name__})"
            )
        except errors.RequestError as error:
            failure = error
        if stream is not None and stream.is_whole:
            return 200, None, answer_headers
        raise failure

    async def _post_through(
        self,
        session: aiohttp.ClientSession,
        call: wire.Call,
        headers: Mapping[str, str],
        read: Callable[[Answer], Awaitable[tuple[int, bytes | None]]],
    ) -> tuple[int, bytes | None]:
        """As `Connections.post`, for what it is not made for."""
        data = io.BytesIO(call.body) if len(call.body) > _LARGE_BODY else call.body
        async with session.post(
            self._base + call.path, data=data, headers=headers, timeout=_NO_TIMEOUT, allow_redirects=False
        ) as answer:
            return await read(Answer(answer.status, answer.headers, answer.content))

    async def _read(self, answer: Answer) -> bytes:
        """The body, unless it is larger than allowed; a compressed one counts as what it unpacks to."""
        length = answer.headers.get("content-length")
        if length is not None and int(length) <= self._max_response_bytes and "content-encoding" not in answer.headers:
            return answer.content.read_nowait() if answer.content.is_eof() else await answer.content.read()
        parts: list[bytes] = []
        size = 0
        async for part in answer.content.iter_any():
            size += len(part)
            self._check_size(size, answer)
            parts.append(part)
        return b"".join(parts)

    async def _follow(self, answer: Answer, stream: Stream) -> None:
        """Feed the stream until it is over."""
        size = 0
        async for part in answer.content.iter_any():
            size += len(part)
            self._check_size(size, answer)
            stream.feed(part)
            if stream.is_over:
                break
        stream.end()
        if not answer.content.at_eof():
            # Its end is on the way, and lets the connection be used again.
            with suppress(TimeoutError):
                async with asyncio.timeout(_LINGER_S):
                    await answer.content.readany()

    def _check_size(self, size: int, answer: Answer) -> None:
        if size > self._max_response_bytes:
            raise errors.APIResponseError(
                f"the answer of {self._where} is larger than {self._max_response_bytes:,} bytes", status=answer.status
            )

    def _connect(self) -> aiohttp.ClientSession:
        if self._closed:
            raise RuntimeError("the transport is closed")
        warn_of_plain_http(self._base)
        proxy = proxy_of(self._base)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=60, keepalive_timeout=30),
            read_bufsize=_READ_BUFFER,
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("user-agent", "accept"),
            proxy=proxy,
        )
        if proxy is None and self._base.startswith(("http://", "https://")):
            self._connections = Connections(
                self._session, base=self._base, headers=self._headers, read_bufsize=_READ_BUFFER
            )
        return self._session


def proxy_of(url: str) -> str | None:
    """The proxy that ``HTTP_PROXY``, ``HTTPS_PROXY`` and ``NO_PROXY`` name for ``url``."""
    parts = urlsplit(url)
    if proxy_bypass(parts.hostname or ""):
        return None
    return getproxies().get(parts.scheme)
