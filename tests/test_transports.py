from __future__ import annotations

import asyncio
import contextlib
import functools
import gzip
import importlib
import json
import os
import re
import socket
import subprocess
import sys
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, Protocol

import aiohttp
import pytest
from aiohttp import web

from runner import errors
from runner.config import DeploymentConfig, SimulatorConfig, TransportKind
from runner.simulator import Simulator
from runner.transports import open_transport
from runner.transports.direct import DirectTransport
from runner.transports.litellm import LiteLLMTransport
from runner.types import (
    Client,
    EmbeddingRequest,
    Embeddings,
    Endpoint,
    Generation,
    GenerationRequest,
    Request,
    Response,
    TokenUsage,
    Transcript,
    TranscriptionRequest,
)

KEY = "sk-a-key-that-nobody-may-see"
CHAT = GenerationRequest(input="Tell me something.")
EMBED = EmbeddingRequest(texts=["a", "b"])
SPEECH = TranscriptionRequest(audio=b"RIFF....WAVE", filename="talk.wav")
ENDPOINTS = list(Endpoint)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Serve = Callable[[Handler], Awaitable[str]]


class Connect(Protocol):
    def __call__(self, api_base: str, **options: Any) -> Client: ...


def direct(api_base: str, model: str = "m", **options: Any) -> DirectTransport:
    return DirectTransport(model=model, api_base=api_base, **options)


def litellm(api_base: str, model: str = "m", **options: Any) -> LiteLLMTransport:
    name = model if "/" in model else f"hosted_vllm/{model}"
    return LiteLLMTransport(model=name, api_base=api_base, **options)


@functools.cache
def warm_litellm() -> None:
    """Let LiteLLM import what it needs for its first call, which takes longer than some tests wait."""

    async def call() -> None:
        async with Simulator(SimulatorConfig(latency_s=0.0)) as simulator:
            client = litellm(simulator.url, api_key=KEY)
            await client.send(CHAT)
            await client.aclose()

    asyncio.run(call())


@pytest.fixture(params=[direct, litellm], ids=["direct", "litellm"])
async def connect(request: pytest.FixtureRequest) -> AsyncIterator[Connect]:
    """Opens the transport under test, and closes it in the end."""
    opened: list[Client] = []
    if request.param is litellm:
        await asyncio.to_thread(warm_litellm)

    def open_it(api_base: str, **options: Any) -> Client:
        opened.append(request.param(api_base, **{"api_key": KEY, "timeout_s": 10, **options}))
        return opened[-1]

    yield open_it
    for client in opened:
        await client.aclose()


@pytest.fixture
async def simulator() -> AsyncIterator[Simulator]:
    async with Simulator(SimulatorConfig(latency_s=0.002, api_key=KEY)) as simulator:
        yield simulator


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Starts servers that answer every request as a test wants; their base URL ends in ``/v1``."""
    runners: list[web.AppRunner] = []

    async def start(handler: Handler) -> str:
        app = web.Application(client_max_size=2**24)
        app.router.add_route("*", "/{path:.*}", handler)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        runners.append(runner)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{runner.addresses[0][1]}/v1"

    yield start
    for runner in runners:
        await runner.cleanup()


@pytest.fixture
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.endswith(("_API_KEY", "_API_BASE")):
            monkeypatch.delenv(name)


def answering(body: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> Handler:
    """A server that always answers the same: JSON, or bytes as they are."""
    payload = body if isinstance(body, bytes) else json.dumps(body).encode()

    async def handler(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(status=status, body=payload, content_type="application/json", headers=headers)

    return handler


class Recorder:
    """A server that answers well, and remembers what it was asked."""

    def __init__(self) -> None:
        self.requests: list[web.BaseRequest] = []
        self.bodies: list[Any] = []

    async def answer(self, request: web.Request) -> web.Response:
        self.requests.append(request)
        self.bodies.append(await request.json())
        return web.json_response(chat_body())


def chat_body(**changes: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": "Hello."}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], **changes}


async def failure(client: Client, request: Request = CHAT) -> errors.RequestError:
    with pytest.raises(errors.RequestError) as caught:
        await client.send(request)
    return caught.value


def assert_presentable(error: errors.RequestError) -> None:
    """One line of prose: no key, no traceback, none of LiteLLM's prefixes."""
    assert len(str(error).splitlines()) == 1
    assert KEY not in str(error)
    assert not re.search(r"litellm\.\w+Error|Exception - |Traceback", str(error))


async def ledger(simulator: Simulator) -> dict[str, Any]:
    url = simulator.url.removesuffix("/v1") + "/ledger"
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        totals: dict[str, Any] = await answer.json()
        return totals


def clients_tasks() -> set[asyncio.Task[Any]]:
    """Every task but those of the servers in this process."""
    servers = ("RequestHandler.", "BaseRequestHandler.")
    return {
        task for task in asyncio.all_tasks() if not getattr(task.get_coro(), "__qualname__", "").startswith(servers)
    }


def generation(response: Response) -> Generation:
    assert isinstance(response.output, Generation)
    return response.output


# Answers


@pytest.mark.parametrize("endpoint", ENDPOINTS)
async def test_a_prompt_is_answered(connect: Connect, simulator: Simulator, endpoint: Endpoint) -> None:
    response = await connect(simulator.url).send(GenerationRequest(input="Tell me something.", endpoint=endpoint))
    output = generation(response)
    assert len(output.text) > 20
    assert output.finish_reason == "stop"
    assert not output.tool_calls
    assert not output.choices
    assert response.model_id == "m"
    assert response.request_id
    usage = response.usage
    assert usage is not None
    assert usage.prompt_tokens > 0
    assert usage.completion_tokens > 10
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.reasoning_tokens == usage.cached_tokens == 0


