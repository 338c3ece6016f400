from __future__ import annotations

import asyncio
import contextlib
import inspect
import io
import logging
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from pydantic import BaseModel

from harness import Asked, refusal, serving
from runner import BatchResult, DeploymentConfig, LMClient, image_block
from runner.config import FaultsConfig, SimulatorConfig
from runner.errors import (
    AuthenticationError,
    BadRequestError,
    ConfigError,
    InsufficientQuotaError,
    InternalServerError,
    RequestError,
    RequestTooLargeError,
    RowError,
    Timeout,
)

FAST = SimulatorConfig(latency_s=0.001, latency_spread=0.0)


def echo(**options: object) -> LMClient:
    return LMClient(**{"model": "simulated/echo", "simulator": FAST, **options})  # type: ignore[arg-type]


@pytest.fixture
def client() -> Iterator[LMClient]:
    with echo() as client:
        yield client


def test_one_prompt_is_answered_with_usage_and_metrics(client: LMClient) -> None:
    result = client.generate("hello")

    assert result.output_text == "echo: hello"
    assert result.finish_reason == "stop"
    assert result.request_id
    assert result.token_usage is not None
    assert result.token_usage.total_tokens == result.token_usage.prompt_tokens + result.token_usage.completion_tokens
    assert result.metrics is not None
    assert result.metrics.deployment == "simulated/echo"
    assert result.metrics.retries == 0
    assert result.metrics.cost_usd is not None
    assert 0 < result.metrics.service_time_s <= result.metrics.end_to_end_s


def test_messages_are_a_conversation(client: LMClient) -> None:
    conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]

    assert client.generate(conversation).output_text == "echo: hello"


def test_messages_may_hold_images(client: LMClient) -> None:
    content = [{"type": "text", "text": "what is this?"}, image_block(b"\x89PNG", mime_type="image/png")]

    assert client.generate([{"role": "user", "content": content}]).output_text == "echo: what is this?"


def test_a_responses_input_has_instructions(client: LMClient) -> None:
    result = client.generate({"input": "hello", "instructions": "Be brief."}, endpoint="responses")

    assert result.output_text == "echo: hello"
    assert result.raw_response["object"] == "response"  # type: ignore[index]


def test_a_result_is_its_text(client: LMClient) -> None:
    result = client.generate("hello")

    assert str(result) == "echo: hello"
    assert result.cost == result.metrics.cost_usd  # type: ignore[union-attr]
    assert result.raw_response["choices"][0]["message"]["content"] == "echo: hello"  # type: ignore[index]


def test_several_choices_are_all_there(client: LMClient) -> None:
    result = client.generate("hello", n=3)

    assert [choice["message"]["content"] for choice in result.choices] == ["echo: hello"] * 3


def test_a_tool_call_is_read(client: LMClient) -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}

    result = client.generate("add", tools=[tool], tool_choice="required")

    assert [call.name for call in result.tool_calls] == ["add"]
    assert result.finish_reason == "tool_calls"


def test_an_input_that_the_endpoint_does_not_take_fails_alone(client: LMClient) -> None:
    batch = client.generate_batch(["a", None, {"input": "b"}, [{"content": "c"}], "d"])  # type: ignore[list-item]

    assert [result is not None for result in batch] == [True, False, False, False, True]
    assert all(isinstance(error, RowError) for error in batch.errors[1:4])


def test_a_batch_shows_how_many_there_are_and_not_what_they_say() -> None:
    failed: BatchResult[str] = BatchResult(
        results=["long " * 1000, None, None, None], errors=[None, Timeout("x"), Timeout("y"), RowError("z")]
    )
    fine: BatchResult[int] = BatchResult(results=[0] * 1200, errors=[None] * 1200)

    assert repr(failed) == "BatchResult(1 result, 3 errors: 2 Timeout, 1 RowError)"
    assert repr(fine) == "BatchResult(1,200 results, 0 errors)"


@pytest.mark.parametrize("endpoint", ["chat_completion", "text_completion", "responses"])
def test_each_endpoint_answers(client: LMClient, endpoint: str) -> None:
    assert client.generate("hello", endpoint=endpoint).output_text == "echo: hello"  # type: ignore[arg-type]


