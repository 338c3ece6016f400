"""Connections to one server: aiohttp's pool, sockets and parser, without what its session does for each request."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple, TypeVar

import aiohttp
from yarl import URL

T = TypeVar("T")

_NO_TIMEOUT = aiohttp.ClientTimeout()
_SWITCHING_PROTOCOLS = 101


class Answer(NamedTuple):
    """An answer whose head has come. Its body is read from ``content``, unpacked."""

    status: int
    headers: Mapping[str, str]
    content: aiohttp.StreamReader


class Connections:
    """Posts small bodies, for a fourth of the CPU that `aiohttp.ClientSession.post` takes.

    A session makes the URL, the headers, a task that writes the body and a response anew for every request. Here the
    head is made once, and a request is one write. Choose the session for what is to be written in pieces, and where
    there is a proxy. Redirects are not followed, cookies not kept.

    Args:
        session: Whose connections are used.
        base: URL, ``http://`` or ``https://``.
        headers: Of every request, beside its host and length.
        read_bufsize: Bytes of an answer that are held before the server has to wait.
    """

    def __init__(
        self, session: aiohttp.ClientSession, *, base: str, headers: Mapping[str, str], read_bufsize: int
    ) -> None:
        self._session = session
        self._base = base
        self._headers = headers
        self._read_bufsize = read_bufsize
        self._prepared: dict[str, _Prepared] = {}  # by path

    async def post(
        self,
        path: str,
        body: bytes,
        read: Callable[[Answer], Awaitable[T]],
        *,
        headers: Mapping[str, str] | None = None,
    ) -> T:
        """Send ``body`` to ``path`` below the base; returns what ``read`` makes of the answer.

        The connection is used again if the answer was read to its end, and closed otherwise.

        Args:
            headers: In the place of the usual ones.

        Raises:
            aiohttp.ClientError: As a session does.
            aiohttp.http.HttpProcessingError: The answer is no HTTP.
        """
        request, head = self._prepare(path, self._headers) if headers is None else self._make(path, headers)
        connector = self._session.connector
        if connector is None:
            raise aiohttp.ClientConnectionError("the session is closed")
        connection = await connector.connect(request, [], _NO_TIMEOUT)
        try:
            protocol, transport = connection.protocol, connection.transport
            if protocol is None or transport is None or transport.is_closing():
                raise aiohttp.ClientConnectionResetError("the connection was closed before it was used")
            protocol.set_response_params(read_until_eof=True, read_bufsize=self._read_bufsize)
            transport.write(b"%scontent-length: %d\r\n\r\n%s" % (head, len(body), body))
            message, content = await protocol.read()
            while 100 <= message.code < 200 and message.code != _SWITCHING_PROTOCOLS:
                message, content = await protocol.read()
            result = await read(Answer(message.code, message.headers, content))
            is_sent = not transport.get_write_buffer_size()
        except BaseException:
            connection.close()
            raise
        if is_sent:
            connection.release()
        else:
            connection.close()
        return result

    def _prepare(self, path: str, headers: Mapping[str, str]) -> _Prepared:
        prepared = self._prepared.get(path)
        if prepared is None:
            prepared = self._prepared[path] = self._make(path, headers)
        return prepared

    def _make(self, path: str, headers: Mapping[str, str]) -> _Prepared:
        """The head as aiohttp would write it."""
        try:
            url = URL(self._base + path)
        except ValueError as error:
            raise aiohttp.InvalidURL(self._base, str(error)) from None
        request = aiohttp.ClientRequest(
            "POST",
            url,
            headers=headers,
            skip_auto_headers=("user-agent", "accept", "content-type"),
            loop=asyncio.get_running_loop(),
            session=self._session,
        )
        lines = [f"POST {request.url.raw_path_qs} HTTP/1.1"]
        for name, value in request.headers.items():
            if not _FORBIDDEN.isdisjoint(name + value):
                raise ValueError(f"the header {name!r} holds a line break")
            if name.lower() not in ("content-length", "transfer-encoding"):
                lines.append(f"{name}: {value}")
        return _Prepared(request, "\r\n".join([*lines, ""]).encode())


class _Prepared(NamedTuple):
    """What all requests to a path have in common."""

    request: aiohttp.ClientRequest  # names the server to the pool
    head: bytes  # without the length


_FORBIDDEN = frozenset("\r\n\0")