@pytest.mark.parametrize(
    "request_",
    [
        CHAT,
        GenerationRequest(input=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi."}]),
        GenerationRequest(input="Hi.", endpoint=Endpoint.text_completion),
        GenerationRequest(input={"input": "Hi.", "instructions": "Be brief."}, endpoint=Endpoint.responses),
        GenerationRequest(input="Hi.", params={"response_format": {"type": "json_object"}}),
        EmbeddingRequest(texts=["a", "b"]),
    ],
    ids=["chat", "system", "text", "responses", "json", "embed"],
)
async def test_both_transports_give_the_same_answer(simulator: Simulator, request_: Request) -> None:
    clients = direct(simulator.url, api_key=KEY), litellm(simulator.url, api_key=KEY)
    one, other = [await client.send(request_) for client in clients]
    for client in clients:
        await client.aclose()
    assert one.output == other.output
    assert one.usage == other.usage
    assert one.model_id == other.model_id


async def test_details_of_an_answer_arrive(connect: Connect, serve: Serve) -> None:
    usage = {
        "prompt_tokens": 9,
        "completion_tokens": 7,
        "total_tokens": 16,
        "prompt_tokens_details": {"cached_tokens": 4},
        "completion_tokens_details": {"reasoning_tokens": 5},
    }
    message = {"role": "assistant", "content": "Hello.", "reasoning_content": "Greeting."}
    body = chat_body(choices=[{"index": 0, "message": message, "finish_reason": "length"}], usage=usage)
    headers = {"X-Request-ID": "req_7", "x-ratelimit-remaining-tokens": "99"}
    response = await connect(await serve(answering(body, headers=headers))).send(CHAT)
    assert generation(response).reasoning == "Greeting."
    assert generation(response).finish_reason == "length"
    assert response.request_id == "req_7"
    assert response.usage == TokenUsage(
        prompt_tokens=9, completion_tokens=7, total_tokens=16, reasoning_tokens=5, cached_tokens=4
    )
    assert {"x-request-id": "req_7", "x-ratelimit-remaining-tokens": "99"}.items() <= dict(response.headers).items()


async def test_a_refusal_is_the_text_where_there_is_no_other(connect: Connect, serve: Serve) -> None:
    message = {"role": "assistant", "content": None, "refusal": "I cannot."}
    body = chat_body(choices=[{"index": 0, "message": message, "finish_reason": "stop"}])
    assert generation(await connect(await serve(answering(body))).send(CHAT)).text == "I cannot."


@pytest.mark.parametrize(
    ("endpoint", "name"),
    [
        (Endpoint.chat_completion, "max_tokens"),
        (Endpoint.text_completion, "max_tokens"),
        (Endpoint.responses, "max_output_tokens"),
    ],
)
async def test_a_cut_answer_says_so(connect: Connect, simulator: Simulator, endpoint: Endpoint, name: str) -> None:
    request = GenerationRequest(input="Tell me something.", endpoint=endpoint, params={name: 16})
    response = await connect(simulator.url).send(request)
    assert generation(response).finish_reason == "length"
    assert response.usage is not None
    assert response.usage.completion_tokens == 16


async def test_several_choices_are_all_returned(connect: Connect, simulator: Simulator) -> None:
    request = GenerationRequest(input="Tell me something.", params={"n": 2})
    output = generation(await connect(simulator.url).send(request))
    texts = [choice["message"]["content"] for choice in output.choices]
    assert texts[0] == output.text
    assert len(set(texts)) == 2


async def test_tool_calls_are_returned(connect: Connect, simulator: Simulator) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    tool = {"type": "function", "function": {"name": "weather", "parameters": schema}}
    request = GenerationRequest(input="Rain?", params={"tools": [tool], "tool_choice": "required"})
    output = generation(await connect(simulator.url).send(request))
    (call,) = output.tool_calls
    assert call.id
    assert call.name == "weather"
    assert json.loads(call.arguments or "").keys() == {"city"}
    assert output.finish_reason == "tool_calls"


async def test_texts_are_embedded_in_their_order(connect: Connect, simulator: Simulator) -> None:
    client = connect(simulator.url)
    response = await client.send(EmbeddingRequest(texts=["a", "b", "c"]))
    alone = await client.send(EmbeddingRequest(texts=["c"]))
    assert isinstance(response.output, Embeddings)
    assert isinstance(alone.output, Embeddings)
    assert [len(vector) for vector in response.output.vectors] == [16, 16, 16]
    assert response.output.vectors[2] == pytest.approx(alone.output.vectors[0])
    assert response.usage == TokenUsage(prompt_tokens=3, total_tokens=3)


@pytest.mark.parametrize("endpoint", [Endpoint.chat_completion, Endpoint.responses])
async def test_the_providers_quota_is_reported(connect: Connect, simulator: Simulator, endpoint: Endpoint) -> None:
    simulator.configure({"rpm": 100})
    response = await connect(simulator.url).send(GenerationRequest(input="Hi.", endpoint=endpoint))
    assert response.headers["x-ratelimit-limit-requests"] == "100"
    assert response.headers["x-ratelimit-remaining-requests"] == "99"


# Streams


def streamed(endpoint: Endpoint = Endpoint.chat_completion, **params: Any) -> GenerationRequest:
    return GenerationRequest(input="Tell me something.", endpoint=endpoint, params={"stream": True, **params})


def text_chunk(text: str, finish_reason: str | None = None) -> dict[str, Any]:
    """A piece of an answer, of a chat's and of a text completion's."""
    delta = {"role": "assistant", "content": text}
    choice = {"index": 0, "delta": delta, "text": text, "finish_reason": finish_reason}
    return {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}


def streaming(*events: Any, ends: bool = True) -> Handler:
    """A server that sends ``events``, each in a part of its own, and then ends its answer, or does not."""

    async def handler(request: web.Request) -> web.StreamResponse:
        await request.read()
        response = web.StreamResponse(headers={"content-type": "text/event-stream", "x-request-id": "req_7"})
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            for event in events:
                payload = event if isinstance(event, bytes) else json.dumps(event).encode()
                await response.write(b"data: %b\n\n" % payload)
                await asyncio.sleep(0.001)
            if not ends:
                await asyncio.sleep(60)
        return response

    return handler


@pytest.mark.parametrize("endpoint", ENDPOINTS)
async def test_a_streamed_answer_says_what_the_whole_one_says(
    connect: Connect, simulator: Simulator, endpoint: Endpoint
) -> None:
    client = connect(simulator.url)
    whole = GenerationRequest(input="Tell me something.", endpoint=endpoint)
    in_pieces = streamed(endpoint)
    one, other = await client.send(whole), await client.send(in_pieces)
    assert other.output == one.output
    assert other.usage == one.usage
    assert other.model_id == one.model_id
    assert other.request_id
    assert other.usage is not None
    times = list(in_pieces.trace.chunk_times)
    assert len(times) == other.usage.completion_tokens
    assert times == sorted(times)
    assert in_pieces.trace.ttft_s == times[0] > 0
    assert whole.trace.ttft_s is None
    assert not whole.trace.chunk_times


async def test_the_times_of_a_stream_are_the_servers(connect: Connect, simulator: Simulator) -> None:
    simulator.configure({"ttft_s": 0.05, "itl_s": 0.01})
    client = connect(simulator.url)
    for endpoint in ENDPOINTS:
        request = streamed(endpoint, max_output_tokens=16) if endpoint is Endpoint.responses else streamed(endpoint)
        await client.send(request)
        times = request.trace.chunk_times
        assert request.trace.ttft_s is not None
        assert request.trace.ttft_s >= 0.045
        assert times[-1] >= 0.045 + 0.008 * (len(times) - 1)
        assert times[-1] > times[0]


async def test_several_choices_are_streamed(connect: Connect, simulator: Simulator) -> None:
    output = generation(await connect(simulator.url).send(streamed(n=2)))
    texts = [choice["message"]["content"] for choice in output.choices]
    assert texts[0] == output.text
    assert len(set(texts)) == 2


@pytest.mark.parametrize("endpoint", [Endpoint.chat_completion, Endpoint.responses])
async def test_tool_calls_are_streamed(connect: Connect, simulator: Simulator, endpoint: Endpoint) -> None:
    function = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
    tool = {"type": "function", "function": function}
    if endpoint is Endpoint.responses:
        tool = {"type": "function", **function}
    request = streamed(endpoint, tools=[tool], tool_choice="required")
    output = generation(await connect(simulator.url).send(request))
    (call,) = output.tool_calls
    assert call.id
    assert call.name == "weather"
    assert json.loads(call.arguments or "").keys() == {"city"}
    assert output.finish_reason == "tool_calls"


async def test_reasoning_is_streamed(connect: Connect, serve: Serve) -> None:
    delta = {"role": "assistant", "reasoning_content": "Greeting."}
    thought = {**text_chunk(""), "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
    usage = {"prompt_tokens": 9, "completion_tokens": 7, "total_tokens": 16}
    usage |= {"completion_tokens_details": {"reasoning_tokens": 5}, "prompt_tokens_details": {"cached_tokens": 4}}  # type: ignore[dict-item]
    end = {**text_chunk(""), "choices": [], "usage": usage}
    url = await serve(streaming(thought, text_chunk("Hello.", "length"), end, b"[DONE]"))
    response = await connect(url).send(streamed())
    assert response.output == Generation(text="Hello.", finish_reason="length", reasoning="Greeting.")
    assert response.usage == TokenUsage(
        prompt_tokens=9, completion_tokens=7, total_tokens=16, reasoning_tokens=5, cached_tokens=4
    )
    assert response.request_id == "req_7"


HALF, END = text_chunk("Hel"), text_chunk("lo.", "stop")


@pytest.mark.parametrize("endpoint", [Endpoint.chat_completion, Endpoint.text_completion])
@pytest.mark.parametrize(
    ("events", "outcome"),
    [
        pytest.param([HALF, END, b"[DONE]"], "Hello.", id="whole"),
        pytest.param([HALF, END], "Hello.", id="no-mark"),
        pytest.param([HALF, b"[DONE]"], "Hel", id="no-reason"),
        pytest.param([HALF, END, b'{"cho', b"[DONE]"], "Hello.", id="broken-after"),
        pytest.param([HALF], errors.APIConnectionError, id="cut"),
        pytest.param([], errors.RequestError, id="nothing"),
        pytest.param([HALF, b'{"cho', END, b"[DONE]"], errors.APIResponseError, id="broken"),
        pytest.param([HALF, {"error": {"message": "boom", "code": 500}}], errors.APIResponseError, id="error"),
        pytest.param([{"error": {"type": "insufficient_quota"}}], errors.InsufficientQuotaError, id="quota"),
        pytest.param([b"[" * 100_000], errors.APIResponseError, id="deep"),
        pytest.param([HALF, b"\xff\xff"], errors.APIResponseError, id="not-utf8"),
    ],
)
async def test_a_stream_is_whole_or_an_error(
    connect: Connect, serve: Serve, endpoint: Endpoint, events: list[Any], outcome: str | type[errors.RequestError]
) -> None:
    client = connect(await serve(streaming(*events)))
    if isinstance(outcome, str):
        assert generation(await client.send(streamed(endpoint))).text == outcome
    else:
        error = await failure(client, streamed(endpoint))
        assert isinstance(error, outcome)
        assert_presentable(error)
        if outcome in (errors.APIConnectionError, errors.APIResponseError):
            assert error.billing == "unknown"


@pytest.mark.parametrize("content_type", ["text/event-stream", "text/html", "application/json"])
async def test_a_page_in_place_of_a_stream_is_no_answer(connect: Connect, serve: Serve, content_type: str) -> None:
    client = connect(await serve(pieces(b"<html>Bad gateway</html>", content_type=content_type)))
    for endpoint in ENDPOINTS:
        assert_presentable(await failure(client, streamed(endpoint)))


async def test_a_server_that_does_not_stream_is_understood(connect: Connect, serve: Serve) -> None:
    request = streamed()
    response = await connect(await serve(answering(chat_body()))).send(request)
    assert generation(response).text == "Hello."
    assert not request.trace.chunk_times
    assert request.trace.ttft_s is None


@pytest.mark.parametrize("events", [[HALF, END, b"[DONE]"], [HALF, END]], ids=["end mark", "no end mark"])
async def test_a_stream_that_never_ends_costs_no_answer(connect: Connect, serve: Serve, events: list[Any]) -> None:
    client = connect(await serve(streaming(*events, ends=False)), timeout_s=0.5)
    async with asyncio.timeout(5):
        assert generation(await client.send(streamed())).text == "Hello."


async def test_a_stream_that_stops_is_a_timeout(connect: Connect, serve: Serve) -> None:
    client = connect(await serve(streaming(HALF, ends=False)), timeout_s=0.3)
    request = streamed()
    assert type(await failure(client, request)) is errors.Timeout
    assert len(request.trace.chunk_times) == 1


async def test_a_cancelled_stream_leaves_nothing_behind(connect: Connect, simulator: Simulator) -> None:
    simulator.configure({"ttft_s": 0.0, "itl_s": 10.0})
    client = connect(simulator.url)
    before = clients_tasks()
    task = asyncio.create_task(client.send(streamed()))
    async with asyncio.timeout(5):
        while (await ledger(simulator))["in_service"] == 0:
            pass
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while (await ledger(simulator))["abandoned"] == 0:  # the server sees the connection close
            pass
    assert clients_tasks() <= before


# Structured output


SCHEMA = {"type": "object", "properties": {"answer": {"type": "string"}}, "required": ["answer"]}
LAYOUT = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("endpoint", ENDPOINTS)
async def test_a_schema_reaches_the_server(
    connect: Connect, simulator: Simulator, endpoint: Endpoint, stream: bool
) -> None:
    params = {"response_format": LAYOUT, "stream": stream}
    request = GenerationRequest(input="Hi.", endpoint=endpoint, params=params)
    output = generation(await connect(simulator.url).send(request))
    assert json.loads(output.text).keys() == {"answer"}
    assert request.params == {"response_format": LAYOUT, "stream": stream}


# Transcripts


@pytest.mark.parametrize(
    ("layout", "text", "details"),
    [
        (None, "echo: talk.wav", (None, None)),
        ("json", "echo: talk.wav", (None, None)),
        ("verbose_json", "echo: talk.wav", ("de", 0.5)),
        ("text", "echo: talk.wav", (None, None)),
        ("srt", "1\n00:00:00,000 --> 00:00:00,500\necho: talk.wav", (None, None)),
        ("vtt", "WEBVTT\n\n00:00:00.000 --> 00:00:00.500\necho: talk.wav", (None, None)),
    ],
)
async def test_speech_is_transcribed(
    connect: Connect, simulator: Simulator, layout: str | None, text: str, details: tuple[str | None, float | None]
) -> None:
    params = {"language": "de"} | ({"response_format": layout} if layout else {})
    request = TranscriptionRequest(audio=bytes(8000), filename="talk.wav", params=params)  # half a second of MP3
    response = await connect(simulator.url, model="echo").send(request)
    language, duration_s = details
    assert response.output == Transcript(text=text, language=language, duration_s=duration_s)
    assert response.model_id == "echo"
    assert response.request_id
    in_tokens = TokenUsage(prompt_tokens=5, completion_tokens=4, total_tokens=9)
    assert response.usage == (in_tokens if layout in (None, "json") else None)


async def test_a_recording_arrives_as_a_file(connect: Connect, serve: Serve) -> None:
    files: list[tuple[str, str, bytes]] = []

    async def keep(request: web.Request) -> web.Response:
        file = (await request.post())["file"]
        assert isinstance(file, web.FileField)
        files.append((file.filename, file.content_type, file.file.read()))
        return web.json_response({"text": "Hello."})

    audio = bytes(range(256)) * 8000  # 2 MB
    await connect(await serve(keep)).send(TranscriptionRequest(audio=audio, filename="talk one.mp3"))
    assert files == [("talk one.mp3", "audio/mpeg", audio)]


@pytest.mark.parametrize(
    ("body", "transcript"),
    [
        ({"text": None}, Transcript(text="")),
        ({"text": "a", "duration": "2.5", "language": None}, Transcript(text="a", duration_s=2.5)),
        ({"text": "a", "usage": {"type": "duration", "seconds": 3}}, Transcript(text="a", duration_s=3.0)),
        ({"text": "a", "duration": "soon", "language": ""}, Transcript(text="a")),
        ({"text": "a", "duration": -1, "usage": {"prompt_tokens": "x"}}, Transcript(text="a")),
    ],
)
async def test_odd_transcripts_are_read(
    connect: Connect, serve: Serve, body: dict[str, Any], transcript: Transcript
) -> None:
    assert (await connect(await serve(answering(body))).send(SPEECH)).output == transcript


async def test_a_transcript_in_invalid_utf8_is_read(connect: Connect, serve: Serve) -> None:
    request = TranscriptionRequest(audio=b"x", params={"response_format": "text"})
    response = await connect(await serve(pieces(b"caf\xe9\n", content_type="text/plain"))).send(request)
    assert response.output == Transcript(text="caf\ufffd")


# Requests


async def test_parameters_headers_and_the_key_reach_the_server(connect: Connect, serve: Serve) -> None:
    recorder = Recorder()
    params = {"temperature": 0.25, "seed": 7, "extra_body": {"guided_choice": ["a"]}, "extra_headers": {"X-Team": "t"}}
    conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi."}]
    await connect(await serve(recorder.answer)).send(GenerationRequest(input=conversation, params=params))
    assert recorder.bodies == [
        {"model": "m", "messages": conversation, "temperature": 0.25, "seed": 7, "guided_choice": ["a"]}
    ]
    headers = recorder.requests[0].headers
    assert recorder.requests[0].path == "/v1/chat/completions"
    assert headers["x-team"] == "t"
    assert headers["authorization"] == f"Bearer {KEY}"


async def test_a_requests_parameters_go_before_the_deployments(connect: Connect, serve: Serve) -> None:
    recorder = Recorder()
    client = connect(await serve(recorder.answer), params={"temperature": 0.1, "seed": 1})
    await client.send(GenerationRequest(input="Hi.", params={"temperature": 0.9}))
    assert recorder.bodies[0]["temperature"] == 0.9
    assert recorder.bodies[0]["seed"] == 1


def every_kind() -> list[Request]:
    """A request of each kind, for each endpoint, streamed and whole."""
    generations = [
        GenerationRequest(input="Tell me something.", endpoint=endpoint, params={"stream": True} if stream else {})
        for endpoint in ENDPOINTS
        for stream in (False, True)
    ]
    return [*generations, EMBED, SPEECH]


@pytest.mark.parametrize("fault", ["http_500", "reset", "truncated", "invalid_json", "error_200"])
async def test_a_failed_request_is_sent_once(connect: Connect, simulator: Simulator, fault: str) -> None:
    simulator.configure({"faults": {fault: 1.0}})
    client = connect(simulator.url, params={"max_retries": 5, "num_retries": 5})
    requests = every_kind()
    for request in requests:
        await failure(client, request)
    assert (await ledger(simulator))["requests"] == len(requests)


async def test_nothing_but_the_caller_bounds_the_requests_in_flight(connect: Connect, serve: Serve) -> None:
    arrived, many = 0, 120  # more than the pools of aiohttp and httpx hold
    everyone = asyncio.Event()

    async def wait_for_everyone(request: web.Request) -> web.Response:
        nonlocal arrived
        arrived += 1
        if arrived == many:
            everyone.set()
        await everyone.wait()
        return web.json_response(chat_body())

    client = connect(await serve(wait_for_everyone))
    assert len(await asyncio.gather(*(client.send(CHAT) for _ in range(many)))) == many


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        (Endpoint.chat_completion, chat_body()),
        (Endpoint.text_completion, {"id": "c", "model": "m", "choices": [{"index": 0, "text": "Hello."}]}),
    ],
)
async def test_one_connection_serves_one_request_after_the_other(
    connect: Connect, serve: Serve, endpoint: Endpoint, body: dict[str, Any]
) -> None:
    peers = set()

    async def note(request: web.Request) -> web.Response:
        assert request.transport is not None
        peers.add(request.transport.get_extra_info("peername"))
        return web.json_response(body)

    client = connect(await serve(note))
    for _ in range(3):
        await client.send(GenerationRequest(input="Hi.", endpoint=endpoint))
    assert len(peers) == 1


