from __future__ import annotations

import contextlib
import itertools
import json
import math
from dataclasses import asdict
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mutations import mutated_json
from runner import errors
from runner.transports import wire
from runner.types import (
    EmbeddingRequest,
    Embeddings,
    Endpoint,
    Generation,
    GenerationRequest,
    Request,
    Response,
    TokenUsage,
    ToolCall,
    Transcript,
    TranscriptionRequest,
)

CHAT = GenerationRequest(input="hi")
TEXT = GenerationRequest(input="hi", endpoint=Endpoint.text_completion)
RESPONSES = GenerationRequest(input="hi", endpoint=Endpoint.responses)
EMBED = EmbeddingRequest(texts=["a", "b"])
SPEECH = TranscriptionRequest(audio=b"")


def chat_body(**changes: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": "Hello."}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return {"id": "chatcmpl-1", "model": "m-2025", "choices": [choice], **changes}


def generation(body: dict[str, Any], request: Request = CHAT) -> Generation:
    output = wire.response_from(request, body, {}).output
    assert isinstance(output, Generation)
    return output


def encoded(request: Request, **params: Any) -> tuple[str, dict[str, Any]]:
    call = wire.encode(request, "m", params)
    assert call.content_type == "application/json"
    return call.path, orjson.loads(call.body)


# Requests


def test_a_string_becomes_one_user_message() -> None:
    assert encoded(CHAT) == ("/chat/completions", {"model": "m", "messages": [{"role": "user", "content": "hi"}]})


def test_a_conversation_is_sent_as_it_is() -> None:
    conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    assert encoded(GenerationRequest(input=conversation))[1]["messages"] == conversation


def test_a_text_completion_sends_its_prompt() -> None:
    assert encoded(TEXT) == ("/completions", {"model": "m", "prompt": "hi"})


def test_a_responses_input_keeps_its_instructions() -> None:
    assert encoded(RESPONSES) == ("/responses", {"model": "m", "input": "hi"})
    fields = {"input": "hi", "instructions": "Be brief."}
    request = GenerationRequest(input=fields, endpoint=Endpoint.responses)
    assert encoded(request) == ("/responses", {"model": "m", **fields})


def test_embeddings_send_all_texts() -> None:
    assert encoded(EMBED) == ("/embeddings", {"model": "m", "input": ["a", "b"]})


def test_params_join_the_body_and_extra_body_comes_last() -> None:
    _, body = encoded(CHAT, temperature=0.5, top_k=3, extra_body={"top_k": 5, "guided_choice": ["a"]})
    assert body["temperature"] == 0.5
    assert body["top_k"] == 5
    assert body["guided_choice"] == ["a"]


def test_what_steers_the_call_stays_out_of_the_body() -> None:
    steering = {name: "x" for name in wire.NOT_IN_BODY if name != "extra_body"}
    assert encoded(CHAT, extra_body={}, **steering)[1].keys() == {"model", "messages"}


@pytest.mark.parametrize("value", [object(), {1: 2}, "\ud800", 2**70])
def test_what_json_cannot_hold_is_an_error_of_the_row(value: Any) -> None:
    with pytest.raises(errors.RowError):
        wire.encode(CHAT, "m", {"stop": value})


@pytest.mark.parametrize("value", ["text", 3, [1]])
def test_an_extra_body_that_is_no_mapping_is_an_error_of_the_row(value: Any) -> None:
    with pytest.raises(errors.RowError):
        wire.encode(CHAT, "m", {"extra_body": value})


def test_a_recording_goes_into_a_form() -> None:
    params = {"language": "de", "temperature": 0.5, "timestamp_granularities": ["word"], "timeout": 3, "stream": True}
    call = wire.encode(TranscriptionRequest(audio=b"RIFF\r\n--", filename="talk.mp3"), "m", params)
    kind, _, boundary = call.content_type.partition("; boundary=")
    assert call.path == "/audio/transcriptions"
    assert kind == "multipart/form-data"
    parts = call.body.split(f"--{boundary}".encode())
    assert [part.partition(b"\r\n\r\n")[0].split(b"; ", 1)[-1] for part in parts[1:-1]] == [
        b'name="model"',
        b'name="language"',
        b'name="temperature"',
        b'name="timestamp_granularities[]"',
        b'name="file"; filename="talk.mp3"\r\ncontent-type: audio/mpeg',
    ]
    assert parts[-2].endswith(b"\r\n\r\nRIFF\r\n--\r\n")
    assert parts[-1] == b"--\r\n"


def test_a_parameter_that_no_form_can_hold_is_an_error_of_the_row() -> None:
    with pytest.raises(errors.RowError, match="prompt"):
        wire.encode(TranscriptionRequest(audio=b""), "m", {"prompt": object()})


def test_a_stream_is_asked_for_its_usage() -> None:
    for request in (CHAT, TEXT):
        assert encoded(request, stream=True)[1]["stream_options"] == {"include_usage": True}
        assert wire.encode(request, "m", {"extra_body": {"stream": True}}).streamed
    wanted = {"include_usage": False, "continuous_usage_stats": True}
    assert encoded(CHAT, stream=True, stream_options=wanted)[1]["stream_options"] == wanted
    assert "stream_options" not in encoded(RESPONSES, stream=True)[1]
    assert "stream_options" not in encoded(CHAT, stream=False)[1]
    assert not wire.encode(CHAT, "m", {"stream": False}).streamed


def test_vectors_are_not_streamed() -> None:
    assert encoded(EMBED, stream=True, stream_options={})[1].keys() == {"model", "input"}


SCHEMA = {"type": "object", "properties": {"answer": {"type": "string"}}}
LAYOUT = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}