def test_arguments_of_the_call_go_before_those_of_the_client() -> None:
    with echo(default_request_kwargs={"max_tokens": 1}) as client:
        short = client.generate("one two three four five six seven")
        long = client.generate("one two three four five six seven", max_tokens=50)

    assert short.finish_reason == "length"
    assert long.finish_reason == "stop"


def test_a_batch_keeps_the_order_of_its_inputs(client: LMClient) -> None:
    prompts = [f"prompt {n}" for n in range(300)]

    batch = client.generate_batch(prompts)

    assert [result.output_text for result in batch if result] == [f"echo: {prompt}" for prompt in prompts]
    assert batch.errors == [None] * 300


def test_a_generator_is_read_as_it_is_needed() -> None:
    read = 0
    ahead: list[int] = []

    def prompts() -> Iterator[str]:
        nonlocal read
        for n in range(2000):
            read += 1
            yield f"prompt {n}"

    with echo(max_parallel_requests=4) as client:
        batch = client.generate_batch(prompts(), on_progress=lambda settled, total: ahead.append(read - settled))

    assert len(batch) == 2000
    assert max(ahead) < 200


def test_a_failed_input_is_none_and_its_error_is_beside_it() -> None:
    simulator = SimulatorConfig(latency_s=0.001, faults=FaultsConfig(http_500=0.5), seed=1)
    with echo(simulator=simulator, max_retries=0) as client:
        batch = client.generate_batch([f"prompt {n}" for n in range(40)])

    failed = [index for index, result in enumerate(batch) if result is None]
    assert 0 < len(failed) < 40
    for index, error in enumerate(batch.errors):
        assert isinstance(error, InternalServerError) == (index in failed)


def test_failures_that_pass_are_retried() -> None:
    simulator = SimulatorConfig(latency_s=0.001, faults=FaultsConfig(http_429=0.3), seed=1)
    with echo(simulator=simulator, max_retries=8) as client:
        batch = client.generate_batch([f"prompt {n}" for n in range(20)])

    assert batch.errors == [None] * 20
    assert sum(result.metrics.retries for result in batch if result and result.metrics) > 0


def test_without_return_exceptions_the_first_failure_is_raised() -> None:
    simulator = SimulatorConfig(latency_s=0.001, faults=FaultsConfig(http_500=1.0))
    with echo(simulator=simulator, max_retries=0) as client, pytest.raises(InternalServerError):
        client.generate_batch(["a", "b"], return_exceptions=False)


def test_each_result_is_handed_out_as_it_settles(client: LMClient) -> None:
    seen: dict[int, str] = {}
    progress: list[tuple[int, int]] = []

    client.generate_batch(
        ["a", "b", "c"],
        on_result=lambda index, result, error: seen.update({index: result.output_text if result else str(error)}),
        on_progress=lambda settled, total: progress.append((settled, total)),
    )

    assert seen == {0: "echo: a", 1: "echo: b", 2: "echo: c"}
    assert progress == [(1, 3), (2, 3), (3, 3)]


async def test_an_asynchronous_iterable_is_a_batch_too() -> None:
    async def prompts() -> AsyncIterator[str]:
        for n in range(3):
            await asyncio.sleep(0)
            yield f"prompt {n}"

    async with echo() as client:
        batch = await client.agenerate_batch(prompts())

    assert [str(result) for result in batch] == [f"echo: prompt {n}" for n in range(3)]


def test_a_large_batch_makes_few_tasks_and_holds_few_inputs() -> None:
    class Prompt(str):
        pass

    alive: weakref.WeakSet[Prompt] = weakref.WeakSet()
    inputs, tasks = [0], [0]

    def prompts() -> Iterator[str]:
        for n in range(3000):
            prompt = Prompt(f"prompt {n}")
            alive.add(prompt)
            inputs.append(len(alive))
            yield prompt

    with echo() as client:
        batch = client.generate_batch(prompts(), on_progress=lambda *_: tasks.append(len(asyncio.all_tasks())))

    assert batch.errors == [None] * 3000
    assert max(inputs) < 600
    assert max(tasks) < 600