async def test_plain_http_to_a_host_elsewhere_is_warned_of_once(
    connect: Connect, simulator: Simulator, caplog: pytest.LogCaptureFixture
) -> None:
    host = f"{connect('http://localhost/v1').__class__.__name__}.invalid".lower()
    for _ in range(2):
        assert type(await failure(connect(f"http://{host}/v1"))) is errors.ConnectError
    await connect(simulator.url).send(CHAT)
    warnings = [record.message for record in caplog.records if record.name.startswith("runner.")]
    assert len(warnings) == 1
    assert host in warnings[0]
    assert KEY not in caplog.text


# Failures


FAULTS = [
    ("http_429", errors.RateLimitError, 429),
    ("http_500", errors.InternalServerError, 500),
    ("http_502", errors.InternalServerError, 502),
    ("http_503", errors.ServiceUnavailableError, 503),
    ("http_529", errors.ServiceUnavailableError, 529),
    ("reset", errors.APIConnectionError, None),
    ("truncated", errors.APIConnectionError, None),
    ("invalid_json", errors.APIResponseError, 200),
    ("error_200", errors.APIResponseError, None),
]


@pytest.mark.parametrize(("fault", "kind", "status"), FAULTS, ids=[fault for fault, _, _ in FAULTS])
async def test_each_fault_has_its_class_and_status(
    connect: Connect, simulator: Simulator, fault: str, kind: type[errors.RequestError], status: int | None
) -> None:
    simulator.configure({"faults": {fault: 1.0}})
    client = connect(simulator.url)
    for request in every_kind():
        error = await failure(client, request)
        assert (type(error), error.status) == (kind, status)
        assert error.retry_after_s == (0.02 if fault == "http_429" else None)
        assert_presentable(error)