def test_each_endpoint_gets_a_schema_in_the_form_it_takes() -> None:
    assert encoded(CHAT, response_format=LAYOUT)[1]["response_format"] == LAYOUT
    assert encoded(TEXT, response_format=LAYOUT)[1]["response_format"] == LAYOUT
    body = encoded(RESPONSES, response_format=LAYOUT, text={"verbosity": "low"})[1]
    layout = {"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": True}
    assert body["text"] == {"format": layout, "verbosity": "low"}
    assert "response_format" not in body
    assert encoded(RESPONSES, response_format={"type": "json_object"})[1]["text"]["format"] == {"type": "json_object"}
    assert encoded(RESPONSES, response_format=None)[1].keys() == {"model", "input"}


@pytest.mark.parametrize("params", [{"response_format": "json"}, {"response_format": LAYOUT, "text": 3}])
def test_a_schema_in_no_known_form_is_an_error_of_the_row(params: dict[str, Any]) -> None:
    with pytest.raises(errors.RowError):
        wire.encode(RESPONSES, "m", params)


# Answers


def test_a_chat_answer_is_read_whole() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    message = {"content": "Hello.", "reasoning_content": "Greeting.", "tool_calls": [call]}
    usage = {
        "prompt_tokens": 9,
        "completion_tokens": 7,
        "total_tokens": 16,
        "prompt_tokens_details": {"cached_tokens": 4},
        "completion_tokens_details": {"reasoning_tokens": 5},
    }
    body = chat_body(choices=[{"message": message, "finish_reason": "tool_calls"}], usage=usage)
    assert wire.response_from(CHAT, body, {"x-request-id": "req_1"}) == Response(
        output=Generation(
            text="Hello.",
            finish_reason="tool_calls",
            reasoning="Greeting.",
            tool_calls=(ToolCall(id="c1", name="f", arguments='{"x": 1}'),),
        ),
        model_id="m-2025",
        request_id="req_1",
        usage=TokenUsage(prompt_tokens=9, completion_tokens=7, total_tokens=16, reasoning_tokens=5, cached_tokens=4),
        headers={"x-request-id": "req_1"},
    )


def test_several_choices_are_all_kept_and_the_first_is_the_answer() -> None:
    choices = [{"message": {"content": text}, "finish_reason": "stop"} for text in ("one", "two")]
    output = generation(chat_body(choices=choices))
    assert output.text == "one"
    assert output.choices == tuple(choices)


