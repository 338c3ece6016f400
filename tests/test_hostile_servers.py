"""Servers that mean harm, or are badly broken: what each sends, and what comes of it.

Bodies of every odd shape are in test_transports.py and test_wire.py. Here the bytes around them are at fault.
"""

from __future__ import annotations

import asyncio
import gzip
import ssl
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeAlias

import pytest

from harness import Command, serving
from runner import errors
from runner.transports.direct import DirectTransport
from runner.types import Generation, GenerationRequest, TokenUsage

Send: TypeAlias = Callable[[asyncio.StreamWriter], Awaitable[None]]

KEY = "sk-0123456789abcdefghij"
MEBIBYTE = 2**20
OK = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
CHUNKED = OK + b"transfer-encoding: chunked\r\n\r\n"
BODY = b'{"choices": [{"message": {"content": "Hello."}, "finish_reason": "stop"}], "usage": %s}'
GOOD = BODY % b"null"
OF_ANOTHER_HOST = Path(__file__).parent / "data" / "elsewhere.pem"  # of elsewhere.example, signed by itself
OF_LOCALHOST = Path(__file__).parent / "data" / "localhost.pem"  # likewise
HI = ("name=t", "prompt=Hi", "tracker=none", "model=openai_like/m")


def once(*parts: bytes) -> Send:
    async def send(writer: asyncio.StreamWriter) -> None:
        writer.write(b"".join(parts))
        await writer.drain()

    return send


def endless(head: bytes, piece: bytes) -> Send:
    async def send(writer: asyncio.StreamWriter) -> None:
        writer.write(head)
        while not writer.is_closing():
            writer.write(piece)
            await writer.drain()

    return send


def sized(payload: bytes, *headers: bytes) -> Send:
    head = b"".join(header + b"\r\n" for header in headers)
    return once(OK, head, b"content-length: %d\r\n\r\n" % len(payload), payload)


def packed(mebibytes: int, bits: int) -> bytes:
    packer = zlib.compressobj(wbits=bits)
    return b"".join([*(packer.compress(b" " * MEBIBYTE) for _ in range(mebibytes)), packer.flush()])


async def drip(writer: asyncio.StreamWriter) -> None:
    writer.write(OK + b"content-length: 1000\r\n\r\n")
    while not writer.is_closing():
        writer.write(b" ")
        await asyncio.sleep(0.01)


def event(text: str) -> bytes:
    return f"data: {text}\n\n".encode()


MANY = ",".join(f'{{"index": {index}}}' for index in range(2_000))

SERVERS: dict[str, tuple[Send, type[errors.RequestError] | str]] = {
    "a body without end": (endless(OK + b"\r\n", b"x" * MEBIBYTE), errors.APIResponseError),
    "chunks without end": (endless(CHUNKED, b"100000\r\n" + b"x" * MEBIBYTE + b"\r\n"), errors.APIResponseError),
    "headers without end": (endless(OK, b"x-a: b\r\n" * 1000), errors.APIConnectionError),
    "a header line without end": (endless(OK + b"x-a: ", b"x" * MEBIBYTE), errors.APIConnectionError),
    "a status line without end": (endless(b"HTTP/1.1 200 ", b"x" * MEBIBYTE), errors.APIConnectionError),
    "trailers without end": (endless(CHUNKED + b"0\r\n", b"x-a: b\r\n" * 1000), errors.APIConnectionError),
    "a chunk's extension without end": (endless(CHUNKED + b"5;a=", b"x" * 4096), errors.Timeout),
    "provisional answers without end": (endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100), errors.Timeout),
    "a byte at a time": (drip, errors.Timeout),
    "20,000 headers": (sized(GOOD, *[b"x-a: b"] * 20_000), errors.APIConnectionError),
    "a chunk of 2^80 bytes": (once(CHUNKED, b"f" * 20, b"\r\n"), errors.APIConnectionError),
    "chunks that are none": (once(CHUNKED, b"zz\r\n", GOOD), errors.APIConnectionError),
    "a negative length": (once(OK, b"content-length: -5\r\n\r\n", GOOD), errors.APIConnectionError),
    "two lengths": (sized(GOOD, b"content-length: 3"), errors.APIConnectionError),
    "a length that is too large": (once(OK, b"content-length: 9999\r\n\r\n", GOOD), errors.APIConnectionError),
    "a length that is too small": (once(OK, b"content-length: 9\r\n\r\n", GOOD), errors.APIConnectionError),
    "no HTTP at all": (once(b"\x16\x03\x01 nonsense\r\n\r\n"), errors.APIConnectionError),
    "a bomb in gzip": (sized(packed(64, 31), b"content-encoding: gzip"), errors.APIResponseError),
    "a bomb in deflate, unasked": (sized(packed(64, 15), b"content-encoding: deflate"), errors.APIResponseError),
    "gzip in gzip": (sized(gzip.compress(packed(64, 31)), b"content-encoding: gzip, gzip"), errors.APIResponseError),
    "another host": (
        once(b"HTTP/1.1 307 Go\r\nlocation: http://evil.example/\r\ncontent-length: 0\r\n\r\n"),
        errors.NotFoundError,
    ),
    "HTTP/1.0": (once(b"HTTP/1.0 200 OK\r\n\r\n", GOOD), "Hello."),
    "a page": (sized(b"<html>\x1b[2JWelcome</html>"), errors.APIResponseError),
    "no choices": (sized(b'{"choices": []}'), errors.APIResponseError),
}
"""What a server sends, and what comes of it: an answer's text, or an error."""