@pytest.mark.parametrize(
    ("status", "detail", "kind"),
    [
        (400, {}, errors.BadRequestError),
        (400, {"message": "rate limit of 429 words"}, errors.BadRequestError),
        (400, {"code": "context_length_exceeded"}, errors.ContextWindowExceededError),
        (400, {"message": "This model's maximum context length is 9 tokens."}, errors.ContextWindowExceededError),
        (400, {"code": "content_filter"}, errors.ContentPolicyViolationError),
        (401, {}, errors.AuthenticationError),
        (402, {}, errors.InsufficientQuotaError),
        (403, {}, errors.PermissionDeniedError),
        (404, {"code": "model_not_found", "type": "invalid_request_error"}, errors.NotFoundError),
        (408, {}, errors.Timeout),
        (409, {}, errors.ConflictError),
        (413, {}, errors.RequestTooLargeError),
        (422, {}, errors.BadRequestError),
        (429, {"code": "insufficient_quota"}, errors.InsufficientQuotaError),
        (504, {}, errors.InternalServerError),
    ],
)
async def test_each_refusal_has_its_class_and_keeps_its_words(
    connect: Connect, serve: Serve, status: int, detail: dict[str, str], kind: type[errors.RequestError]
) -> None:
    body = {"error": {"message": "The server says no.", "type": "some_error", "param": None, "code": None} | detail}
    headers = {"Retry-After": "1.5", "x-request-id": "req_7"}
    error = await failure(connect(await serve(answering(body, status=status, headers=headers))))
    assert type(error) is kind
    assert error.status == status
    assert error.retry_after_s == 1.5
    assert error.headers["x-request-id"] == "req_7"
    assert str(error) == f"HTTP {status}: {body['error']['message']}"


async def test_a_wrong_key_is_refused_and_not_repeated(connect: Connect, simulator: Simulator) -> None:
    error = await failure(connect(simulator.url, api_key="sk-wrong-key"))
    assert type(error) is errors.AuthenticationError
    assert error.status == 401
    assert "sk-wrong-key" not in str(error)


async def test_a_key_that_the_server_repeats_is_blotted_out(connect: Connect, serve: Serve) -> None:
    async def repeat(request: web.Request) -> web.Response:
        return web.json_response({"error": {"message": f"no {request.headers['authorization']} here"}}, status=401)

    assert str(await failure(connect(await serve(repeat)))) == "HTTP 401: no Bearer *** here"