@pytest.mark.parametrize("inputs", ["one prompt", b"bytes", {"input": "hello"}, 7, None])
def test_one_input_is_no_batch(client: LMClient, inputs: Any) -> None:
    for method in (client.generate_batch, client.embed_batch, client.transcribe_batch):
        with pytest.raises(ConfigError, match="pass a list"):
            method(inputs)


def test_an_empty_batch_is_empty(client: LMClient) -> None:
    assert len(client.generate_batch([])) == 0


def test_a_wrong_key_is_an_error_of_the_request() -> None:
    with (
        echo(simulator=SimulatorConfig(latency_s=0.001, api_key="right"), api_key="wrong-key-of-mine") as client,
        pytest.raises(AuthenticationError) as caught,
    ):
        client.generate("hello")

    assert isinstance(caught.value, RequestError)
    assert "wrong-key-of-mine" not in str(caught.value)


def test_a_request_that_hangs_ends_at_the_default_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.transports.DEFAULT_TIMEOUT_S", 0.1)
    hanging = SimulatorConfig(faults=FaultsConfig(hang=1.0))
    with LMClient(model="simulated/echo", simulator=hanging, max_retries=0) as client:
        batch = client.generate_batch(["hello"])

    assert type(batch.errors[0]).__name__ == "Timeout"


def test_the_number_of_requests_at_once_can_be_found_out() -> None:
    slotted = SimulatorConfig(latency_s=0.02, slots=16)
    with LMClient(model="simulated/echo", simulator=slotted, max_parallel_requests="auto") as client:
        batch = client.generate_batch(f"prompt {n}" for n in range(200))
        single = client.generate("hello")

    assert batch.errors == [None] * 200
    assert single.output_text == "echo: hello"


def test_a_timeout_of_the_call_is_obeyed() -> None:
    with echo(simulator=SimulatorConfig(latency_s=5.0), max_retries=0) as client:
        batch = client.generate_batch(["hello"], timeout=0.05)

    assert type(batch.errors[0]).__name__ == "Timeout"