STREAMS: dict[str, tuple[Send, type[errors.RequestError]]] = {
    "comments without end": (endless(OK + b"\r\n", b": ping\n\n" * 1000), errors.APIResponseError),
    "a line without end": (endless(OK + b"\r\ndata: ", b"x" * MEBIBYTE), errors.APIResponseError),
    "choices without end": (endless(OK + b"\r\n", event(f'{{"choices": [{MANY}]}}')), errors.APIResponseError),
    "calls without end": (
        endless(OK + b"\r\n", event(f'{{"choices": [{{"delta": {{"tool_calls": [{MANY}]}}}}]}}')),
        errors.APIResponseError,
    ),
}


@asynccontextmanager
async def listening(send: Send, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """A server that answers whatever comes with what ``send`` writes; gives its address without the scheme."""
    tasks: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())  # type: ignore[arg-type]
        try:
            await reader.readuntil(b"\r\n\r\n")
            await send(writer)
            writer.close()
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            if not writer.is_closing():
                writer.transport.abort()

    server = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=tls)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def ask(send: Send, *, stream: bool = False, timeout_s: float = 5.0) -> Generation:
    async with listening(send) as address:
        client = DirectTransport(
            model="m", api_base=f"http://{address}", api_key=KEY, timeout_s=timeout_s, max_response_bytes=4 * MEBIBYTE
        )
        try:
            response = await client.send(GenerationRequest(input="Hi.", params={"stream": True} if stream else {}))
        finally:
            await client.aclose()
    assert isinstance(response.output, Generation)
    return response.output


@pytest.mark.parametrize("name", SERVERS)
async def test_a_hostile_server_is_read_or_refused(name: str) -> None:
    send, outcome = SERVERS[name]
    if isinstance(outcome, str):
        assert (await ask(send)).text == outcome
        return
    with pytest.raises(errors.RequestError) as caught:
        await ask(send, timeout_s=0.3 if outcome is errors.Timeout else 5.0)
    assert isinstance(caught.value, outcome), caught.value
    assert len(caught.value.message) < 600
    assert KEY not in caught.value.message


@pytest.mark.parametrize("name", STREAMS)
async def test_a_hostile_stream_has_an_end(name: str) -> None:
    send, outcome = STREAMS[name]
    with pytest.raises(outcome):
        await ask(send, stream=True)


async def test_a_key_that_an_excerpt_cuts_in_two_is_blotted_out() -> None:
    for place in range(160, 200):
        with pytest.raises(errors.APIResponseError) as caught:
            await ask(sized(b"x" * place + KEY.encode()))
        assert KEY[:9] not in caught.value.message


@pytest.mark.parametrize(
    "usage", ['{"prompt_tokens": 1e400, "completion_tokens": -4, "total_tokens": "12"}', '{"total_tokens": 12.0}']
)
async def test_a_paid_answer_survives_odd_counts(usage: str) -> None:
    async with listening(sized(BODY % usage.encode())) as address:
        client = DirectTransport(model="m", api_base=f"http://{address}")
        response = await client.send(GenerationRequest(input="Hi."))
        await client.aclose()
    assert response.usage == TokenUsage(total_tokens=12)


async def test_a_trusted_certificate_of_the_host_is_taken(command: Command) -> None:
    async with listening(sized(GOOD), speaking(OF_LOCALHOST)) as address:
        done = await command(*HI, f"api_base=https://{address}", SSL_CERT_FILE=str(OF_LOCALHOST))
    assert done.exit_code == 0, done.err


@pytest.mark.parametrize(
    ("trusted", "why"),
    [({}, "self-signed certificate"), ({"SSL_CERT_FILE": str(OF_ANOTHER_HOST)}, "IP address mismatch")],
    ids=["unknown", "of another host"],
)
async def test_a_wrong_certificate_is_refused_before_anything_is_sent(
    command: Command, trusted: dict[str, str], why: str
) -> None:
    asked: list[bytes] = []

    async def send(writer: asyncio.StreamWriter) -> None:
        asked.append(b"")
        await sized(GOOD)(writer)

    async with listening(send, speaking(OF_ANOTHER_HOST)) as address:
        done = await command(*HI, f"api_base=https://{address}", OPENAI_LIKE_API_KEY=KEY, **trusted)
    assert done.exit_code == 2, done.err
    assert f"api_base=https://{address}: its certificate is refused ({why}" in done.err
    assert not asked
    assert KEY not in done.out + done.err


async def test_a_certificate_that_is_replaced_by_a_wrong_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(OF_LOCALHOST))
    async with listening(sized(GOOD), speaking(OF_ANOTHER_HOST)) as address:
        client = DirectTransport(model="m", api_base=f"https://{address}", api_key=KEY)
        with pytest.raises(errors.ConnectError, match=r"(?i)certificate"):
            await client.send(GenerationRequest(input="Hi."))
        await client.aclose()


async def test_an_address_of_https_where_nobody_speaks_tls_is_refused_at_once(command: Command) -> None:
    async with serving() as provider:
        address = provider.url.replace("http://", "https://")
        done = await command(*HI, f"api_base={address}")
    assert done.exit_code == 2, done.err
    assert f"api_base={address}: what listens there speaks no TLS" in done.err
    assert done.err.endswith("write http:// if that is meant\n")


def speaking(certificate: Path) -> ssl.SSLContext:
    """The side of a server with this certificate and its key."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context