async def test_no_message_repeats_the_key(connect: Connect, serve: Serve) -> None:
    """Not those of answers that cannot be read, nor those that name the address."""
    echo = json.dumps({"choices": None, "data": f"Bearer {KEY}"}).encode()
    handlers = [
        answering(echo),
        answering(KEY.encode()),
        pieces(b"data: {%b\n\n" % echo, content_type="text/event-stream"),
    ]
    for handler in handlers:
        client = connect(await serve(handler))
        for request in every_kind():
            with contextlib.suppress(errors.RequestError):
                await client.send(request)
                continue
            assert KEY not in str(await failure(client, request))


async def test_no_message_repeats_the_password_in_an_address(serve: Serve) -> None:
    url = (await serve(answering(b""))).replace("://", "://me:hunter2@")
    for address in (url, "http://me:hunter2@127.0.0.1:1/v1"):
        client = direct(address)
        assert "hunter2" not in str(await failure(client))
        await client.aclose()
    with pytest.raises(errors.ConfigError, match="leave one of them out") as caught:
        direct(url, api_key=KEY)
    assert "hunter2" not in str(caught.value)


async def test_a_key_sent_as_a_header_is_blotted_out_too(serve: Serve) -> None:
    async def repeat(request: web.Request) -> web.Response:
        return web.json_response({"error": {"message": f"no {request.headers['authorization']} here"}}, status=401)

    client = direct(await serve(repeat))
    headers = {"Authorization": f"Bearer {KEY}"}
    error = await failure(client, GenerationRequest(input="Hi.", params={"extra_headers": headers}))
    assert str(error) == "HTTP 401: no Bearer *** here"
    await client.aclose()


async def test_a_placeholder_for_a_key_spoils_no_message(connect: Connect, serve: Serve) -> None:
    body = {"error": {"message": "none of these", "code": "insufficient_quota"}}
    error = await failure(connect(await serve(answering(body, status=429)), api_key="none"))
    assert type(error) is errors.InsufficientQuotaError
    assert str(error) == "HTTP 429: none of these"


async def test_an_unknown_path_is_not_found(connect: Connect, simulator: Simulator) -> None:
    error = await failure(connect(simulator.url + "/nowhere"))
    assert type(error) is errors.NotFoundError
    assert error.status == 404


async def test_an_address_that_ends_too_early_or_too_late_is_shown_as_it_is_probably_meant(serve: Serve) -> None:
    url = (await serve(answering({"detail": "Not Found"}, status=404))).removesuffix("/v1")
    right = f"; perhaps its api_base is {url}/v1"
    hints = {"": right, "/": right, "/v1": "", "/v1beta/ai": "", "/v1/chat/completions": right, "/completions/": right}
    for path, hint in hints.items():
        client = direct(f"{url}{path}")
        assert str(await failure(client)) == f"HTTP 404: Not Found{hint}"
        await client.aclose()


async def test_silence_is_a_timeout(connect: Connect, simulator: Simulator) -> None:
    simulator.configure({"faults": {"hang": 1.0}})
    error = await failure(connect(simulator.url, timeout_s=0.05))
    assert type(error) is errors.Timeout
    assert str(error) == f"no answer from {simulator.url} within 0.05 s"


async def test_a_requests_own_timeout_counts(connect: Connect, simulator: Simulator) -> None:
    simulator.configure({"faults": {"hang": 1.0}})
    error = await failure(connect(simulator.url), GenerationRequest(input="Hi.", timeout_s=0.05))
    assert type(error) is errors.Timeout


async def trickle(request: web.Request) -> web.StreamResponse:
    """A server that goes on and on, and never comes to the point."""
    response = web.StreamResponse(headers={"content-type": "application/json"})
    await response.prepare(request)
    while True:
        await response.write(b" ")
        await asyncio.sleep(0.01)


async def test_a_trickle_is_no_answer_in_time(connect: Connect, serve: Serve) -> None:
    client = connect(await serve(trickle), timeout_s=0.1)
    async with asyncio.timeout(5):
        assert type(await failure(client)) is errors.Timeout


@pytest.mark.parametrize("endpoint", ENDPOINTS)
async def test_where_nobody_listens_nothing_is_sent(connect: Connect, endpoint: Endpoint) -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}/v1"
        error = await failure(connect(url), GenerationRequest(input="Hi.", endpoint=endpoint))
    assert type(error) is errors.ConnectError
    assert url in str(error)


async def test_a_server_without_tls_is_no_connection(connect: Connect, simulator: Simulator) -> None:
    error = await failure(connect(simulator.url.replace("http:", "https:")))
    assert isinstance(error, errors.APIConnectionError)


async def test_a_cancelled_request_leaves_nothing_behind(connect: Connect, serve: Serve) -> None:
    arrived, over = asyncio.Event(), asyncio.Event()

    async def hang(request: web.Request) -> web.Response:
        arrived.set()
        await over.wait()
        return web.Response()

    client = connect(await serve(hang))
    before = clients_tasks()
    task = asyncio.create_task(client.send(CHAT))
    await arrived.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert clients_tasks() <= before
    over.set()


async def test_an_answered_request_leaves_no_task_behind(connect: Connect, simulator: Simulator) -> None:
    client = connect(simulator.url)
    before = clients_tasks()
    for endpoint in ENDPOINTS:
        await client.send(GenerationRequest(input="Hi.", endpoint=endpoint))
    await asyncio.sleep(0.01)
    assert clients_tasks() <= before


async def test_an_error_from_before_is_not_taken_for_this_one(connect: Connect, simulator: Simulator) -> None:
    client = connect(simulator.url)
    simulator.configure({"faults": {"http_503": 1.0}})
    try:
        await client.send(CHAT)
    except errors.ServiceUnavailableError:
        simulator.configure({"faults": {"http_503": 0.0, "invalid_json": 1.0}})
        assert type(await failure(client)) is errors.APIResponseError


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_an_error_and_takes_no_key_along(connect: Connect, serve: Serve, status: int) -> None:
    elsewhere = Recorder()
    other = await serve(elsewhere.answer)
    location = other.replace("//", "//me:hunter2@") + "/chat/completions?token=hunter3"
    client = connect(await serve(answering(b"", status=status, headers={"location": location})))
    for request in every_kind():
        error = await failure(client, request)
        assert type(error) is errors.NotFoundError
        assert error.status == status
        assert f"sends on to {other}/chat/completions, and" in str(error)
    assert not elsewhere.requests


async def test_a_closed_transport_sends_nothing(connect: Connect, simulator: Simulator) -> None:
    client = connect(simulator.url)
    await client.aclose()
    with pytest.raises(RuntimeError):
        await client.send(CHAT)


# Hostile answers: a correct result or an error of the tree, and never anything else


def text_body(**changes: Any) -> dict[str, Any]:
    return {"id": "c", "model": "m", "choices": [{"index": 0, "text": "Hello.", "finish_reason": "stop"}], **changes}


def responses_body(**changes: Any) -> dict[str, Any]:
    content = [{"type": "output_text", "text": "Hello.", "annotations": []}]
    item = {"type": "message", "id": "msg", "role": "assistant", "status": "completed", "content": content}
    body = {"id": "r", "object": "response", "created_at": 1, "model": "m", "status": "completed", "output": [item]}
    return {**body, **changes}


def embeddings_body(**changes: Any) -> dict[str, Any]:
    data = [{"object": "embedding", "index": index, "embedding": [0.5, index]} for index in range(2)]
    return {"object": "list", "model": "m", "data": data, **changes}


def transcript_body(**changes: Any) -> dict[str, Any]:
    return {"text": "Hello.", **changes}


GOOD: dict[str, tuple[Request, Callable[..., dict[str, Any]]]] = {
    "chat": (CHAT, chat_body),
    "completion": (GenerationRequest(input="Hi.", endpoint=Endpoint.text_completion), text_body),
    "responses": (GenerationRequest(input="Hi.", endpoint=Endpoint.responses), responses_body),
    "embedding": (EMBED, embeddings_body),
    "transcript": (SPEECH, transcript_body),
}
"""Of each kind a request, and what makes a good answer to it."""