def test_a_single_choice_is_not_kept_twice() -> None:
    assert generation(chat_body()).choices == ()


def test_a_text_completion_is_read() -> None:
    body = {"choices": [{"text": "Hello.", "finish_reason": "length"}]}
    assert generation(body, TEXT) == Generation(text="Hello.", finish_reason="length")


def test_a_responses_answer_is_read() -> None:
    body = {
        "output": [
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Greeting."}]},
            {"type": "message", "content": [{"type": "output_text", "text": "Hel"}, {"text": "lo."}]},
            {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
            {"type": "something_new"},
        ]
    }
    assert generation(body, RESPONSES) == Generation(
        text="Hello.",
        finish_reason="tool_calls",
        reasoning="Greeting.",
        tool_calls=(ToolCall(id="c1", name="f", arguments="{}"),),
    )


@pytest.mark.parametrize(
    ("reason", "expected"), [("max_output_tokens", "length"), ("content_filter", "content_filter")]
)
def test_an_incomplete_responses_answer_says_why(reason: str, expected: str) -> None:
    body = {"output": [], "incomplete_details": {"reason": reason}}
    assert generation(body, RESPONSES).finish_reason == expected


def test_vectors_come_in_the_order_of_the_texts() -> None:
    body = {"data": [{"index": 1, "embedding": [3, 4]}, {"index": 0, "embedding": [1, 2]}]}
    assert wire.response_from(EMBED, body, {}).output == Embeddings(vectors=([1.0, 2.0], [3.0, 4.0]))


def test_a_vector_too_few_is_no_answer() -> None:
    with pytest.raises(errors.APIResponseError):
        wire.response_from(EMBED, {"data": [{"index": 0, "embedding": [1.0]}]}, {})


@pytest.mark.parametrize(
    ("vector", "values"),
    [("AAAAPwAAgD8=", [0.5, 1.0]), (["0.5", 1], [0.5, 1.0]), ([1, 2], [1.0, 2.0]), ([], []), ("", [])],
)
def test_a_vector_is_numbers_or_base64(vector: Any, values: list[float]) -> None:
    body = {"data": [{"index": "0", "embedding": vector}]}
    output = wire.response_from(EmbeddingRequest(texts=["a"]), body, {}).output
    assert output == Embeddings(vectors=(values,))


@pytest.mark.parametrize("vector", ["AAA", "ü", None, ["x"], [None], 3, [10**400], [0.5, 10**400]])
def test_a_vector_that_is_none_is_no_answer(vector: Any) -> None:
    with pytest.raises(errors.APIResponseError):
        wire.response_from(EmbeddingRequest(texts=["a"]), {"data": [{"embedding": vector}]}, {})


def test_indexes_that_are_all_the_same_leave_the_order() -> None:
    body = {"data": [{"index": 0, "embedding": [3]}, {"index": 0, "embedding": [1]}]}
    assert wire.response_from(EMBED, body, {}).output == Embeddings(vectors=([3.0], [1.0]))


@pytest.mark.parametrize(
    ("payload", "content_type", "text"),
    [
        (b"Hello.\n", "text/plain", "Hello."),
        (b"[Music]\n", "text/html; charset=utf-8", "[Music]"),  # whisper.cpp
        (b"", "text/plain", ""),
        (b'"Hello."', "application/json", "Hello."),
        (b' {"text": "Hello."}', "", "Hello."),
        (b"WEBVTT\n\n00:00\n\n", "text/vtt", "WEBVTT\n\n00:00"),
    ],
)
def test_a_transcript_is_json_or_plain_text(payload: bytes, content_type: str, text: str) -> None:
    response = wire.decode(SPEECH, payload, {"content-type": content_type}, model="whisper-1")
    assert response.output == Transcript(text=text)
    assert response.model_id == "whisper-1"
    assert response.usage is None


@pytest.mark.parametrize(
    ("payload", "content_type"),
    [(b"Hello.", "application/json"), (b'{"text": "Hel', "text/plain"), (b"<!DOCTYPE html>", "text/html"), (b"{}", "")],
)
def test_what_is_no_transcript_is_an_error(payload: bytes, content_type: str) -> None:
    with pytest.raises(errors.APIResponseError):
        wire.decode(SPEECH, payload, {"content-type": content_type})


@pytest.mark.parametrize("status", ["failed", "cancelled", "queued", "in_progress"])
def test_a_responses_answer_that_did_not_end_is_none(status: str) -> None:
    with pytest.raises(errors.APIResponseError):
        wire.response_from(RESPONSES, {"status": status, "output": []}, {})


def test_a_redirect_is_an_error_that_names_the_other_address() -> None:
    error = wire.error_from(308, b"", {"Location": "https://me:hunter2@other.example/v1/x?token=3"})
    assert type(error) is errors.NotFoundError
    assert "sends on to https://other.example/v1/x, and" in str(error)
    assert not type(error).retryable


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": None}, ""),
        ({}, ""),
        ({"content": None, "refusal": "I cannot."}, "I cannot."),
        ({"content": [{"type": "text", "text": "a"}, {"type": "image"}, "b", None]}, "ab"),
        ({"content": 42}, "42"),
        ({"content": {"text": "a"}}, "a"),
    ],
)
def test_content_in_odd_shapes_still_yields_its_text(message: dict[str, Any], text: str) -> None:
    assert generation(chat_body(choices=[{"message": message}])).text == text


