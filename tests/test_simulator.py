"""The simulated provider, over loopback HTTP as its clients see it."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import io
import math
import os
import signal
import socket
import statistics
import sys
import time
import wave
from array import array
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest

from runner.config import FaultsConfig, SimulatorConfig
from runner.errors import ConfigError
from runner.simulator import Simulator
from runner.simulator.__main__ import main
from runner.simulator.document import document_for
from runner.simulator.model import AnswerKey
from runner.simulator.quota import SlidingMinute, duration_text
from runner.simulator.service import Pace, Slots
from runner.simulator.settings import SETTINGS
from runner.simulator.text import filler, tokens_in

CHAT = "/v1/chat/completions"

Json = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Answer:
    status: int
    headers: Any
    body: bytes

    @property
    def json(self) -> Any:
        return orjson.loads(self.body)

    @property
    def message(self) -> str:
        text = self.json["choices"][0]["message"]["content"]
        assert isinstance(text, str)
        return text

    @property
    def events(self) -> list[Any]:
        """The JSON of each streamed event; the last must be the end mark."""
        lines = [line.removeprefix("data: ") for line in self.body.decode().split("\n\n") if line]
        assert lines[-1] == "[DONE]"
        return [orjson.loads(line) for line in lines[:-1]]


class Client:
    """A client of one simulator."""

    def __init__(self, simulator: Simulator, session: aiohttp.ClientSession) -> None:
        self._root = simulator.url.removesuffix("/v1")
        self._session = session

    async def post(self, path: str, body: Any = None, *, key: str | None = None, data: Any = None) -> Answer:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        data = orjson.dumps(body) if data is None else data
        async with self._session.post(self._root + path, data=data, headers=headers) as answer:
            return Answer(answer.status, answer.headers, await answer.read())

    async def get(self, path: str) -> Answer:
        async with self._session.get(self._root + path) as answer:
            return Answer(answer.status, answer.headers, await answer.read())

    async def chat(self, prompt: str = "Hello?", **fields: Any) -> Answer:
        return await self.post(CHAT, ask(prompt, **fields))

    async def ledger(self) -> Any:
        return (await self.get("/ledger")).json

    async def arrivals(self, body: Json) -> list[float]:
        """Seconds from sending to each piece of a streamed answer."""
        started = time.perf_counter()
        async with self._session.post(self._root + CHAT, data=orjson.dumps(body)) as answer:
            return [time.perf_counter() - started async for _ in answer.content.iter_any()]

    async def until(self, condition: Callable[[Any], bool]) -> None:
        """Wait until the ledger looks as it should."""
        while True:
            if condition(await self.ledger()):
                return


@asynccontextmanager
async def serving(**settings: Any) -> AsyncIterator[Client]:
    """A client of a simulator that answers at once, unless the settings say otherwise."""
    simulator = Simulator(SimulatorConfig(**{"latency_s": 0.0, "latency_spread": 0.0, **settings}))
    async with simulator, aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        yield Client(simulator, session)


@pytest.fixture
def key(tmp_path: Path) -> str:
    rows = [{"question": f"What is the code of town {number}?", "answer": f"C{number}"} for number in range(200)]
    path = tmp_path / "key.jsonl"
    path.write_bytes(b"\n".join(map(orjson.dumps, rows)))
    return str(path)


def ask(prompt: str = "Hello?", **fields: Any) -> Json:
    return {"model": "simulated", "messages": [{"role": "user", "content": prompt}], **fields}


def told(answer: Answer) -> str:
    """The text of a streamed chat answer."""
    return "".join(
        choice["delta"].get("content") or ""
        for event in answer.events
        for choice in event["choices"]
        if not choice["index"]
    )


# Wire


async def test_a_chat_completion_has_the_shape_of_openai_s_reference() -> None:
    async with serving() as client:
        answer = await client.chat("12345678")
    body = answer.json
    text = body["choices"][0]["message"]["content"]
    assert answer.status == 200
    assert answer.headers["x-request-id"].startswith("req_")
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    assert abs(body["created"] - time.time()) < 60
    assert body["model"] == "simulated"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None, "annotations": []},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    usage = body["usage"]
    assert usage["prompt_tokens"] == 2
    assert usage["completion_tokens"] == math.ceil(len(text) / 4)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0
    assert usage["completion_tokens_details"]["reasoning_tokens"] == 0


async def test_every_message_and_attachment_counts_as_prompt() -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:,"}}
    messages = [
        {"role": "system", "content": "1234"},
        {"role": "user", "content": [{"type": "text", "text": "12345678"}, picture]},
    ]
    async with serving() as client:
        answer = await client.chat(messages=messages)
    assert answer.json["usage"]["prompt_tokens"] == 3 + 85


async def test_ids_differ_between_equal_requests() -> None:
    async with serving() as client:
        first, second = await client.chat(), await client.chat()
    assert first.message == second.message
    assert first.json["id"] != second.json["id"]
    assert first.headers["x-request-id"] != second.headers["x-request-id"]


async def test_models_are_listed() -> None:
    async with serving() as client:
        models = (await client.get("/v1/models")).json
    assert models["object"] == "list"
    assert {"id", "object", "created", "owned_by"} <= models["data"][0].keys()
    assert "echo" in [entry["id"] for entry in models["data"]]


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("/v1/nowhere", ask(), 404, None),
        (CHAT, [], 400, None),
        (CHAT, {"messages": []}, 400, "missing_required_parameter"),
        (CHAT, {"messages": [{"role": "user", "content": "x"}]}, 400, "missing_required_parameter"),
        (CHAT, ask(max_tokens=0), 400, "integer_below_min_value"),
        (CHAT, ask(n="two"), 400, "integer_below_min_value"),
        (CHAT, ask(tools=[], tool_choice="required"), 400, None),
        (
            CHAT,
            ask(response_format={"type": "json_schema", "json_schema": {"schema": {"enum": []}}}),
            400,
            "invalid_json_schema",
        ),
        ("/v1/completions", {"model": "m", "prompt": []}, 400, "missing_required_parameter"),
        ("/v1/embeddings", {"model": "m", "input": ""}, 400, "missing_required_parameter"),
        ("/v1/audio/transcriptions", {"model": "m"}, 400, "missing_required_parameter"),
    ],
)
async def test_a_request_that_cannot_be_served_is_refused_in_openai_s_form(
    path: str, body: Any, status: int, code: str | None
) -> None:
    async with serving() as client:
        answer = await client.post(path, body)
    assert answer.status == status
    assert answer.json["error"].keys() == {"message", "type", "param", "code"}
    assert answer.json["error"]["type"] == "invalid_request_error"
    assert answer.json["error"]["code"] == code


async def test_a_body_that_is_no_json_is_a_400() -> None:
    async with serving() as client:
        answer = await client.post(CHAT, data=b'{"model": ')
    assert answer.status == 400
    assert "parse" in answer.json["error"]["message"]


async def test_getting_an_endpoint_is_not_allowed() -> None:
    async with serving() as client:
        assert (await client.get(CHAT)).status == 405
        assert (await client.get("/elsewhere")).status == 404


async def test_only_the_right_key_is_let_in() -> None:
    async with serving(api_key="right") as client:
        right = await client.post(CHAT, ask(), key="right")
        wrong = await client.post(CHAT, ask(), key="wrong")
        none = await client.post(CHAT, ask())
        models = await client.get("/v1/models")
    assert [right.status, wrong.status, none.status, models.status] == [200, 401, 401, 401]
    assert wrong.json["error"]["code"] == "invalid_api_key"


async def test_text_completions_answer_each_prompt_n_times() -> None:
    async with serving() as client:
        answer = await client.post(
            "/v1/completions", {"model": "echo", "prompt": ["one", "two"], "n": 2, "max_tokens": 2}
        )
    body = answer.json
    assert body["id"].startswith("cmpl-")
    assert body["object"] == "text_completion"
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in body["choices"]] == ["echo: on"] * 2 + ["echo: tw"] * 2
    assert body["choices"][0] == {"text": "echo: on", "index": 0, "logprobs": None, "finish_reason": "length"}
    assert body["usage"]["completion_tokens"] == 8


async def test_responses_have_the_shape_of_openai_s_reference() -> None:
    request = {"model": "echo", "instructions": "Be kind.", "input": [{"role": "user", "content": "Hello"}]}
    async with serving() as client:
        body = (await client.post("/v1/responses", request)).json
    assert body["id"].startswith("resp_")
    assert (body["object"], body["status"], body["incomplete_details"]) == ("response", "completed", None)
    [item] = body["output"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    assert item["content"] == [{"type": "output_text", "text": "echo: Hello", "annotations": [], "logprobs": []}]
    assert body["usage"] == {
        "input_tokens": 4,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 3,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 7,
    }


async def test_a_cut_response_is_incomplete() -> None:
    async with serving() as client:
        body = (await client.post("/v1/responses", {"model": "echo", "input": "Hello", "max_output_tokens": 1})).json
    assert body["status"] == "incomplete"
    assert body["incomplete_details"] == {"reason": "max_output_tokens"}
    assert body["output"][0]["content"][0]["text"] == "echo"


async def test_embeddings_are_unit_vectors_that_depend_on_the_text_alone() -> None:
    async with serving(embedding_size=8) as client:
        single = (await client.post("/v1/embeddings", {"model": "e", "input": "cat"})).json
        several = (await client.post("/v1/embeddings", {"model": "e", "input": ["dog", "cat"]})).json
        short = (await client.post("/v1/embeddings", {"model": "e", "input": "cat", "dimensions": 3})).json
        ids = (await client.post("/v1/embeddings", {"model": "e", "input": [[1, 2], [3]]})).json
    dog, cat = (entry["embedding"] for entry in several["data"])
    assert single["data"] == [{"object": "embedding", "index": 0, "embedding": cat}]
    assert several["usage"] == {"prompt_tokens": 2, "total_tokens": 2}
    assert dog != cat
    assert len(cat) == 8
    assert math.isclose(math.hypot(*cat), 1.0)
    assert len(short["data"][0]["embedding"]) == 3
    assert len(ids["data"]) == 2


async def test_embeddings_come_packed_where_asked() -> None:
    async with serving() as client:
        plain = (await client.post("/v1/embeddings", {"model": "e", "input": "cat"})).json
        packed = (await client.post("/v1/embeddings", {"model": "e", "input": "cat", "encoding_format": "base64"})).json
    values = array("f", base64.b64decode(packed["data"][0]["embedding"]))
    assert list(values) == pytest.approx(plain["data"][0]["embedding"], abs=1e-6)


def recording(seconds: float) -> aiohttp.FormData:
    file = io.BytesIO()
    with wave.open(file, "wb") as audio:
        audio.setnchannels(1)
        audio.setsampwidth(2)
        audio.setframerate(8000)
        audio.writeframes(b"\r\n--\0\0" * int(8000 * seconds / 3))
    form = aiohttp.FormData()
    form.add_field("model", "echo")
    form.add_field("file", file.getvalue(), filename="talk.wav", content_type="audio/wav")
    return form


async def test_speech_is_transcribed() -> None:
    async with serving() as client:
        answer = await client.post("/v1/audio/transcriptions", data=recording(1.5))
    assert answer.json["text"] == "echo: talk.wav"
    assert answer.json["usage"] == {
        "type": "tokens",
        "input_tokens": 15,
        "input_token_details": {"text_tokens": 0, "audio_tokens": 15},
        "output_tokens": 4,
        "total_tokens": 19,
    }


async def test_a_verbose_transcript_has_language_and_duration() -> None:
    form = recording(1.5)
    form.add_field("response_format", "verbose_json")
    async with serving() as client:
        body = (await client.post("/v1/audio/transcriptions", data=form)).json
    assert body["task"] == "transcribe"
    assert body["language"] == "english"
    assert body["duration"] == 1.5
    assert body["segments"][0]["end"] == 1.5


@pytest.mark.parametrize(
    ("layout", "beginning"),
    [("text", ""), ("srt", "1\n00:00:00,000 --> 00:00:01,500\n"), ("vtt", "WEBVTT\n\n00:00:00.000 --> 00:00:01.500\n")],
)
async def test_a_transcript_can_be_plain_text(layout: str, beginning: str) -> None:
    async with serving() as client:
        whole = (await client.post("/v1/audio/transcriptions", data=recording(1.5))).json
        form = recording(1.5)
        form.add_field("response_format", layout)
        answer = await client.post("/v1/audio/transcriptions", data=form)
    assert answer.headers["content-type"].startswith("text/plain")
    assert answer.body.decode().startswith(beginning)
    assert len(answer.body.decode().removeprefix(beginning).strip()) > len(whole["text"]) / 2


async def test_a_transcript_in_an_unknown_format_is_refused() -> None:
    async with serving() as client:
        form = recording(0.1)
        form.add_field("response_format", "docx")
        assert (await client.post("/v1/audio/transcriptions", data=form)).status == 400


# Streams

TOOL = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


async def test_a_streamed_answer_says_what_the_whole_one_says() -> None:
    async with serving() as client:
        whole = await client.chat()
        streamed = await client.chat(stream=True)
    events = streamed.events
    assert streamed.headers["content-type"].startswith("text/event-stream")
    assert told(streamed) == whole.message
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({event["id"] for event in events}) == 1
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert events[-1]["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}]
    assert not any("usage" in event for event in events)


async def test_a_stream_ends_with_its_usage_where_asked() -> None:
    async with serving() as client:
        whole = await client.chat()
        events = (await client.chat(stream=True, stream_options={"include_usage": True})).events
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == whole.json["usage"]
    assert all(event["usage"] is None for event in events[:-1])


async def test_each_token_is_an_event_of_its_own() -> None:
    async with serving() as client:
        events = (await client.chat(stream=True, max_tokens=5)).events
    assert len([event for event in events if event["choices"][0]["delta"].get("content")]) == 5


async def test_several_choices_are_streamed_side_by_side() -> None:
    async with serving() as client:
        whole = await client.chat(n=3)
        events = (await client.chat(n=3, stream=True)).events
    texts = ["", "", ""]
    for event in events:
        for choice in event["choices"]:
            texts[choice["index"]] += choice["delta"].get("content") or ""
    assert texts == [choice["message"]["content"] for choice in whole.json["choices"]]
    assert len(set(texts)) == 3


async def test_text_completions_are_streamed_too() -> None:
    async with serving() as client:
        events = (
            await client.post("/v1/completions", {"model": "echo", "prompt": "Hello there", "stream": True})
        ).events
    assert "".join(event["choices"][0]["text"] for event in events) == "echo: Hello there"
    assert events[-1]["choices"][0]["finish_reason"] == "stop"
    assert events[0]["object"] == "text_completion"


@pytest.mark.parametrize(
    "fields", [{}, {"max_output_tokens": 5}, {"tools": [TOOL], "tool_choice": "required"}], ids=["text", "cut", "tool"]
)
async def test_responses_are_streamed_too(fields: Json) -> None:
    async with serving() as client:
        whole = (await client.post("/v1/responses", {"model": "m", "input": "Hello?", **fields})).json
        answer = await client.post("/v1/responses", {"model": "m", "input": "Hello?", "stream": True, **fields})
    events = [orjson.loads(part.partition("data: ")[2]) for part in answer.body.decode().split("\n\n") if part]
    said = "".join(event["delta"] for event in events if event["type"].endswith(".delta"))
    [item] = whole["output"]
    assert said == (item["arguments"] if "arguments" in item else item["content"][0]["text"])
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[0]["type"] == "response.created"
    assert events[-1]["type"] == f"response.{whole['status']}"
    assert events[-1]["response"]["usage"] == whole["usage"]
    assert events[-1]["response"]["output"][0].keys() == item.keys()


async def test_a_forced_call_is_streamed_too() -> None:
    async with serving() as client:
        events = (await client.chat(tools=[WEATHER], tool_choice="required", stream=True)).events
    calls = [call for event in events for call in event["choices"][0]["delta"].get("tool_calls", ())]
    assert calls[0]["id"]
    assert calls[0]["function"]["name"] == "weather"
    assert orjson.loads("".join(call["function"]["arguments"] for call in calls))["unit"] in ("C", "F")
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


# Answers


async def test_the_answer_follows_from_seed_and_request() -> None:
    async with serving() as client, serving() as twin, serving(seed=1) as other:
        answers = [await client.chat(f"Question {number}") for number in range(20)]
        same = [await twin.chat(f"Question {number}") for number in range(20)]
        different = [await other.chat(f"Question {number}") for number in range(20)]
        reordered = await client.post(CHAT, dict(reversed(ask("Question 0").items())))
        warmer = await client.chat("Question 0", temperature=1)
    texts = [answer.message for answer in answers]
    assert texts == [answer.message for answer in same]
    assert texts != [answer.message for answer in different]
    assert len(set(texts)) > 15
    assert reordered.message == texts[0]
    assert warmer.message != texts[0]


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
async def test_an_answer_is_cut_to_the_tokens_asked_for(limit: str) -> None:
    async with serving() as client:
        whole = await client.chat()
        cut = await client.post(CHAT, {**ask("12345678"), "model": "other/echo", limit: 3})
        fits = await client.post(CHAT, {**ask(), limit: 1000})
    assert cut.message == "echo: 123456"
    assert cut.json["usage"]["completion_tokens"] == 3
    assert cut.json["choices"][0]["finish_reason"] == "length"
    assert whole.json["choices"][0]["finish_reason"] == fits.json["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("tokens", [1, 5, 24, 700])
def test_filler_has_about_the_length_asked_for(tokens: int) -> None:
    for drawn in (0.0001, 0.3, 0.77, 0.9999):
        assert tokens - 4 <= tokens_in(filler(tokens, drawn)) <= tokens


async def test_output_tokens_sets_the_length_of_an_answer() -> None:
    async with serving(output_tokens=100) as client:
        assert 95 <= (await client.chat()).json["usage"]["completion_tokens"] <= 100


async def test_echo_repeats_what_the_user_said_last() -> None:
    messages = [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": [{"type": "text", "text": "second"}]},
    ]
    async with serving() as client:
        assert (await client.chat(model="echo", messages=messages)).message == "echo: second"
        assert (await client.chat("hi", model="simulated/echo")).message == "echo: hi"
        assert (await client.chat("hi", model="echoes")).message != "echo: hi"


async def test_a_known_question_within_a_prompt_is_answered(key: str) -> None:
    async with serving(answers=key) as client:
        plain = await client.chat("Be brief.\nQ: What is the code of town 17?\nA:")
        echo = await client.chat("What is the code of town 18?", model="echo")
        unknown = await client.chat("What is the code of town 1?7", model="echo")
    assert plain.message == "C17"
    assert echo.message == "C18"
    assert unknown.message == "C1"


async def test_accuracy_is_the_share_of_right_answers(key: str) -> None:
    async with serving(answers=key, accuracy=0.7) as client:
        right = [(await client.chat(f"What is the code of town {n}?")).message == f"C{n}" for n in range(200)]
        again = [(await client.chat(f"What is the code of town {n}?")).message == f"C{n}" for n in range(200)]
        asked_otherwise = [
            (await client.chat(f"Hm? What is the code of town {n}?")).message == f"C{n}" for n in range(200)
        ]
        elsewhere = [
            (await client.chat(f"What is the code of town {n}?", model="m")).message == f"C{n}" for n in range(200)
        ]
    assert 115 <= sum(right) <= 165
    assert right == again
    assert right != asked_otherwise
    assert right != elsewhere
    assert 115 <= sum(asked_otherwise) <= 165


async def test_a_wrong_answer_is_that_of_another_question(key: str) -> None:
    async with serving(answers=key, accuracy=0.0) as client:
        texts = [(await client.chat(f"What is the code of town {n}?")).message for n in range(50)]
    assert all(text.startswith("C") and text != f"C{number}" for number, text in enumerate(texts))


def test_of_several_known_questions_the_last_counts_and_of_nested_ones_the_longest() -> None:
    key = AnswerKey({"Who?": "a", "Who? And why?": "b", "Where is it?": "c", "x": "d", "国の首都は?": "e"})
    assert key.find("Q: Where is it? A: there. Q: Who? A:") == "Who?"
    assert key.find("Q: Who? And why?") == "Who? And why?"
    assert key.find("Where is it?") == "Where is it?"
    assert key.find("日本という国の首都は?") == "国の首都は?"
    assert key.find("-x-") == "x"
    assert key.find("Where is it") is None
    assert key.find("") is None


def test_a_question_is_found_wherever_it_stands() -> None:
    questions = ["ab", "abc", "a b c d", "What now?", "What is the capital of Peru?"]
    for question in questions:
        key = AnswerKey({question: "yes"})
        for before in range(20):
            assert key.find("." * before + question + ".") == question


def test_the_shipped_questions_are_known() -> None:
    key = AnswerKey.read(None)
    for question in key.answers:
        assert key.find(f"Answer in one word.\n{question}\nAnswer:") == question


async def test_another_answer_key_can_be_set_while_it_runs(key: str) -> None:
    async with serving() as client:
        before = await client.chat("What is the code of town 7?", model="echo")
        await client.post("/settings", {"answers": key})
        await client.post("/settings", {"latency_s": 0.001})
        after = await client.chat("What is the code of town 7?", model="echo")
    assert before.message.startswith("echo: ")
    assert after.message == "C7"


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"{", "unexpected end of data"),
        (b"[]", r"it holds \[\]"),
        (b'{"question": "x"}', "has no 'answer'"),
        (b'{"question": "\\ud83d", "answer": "x"}', "surrogate"),
    ],
)
def test_an_answer_key_that_cannot_be_read_is_a_configuration_error(tmp_path: Path, line: bytes, why: str) -> None:
    path = tmp_path / "key.jsonl"
    path.write_bytes(b'{"question": "q", "answer": 1}\n\n' + line)
    with pytest.raises(ConfigError, match=rf"key\.jsonl:3 .*{why}"):
        Simulator(SimulatorConfig(answers=str(path)))
    with pytest.raises(ConfigError, match="nowhere"):
        Simulator(SimulatorConfig(answers="nowhere.jsonl"))


SCHEMA = {
    "type": "object",
    "properties": {
        "answer": {"type": "string", "maxLength": 5},
        "long": {"type": "string", "minLength": 40},
        "day": {"type": "string", "format": "date"},
        "count": {"type": "integer", "minimum": 3, "maximum": 5},
        "even": {"type": "integer", "multipleOf": 2, "exclusiveMinimum": 10},
        "share": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        "negative": {"type": "number", "maximum": -1},
        "unit": {"enum": ["C", "F"]},
        "fixed": {"const": [1]},
        "flag": {"type": "boolean"},
        "nothing": {"type": "null"},
        "maybe": {"anyOf": [{"type": "null"}, {"type": "integer"}]},
        "either": {"type": ["string", "null"]},
        "tags": {"type": "array", "items": {"type": "string"}, "minItems": 2, "maxItems": 3},
        "none": {"type": "array", "maxItems": 0},
        "pair": {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "boolean"}]},
        "person": {"$ref": "#/$defs/person"},
        "both": {"allOf": [{"$ref": "#/$defs/person"}, {"properties": {"age": {"type": "integer"}}}]},
    },
    "required": ["answer", "extra"],
    "$defs": {
        "person": {
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "boss": {"anyOf": [{"$ref": "#/$defs/person"}, {"type": "null"}]},
            },
            "required": ["name", "boss"],
        }
    },
}


async def test_a_json_schema_is_satisfied() -> None:
    layout = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    async with serving() as client:
        value = orjson.loads((await client.chat(response_format=layout)).message)
        other = await client.post(
            "/v1/responses",
            {"model": "m", "input": "x", "text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}},
        )
    assert value.keys() == SCHEMA["properties"].keys() | {"extra"}  # type: ignore[attr-defined]
    assert 1 <= len(value["answer"]) <= 5
    assert len(value["long"]) >= 40
    assert len(value["day"].split("-")) == 3
    assert value["count"] in (3, 4, 5)
    assert value["even"] % 2 == 0
    assert value["even"] > 10
    assert 0 < value["share"] <= 1
    assert value["negative"] <= -1
    assert value["unit"] in ("C", "F")
    assert value["fixed"] == [1]
    assert isinstance(value["flag"], bool)
    assert value["nothing"] is None
    assert isinstance(value["maybe"], int)
    assert isinstance(value["either"], str)
    assert len(value["tags"]) in (2, 3)
    assert value["none"] == []
    assert [type(item) for item in value["pair"]] == [int, bool]
    assert value["person"].keys() == {"name", "boss"}
    assert value["both"].keys() == {"name", "boss", "age"}
    assert orjson.loads(other.json["output"][0]["content"][0]["text"]).keys() == value.keys()


async def test_a_json_document_holds_the_known_answer(key: str) -> None:
    schema = {"type": "object", "properties": {"answer": {"type": "string"}}}
    layout = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    async with serving(answers=key) as client:
        answer = await client.chat("What is the code of town 3?", response_format=layout)
        free = await client.chat("What is the code of town 3?", response_format={"type": "json_object"})
    assert orjson.loads(answer.message) == {"answer": "C3"}
    assert isinstance(orjson.loads(free.message), dict)


@pytest.mark.parametrize(
    ("known", "answered"),
    [
        ('{"label": "b"}', {"label": "b"}),
        ("b", {"label": "b"}),
        ('{"label": "none of them"}', None),
        ('["b"]', None),
    ],
)
async def test_a_known_answer_that_is_such_a_document_is_given_as_it_is(
    tmp_path: Path, known: str, answered: dict[str, str] | None
) -> None:
    path = tmp_path / "key.jsonl"
    path.write_bytes(orjson.dumps({"question": "What is it?", "answer": known}))
    schema = {"type": "object", "properties": {"label": {"enum": ["a", "b", "c"]}}, "required": ["label"]}
    layout = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    async with serving(answers=str(path)) as client:
        said = orjson.loads((await client.chat("What is it?", response_format=layout)).message)
    assert said == (answered or said)
    assert said["label"] in ("a", "b", "c")


def test_known_answers_fit_their_type() -> None:
    assert document_for({"type": "integer"}, text="42", number=0.5) == 42
    assert document_for({"type": "number", "maximum": 10}, text="42", number=0.5) <= 10
    assert document_for({"enum": ["A", "B", "C"]}, text="B", number=0.99) == "B"
    assert document_for({"type": "boolean"}, text="yes", number=0.1) is True


def test_a_schema_that_nothing_satisfies_is_an_error() -> None:
    endless = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}
    with pytest.raises(ValueError, match="RecursionError"):
        document_for(endless, text="", number=0.5)


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"type": "string", "enum": ["C", "F"]}},
            "required": ["city", "unit"],
        },
    },
}


@pytest.mark.parametrize(
    ("choice", "finish_reason"),
    [("required", "tool_calls"), ({"type": "function", "function": {"name": "weather"}}, "stop")],
)
async def test_a_forced_tool_is_called(choice: Any, finish_reason: str) -> None:
    async with serving() as client:
        answer = await client.chat(tools=[WEATHER], tool_choice=choice)
        free = await client.chat(tools=[WEATHER])
    [entry] = answer.json["choices"]
    [call] = entry["message"]["tool_calls"]
    assert entry["message"]["content"] is None
    assert entry["finish_reason"] == finish_reason
    assert call["type"] == "function"
    assert call["function"]["name"] == "weather"
    assert orjson.loads(call["function"]["arguments"])["unit"] in ("C", "F")
    assert free.message


async def test_responses_call_tools_too() -> None:
    tool = {"type": "function", **WEATHER["function"]}  # type: ignore[dict-item]
    async with serving() as client:
        body = (
            await client.post("/v1/responses", {"model": "m", "input": "x", "tools": [tool], "tool_choice": "required"})
        ).json
    [item] = body["output"]
    assert (item["type"], item["name"], item["status"]) == ("function_call", "weather", "completed")
    assert orjson.loads(item["arguments"])["city"]


# Time


def test_latency_has_the_mean_and_spread_that_are_set() -> None:
    config = SimulatorConfig(latency_s=2.0, latency_spread=0.3)
    times = [Pace.of(config, str(number), 10).total_s for number in range(4000)]
    assert statistics.mean(times) == pytest.approx(2.0, rel=0.03)
    assert statistics.stdev(times) == pytest.approx(0.6, rel=0.1)
    assert times == [Pace.of(config, str(number), 10).total_s for number in range(4000)]
    assert Pace.of(SimulatorConfig(latency_s=2.0, latency_spread=0.0), "x", 10).total_s == 2.0


def test_tokens_are_due_evenly_from_the_first_to_the_end() -> None:
    derived = Pace.of(SimulatorConfig(latency_s=1.0, latency_spread=0.0), "x", 7)
    assert [derived.at_s(step) for step in (0, 3, 6)] == pytest.approx([0.4, 0.7, 1.0])
    explicit = Pace.of(SimulatorConfig(ttft_s=0.5, itl_s=0.1), "x", 11)
    assert explicit.total_s == pytest.approx(1.5)
    assert [explicit.at_s(step) for step in (0, 10)] == pytest.approx([0.5, 1.5])
    first = Pace.of(SimulatorConfig(latency_s=1.0, latency_spread=0.0, ttft_s=0.9), "x", 2)
    assert [first.at_s(0), first.at_s(1)] == pytest.approx([0.9, 1.0])


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"stream": True, "max_tokens": 1}])
async def test_an_answer_takes_its_service_time(fields: Json) -> None:
    async with serving(latency_s=0.02) as client:
        started = time.perf_counter()
        await client.chat(**fields)
        assert time.perf_counter() - started >= 0.02


async def test_a_stream_keeps_its_pace() -> None:
    async with serving(ttft_s=0.02, itl_s=0.004) as client:
        await client.chat()
        arrivals = await client.arrivals(ask(stream=True, max_tokens=11))
    assert arrivals[0] >= 0.02
    assert arrivals[-1] >= 0.02 + 10 * 0.004
    assert len(arrivals) > 3


@pytest.mark.parametrize("stream", [False, True])
async def test_slots_bound_the_requests_in_service(stream: bool) -> None:
    async with serving(latency_s=0.01, slots=3) as client:
        started = time.perf_counter()
        answers = await asyncio.gather(*(client.chat(f"{n}", stream=stream) for n in range(30)))
        elapsed = time.perf_counter() - started
        ledger = await client.ledger()
    assert {answer.status for answer in answers} == {200}
    assert ledger["in_service_peak"] == 3
    assert 3 < ledger["in_flight_peak"] <= 30
    assert (ledger["in_flight"], ledger["in_service"]) == (0, 0)
    assert 0.099 <= elapsed < 1.0


async def test_without_slots_all_are_in_service_at_once() -> None:
    async with serving(latency_s=0.02) as client:
        await asyncio.gather(*(client.chat(f"{n}") for n in range(20)))
        ledger = await client.ledger()
    assert ledger["in_service_peak"] > 10


async def test_those_who_wait_for_a_slot_begin_in_order_and_without_a_gap() -> None:
    slots = Slots(1)
    order: list[int] = []
    begun: list[float] = []

    async def serve(number: int) -> None:
        async with slots.hold(0.001) as at:
            begun.append(at)
            order.append(number)
            await asyncio.sleep(0.002)  # later than planned

    await asyncio.gather(*(serve(number) for number in range(5)))
    assert order == [0, 1, 2, 3, 4]
    assert [later - earlier for earlier, later in pairwise(begun)] == pytest.approx([0.001] * 4)


async def test_who_stops_waiting_for_a_slot_leaves_it_to_the_next() -> None:
    slots = Slots(1)
    entered: list[str] = []

    async def serve(name: str) -> None:
        async with slots.hold(0.0):
            entered.append(name)
            await asyncio.sleep(0)

    async with slots.hold(0.0):
        tasks = [asyncio.create_task(serve(name)) for name in "abc"]
        await asyncio.sleep(0)
        tasks[0].cancel()
    tasks[1].cancel()  # just granted
    await asyncio.gather(*tasks, return_exceptions=True)
    assert entered == ["c"]
    assert slots.held == 0


async def test_more_slots_serve_those_who_wait() -> None:
    async with serving(latency_s=0.02, slots=1) as client:
        tasks = [asyncio.create_task(client.chat(f"{n}")) for n in range(6)]
        await client.until(lambda ledger: ledger["in_flight"] == 6)
        await client.post("/settings", {"slots": 6})
        assert (await client.ledger())["in_service"] >= 5
        await asyncio.gather(*tasks)


async def test_a_client_that_goes_away_frees_its_slot() -> None:
    async with serving(latency_s=60.0, slots=1) as client:
        leaving = asyncio.create_task(client.chat("slow"))
        await client.until(lambda ledger: ledger["in_service"] == 1)
        await client.post("/settings", {"latency_s": 0.0})
        waiting = asyncio.create_task(client.chat("quick"))
        await client.until(lambda ledger: ledger["in_flight"] == 2)
        leaving.cancel()
        assert (await waiting).status == 200
        ledger = await client.ledger()
    assert (ledger["requests"], ledger["answered"], ledger["abandoned"]) == (2, 1, 1)


# Limits


def test_the_window_slides() -> None:
    minute = SlidingMinute()
    for now in (0.0, 10.0, 20.0):
        assert minute.wait_s(now, 1, rpm=3, tpm=None) == 0
        minute.add(now, 1)
    assert minute.wait_s(30.0, 1, rpm=3, tpm=None) == 30.0
    assert minute.wait_s(59.9, 1, rpm=3, tpm=None) == pytest.approx(0.1)
    assert minute.wait_s(60.0, 1, rpm=3, tpm=None) == 0
    minute.add(60.0, 1)
    assert minute.wait_s(60.0, 1, rpm=3, tpm=None) == 10.0


def test_tokens_free_as_the_requests_that_used_them_leave_the_window() -> None:
    minute = SlidingMinute()
    minute.add(0.0, 50)
    minute.add(5.0, 40)
    assert minute.wait_s(10.0, 10, rpm=None, tpm=100) == 0
    assert minute.wait_s(10.0, 60, rpm=None, tpm=100) == 50.0
    assert minute.wait_s(10.0, 61, rpm=None, tpm=100) == 55.0
    assert minute.wait_s(10.0, 101, rpm=None, tpm=100) == math.inf


def test_the_headers_tell_what_is_left() -> None:
    minute = SlidingMinute()
    assert minute.headers(0.0, rpm=2, tpm=None) == {
        "x-ratelimit-limit-requests": "2",
        "x-ratelimit-remaining-requests": "2",
        "x-ratelimit-reset-requests": "0s",
    }
    minute.add(0.0, 30)
    headers = minute.headers(1.5, rpm=2, tpm=100)
    assert headers["x-ratelimit-remaining-requests"] == "1"
    assert headers["x-ratelimit-limit-tokens"] == "100"
    assert headers["x-ratelimit-remaining-tokens"] == "70"
    assert headers["x-ratelimit-reset-tokens"] == "58.5s"
    assert minute.headers(60.0, rpm=2, tpm=100)["x-ratelimit-remaining-tokens"] == "100"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.12, "120ms"),
        (0.0001, "1ms"),
        (1, "1s"),
        (1.5, "1.5s"),
        (60, "1m0s"),
        (360, "6m0s"),
        (3661, "1h1m1s"),
    ],
)
def test_durations_are_written_as_openai_does(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


async def test_a_request_over_the_limit_is_told_when_to_come_back() -> None:
    async with serving(rpm=2) as client:
        first, _, third, fourth = [await client.chat() for _ in range(4)]
        ledger = await client.ledger()
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert first.headers["x-ratelimit-reset-requests"] == "1m0s"
    assert "x-ratelimit-limit-tokens" not in first.headers
    assert third.status == 429
    assert third.json["error"]["code"] == "rate_limit_exceeded"
    assert 50 < int(third.headers["retry-after"]) <= 60
    assert 50_000 < int(third.headers["retry-after-ms"]) <= 60_000
    assert third.headers["x-ratelimit-remaining-requests"] == "0"
    assert int(fourth.headers["retry-after-ms"]) <= int(third.headers["retry-after-ms"])
    assert ledger["by_status"] == {"200": 2, "429": 2}


async def test_tokens_are_charged_as_prompt_and_the_most_that_may_be_answered() -> None:
    async with serving(tpm=100) as client:
        capped = await client.chat("1234", max_tokens=39)
        open_ended = await client.chat("1234", model="echo")
        over = await client.chat("1234", max_tokens=60)
        never = await client.chat("1234", max_tokens=100)
        fits = await client.chat("1234", max_tokens=55)
    assert capped.headers["x-ratelimit-remaining-tokens"] == "60"
    assert open_ended.headers["x-ratelimit-remaining-tokens"] == "56"
    assert over.status == 429
    assert "retry-after" in over.headers
    assert fits.status == 200  # what was refused does not count
    assert fits.headers["x-ratelimit-remaining-tokens"] == "0"
    assert never.status == 429
    assert never.json["error"]["message"].startswith("Request too large")
    assert "retry-after" not in never.headers


async def test_without_limits_there_are_no_limit_headers() -> None:
    async with serving() as client:
        assert not [name for name in (await client.chat()).headers if name.lower().startswith("x-ratelimit")]


# Faults


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("status", [429, 500, 502, 503, 529])
async def test_faults_can_be_http_errors(status: int, stream: bool) -> None:
    async with serving(faults=FaultsConfig(**{f"http_{status}": 1.0})) as client:
        answer = await client.chat(stream=stream)
        ledger = await client.ledger()
    assert answer.status == status
    assert ledger["by_status"] == {str(status): 1}
    assert ledger["faults"] == {f"http_{status}": 1}
    assert ledger["tokens"] == {"prompt": 0, "completion": 0}
    if status == 502:
        assert answer.headers["content-type"] == "text/html"
        assert b"<html>" in answer.body
    elif status == 529:
        assert answer.json == {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
    else:
        assert answer.json["error"]["message"]
    assert ("retry-after-ms" in answer.headers) == (status == 429)


async def test_a_429_of_the_faults_says_what_it_is_told_to() -> None:
    async with serving(faults=FaultsConfig(http_429=1.0), retry_after="Wed, 21 Oct 2015 07:28:00 GMT") as client:
        answer = await client.chat()
    assert (answer.status, answer.headers["retry-after"]) == (429, "Wed, 21 Oct 2015 07:28:00 GMT")
    assert "retry-after-ms" not in answer.headers


@pytest.mark.parametrize("stream", [False, True])
async def test_a_reset_breaks_the_connection(stream: bool) -> None:
    async with serving(faults=FaultsConfig(reset=1.0)) as client:
        with pytest.raises((aiohttp.ClientError, ConnectionResetError)):
            await client.chat(stream=stream)
        ledger = await client.ledger()
    assert (ledger["requests"], ledger["answered"], ledger["abandoned"]) == (1, 0, 0)
    assert ledger["tokens"]["completion"] > 0


async def test_a_reset_is_a_tcp_reset() -> None:
    simulator = Simulator(SimulatorConfig(latency_s=0.0, faults=FaultsConfig(reset=1.0)))
    async with simulator:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(simulator.url.split(":")[2].split("/")[0]))
        body = orjson.dumps(ask())
        writer.write(b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (CHAT.encode(), len(body), body))
        with pytest.raises(ConnectionResetError):
            await reader.read()
        writer.close()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_truncated_answer_ends_in_its_middle(stream: bool) -> None:
    async with serving(faults=FaultsConfig(truncated=1.0)) as client:
        with pytest.raises(aiohttp.ClientPayloadError):
            await client.chat(stream=stream)
        ledger = await client.ledger()
    assert ledger["by_status"] == {"200": 1}
    assert ledger["answered"] == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_invalid_json_comes_with_a_200(stream: bool) -> None:
    async with serving(faults=FaultsConfig(invalid_json=1.0)) as client:
        answer = await client.chat(stream=stream)
        ledger = await client.ledger()
    assert answer.status == 200
    with pytest.raises(orjson.JSONDecodeError):
        _ = answer.events if stream else answer.json
    assert ledger["answered"] == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_an_error_can_come_with_a_200(stream: bool) -> None:
    async with serving(faults=FaultsConfig(error_200=1.0)) as client:
        answer = await client.chat(stream=stream)
    assert answer.status == 200
    assert orjson.loads(answer.body.removeprefix(b"data: "))["error"]["message"]


async def test_a_hanging_request_is_answered_after_its_time() -> None:
    async with serving(hang_s=0.02, faults=FaultsConfig(hang=1.0)) as client:
        started = time.perf_counter()
        answer = await client.chat()
        assert time.perf_counter() - started >= 0.02
    assert answer.status == 200


async def test_a_slow_request_takes_so_many_times_as_long() -> None:
    async with serving(latency_s=0.01, slow_factor=5.0, faults=FaultsConfig(slow=1.0)) as client:
        started = time.perf_counter()
        answer = await client.chat()
        assert time.perf_counter() - started >= 0.05
    assert answer.status == 200


async def test_a_hanging_request_holds_no_slot_and_does_not_delay_the_end() -> None:
    async with serving(slots=1, faults=FaultsConfig(hang=1.0)) as client:
        hanging = asyncio.create_task(client.chat())
        await client.until(lambda ledger: ledger["in_flight"] == 1)
        assert (await client.ledger())["in_service"] == 0
        await client.post("/settings", {"faults": {"hang": 0}})
        assert (await client.chat()).status == 200
    with pytest.raises(aiohttp.ClientError):
        await hanging


async def test_faults_are_exclusive_and_as_frequent_as_set() -> None:
    rates = FaultsConfig(http_429=0.2, http_500=0.2, http_503=0.2, error_200=0.2)
    async with serving(faults=rates) as client:
        await asyncio.gather(*(client.chat(f"{n}") for n in range(400)))
        ledger = await client.ledger()
    assert ledger["faults"].keys() == {"http_429", "http_500", "http_503", "error_200"}
    assert all(50 <= count <= 110 for count in ledger["faults"].values())
    assert ledger["answered"] + sum(ledger["faults"].values()) == 400


async def test_a_retry_meets_a_fate_of_its_own_and_the_same_in_every_run() -> None:
    async def statuses() -> list[int]:
        async with serving(faults=FaultsConfig(http_500=0.5)) as client:
            return [(await client.chat()).status for _ in range(20)]

    first = await statuses()
    assert set(first) == {200, 500}
    assert first == await statuses()


async def test_a_retry_of_an_upload_is_known_as_the_same() -> None:
    async with serving() as client:
        await client.post("/v1/audio/transcriptions", data=recording(0.1))
        await client.post("/v1/audio/transcriptions", data=recording(0.1))
        seen = (await client.get("/ledger/requests")).json
        prompts = (await client.get("/ledger/prompts")).json
    assert list(seen.values()) == [{"asked": 2, "answered": 2}]
    assert prompts == {"talk.wav": {"asked": 2, "answered": 2}}


# Ledger, settings, life


async def test_the_ledger_knows_each_request_and_prompt() -> None:
    async with serving() as client:
        await client.chat("one")
        await client.chat("one")
        await client.chat("two", max_tokens=0)
        await client.post("/v1/embeddings", {"model": "e", "input": ["one", "three"]})
        requests = (await client.get("/ledger/requests")).json
        prompts = (await client.get("/ledger/prompts")).json
    digest = blake2b(orjson.dumps(ask("one")), digest_size=8).hexdigest()
    assert requests[digest] == {"asked": 2, "answered": 2}
    assert len(requests) == 3
    assert prompts == {"one": {"asked": 3, "answered": 3}, "three": {"asked": 1, "answered": 1}}


async def test_the_ledger_adds_up_tokens_and_cost() -> None:
    async with serving(usd_per_million_prompt_tokens=2e6, usd_per_million_completion_tokens=3e6) as client:
        await client.chat("12345678", model="echo")
        await client.chat("12345678", model="echo", stream=True)
        ledger = await client.ledger()
    assert ledger["tokens"] == {"prompt": 4, "completion": 8}
    assert ledger["cost_usd"] == pytest.approx(4 * 2 + 8 * 3)
    assert (ledger["requests"], ledger["answered"], ledger["by_status"]) == (2, 2, {"200": 2})


async def test_the_ledger_counts_prompts_whose_beginning_was_there_before() -> None:
    beginnings = ["a" * 300, "b" * 300]
    async with serving() as client:
        for number in range(5):
            for beginning in beginnings:
                await client.chat(f"{beginning} {number}")
            await client.chat("short")
        ledger = await client.ledger()
    assert ledger["prefixes"] == {"hits": 8, "misses": 2}
    assert "beginnings" not in ledger


async def test_the_ledger_counts_refused_requests() -> None:
    async with serving(api_key="right") as client:
        await client.post(CHAT, ask(), key="wrong")
        ledger = await client.ledger()
    assert (ledger["requests"], ledger["answered"], ledger["by_status"]) == (1, 0, {"401": 1})


async def test_the_ledger_knows_when_each_request_came_and_what_it_was_charged() -> None:
    async with serving(api_key="right") as client:
        before = time.monotonic()
        await client.post(CHAT, ask(), key="wrong")
        await client.post(CHAT, ask(), key="right")
        arrivals = (await client.get("/ledger/arrivals")).json
        ledger = await client.ledger()
    assert before <= arrivals["at"][0] <= arrivals["at"][1] <= time.monotonic()
    assert arrivals["tokens"] == [0, sum(ledger["tokens"].values())]


async def test_the_ledger_can_be_cleared() -> None:
    async with serving() as client:
        await client.chat()
        await client.post("/ledger/reset")
        assert (await client.ledger())["requests"] == 0
        assert (await client.get("/ledger/prompts")).json == {}


async def test_settings_change_while_it_runs() -> None:
    config = SimulatorConfig(latency_s=0.0, api_key="secret")
    async with Simulator(config) as simulator, aiohttp.ClientSession() as session:
        client = Client(simulator, session)
        answer = await client.post("/settings", {"output_tokens": 3, "faults": {"http_500": 1}})
        failed = await client.post(CHAT, ask(), key="secret")
        await client.post("/settings", {"faults": {"http_500": 0.0}})
        short = await client.post(CHAT, ask(), key="secret")
    assert answer.json["faults"]["http_500"] == 1.0
    assert b"secret" not in answer.body
    assert failed.status == 500
    assert short.json["usage"]["completion_tokens"] <= 3
    assert config.output_tokens == 24


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"slotz": 1}, "Did you mean 'slots'"),
        ({"faults": {"http_5000": 1}}, "faults.http_5000"),
        ({"slots": "many"}, "slots='many': expected int or null"),
        ({"slots": True}, "expected int"),
        ({"slots": 0}, "slots=0"),
        ({"faults": 1}, "faults"),
        ({"faults": {"hang": 0.6, "reset": 0.6}}, "add up to 1.2"),
        ({"accuracy": 2}, "accuracy"),
        ({"latency_s": -1}, "latency_s"),
    ],
)
async def test_impossible_settings_are_refused_and_change_nothing(changes: Json, words: str) -> None:
    async with serving() as client:
        answer = await client.post("/settings", {"output_tokens": 3, **changes})
        unchanged = (await client.post("/settings", {})).json
    assert answer.status == 400
    assert words in answer.json["error"]["message"]
    assert unchanged["output_tokens"] == 24


def test_impossible_settings_are_a_configuration_error_at_once() -> None:
    with pytest.raises(ConfigError, match="more than all"):
        Simulator(SimulatorConfig(faults=FaultsConfig(reset=0.7, hang=0.7)))
    with pytest.raises(ConfigError, match="accuracy"):
        Simulator(SimulatorConfig(accuracy=-0.1))


async def test_it_ends_at_once_with_requests_under_way() -> None:
    simulator = Simulator(SimulatorConfig(latency_s=60.0))
    await simulator.start()
    async with aiohttp.ClientSession() as session:
        client = Client(simulator, session)
        waiting = asyncio.create_task(client.chat())
        await client.until(lambda ledger: ledger["in_service"] == 1)
        started = time.perf_counter()
        await simulator.aclose()
        assert time.perf_counter() - started < 5
        with pytest.raises(aiohttp.ClientError):
            await waiting
    await simulator.aclose()


# The command


def test_every_setting_is_explained_and_has_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    names = [field.name for field in dataclasses.fields(SimulatorConfig) if field.name != "faults"]
    names += [f"faults.{field.name}" for field in dataclasses.fields(FaultsConfig)]
    assert SETTINGS.keys() == set(names)
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    for name in names:
        assert f"--{name.replace('_', '-')} " in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--slots", "many"], "--slots"),
        (["--latency", "1"], "--latency"),
    ],
)
def test_bad_options_end_with_2(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(options)
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--faults.reset", "2"], "simulator: simulator.faults.reset=2.0: a share between 0 and 1"),
        (["--answers", "nowhere.jsonl"], "simulator: simulator.answers=nowhere.jsonl: No such file or directory"),
    ],
)
def test_a_setting_that_is_impossible_is_told_in_one_line(
    options: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(options) == 2
    assert capsys.readouterr().err == f"{line}\n"


def test_a_port_that_is_taken_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["--port", str(port)]) == 2
    assert f"cannot listen at 127.0.0.1:{port}" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_the_command_serves_until_a_signal(number: int) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "runner.simulator", "--port", "0", "--latency-s", "0", "--faults.http-429", "1"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None
    line = (await process.stdout.readline()).decode()
    assert line.startswith("simulator: listening at http://127.0.0.1:")
    async with aiohttp.ClientSession() as session:
        url = line.split()[-1]
        async with session.post(f"{url}/chat/completions", data=orjson.dumps(ask())) as answer:
            assert answer.status == 429
    process.send_signal(number)
    _, errors = await process.communicate()
    assert (process.returncode, errors) == (0, b"")