def bytes_of(body: Any) -> bytes:
    return json.dumps(body).encode()


def hostile() -> Iterator[tuple[str, str, bytes]]:
    """Bad answers: what they answer, what is bad about them, and their bytes."""
    odd: Any
    for kind, (_, body) in GOOD.items():
        whole = bytes_of(body())
        yield kind, "nothing", b""
        yield kind, "no JSON", b"<html>Bad gateway</html>"
        yield kind, "half JSON", whole[: len(whole) // 2]
        yield kind, "null", b"null"
        yield kind, "list", b"[1]"
        yield kind, "number", b"17"
        yield kind, "nothing in it", b"{}"
        yield kind, "invalid UTF-8", whole.replace(b"Hello", b"Hell\xff")
        yield kind, "lone surrogate", whole.replace(b"Hello", rb"Hell\ud800")
        yield kind, "byte order mark", b"\xef\xbb\xbf" + whole
        yield kind, "deep array", b"[" * 100_000 + b"]" * 100_000
        yield kind, "deep object", b'{"choices":' * 900 + b"1" + b"}" * 900
        yield kind, "odd model", bytes_of(body(model={"a": 1}, id=[]))
        yield kind, "no totals", bytes_of(body(usage={"prompt_tokens": 3}))
        yield kind, "string counts", bytes_of(body(usage={"prompt_tokens": "3", "completion_tokens": "x"}))
        yield kind, "negative counts", bytes_of(body(usage={"prompt_tokens": -3, "completion_tokens": -1}))
        yield kind, "huge counts", bytes_of(body(usage={"prompt_tokens": 10**30, "total_tokens": 1e300}))
        yield kind, "NaN counts", bytes_of(body(usage={"prompt_tokens": float("nan")}))
        yield kind, "odd usage", bytes_of(body(usage=[3]))
        for field in ("choices", "output", "data", "text"):
            if field in body():
                for odd in ([], None, [None], {}, 3, "x", [[]], [{}]):
                    yield kind, f"{field}={odd}", bytes_of(body(**{field: odd}))
    for message in (None, {"content": None}, {"content": {"a": [1]}}, {"tool_calls": [{"function": 3}]}, "x"):
        yield "chat", f"message={message}", bytes_of(chat_body(choices=[{"index": 0, "message": message}]))
    yield "chat", "odd finish", bytes_of(chat_body(choices=[{"message": {"content": "a"}, "finish_reason": [1]}]))
    for text in (None, 3, ["x"]):
        yield "completion", f"text={text}", bytes_of(text_body(choices=[{"index": 0, "text": text}]))
    for content in (None, [], [None], "x", [{"type": "output_text", "text": None}]):
        yield (
            "responses",
            f"content={content}",
            bytes_of(responses_body(output=[{"type": "message", "content": content}])),
        )
    for vector in (None, [], "x", "AAAA", ["0.5", "1"], [None], {"a": 1}, 3):
        data = [{"index": index, "embedding": vector} for index in ("0", 1)]
        yield "embedding", f"embedding={vector}", bytes_of(embeddings_body(data=data))
    yield "embedding", "one too few", bytes_of(embeddings_body(data=[{"index": 0, "embedding": [0.5]}]))


@pytest.mark.parametrize("kind", GOOD)
async def test_a_hostile_answer_is_read_or_refused(connect: Connect, serve: Serve, kind: str) -> None:
    payloads: list[bytes] = []

    async def answer(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(body=payloads[-1], content_type="application/json")

    client = connect(await serve(answer))
    for of_kind, name, payload in hostile():
        if of_kind == kind:
            payloads.append(payload)
            try:
                response = await client.send(GOOD[kind][0])
            except errors.RequestError as error:
                assert_presentable(error)
            except Exception as bug:
                raise AssertionError(f"{name}: {bug!r}") from bug
            else:
                assert_sound(response)


def assert_sound(response: Response) -> None:
    """Everything is of its type, and every count can be stored."""
    match response.output:
        case Generation() as output:
            assert isinstance(output.text, str)
        case Embeddings() as output:
            assert len(output.vectors) == 2
            assert {type(value) for vector in output.vectors for value in vector} <= {float, int}
        case Transcript() as output:
            assert isinstance(output.text, str)
    usage = response.usage or TokenUsage()
    assert 0 <= usage.prompt_tokens < 2**53
    assert 0 <= usage.total_tokens < 2**53


@pytest.mark.parametrize("kind", GOOD)
@pytest.mark.parametrize(
    "usage",
    [{"prompt_tokens": 3}, {"prompt_tokens": "3", "completion_tokens": "x"}, {"total_tokens": None}, None],
    ids=str,
)
async def test_a_paid_answer_is_not_lost_over_its_usage(serve: Serve, kind: str, usage: dict[str, Any] | None) -> None:
    request, body = GOOD[kind]
    client = direct(await serve(answering(body(usage=usage))))
    response = await client.send(request)
    await client.aclose()
    said = response.output.vectors if isinstance(response.output, Embeddings) else response.output.text
    assert said in ("Hello.", ([0.5, 0.0], [0.5, 1.0]))


@pytest.mark.parametrize("status", [200, 429, 500])
@pytest.mark.parametrize("kind", GOOD)
async def test_nonsense_in_headers_breaks_nothing(connect: Connect, serve: Serve, status: int, kind: str) -> None:
    headers = {
        "retry-after": "soon",
        "retry-after-ms": "NaN",
        "x-ratelimit-remaining-requests": "-1",
        "x-ratelimit-reset-requests": "0s0s0q",
        "x-ratelimit-remaining-tokens": "0",
        "x-ratelimit-reset-tokens": "99999999999999999999d",
    }
    request, body = GOOD[kind]
    client = connect(await serve(answering(body(), status=status, headers=headers)))
    if status == 200:
        response = await client.send(request)
        assert headers.items() <= dict(response.headers).items()
    else:
        error = await failure(client, request)
        assert error.status == status
        assert error.retry_after_s is None


async def test_headers_outside_ascii_break_nothing(connect: Connect, serve: Serve) -> None:
    headers = {"x-ratelimit-limit-requests": "∞", "x-request-id": "\u00ff"}
    client = connect(await serve(answering(chat_body(), headers=headers)))
    with contextlib.suppress(errors.RequestError):
        assert generation(await client.send(CHAT)).text == "Hello."


async def test_the_environments_proxy_is_used(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    async def proxy(request: web.Request) -> web.Response:
        asked.append(str(request.url))
        return web.json_response({"choices": [{"message": {"content": "by proxy"}}]})

    monkeypatch.setenv("http_proxy", (await serve(proxy)).removesuffix("/v1"))
    monkeypatch.setenv("no_proxy", "other.test")
    client = direct("http://models.test/v1")
    response = await client.send(CHAT)
    await client.aclose()

    assert response.output == Generation(text="by proxy")
    assert asked == ["http://models.test/v1/chat/completions"]


def pieces(body: bytes, *, content_type: str = "application/json") -> Handler:
    """A server that does not say how long its answer is."""

    async def handler(request: web.Request) -> web.StreamResponse:
        await request.read()
        response = web.StreamResponse(headers={"content-type": content_type})
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            for start in range(0, len(body), 2**14):
                await response.write(body[start : start + 2**14])
        return response

    return handler


async def test_an_oversized_answer_is_refused(connect: Connect, serve: Serve) -> None:
    body = json.dumps(chat_body(padding="x" * 300_000)).encode()
    endless = b"data: " + body * 3
    streamed = GenerationRequest(input="Hi.", params={"stream": True})
    for handler, request in (
        (answering(body), CHAT),
        (pieces(body), CHAT),
        (pieces(endless, content_type="text/event-stream"), streamed),
        (pieces(b"x" * 300_000, content_type="text/plain"), SPEECH),
        (answering(body, status=500), CHAT),
    ):
        client = connect(await serve(handler), max_response_bytes=100_000)
        error = await failure(client, request)
        assert type(error) is errors.APIResponseError
        assert "larger than 100,000 bytes" in str(error)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_compressed_answer_is_read(connect: Connect, serve: Serve, stream: bool) -> None:
    body = b"data: %b\n\ndata: [DONE]\n\n" % json.dumps(text_chunk("Hello.")).encode() if stream else None
    payload = gzip.compress(body or json.dumps(chat_body()).encode())

    async def pack(request: web.Request) -> web.Response:
        headers = {"content-encoding": "gzip", "content-type": "text/event-stream" if stream else "application/json"}
        return web.Response(body=payload, headers=headers)

    request = GenerationRequest(input="Hi.", params={"stream": stream})
    assert generation(await connect(await serve(pack)).send(request)).text == "Hello."


@pytest.mark.parametrize(
    "damage", [lambda packed: packed[:-20], lambda packed: packed[:30] + bytes(30) + packed[60:]], ids=["cut", "zeros"]
)
async def test_a_broken_packing_is_no_answer(connect: Connect, serve: Serve, damage: Callable[[bytes], bytes]) -> None:
    payload = damage(gzip.compress(json.dumps(chat_body(noise=list(range(1000)))).encode()))
    error = await failure(connect(await serve(answering(payload, headers={"content-encoding": "gzip"}))))
    assert isinstance(error, errors.APIConnectionError | errors.APIResponseError)
    assert error.billing == "unknown"


async def test_a_compressed_bomb_is_refused_before_it_is_unpacked(connect: Connect, serve: Serve) -> None:
    bomb = gzip.compress(bytes(100 * 2**20), compresslevel=1)
    client = connect(await serve(answering(bomb, headers={"content-encoding": "gzip"})), max_response_bytes=2**20)
    await failure(client)  # warm
    tracemalloc.start()
    error = await failure(client)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert isinstance(error, errors.APIResponseError | errors.APIConnectionError)
    assert peak < 50 * 2**20


# LiteLLM's own


@pytest.mark.parametrize(
    ("model", "hint"),
    [("opnai/gpt", "Did you mean 'openai'?"), ("qqqq/gpt", "https://docs.litellm.ai/docs/providers")],
)
def test_an_unknown_provider_is_refused_with_the_nearest_name(model: str, hint: str) -> None:
    with pytest.raises(errors.ConfigError) as caught:
        LiteLLMTransport(model=model, api_key=KEY)
    provider = model.partition("/")[0]
    assert str(caught.value).startswith(f"unknown provider {provider!r} in model={model!r}.")
    assert hint in str(caught.value)


@pytest.mark.usefixtures("no_keys")
@pytest.mark.parametrize(
    ("model", "variable"),
    [
        ("anthropic/claude", "ANTHROPIC_API_KEY"),
        ("gemini/gemini-2.5-pro", "GEMINI_API_KEY"),
        ("groq/x", "GROQ_API_KEY"),
    ],
)
def test_a_missing_key_is_named(model: str, variable: str) -> None:
    with pytest.raises(errors.ConfigError, match=variable) as caught:
        LiteLLMTransport(model=model)
    assert repr(model) in str(caught.value)


@pytest.mark.usefixtures("no_keys")
@pytest.mark.parametrize(
    "options",
    [
        {"model": "anthropic/claude", "api_key": KEY},
        {"model": "anthropic/claude", "api_base": "http://localhost"},
        {"model": "anthropic/claude", "params": {"api_key": KEY}},
        {"model": "bedrock/anthropic.claude"},
        {"model": "vertex_ai/gemini-2.5-pro"},
        {"model": "ollama/llama3"},
        {"model": "hosted_vllm/m"},
    ],
    ids=str,
)
def test_other_credentials_than_a_key_in_the_environment_suffice(options: dict[str, Any]) -> None:
    LiteLLMTransport(**options)


@pytest.mark.usefixtures("no_keys")
def test_a_key_in_the_environment_suffices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    LiteLLMTransport(model="anthropic/claude")


async def test_another_providers_wire_ends_in_the_same_response(serve: Serve) -> None:
    answer = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "claude-x",
        "content": [{"type": "text", "text": "Hello."}],
        "stop_reason": "end_turn",
        "usage": {"input_tokens": 5, "cache_read_input_tokens": 4, "output_tokens": 2},
    }
    headers = {"request-id": "req_9", "anthropic-ratelimit-requests-remaining": "12"}
    url = await serve(answering(answer, headers=headers))
    client = litellm(url.removesuffix("/v1"), model="anthropic/claude-x", api_key=KEY)
    response = await client.send(CHAT)
    assert generation(response) == Generation(text="Hello.", finish_reason="stop")
    assert response.usage is not None
    assert (response.usage.prompt_tokens, response.usage.cached_tokens) == (9, 4)
    assert response.headers["anthropic-ratelimit-requests-remaining"] == "12"
    assert response.model_id == "claude-x"
    assert response.request_id == "req_9"
    await client.aclose()


def anthropic_events(*kinds: str) -> Handler:
    message = {"id": "msg_1", "type": "message", "role": "assistant", "model": "claude-x", "content": []}
    events: dict[str, dict[str, Any]] = {
        "message_start": {"message": {**message, "usage": {"input_tokens": 5, "output_tokens": 1}}},
        "content_block_start": {"index": 0, "content_block": {"type": "text", "text": ""}},
        "content_block_delta": {"index": 0, "delta": {"type": "text_delta", "text": "Hello."}},
        "content_block_stop": {"index": 0},
        "message_delta": {"delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 3}},
        "message_stop": {},
        "error": {"error": {"type": "overloaded_error", "message": "Overloaded"}},
    }
    return streaming(*({"type": kind, **events[kind]} for kind in kinds))


ANTHROPIC = ("message_start", "content_block_start", "content_block_delta", "content_block_stop")


async def test_another_providers_stream_ends_in_the_same_response(serve: Serve) -> None:
    url = await serve(anthropic_events(*ANTHROPIC, "message_delta", "message_stop"))
    client = litellm(url.removesuffix("/v1"), model="anthropic/claude-x", api_key=KEY)
    request = streamed()
    response = await client.send(request)
    assert generation(response) == Generation(text="Hello.", finish_reason="stop")
    assert response.usage is not None
    assert (response.usage.prompt_tokens, response.usage.completion_tokens) == (5, 3)
    assert response.request_id == "req_7"
    assert len(request.trace.chunk_times) == 1
    assert request.trace.ttft_s == request.trace.chunk_times[0]
    await client.aclose()


async def test_another_providers_stream_that_fails_is_an_error(serve: Serve) -> None:
    url = await serve(anthropic_events(*ANTHROPIC, "error"))
    client = litellm(url.removesuffix("/v1"), model="anthropic/claude-x", api_key=KEY)
    error = await failure(client, streamed())
    assert "Overloaded" in str(error)
    assert error.billing == "unknown"
    assert_presentable(error)
    await client.aclose()


async def test_a_redirect_takes_no_key_of_another_provider_along(serve: Serve) -> None:
    elsewhere = Recorder()
    other = await serve(elsewhere.answer)
    url = await serve(answering(b"", status=307, headers={"location": other}))
    client = litellm(url.removesuffix("/v1"), model="anthropic/claude-x", api_key=KEY)
    for request in (CHAT, streamed()):
        assert type(await failure(client, request)) is errors.NotFoundError
    assert not elsewhere.requests
    await client.aclose()


async def test_litellm_itself_is_left_alone(serve: Serve) -> None:
    """Calls of LiteLLM beside ours are not guarded."""
    recorder = Recorder()
    other = await serve(recorder.answer)
    url = await serve(answering(b"", status=307, headers={"location": other + "/chat/completions"}))
    client = litellm(url)
    answer = await importlib.import_module("litellm").acompletion(
        model="hosted_vllm/m", api_base=url, messages=[{"role": "user", "content": "Hi."}], max_retries=0
    )
    assert answer.choices[0].message.content == "Hello."
    await client.aclose()


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, errors.BadRequestError),
        (413, errors.RequestTooLargeError),
        (529, errors.ServiceUnavailableError),
    ],
)
async def test_another_providers_errors_keep_their_status(
    serve: Serve, status: int, kind: type[errors.RequestError]
) -> None:
    body = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
    url = await serve(answering(body, status=status, headers={"retry-after": "4"}))
    client = litellm(url.removesuffix("/v1"), model="anthropic/claude-x", api_key=KEY)
    error = await failure(client)
    assert type(error) is kind
    assert error.status == status
    assert error.retry_after_s == 4.0
    assert str(error) == f"HTTP {status}: Overloaded"
    await client.aclose()