def test_several_deployments_share_the_requests() -> None:
    deployments = {"a": DeploymentConfig(model="simulated/echo"), "b": {"model": "simulated/echo"}}
    with echo(model="echo", deployments=deployments) as client:
        batch = client.generate_batch([f"prompt {n}" for n in range(60)])

    assert {result.metrics.deployment for result in batch if result and result.metrics} == {"a", "b"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "needs a model"),
        ({"model": "gpt-4.1"}, "has no provider"),
        ({"model": "simulated/echo", "rpm": 0}, "rpm"),
        ({"model": "simulated/echo", "endpoint": "chat"}, "endpoint='chat'"),
        ({"model": "simulated/echo", "deployments": {"a": {"modle": "x"}}}, "modle"),
        ({"model": "simulated/echo", "deployments": {"a": {"model": "x/y", "limits": {"rmp": 1}}}}, "rmp"),
        ({"model": "simulated/echo", "deployments": {"a": {"model": "x/y", "limits": {"rpm": 0}}}}, "rpm=0"),
        ({"model": "simulated/echo", "deployments": {"a": {"model": "x/y", "transport": "post"}}}, "post"),
        ({"model": "simulated/echo", "routing_strategy": "fastest"}, "fastest"),
        ({"model": "simulated/echo", "router_kwargs": {"redis_url": "x"}}, "router_kwargs has 'redis_url'"),
        ({"model": "simulated/echo", "router_kwargs": {"cooldown_time": "1"}}, "cooldown_s='1' is of type str"),
        ({"model": "simulated/echo", "router_kwargs": {"cooldown_time": 0}}, "cooldown_s=0"),
        ({"model": "simulated/echo", "timeout": 0}, "timeout=0"),
        ({"model": "simulated/echo", "max_retries": -1}, "^max_retries=-1: a whole number of at least 0"),
        ({"model": "simulated/echo", "max_retries": None}, "^max_retries=None"),
        ({"model": "simulated/echo", "max_parallel_requests": 0}, "^max_parallel_requests=0: a whole number of at"),
        ({"model": "simulated/echo", "rpm": 0}, "^rpm=0: a number above 0, or None for no limit"),
        ({"model": "hosted_vllm/m", "api_base": "localhost:8000"}, "^api_base='localhost:8000': a URL begins with"),
        ({"model": "hosted_vllm/m", "api_base": 8000}, "^api_base is of type int, and not a text"),
        ({"model": "gpt"}, "^model='gpt' has no provider"),
        ({"model": "simulated/echo", "router_kwargs": "fast"}, "^router_kwargs is of type str: a dictionary, as in"),
        ({"model": "simulated/echo", "simulator": {"seed": 1}}, "^simulator is of type dict"),
        ({"deployments": ["simulated/echo"]}, "^deployments is of type list: a dictionary, as in {'local'"),
        ({"deployments": {"a": "simulated/echo"}}, r"^deployments\['a'\]: it is of type str: a dictionary, as in"),
        ({"deployments": {"a": {"api_base": "http://a/v1"}}}, r"^deployments\['a'\]\.model must be set"),
        ({"deployments": {"a": {"model": "x/y", "limits": 5}}}, r"^deployments\['a'\]\.limits is of type int"),
        ({"model": "simulated/echo", "header_bucket_scope": "hour"}, "header_bucket_scope='hour'"),
        ({"model": "simulated/echo", "default_request_kwargs": {"model": "x"}}, "default_request_kwargs has 'model'"),
        ({"model": "x/y", "api_base": "http://a/v1", "deployments": {"a": {"model": "x/y"}}}, "api_base and api_key"),
    ],
)
def test_arguments_that_cannot_be_used_are_named(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        LMClient(**arguments)  # type: ignore[arg-type]


def test_a_deployment_may_be_plain_data_with_a_price() -> None:
    price = {"prompt": 1e6, "completion": 0}
    with LMClient(deployments={"a": {"model": "simulated/echo", "price": price}}) as client:
        assert client.generate("one two").cost == 2.0


def test_an_argument_without_its_name_and_one_of_another_program_are_shown_with_ours() -> None:
    with pytest.raises(TypeError, match="write the name before 'simulated/echo', as in model='simulated/echo'"):
        LMClient("simulated/echo")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"'base_url'\. Did you mean 'api_base'"):
        LMClient(model="hosted_vllm/m", base_url="http://a/v1")  # type: ignore[call-arg]


def test_several_inputs_for_a_method_of_one_are_shown_the_method_of_many(client: LMClient) -> None:
    texts: Any = ["a", "b"]
    with pytest.raises(RowError, match="generate_batch answers several"):
        client.generate(texts)
    with pytest.raises(RowError, match="embed_batch takes several"):
        client.embed(texts)


def test_what_cannot_be_called_back_is_refused_before_anything_is_sent(client: LMClient) -> None:
    asked: list[str] = []

    def inputs() -> Iterator[str]:
        asked.append("read")
        yield "a"

    for name in ("on_result", "on_progress"):
        options: Any = {name: "print"}
        with pytest.raises(ConfigError, match=f"{name} is of type str, and not a function"):
            client.generate_batch(inputs(), **options)
    assert asked == []


def test_the_routers_options_may_be_given() -> None:
    with echo(router_kwargs={"cooldown_time": 5, "failover": False}) as client:
        assert client.generate("hello").output_text == "echo: hello"


@pytest.mark.parametrize("arguments", [{"api_key": "k"}, {"timeout": -1}, {"endpoint": "chat"}, {"response_format": 1}])
def test_arguments_of_a_call_that_cannot_be_used_are_refused_before_anything_is_sent(
    client: LMClient, arguments: Any
) -> None:
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        client.generate_batch(["a", "b"], **arguments)


# Structured output


class Answer(BaseModel):
    value: int
    confidence: float


