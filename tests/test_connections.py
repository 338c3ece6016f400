"""Connections: what goes over the wire, and when a connection is used again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager

import aiohttp
import pytest

from runner.transports.connections import Answer, Connections

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
KEY = {"authorization": "Bearer key", "content-type": "application/json", "accept-encoding": "gzip, identity"}

Conversation = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def test_a_request_is_on_the_wire_as_a_session_writes_it() -> None:
    seen: list[bytes] = []

    async def note(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await head_of(reader):
            seen.append(head)
            await reader.readexactly(4)
            writer.write(OK)

    async with server(note) as base, connections(base) as (ours, session):
        assert await ours.post("/a%20b?c=d", b"body", text) == "ok"
        skip = ("user-agent", "accept")
        async with session.post(f"{base}/a%20b?c=d", data=b"body", headers=KEY, skip_auto_headers=skip) as answer:
            assert await answer.text() == "ok"

    [mine, theirs] = [sorted(head.lower().splitlines()) for head in seen]
    assert mine == theirs


async def test_one_connection_serves_one_request_after_the_other() -> None:
    served = Served(OK)

    async with server(served) as base, connections(base) as (ours, _):
        for _ in range(3):
            assert await ours.post("/", b"body", text) == "ok"

    assert served.connections == 1


async def test_an_interim_answer_is_passed_over() -> None:
    served = Served(b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n" + OK)

    async with server(served) as base, connections(base) as (ours, _):
        assert await ours.post("/", b"body", text) == "ok"


async def test_other_headers_stand_in_the_place_of_the_usual_ones() -> None:
    served = Served(OK)

    async with server(served) as base, connections(base) as (ours, _):
        await ours.post("/", b"body", text, headers={"x-mine": "1"})

    assert b"x-mine: 1" in served.heads[0]
    assert b"authorization" not in served.heads[0].lower()


async def test_an_answer_that_is_not_read_to_its_end_costs_its_connection() -> None:
    served = Served(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nok")

    async def nothing(answer: Answer) -> int:
        return answer.status

    async with server(served) as base, connections(base) as (ours, _):
        assert [await ours.post("/", b"body", nothing) for _ in range(2)] == [200, 200]

    assert served.connections == 2


async def test_an_answer_that_comes_before_the_body_is_sent_costs_its_connection() -> None:
    count = 0

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        count += 1
        await head_of(reader)
        writer.write(OK)
        await reader.read(1)
        await asyncio.sleep(3600)

    async with server(refuse) as base, connections(base) as (ours, _):
        for _ in range(2):
            assert await ours.post("/", bytes(2**24), text) == "ok"

    assert count == 2


async def test_a_cancelled_request_costs_its_connection() -> None:
    async def keep_silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        closed.set()

    closed = asyncio.Event()
    async with server(keep_silent) as base, connections(base) as (ours, _):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await ours.post("/", b"body", text)
        await closed.wait()


async def test_a_connection_that_ends_without_an_answer_is_an_error() -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head_of(reader)

    async with server(hang_up) as base, connections(base) as (ours, _):
        with pytest.raises(aiohttp.ServerDisconnectedError):
            await ours.post("/", b"body", text)


async def test_what_is_no_http_is_an_error() -> None:
    async with server(Served(b"HELLO\r\n\r\n")) as base, connections(base) as (ours, _):
        with pytest.raises(aiohttp.http.HttpProcessingError):
            await ours.post("/", b"body", text)


async def test_a_header_cannot_bring_another_one() -> None:
    async with connections("http://127.0.0.1:9", {"authorization": "key\r\nx-mine: 1"}) as (ours, _):
        with pytest.raises(ValueError, match="line break"):
            await ours.post("/", b"body", text)


@pytest.mark.parametrize("base", ["http://", "http://host:port"])
async def test_an_address_that_is_none_is_an_error(base: str) -> None:
    async with connections(base) as (ours, _):
        with pytest.raises(aiohttp.InvalidURL):
            await ours.post("/", b"body", text)


async def test_a_closed_session_sends_nothing() -> None:
    async with connections("http://127.0.0.1:9") as (ours, session):
        await session.close()
        with pytest.raises(aiohttp.ClientConnectionError, match="closed"):
            await ours.post("/", b"body", text)


class Served:
    """A conversation in which every request gets the same bytes."""

    def __init__(self, answer: bytes) -> None:
        self.connections = 0
        self.heads: list[bytes] = []
        self._answer = answer

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        while head := await head_of(reader):
            self.heads.append(head)
            await reader.readexactly(4)
            writer.write(self._answer)


async def head_of(reader: asyncio.StreamReader) -> bytes:
    """The next request's head; nothing where the connection ends."""
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return b""


async def text(answer: Answer) -> str:
    return (await answer.content.read()).decode()


@asynccontextmanager
async def server(talk: Conversation) -> AsyncIterator[str]:
    """A server that holds this conversation with everybody who comes."""
    talks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        talks.add(task)
        try:
            await talk(reader, writer)
        except asyncio.CancelledError:
            pass
        finally:
            writer.close()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    finally:
        listener.close()
        for task in talks:
            task.cancel()
        await asyncio.gather(*talks)


@asynccontextmanager
async def connections(
    base: str, headers: Mapping[str, str] = KEY
) -> AsyncIterator[tuple[Connections, aiohttp.ClientSession]]:
    async with aiohttp.ClientSession() as session:
        yield Connections(session, base=base, headers=headers, read_bufsize=2**20), session