def test_arguments_sent_as_an_object_become_json_text() -> None:
    call = {"id": 7, "function": {"name": "f", "arguments": {"x": [1]}}}
    output = generation(chat_body(choices=[{"message": {"content": None, "tool_calls": [call]}}]))
    assert output.tool_calls == (ToolCall(id="7", name="f", arguments='{"x":[1]}'),)


@pytest.mark.parametrize(
    "body",
    [
        None,
        [],
        "text",
        {},
        {"choices": None},
        {"choices": []},
        {"choices": {}},
        {"choices": [None]},
        {"choices": ["message"]},
        {"choices": [{}]},
        {"choices": [{"message": None}]},
        {"choices": [{"message": "hi"}]},
        {"choices": [{"message": {"tool_calls": [{}]}}]},
        {"choices": [{"message": {"tool_calls": 3}}]},
    ],
)
def test_a_body_without_an_answer_is_an_error(body: Any) -> None:
    with pytest.raises(errors.APIResponseError) as caught:
        wire.response_from(CHAT, body, {})
    assert caught.value.status == 200


def test_an_error_behind_a_200_is_an_error() -> None:
    with pytest.raises(errors.APIResponseError, match="model is on fire"):
        wire.response_from(CHAT, {"error": {"message": "model is on fire"}}, {})
    with pytest.raises(errors.InsufficientQuotaError):
        wire.response_from(CHAT, {"error": {"code": "insufficient_quota"}}, {})


def test_without_the_header_the_bodys_id_identifies_the_request() -> None:
    assert wire.response_from(CHAT, chat_body(), {}).request_id == "chatcmpl-1"
    assert wire.response_from(CHAT, chat_body(id=None), {}).request_id is None


def test_a_request_id_can_always_be_stored() -> None:
    header = b"req-\xff".decode("utf-8", "surrogateescape")
    response = wire.response_from(CHAT, chat_body(), {"x-request-id": header})
    assert response.request_id is not None
    assert response.request_id.encode().startswith(b"req-")


# Usage


def test_responses_names_of_usage_are_read() -> None:
    usage = {
        "input_tokens": 9,
        "output_tokens": 7,
        "input_tokens_details": {"cached_tokens": 4},
        "output_tokens_details": {"reasoning_tokens": 5},
    }
    assert wire.usage_from(usage) == TokenUsage(
        prompt_tokens=9, completion_tokens=7, total_tokens=16, reasoning_tokens=5, cached_tokens=4
    )