async def test_openais_sdk_below_litellm_behaves_no_differently(simulator: Simulator) -> None:
    client = litellm(simulator.url, model="openai/m", api_key=KEY)
    for endpoint in ENDPOINTS:
        assert generation(await client.send(GenerationRequest(input="Hi.", endpoint=endpoint))).text
    for fault, kind, status in FAULTS:
        simulator.configure({"faults": {**{name: 0.0 for name, _, _ in FAULTS}, fault: 1.0}})
        before = (await ledger(simulator))["requests"]
        error = await failure(client)
        assert (type(error), error.status) == (kind, status)
        assert (await ledger(simulator))["requests"] == before + 1
    await client.aclose()


async def test_a_trickle_through_openais_sdk_is_no_answer_in_time(serve: Serve) -> None:
    client = litellm(await serve(trickle), model="openai/m", api_key=KEY, timeout_s=0.1)
    async with asyncio.timeout(5):
        assert type(await failure(client)) is errors.Timeout
    await client.aclose()


async def test_litellm_knows_more_providers_words_for_a_full_context(serve: Serve) -> None:
    body = {"error": {"message": "The input token count (9) exceeds the maximum number of tokens allowed (8)."}}
    client = litellm(await serve(answering(body, status=400, headers={"retry-after": "1"})))
    error = await failure(client)
    assert type(error) is errors.ContextWindowExceededError
    assert (error.status, error.retry_after_s) == (400, 1.0)
    await client.aclose()