def says(text: str) -> Callable[[Asked], web.Response]:
    """A provider that always says ``text``."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return lambda asked: web.json_response({"id": "x", "model": "m", "choices": [choice]})


async def test_a_model_is_asked_for_and_read_back() -> None:
    async with (
        serving(says('{"value": 4, "confidence": 0.99}')) as provider,
        LMClient(model="hosted_vllm/m", api_base=provider.url) as client,
    ):
        result = await client.agenerate("2 + 2", response_format=Answer)

    [asked] = provider.requests
    assert asked.body["response_format"]["json_schema"]["name"] == "Answer"
    assert result.output_parsed == Answer(value=4, confidence=0.99)
    assert result.output_text == '{"value": 4, "confidence": 0.99}'


async def test_a_format_may_be_the_clients() -> None:
    async with (
        serving(says('{"value": 4, "confidence": 1}')) as provider,
        LMClient(
            model="hosted_vllm/m", api_base=provider.url, default_request_kwargs={"response_format": Answer}
        ) as client,
    ):
        batch = await client.agenerate_batch(["2 + 2", "3 + 1"])
        plain = await client.agenerate("2 + 2", response_format={"type": "object"})

    assert [result.output_parsed for result in batch if result] == [Answer(value=4, confidence=1)] * 2
    assert plain.output_parsed == {"value": 4, "confidence": 1}


async def test_an_answer_that_does_not_fit_is_a_warning_and_none(caplog: pytest.LogCaptureFixture) -> None:
    async with (
        serving(says("Four.")) as provider,
        LMClient(model="hosted_vllm/m", api_base=provider.url) as client,
    ):
        with caplog.at_level(logging.WARNING):
            result = await client.agenerate("2 + 2", response_format=Answer)

    assert result.output_text == "Four."
    assert result.output_parsed is None
    assert "does not fit Answer" in caplog.text


def test_a_tool_call_is_no_answer_that_does_not_fit(client: LMClient, caplog: pytest.LogCaptureFixture) -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}

    result = client.generate("add", tools=[tool], tool_choice="required", response_format=Answer)

    assert result.tool_calls
    assert result.output_parsed is None
    assert not caplog.records


async def test_an_answer_may_be_parsed_without_a_format() -> None:
    async with (
        serving(says('{"any": 1}')) as provider,
        LMClient(model="hosted_vllm/m", api_base=provider.url) as client,
    ):
        parsed = await client.agenerate("hello", parse_output=True)
        plain = await client.agenerate("hello")

    assert parsed.output_parsed == {"any": 1}
    assert plain.output_parsed is None
    assert "response_format" not in provider.requests[0].body


# Embeddings


def embeds(asked: Asked) -> web.Response:
    """A provider whose vector of a text is its length, and that refuses what is bad."""
    texts = asked.body["input"]
    if "bad" in texts:
        return refusal(400, "invalid_input")
    data = [{"index": index, "embedding": [len(text)]} for index, text in enumerate(texts)]
    tokens = sum(map(len, texts))
    return web.json_response({"model": "m", "data": data, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}})


def test_a_text_has_a_vector(client: LMClient) -> None:
    result = client.embed("hello")

    assert len(result.embedding) == FAST.embedding_size
    assert client.embed("hello", dimensions=4).embedding != result.embedding
    assert result.token_usage is not None
    assert result.metrics is not None
    assert result.metrics.cost_usd is not None


async def test_texts_share_requests_and_keep_their_order() -> None:
    texts = ["x" * n for n in range(1, 101)]
    async with (
        serving(embeds) as provider,
        LMClient(model="hosted_vllm/m", api_base=provider.url) as client,
    ):
        batch = await client.aembed_batch(iter(texts), micro_batch_size=32)

    assert [result.embedding for result in batch if result] == [[n] for n in range(1, 101)]
    assert sorted(len(asked.body["input"]) for asked in provider.requests) == [4, 32, 32, 32]
    tokens = [result.token_usage.total_tokens for result in batch if result and result.token_usage]
    assert sum(tokens) == sum(map(len, texts))


async def test_a_bad_text_fails_alone() -> None:
    texts: list[Any] = ["a"] * 20
    texts[3], texts[11], texts[12] = "bad", None, 1.5
    told: dict[int, bool] = {}
    progress: list[tuple[int, int]] = []
    async with (
        serving(embeds) as provider,
        LMClient(model="hosted_vllm/m", api_base=provider.url) as client,
    ):
        batch = await client.aembed_batch(
            texts,
            micro_batch_size=8,
            on_result=lambda index, result, error: told.update({index: result is not None}),
            on_progress=lambda settled, total: progress.append((settled, total)),
        )

    assert [index for index, result in enumerate(batch) if result is None] == [3, 11, 12]
    assert isinstance(batch.errors[3], BadRequestError)
    assert isinstance(batch.errors[11], RowError)
    assert told == {index: index not in (3, 11, 12) for index in range(20)}
    assert progress == [(settled, 20) for settled in range(1, 21)]


async def test_each_micro_batch_takes_a_slot() -> None:
    asked: list[int] = []

    def answer(request: Asked) -> web.Response:
        asked.append(len(request.body["input"][0]))
        return embeds(request)

    async with (
        serving(answer) as provider,
        LMClient(model="hosted_vllm/m", api_base=provider.url, max_parallel_requests=1) as client,
    ):
        await client.aembed_batch(["x" * n for n in range(30)], micro_batch_size=2)

    assert asked == list(range(0, 30, 2))


async def test_without_return_exceptions_the_first_bad_text_is_raised() -> None:
    async with (
        serving(embeds) as provider,
        LMClient(model="hosted_vllm/m", api_base=provider.url) as client,
    ):
        with pytest.raises(BadRequestError):
            await client.aembed_batch(["a", "bad", "c"], return_exceptions=False)
        with pytest.raises(BadRequestError):
            await client.aembed("bad")
        with pytest.raises(RowError, match="not a text"):
            await client.aembed(7)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="micro_batch_size=0"):
            await client.aembed_batch(["a"], micro_batch_size=0)


# Transcriptions


def test_a_recording_is_transcribed_from_a_path_from_bytes_and_from_a_file(client: LMClient, tmp_path: Path) -> None:
    path = tmp_path / "talk.wav"
    path.write_bytes(b"sound")

    with path.open("rb") as file:
        batch = client.transcribe_batch([path, str(path), b"sound", file, io.BytesIO(b"sound")])
    single = client.transcribe(path, response_format="verbose_json")

    names = ["talk.wav", "talk.wav", "audio.wav", "talk.wav", "audio.wav"]
    assert [result.text for result in batch if result] == [f"echo: {name}" for name in names]
    assert single.text == "echo: talk.wav"
    assert single.language == "english"
    assert single.duration_s is not None
    assert single.raw_response["task"] == "transcribe"  # type: ignore[index]
    assert single.metrics is not None
    assert single.metrics.deployment == "simulated/echo"


def test_a_recording_that_is_missing_or_too_large_fails_alone(client: LMClient, tmp_path: Path) -> None:
    good, large = tmp_path / "good.wav", tmp_path / "large.wav"
    good.write_bytes(b"sound")
    with large.open("wb") as file:
        file.truncate(26 * 2**20)
    told: list[int] = []

    batch = client.transcribe_batch(
        (each for each in (good, tmp_path / "missing.wav", large, good)), on_result=lambda index, *_: told.append(index)
    )

    assert [result is not None for result in batch] == [True, False, False, True]
    assert isinstance(batch.errors[1], RowError)
    assert isinstance(batch.errors[2], RequestTooLargeError)
    assert sorted(told) == [0, 1, 2, 3]
    assert client.transcribe(large, max_transcription_bytes=None).text == "echo: large.wav"
    with pytest.raises(RequestTooLargeError, match="more than 4 bytes"):
        client.transcribe(b"sound", max_transcription_bytes=4)
    with pytest.raises(RowError, match=r"missing\.wav"):
        client.transcribe_batch([tmp_path / "missing.wav"], return_exceptions=False)


# Loops, threads, endings


async def test_both_twins_work_within_a_running_event_loop() -> None:
    async with echo() as client:
        awaited = await client.agenerate("hello")
        called = client.generate("hello")
        batch = await client.agenerate_batch(["a", "b"])

    assert awaited.output_text == called.output_text == "echo: hello"
    assert [result.output_text for result in batch if result] == ["echo: a", "echo: b"]


def test_one_client_serves_one_event_loop_after_the_other(client: LMClient) -> None:
    async def ask() -> str:
        return (await client.agenerate("hello")).output_text

    assert asyncio.run(ask()) == asyncio.run(ask()) == client.generate("hello").output_text == "echo: hello"


def test_both_twins_take_from_one_quota() -> None:
    with echo(rpd=3) as client:
        for _ in range(3):
            client.generate("hello")
        with pytest.raises(InsufficientQuotaError):
            asyncio.run(client.agenerate("hello"))


def test_many_threads_may_call_at_once(client: LMClient) -> None:
    texts: list[str] = []

    def ask(number: int) -> None:
        texts.append(client.generate(f"from {number}").output_text)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(texts) == sorted(f"echo: from {number}" for number in range(16))


def test_a_closed_client_says_so(client: LMClient) -> None:
    client.generate("hello")
    client.close()
    client.close()

    with pytest.raises(RuntimeError, match="closed"):
        client.generate("hello")
    with pytest.raises(RuntimeError, match="closed"):
        asyncio.run(client.agenerate("hello"))


async def test_a_client_that_is_closed_synchronously_lets_go_of_the_running_loop_too() -> None:
    with echo() as client:
        await client.agenerate("hello")
        client.generate("hello")

    await asyncio.sleep(0)
    others = asyncio.all_tasks() - {asyncio.current_task()}
    await asyncio.wait(others, timeout=10)
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.parametrize("ending", ["", "del client; import gc; gc.collect()", "client.close()"])
def test_a_client_that_nobody_closes_ends_in_silence(ending: str) -> None:
    code = f"""