@pytest.mark.parametrize("usage", [None, [], "12", 12])
def test_usage_that_is_no_object_is_unknown(usage: Any) -> None:
    assert wire.usage_from(usage) is None


def test_a_missing_total_is_the_sum() -> None:
    assert wire.usage_from({"prompt_tokens": 2, "completion_tokens": 3}) == TokenUsage(
        prompt_tokens=2, completion_tokens=3, total_tokens=5
    )


@pytest.mark.parametrize(
    ("count", "expected"),
    [("12", 12), (12.0, 12), (-3, 0), (None, 0), ("many", 0), (math.nan, 0), (math.inf, 0), (1e300, 0), ([], 0)],
)
def test_odd_counts_are_read_or_taken_for_zero(count: Any, expected: int) -> None:
    usage = wire.usage_from({"prompt_tokens": count})
    assert usage == TokenUsage(prompt_tokens=expected, total_tokens=expected)


def test_no_more_tokens_are_cached_than_were_sent() -> None:
    usage = wire.usage_from({"prompt_tokens": 10, "prompt_tokens_details": {"cached_tokens": 99}})
    assert usage is not None
    assert usage.cached_tokens == 10


# Errors


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, errors.BadRequestError),
        (401, errors.AuthenticationError),
        (402, errors.InsufficientQuotaError),
        (403, errors.PermissionDeniedError),
        (404, errors.NotFoundError),
        (408, errors.Timeout),
        (409, errors.ConflictError),
        (413, errors.RequestTooLargeError),
        (418, errors.BadRequestError),
        (422, errors.BadRequestError),
        (429, errors.RateLimitError),
        (500, errors.InternalServerError),
        (502, errors.InternalServerError),
        (503, errors.ServiceUnavailableError),
        (504, errors.InternalServerError),
        (529, errors.ServiceUnavailableError),
    ],
)
def test_each_status_has_its_class(status: int, kind: type[errors.RequestError]) -> None:
    error = wire.error_from(status, {"error": {"message": "no", "type": "t", "code": None}}, {})
    assert type(error) is kind
    assert error.status == status
    assert str(error) == f"HTTP {status}: no"


@pytest.mark.parametrize(
    ("detail", "kind"),
    [
        ({"code": "insufficient_quota"}, errors.InsufficientQuotaError),
        ({"code": None, "type": "insufficient_quota"}, errors.InsufficientQuotaError),
        ({"code": "429", "type": "insufficient_quota"}, errors.InsufficientQuotaError),
        ({"code": "context_length_exceeded"}, errors.ContextWindowExceededError),
        ({"code": "content_filter"}, errors.ContentPolicyViolationError),
    ],
)
def test_a_code_is_more_exact_than_the_status(detail: dict[str, Any], kind: type[errors.RequestError]) -> None:
    assert type(wire.error_from(429, {"error": detail}, {})) is kind


@pytest.mark.parametrize(
    "message",
    [
        "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens.",
        "The input (9000 tokens) is longer than the model's context length (8192 tokens).",
        "the request exceeds the available context size, try increasing it",
        "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096.",
        "prompt is too long: 210000 tokens > 200000 maximum",
    ],
)
def test_servers_words_for_a_full_context_are_known(message: str) -> None:
    assert type(wire.error_from(400, {"message": message}, {})) is errors.ContextWindowExceededError


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"error": "model not loaded"}, "HTTP 500: model not loaded"),
        ({"detail": "Not Found"}, "HTTP 500: Not Found"),
        ({"error": None, "message": "boom"}, "HTTP 500: boom"),
        (b'{"error": {"message": "boom"}}', "HTTP 500: boom"),
        (b"<html>\n<h1>Bad  Gateway</h1>\n</html>", "HTTP 500: <html> <h1>Bad Gateway</h1> </html>"),
        (b"", "HTTP 500"),
        (None, "HTTP 500"),
        ({"error": {"message": "two\nlines"}}, "HTTP 500: two lines"),
    ],
)
def test_the_message_holds_the_servers_words_in_one_line(body: Any, message: str) -> None:
    assert str(wire.error_from(500, body, {})) == message