async def test_a_parameter_that_the_provider_does_not_take_is_a_bad_request(simulator: Simulator) -> None:
    client = litellm(simulator.url, model="openai/m", api_key=KEY)
    error = await failure(client, EmbeddingRequest(texts=["a"], params={"dimensions": 2}))
    assert type(error) is errors.BadRequestError
    assert "dimensions" in str(error)
    assert_presentable(error)
    await client.aclose()


@pytest.mark.parametrize(
    ("name", "status", "headers", "kind"),
    [
        ("RateLimitError", 429, {"retry-after": "3"}, errors.RateLimitError),
        ("ServiceUnavailableError", 503, {"retry-after": "3"}, errors.ServiceUnavailableError),
        ("ContextWindowExceededError", None, {}, errors.ContextWindowExceededError),
        ("AuthenticationError", None, {}, errors.AuthenticationError),
        ("BadGatewayError", None, {}, errors.InternalServerError),
        ("Timeout", None, {}, errors.Timeout),
        ("APIConnectionError", None, {}, errors.APIConnectionError),
    ],
)
async def test_exceptions_without_an_http_answer_are_told_by_their_names(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    status: int | None,
    headers: dict[str, str],
    kind: type[errors.RequestError],
) -> None:
    module = importlib.import_module("litellm")

    async def fail(**_: Any) -> None:
        error = getattr(module, name)(f"AcmeException - No {KEY}.", model="m", llm_provider="acme")
        error.litellm_response_headers = headers
        raise error

    client = LiteLLMTransport(model="hosted_vllm/m", api_key=KEY)
    monkeypatch.setattr(module, "acompletion", fail)
    error = await failure(client)
    assert type(error) is kind
    assert error.status == status
    assert error.retry_after_s == (3.0 if headers else None)
    assert str(error) == "No ***."
    await client.aclose()


async def test_a_package_that_the_provider_needs_is_a_matter_of_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(**_: Any) -> None:
        raise ImportError("Missing boto3 to call bedrock. Run 'pip install boto3'.", name="boto3")

    client = LiteLLMTransport(model="bedrock/m")
    monkeypatch.setattr(importlib.import_module("litellm"), "acompletion", fail)
    with pytest.raises(errors.ConfigError, match="pip install boto3"):
        await client.send(CHAT)
    await client.aclose()


async def test_closing_one_transport_leaves_the_others_open(simulator: Simulator) -> None:
    one, other = litellm(simulator.url, api_key=KEY), litellm(simulator.url, api_key=KEY)
    await asyncio.gather(one.send(CHAT), other.send(CHAT))
    under_way = asyncio.create_task(other.send(CHAT))
    await one.aclose()
    assert generation(await under_way).text
    await other.aclose()


# Choosing a transport


def opened(model: str, **options: Any) -> Client:
    return open_transport(DeploymentConfig(model=model, **options), simulator=SimulatorConfig())


@pytest.mark.usefixtures("no_keys")
@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"model": "hosted_vllm/m", "api_base": "http://localhost:8000/v1"}, DirectTransport),
        ({"model": "openai/m", "api_key": KEY}, DirectTransport),
        ({"model": "openai/m", "api_base": "http://localhost:8000/v1"}, DirectTransport),
        ({"model": "llamafile/m"}, DirectTransport),
        ({"model": "openai/m", "api_key": KEY, "transport": TransportKind.litellm}, LiteLLMTransport),
        ({"model": "anthropic/claude", "api_key": KEY}, LiteLLMTransport),
    ],
    ids=str,
)
def test_the_provider_decides_the_transport(options: dict[str, Any], kind: type) -> None:
    assert isinstance(opened(**options), kind)


@pytest.mark.usefixtures("no_keys")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "hosted_vllm/m"}, "HOSTED_VLLM_API_BASE"),
        ({"model": "openai/m"}, "OPENAI_API_KEY"),
        ({"model": "openai/m", "api_key_env": "MY_KEY"}, "MY_KEY"),
        ({"model": "anthropic/m", "transport": TransportKind.direct}, "transport=direct"),
        ({"model": "opnai/m"}, "Did you mean 'openai'?"),
    ],
    ids=str,
)
def test_a_deployment_that_cannot_be_served_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(errors.ConfigError, match=re.escape(message)):
        opened(**options)


async def test_the_simulated_provider_needs_no_server() -> None:
    client = opened("simulated/echo")
    first, second = await asyncio.gather(client.send(CHAT), client.send(CHAT))
    assert generation(first).text == generation(second).text == "echo: Tell me something."
    await client.aclose()


def test_the_direct_path_never_imports_litellm() -> None:
    code = (
        "import sys, runner.transports.direct, runner.transports.litellm, runner.transports as transports;"
        "from runner.config import DeploymentConfig, SimulatorConfig;"
        "deployment = DeploymentConfig(model='hosted_vllm/m', api_base='http://h/v1');"
        "transports.open_transport(deployment, simulator=SimulatorConfig());"
        "assert not {'litellm', 'openai', 'httpx'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