from runner import LMClient
client = LMClient(model="simulated/echo")
print(client.generate("hello").output_text)
{ending}
"""
    command = [sys.executable, "-W", "always::ResourceWarning:asyncio", "-X", "dev", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    assert (done.returncode, done.stdout) == (0, "echo: hello\n")
    assert "nclosed" not in done.stderr
    assert "Traceback" not in done.stderr


class Unexpected(Exception):
    pass


@pytest.mark.parametrize("kind", [Unexpected, SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize("callback", ["on_result", "on_progress"])
def test_what_a_callback_raises_ends_the_batch_and_the_client_goes_on(
    client: LMClient, callback: str, kind: type[BaseException]
) -> None:
    def fail(*_: object) -> None:
        raise kind

    calls: dict[str, Any] = {callback: fail}
    with pytest.raises(kind):
        client.generate_batch([f"prompt {n}" for n in range(300)], **calls)
    with pytest.raises(kind):
        client.embed_batch([f"text {n}" for n in range(300)], **calls)

    assert client.generate("hello").output_text == "echo: hello"


def test_an_iterable_that_fails_ends_the_batch() -> None:
    def prompts() -> Iterator[str]:
        yield "a"
        raise Unexpected

    with echo() as client, pytest.raises(Unexpected):
        client.generate_batch(prompts())


async def test_waiting_for_a_slot_counts_as_waiting() -> None:
    async with echo(simulator=SimulatorConfig(latency_s=0.02), max_parallel_requests=1) as client:
        first, second = await asyncio.gather(client.agenerate("a"), client.agenerate("b"))

    assert first.metrics is not None
    assert second.metrics is not None
    assert second.metrics.queue_wait_s >= 0.5 * first.metrics.service_time_s
    assert second.metrics.end_to_end_s >= second.metrics.queue_wait_s + second.metrics.service_time_s - 1e-3


def test_a_synchronous_call_from_a_callback_is_refused_and_not_deadlocked(client: LMClient) -> None:
    with pytest.raises(RuntimeError, match="callback"):
        client.generate_batch(["a"], on_result=lambda index, result, error: print(client.generate("b")))


def test_a_client_from_before_a_fork_says_so() -> None:
    code = (
        "import asyncio, os\n"
        "from runner import LMClient\n"
        "client = LMClient(model='simulated/echo')\n"
        "client.generate('hello')\n"
        "if os.fork() == 0:\n"
        "    for ask in client.generate, lambda text: asyncio.run(client.agenerate(text)):\n"
        "        try:\n"
        "            ask('hello')\n"
        "        except RuntimeError as error:\n"
        "            print(error, flush=True)\n"
        "    os._exit(0)\n"
        "os.wait()\n"
        "client.close()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)

    assert done.stdout.count("before a fork") == 2


def test_ctrl_c_ends_a_synchronous_batch_and_all_its_requests() -> None:
    read, told = [0], [0]
    begun = threading.Event()

    def prompts() -> Iterator[str]:
        for n in range(100_000):
            read[0] = n
            if n == 300:
                begun.set()
            yield f"prompt {n}"

    def count(*_: object) -> None:
        told[0] += 1

    def interrupt() -> None:
        begun.wait()
        os.kill(os.getpid(), signal.SIGINT)

    with echo(simulator=SimulatorConfig(latency_s=0.2)) as client, ThreadPoolExecutor() as pool:
        pool.submit(interrupt)
        with pytest.raises(KeyboardInterrupt):
            client.generate_batch(prompts(), on_result=count)
        settled = told[0]
        assert client.generate("hello").output_text == "echo: hello"

    assert told[0] == settled
    assert read[0] < 2000


@pytest.mark.parametrize(
    "name", ["generate", "generate_batch", "embed", "embed_batch", "transcribe", "transcribe_batch"]
)
def test_the_synchronous_twin_has_the_signature_and_documentation(name: str) -> None:
    twin, written = getattr(LMClient, name), getattr(LMClient, f"a{name}")

    assert inspect.signature(twin) == inspect.signature(written)
    assert twin.__doc__ == written.__doc__
    assert twin.__name__ == name
    assert not inspect.iscoroutinefunction(twin)


def test_closing_from_another_thread_ends_those_who_wait() -> None:
    client = echo(simulator=SimulatorConfig(latency_s=0.001, faults=FaultsConfig(hang=0.5)), max_retries=0)
    answered, ended = threading.Event(), threading.Event()

    def ask() -> None:
        with contextlib.suppress(BaseException):
            client.generate_batch([f"prompt {n}" for n in range(20)], on_result=lambda *outcome: answered.set())
        ended.set()

    thread = threading.Thread(target=ask)
    thread.start()
    assert answered.wait(10)
    client.close()

    assert ended.wait(10)
    thread.join()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"modle": "simulated/echo"}, r"LMClient\.__init__\(\) got .* 'modle'\. Did you mean 'model'\?"),
        ({"wibble": 1}, r"'wibble'; it takes model, api_base, "),
    ],
)
def test_a_misspelt_argument_is_named_with_the_right_one(options: dict[str, Any], told: str) -> None:
    with pytest.raises(TypeError, match=told):
        LMClient(**options)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            {"routing_strategy": "leastbusy"},
            r"^routing_strategy=leastbusy: .* Did you mean routing_strategy=least-busy\?",
        ),
        ({"rpm": "many"}, "^rpm='many': a number above 0"),
        ({"max_retries": "often"}, r"max_retries='often'"),
        ({"deployments": {"a": {"modle": "simulated/echo"}}}, r"deployments\['a'\]: .* Did you mean 'model'\?"),
        ({"deployments": {"a": {"model": "simulated/echo", "limits": {"rmp": 1}}}}, r"Did you mean 'rpm'\?"),
    ],
)
def test_an_argument_of_no_use_is_named_as_the_caller_wrote_it(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        echo(**options)


def test_a_misspelt_argument_of_a_call_is_not_sent_to_the_server(client: LMClient) -> None:
    with pytest.raises(ConfigError, match="on_resutl: did you mean on_result"):
        client.generate_batch(["hello"], on_resutl=print)
    with pytest.raises(ConfigError, match=r"did you mean temperature\?.* write extra_body=\{'temprature': …\}"):
        client.generate("hello", temprature=0)


async def test_where_nobody_listens_the_first_call_says_so_at_once() -> None:
    async with serving() as server:
        gone = server.url

    async with LMClient(model="hosted_vllm/llama", api_base=gone) as client:
        with pytest.raises(ConfigError, match="nobody listens there: start the server, or correct the address"):
            await client.agenerate_batch(["one", "two"])