def test_an_endless_message_is_cut() -> None:
    assert len(str(wire.error_from(500, {"error": {"message": "x" * 10**6}}, {}))) < 3000


def test_a_hint_that_is_a_time_is_read_by_the_clock_of_the_server() -> None:
    sent, again = "Sun, 01 Mar 2026 12:00:00 GMT", "Sun, 01 Mar 2026 12:00:02 GMT"
    assert wire.error_from(429, {}, {"Date": sent, "Retry-After": again}).retry_after_s == 2.0


def test_the_hint_and_the_headers_travel_with_the_error() -> None:
    error = wire.error_from(429, {}, {"Retry-After": "3", "retry-after": "3"})
    assert error.retry_after_s == 3.0
    assert error.headers == {"retry-after": "3"}


# Anything at all

JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=12,
)


def shaped(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Objects with some of ``fields``, any of which may be something else entirely."""
    return st.fixed_dictionaries({}, optional={name: JSON | value for name, value in fields.items()})


FUNCTION = shaped(id=st.text(), name=st.text(), call_id=st.text(), arguments=st.text())
CALLS = st.lists(FUNCTION | shaped(function=FUNCTION), max_size=2)
PARTS = st.lists(shaped(text=st.text(), refusal=st.text()), max_size=2)
MESSAGE = shaped(content=st.text() | PARTS, refusal=st.text(), reasoning=st.text(), tool_calls=CALLS)
CHOICES = st.lists(shaped(message=MESSAGE, text=st.text(), finish_reason=st.text()), max_size=3)
ITEM = shaped(
    type=st.sampled_from(["message", "reasoning", "function_call"]), content=PARTS, summary=PARTS, arguments=st.text()
)
DETAILS = shaped(cached_tokens=st.integers(), reasoning_tokens=st.integers())
USAGE = shaped(prompt_tokens=JSON, output_tokens=JSON, total_tokens=JSON, prompt_tokens_details=DETAILS)
DATA = st.lists(shaped(index=st.integers(), embedding=st.lists(st.floats(), max_size=3)), max_size=3)
ERROR = shaped(message=st.text(), code=st.text(), type=st.text(), details=st.lists(shaped(retryDelay=st.text())))
BODY = shaped(
    choices=CHOICES,
    output=st.lists(ITEM, max_size=3),
    incomplete_details=shaped(reason=st.text()),
    data=DATA,
    usage=USAGE,
    error=ERROR,
    model=st.text(),
    id=st.text(),
)


@settings(deadline=None)
@given(request=st.sampled_from([CHAT, TEXT, RESPONSES, EMBED, SPEECH]), body=JSON | BODY)
def test_any_body_is_a_response_or_an_error_of_the_tree(request: Request, body: Any) -> None:
    try:
        response = wire.response_from(request, body, {})
    except errors.RequestError:
        return
    assert isinstance(response.model_id, str)
    assert isinstance(response.request_id, str | None)
    if isinstance(response.output, Generation):
        assert isinstance(response.output.text, str)
        assert isinstance(response.output.finish_reason, str | None)
        assert isinstance(response.output.reasoning, str | None)
        for call in response.output.tool_calls:
            assert isinstance(call.id, str)
            assert isinstance(call.name, str)
            assert isinstance(call.arguments, str | None)
        assert all(isinstance(choice, dict) for choice in response.output.choices)
    usage = response.usage or TokenUsage()
    counts = (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens, usage.cached_tokens or 0)
    assert all(0 <= count < 2**63 for count in counts)


VALID: list[tuple[Request, Any]] = [
    (CHAT, chat_body(usage={"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": 1}})),
    (
        CHAT,
        chat_body(choices=[{"message": {"tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{}"}}]}}]),
    ),
    (TEXT, {"choices": [{"text": "Hello.", "finish_reason": "stop"}]}),
    (RESPONSES, {"status": "completed", "output": [{"type": "message", "content": [{"text": "Hello."}]}]}),
    (EMBED, {"data": [{"index": 0, "embedding": [0.5, 1]}, {"index": 1, "embedding": "AAAAPwAAgD8="}]}),
    (SPEECH, {"text": "Hello.", "language": "en", "duration": 2.5, "usage": {"type": "duration", "seconds": 3}}),
]


@settings(deadline=None, max_examples=400)
@given(
    case=st.sampled_from(VALID).flatmap(
        lambda case: st.tuples(st.just(case[0]), mutated_json(json.dumps(case[1]).encode()))
    ),
    content_type=st.sampled_from(["application/json", "text/plain", ""]),
)
def test_a_good_body_gone_bad_is_a_response_or_an_error_of_the_tree(
    case: tuple[Request, bytes], content_type: str
) -> None:
    request, payload = case
    with contextlib.suppress(errors.RequestError):
        response = wire.decode(request, payload, {"content-type": content_type})
        orjson.dumps(asdict(response.output))


@settings(deadline=None)
@given(
    status=st.none() | st.integers(100, 999),
    body=JSON | BODY | st.binary(max_size=40),
    headers=st.dictionaries(st.sampled_from(["retry-after", "x-ratelimit-reset-tokens"]), st.text(max_size=12)),
)
def test_any_failure_has_a_place_in_the_tree(status: int | None, body: Any, headers: dict[str, str]) -> None:
    error = wire.error_from(status, body, headers)
    assert isinstance(error, errors.RequestError)
    assert len(str(error).splitlines()) <= 1
    assert error.retry_after_s is None or 0 <= error.retry_after_s < math.inf


@settings(deadline=None)
@given(payload=st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode("utf-8", "surrogatepass")))
def test_any_bytes_are_json_or_a_value_error(payload: bytes) -> None:
    try:
        value = wire.parse_json(payload)
    except ValueError:
        return
    orjson.dumps(value)


@pytest.mark.parametrize(("inner", "closing"), [(b"[", b"]"), (b'{"a":', b"}"), (b'{"choices":[', b"]}")])
def test_deep_nesting_is_an_error_and_no_crash(inner: bytes, closing: bytes) -> None:
    for request, depth in itertools.product([CHAT, RESPONSES, EMBED], [300, 900, 1000, 100_000]):
        payload = inner * depth + b"1" + closing * depth
        with pytest.raises(errors.APIResponseError):
            wire.decode(request, payload, {})
        assert isinstance(wire.error_from(500, payload, {}), errors.InternalServerError)


def test_deeply_nested_fields_do_not_crash_the_reading() -> None:
    deep: Any = "x"
    for _ in range(20_000):
        deep = [{"text": deep}]
    generation(
        chat_body(choices=[{"message": {"content": deep, "reasoning": deep}, "finish_reason": deep}], model=deep)
    )
    wire.error_from(500, {"error": {"message": deep, "code": deep}}, {})


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        (b'{"choices": [{"message": {"content": "caf\xe9"}}]}', "caf\ufffd"),
        (rb'{"choices": [{"message": {"content": "a\ud800b"}}]}', "a?b"),
        (b'{"choices": [{"message": {"content": "a"}, "logprobs": -Infinity, "score": NaN}]}', "a"),
    ],
)
def test_a_paid_answer_is_not_lost_over_a_sloppy_encoder(payload: bytes, text: str) -> None:
    output = wire.decode(CHAT, payload, {}).output
    assert isinstance(output, Generation)
    assert output.text == text


@pytest.mark.parametrize("payload", [b"", b"<html>", b'{"choices": [', b"\x00\xff", b"data: {}\n\n"])
def test_an_answer_that_is_no_json_is_an_error_with_its_beginning(payload: bytes) -> None:
    with pytest.raises(errors.APIResponseError, match="not JSON") as caught:
        wire.decode(CHAT, payload, {"x-request-id": "r"})
    assert caught.value.status == 200
    assert caught.value.headers == {"x-request-id": "r"}
