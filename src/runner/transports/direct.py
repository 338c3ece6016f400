"""The direct transport: OpenAI's wire format over aiohttp, for servers that speak it unmodified."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp

from runner import errors
from runner.transports import wire
from runner.types import Request, Response

MAX_RESPONSE_BYTES = 64 * 2**20
"""A larger answer is refused: no model writes so much, but a broken server does."""

_READ_BUFFER = 2**20  # aiohttp's default of 64 KiB halves the speed of long answers


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
    """

    def __init__(
        self,
        *,
        model: str,
        api_base: str,
        api_key: str | None = None,
        params: Mapping[str, Any] | None = None,
        timeout_s: float = 600.0,
        max_response_bytes: int = MAX_RESPONSE_BYTES,
    ) -> None:
        self._model = model
        self._base = api_base.rstrip("/")
        self._headers = {"content-type": "application/json", "accept-encoding": "gzip, identity"}
        self._secrets = [api_key] if api_key else []
        if api_key:
            self._headers["authorization"] = f"Bearer {api_key}"
        self._params = dict(params or {})
        self._timeout_s = timeout_s
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._max_response_bytes = max_response_bytes
        self._session: aiohttp.ClientSession | None = None
        self._closed = False

    async def send(self, request: Request) -> Response:
        params = {**self._params, **request.params} if self._params else request.params
        path, body = wire.encode(request, self._model, params)
        headers = self._headers
        extra = params.get("extra_headers")
        if extra:
            headers = {**headers, **{name.lower(): str(value) for name, value in extra.items()}}
        status, payload, answer_headers = await self._post(path, body, headers, request.timeout_s)
        if status != 200:
            raise wire.error_from(status, wire.redacted(payload, self._secrets), answer_headers)
        return wire.decode(request, payload, {name.lower(): value for name, value in answer_headers.items()})

    async def aclose(self) -> None:
        self._closed = True
        if self._session is not None:
            await self._session.close()

    async def _post(
        self, path: str, body: bytes, headers: Mapping[str, str], timeout_s: float | None
    ) -> tuple[int, bytes, Mapping[str, str]]:
        """Send, and read the whole answer. Redirects are not followed, so that the key stays with its host."""
        session = self._session or self._connect()
        timeout = self._timeout if timeout_s is None else aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with session.post(
                self._base + path, data=body, headers=headers, timeout=timeout, allow_redirects=False
            ) as answer:
                return answer.status, await self._read(answer), answer.headers
        except TimeoutError:
            waited = self._timeout_s if timeout_s is None else timeout_s
            raise errors.Timeout(f"no answer from {self._base} within {waited:g} s") from None
        except aiohttp.ClientConnectorError as error:
            raise errors.ConnectError(f"cannot connect to {self._base}: {error.strerror or error}") from None
        except (aiohttp.ClientError, OSError) as error:
            raise errors.APIConnectionError(
                f"the connection to {self._base} broke before the answer was whole ({type(error).__name__})"
            ) from None

    async def _read(self, answer: aiohttp.ClientResponse) -> bytes:
        """The body, unless it is larger than allowed; a compressed one counts as what it unpacks to."""
        length = answer.content_length
        if length is not None and length <= self._max_response_bytes and "content-encoding" not in answer.headers:
            return await answer.read()
        parts: list[bytes] = []
        size = 0
        async for part in answer.content.iter_any():
            size += len(part)
            if size > self._max_response_bytes:
                answer.close()
                raise errors.APIResponseError(
                    f"the answer of {self._base} is larger than {self._max_response_bytes:,} bytes",
                    status=answer.status,
                )
            parts.append(part)
        return b"".join(parts)

    def _connect(self) -> aiohttp.ClientSession:
        if self._closed:
            raise RuntimeError("the transport is closed")
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=60, keepalive_timeout=30),
            read_bufsize=_READ_BUFFER,
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("user-agent", "accept"),
            proxy=proxy_of(self._base),
        )
        return self._session


def proxy_of(url: str) -> str | None:
    """The proxy that ``HTTP_PROXY``, ``HTTPS_PROXY`` and ``NO_PROXY`` name for ``url``."""
    parts = urlsplit(url)
    if proxy_bypass(parts.hostname or ""):
        return None
    return getproxies().get(parts.scheme)
