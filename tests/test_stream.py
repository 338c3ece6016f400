from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mutations import mutated_bytes, mutated_json
from runner import errors
from runner.transports import wire
from runner.transports.stream import EventReader, Stream
from runner.types import Endpoint, Generation, GenerationRequest, Response, TokenUsage, ToolCall

CHAT = Endpoint.chat_completion
TEXT = Endpoint.text_completion
RESPONSES = Endpoint.responses


def data(event: Any) -> bytes:
    return b"data: " + (event if isinstance(event, bytes) else json.dumps(event).encode()) + b"\n\n"


DONE = data(b"[DONE]")


def chunk(delta: Any = None, finish_reason: str | None = None, *, index: Any = 0, **fields: Any) -> dict[str, Any]:
    choice = {"index": index, "delta": {} if delta is None else delta, "logprobs": None, "finish_reason": finish_reason}
    return {"id": "c1", "object": "chat.completion.chunk", "model": "m-1", "choices": [choice], **fields}


def said(text: str, **fields: Any) -> bytes:
    return data(chunk({"content": text}, **fields))


STOP = data(chunk(finish_reason="stop"))
USAGE = data({"id": "c1", "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}})
HELLO = [data(chunk({"role": "assistant", "content": ""})), said("Hel"), said("lo."), STOP, USAGE, DONE]


def answer(parts: Sequence[bytes], endpoint: Endpoint = CHAT, *, choices: Any = None) -> Response:
    """What `parts` are an answer of, read as a transport reads them."""
    request = GenerationRequest(input="hi", endpoint=endpoint)
    stream = Stream(request, choices=choices)
    for part in parts:
        stream.feed(part)
        if stream.is_over:
            break
    stream.end()
    return wire.response_from(request, stream.body(), {})


def generation(parts: Sequence[bytes], endpoint: Endpoint = CHAT, *, choices: Any = None) -> Generation:
    output = answer(parts, endpoint, choices=choices).output
    assert isinstance(output, Generation)
    return output


# Events


def cut(raw: bytes, size: int) -> list[bytes]:
    return [raw[start : start + size] for start in range(0, len(raw), size)]


def events(parts: Sequence[bytes]) -> list[bytes]:
    reader = EventReader()
    found = [event for part in parts for event in reader.feed(part)]
    return found + reader.end()


@pytest.mark.parametrize("ending", [b"\n", b"\r\n", b"\r"])
def test_events_end_with_an_empty_line_of_any_kind(ending: bytes) -> None:
    raw = ending.join([b"event: x", b"data: one", b"", b": a comment", b"data:two", b"data:  three", b"", b""])
    for size in (1, 2, 3, 7, 1000):
        assert events(cut(raw, size)) == [b"one", b"two\n three"]


def test_an_event_at_the_end_needs_no_empty_line() -> None:
    assert events([b"data: one\n\ndata: [DONE]"]) == [b"one", b"[DONE]"]


def test_what_is_no_data_is_passed_over() -> None:
    assert events([b"id: 7\nretry: 10\n\n:\n\nwhatever\n\n"]) == []


def test_an_event_comes_as_soon_as_it_is_complete() -> None:
    reader = EventReader()
    assert reader.feed(b"data: one\n") == []
    assert reader.feed(b"\ndata: t") == [b"one"]
    assert reader.feed(b"wo") == []
    assert reader.feed(b"\n\n") == [b"two"]


# Answers


@pytest.mark.parametrize("size", [1, 5, 64, 100_000])
def test_a_streamed_answer_is_put_together(size: int) -> None:
    response = answer(cut(b"".join(HELLO), size))
    assert response.output == Generation(text="Hello.", finish_reason="stop")
    assert response.usage == TokenUsage(prompt_tokens=3, completion_tokens=2, total_tokens=5)
    assert (response.model_id, response.request_id) == ("m-1", "c1")


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_reasoning_is_put_together(name: str) -> None:
    parts = [data(chunk({name: "Gree"})), data(chunk({name: "ting."})), *HELLO]
    assert generation(parts) == Generation(text="Hello.", finish_reason="stop", reasoning="Greeting.")


def test_a_refusal_is_put_together() -> None:
    assert generation([data(chunk({"refusal": "I "})), data(chunk({"refusal": "cannot."})), STOP]).text == "I cannot."


def call(index: int | None, arguments: Any, **fields: Any) -> dict[str, Any]:
    function = {"arguments": arguments} | ({"name": fields.pop("name")} if "name" in fields else {})
    return {**({} if index is None else {"index": index}), "function": function, **fields}


def calls(*pieces: dict[str, Any]) -> list[bytes]:
    return [*(data(chunk({"tool_calls": [piece]})) for piece in pieces), data(chunk(finish_reason="tool_calls"))]


def test_tool_calls_are_put_together_by_their_index() -> None:
    output = generation(
        calls(
            call(0, "", id="a", name="f"),
            call(0, '{"x":'),
            call(1, "", id="b", name="g"),
            call(1, "{}"),
            call(0, " 1}", name="f"),
        )
    )
    assert output.tool_calls == (
        ToolCall(id="a", name="f", arguments='{"x": 1}'),
        ToolCall(id="b", name="g", arguments="{}"),
    )
    assert output.finish_reason == "tool_calls"


def test_tool_calls_without_an_index_are_told_apart_by_their_ids() -> None:
    output = generation(
        calls(call(None, "{", id="a", name="f"), call(None, "}"), call(None, {"x": 1}, id="b", name="g"))
    )
    assert output.tool_calls == (
        ToolCall(id="a", name="f", arguments="{}"),
        ToolCall(id="b", name="g", arguments='{"x":1}'),
    )


def test_several_choices_are_put_together_each() -> None:
    parts = [said("one", index=1), said("zero", index=0), said("!", index=1)]
    logprobs = {"content": [{"token": "!"}]}
    entry = {"index": 1, "delta": {}, "finish_reason": "length", "logprobs": logprobs, "stop_reason": 7}
    parts += [data({"choices": [entry]}), data({"choices": [entry]}), STOP, DONE]
    output = generation(parts, choices=2)
    assert output.text == "zero"
    assert [choice["message"]["content"] for choice in output.choices] == ["zero", "one!"]
    assert output.choices[1]["finish_reason"] == "length"
    assert output.choices[1]["logprobs"] == {"content": [{"token": "!"}, {"token": "!"}]}
    assert output.choices[1]["stop_reason"] == 7


def test_a_text_completion_is_put_together() -> None:
    pieces = [("Hel", None), ("lo.", None), ("", "length")]
    parts = [data({"id": "c", "choices": [{"index": 0, "text": text, "finish_reason": end}]}) for text, end in pieces]
    assert generation(parts, TEXT) == Generation(text="Hello.", finish_reason="length")


def response_event(kind: str, **fields: Any) -> bytes:
    return f"event: response.{kind}\n".encode() + data({"type": f"response.{kind}", **fields})


ITEM = {"type": "message", "content": [{"type": "output_text", "text": "Hello."}]}
SAYS_HELLO = [
    response_event("created", response={"status": "in_progress", "output": []}),
    response_event("output_text.delta", delta="Hel"),
    response_event("output_text.delta", delta="lo."),
    response_event("output_item.done", item=ITEM),
]


@pytest.mark.parametrize("output", [[ITEM], []], ids=["whole", "not repeated"])
def test_a_responses_answer_is_what_its_last_event_says(output: list[Any]) -> None:
    ended = {"status": "completed", "model": "m-1", "output": output, "usage": {"input_tokens": 3, "output_tokens": 2}}
    response = answer([*SAYS_HELLO, response_event("completed", response=ended)], RESPONSES)
    assert response.output == Generation(text="Hello.", finish_reason="stop")
    assert response.usage == TokenUsage(prompt_tokens=3, completion_tokens=2, total_tokens=5)
    assert response.model_id == "m-1"


def test_an_incomplete_responses_answer_says_why() -> None:
    ended = {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}, "output": [ITEM]}
    assert generation([response_event("incomplete", response=ended)], RESPONSES).finish_reason == "length"


@pytest.mark.parametrize(
    ("event", "kind"),
    [
        (response_event("failed", response={"error": {"code": "server_error", "message": "No."}}), None),
        (response_event("failed", response={"error": {"code": "rate_limit_exceeded"}}), errors.RateLimitError),
        (response_event("failed", response={"status": "failed", "output": [], "error": None}), None),
        (data({"type": "error", "code": "server_error", "message": "No."}), None),
        (data({"type": "error", "error": {"code": "insufficient_quota"}}), errors.InsufficientQuotaError),
        (data({"error": {"message": "No."}}), None),
    ],
)
def test_a_responses_answer_that_failed_is_an_error(event: bytes, kind: type[errors.RequestError] | None) -> None:
    with pytest.raises(errors.RequestError) as caught:
        answer([*SAYS_HELLO, event], RESPONSES)
    assert type(caught.value) is (kind or errors.APIResponseError)


# Times


def test_content_notes_when_it_came() -> None:
    request = GenerationRequest(input="hi")
    stream = Stream(request)
    stream.feed(HELLO[0])
    assert not request.trace.chunk_times  # it has no content
    for part in HELLO[1:]:
        stream.feed(part)
    times = list(request.trace.chunk_times)
    assert len(times) == 2
    assert request.trace.ttft_s == times[0]
    assert 0 < times[0] <= times[1]


@pytest.mark.parametrize("delta", [{"reasoning": "a"}, {"refusal": "a"}, {"tool_calls": [call(0, "{}", id="a")]}])
def test_reasoning_refusals_and_calls_are_content(delta: dict[str, Any]) -> None:
    request = GenerationRequest(input="hi")
    Stream(request).feed(data(chunk(delta)))
    assert len(request.trace.chunk_times) == 1


def test_another_attempt_starts_its_times_anew() -> None:
    request = GenerationRequest(input="hi")
    Stream(request).feed(said("Hel"))
    Stream(request)
    assert request.trace.ttft_s is None
    assert not request.trace.chunk_times


# Streams that go wrong


@pytest.mark.parametrize("kept", range(len(HELLO) - 3))
def test_a_stream_that_ends_early_is_no_answer(kept: int) -> None:
    with pytest.raises(errors.APIConnectionError, match="ended before") as caught:
        answer(HELLO[:kept])
    assert caught.value.billing == "unknown"


@pytest.mark.parametrize("kept", [4, 5, 6])
def test_once_the_answer_has_ended_the_end_mark_may_be_missing(kept: int) -> None:
    assert generation(HELLO[:kept]) == Generation(text="Hello.", finish_reason="stop")


def test_an_end_mark_without_a_reason_ends_the_answer() -> None:
    assert generation([said("Hello."), DONE]) == Generation(text="Hello.")


def test_several_choices_must_all_have_ended() -> None:
    parts = [said("one"), STOP, said("two", index=1)]
    with pytest.raises(errors.APIConnectionError):
        answer(parts[:2], choices=2)
    with pytest.raises(errors.APIConnectionError):
        answer(parts, choices=2)
    assert len(generation([*parts, data(chunk(finish_reason="stop", index=1))], choices=2).choices) == 2


MALFORMED = [b'{"choices": [{"del', b"[1]", b'"x"', b"7", b'{"choices": 3}', b'{"choices": [{"delta": "x"}]}']


@pytest.mark.parametrize("broken", MALFORMED)
def test_a_malformed_event_leaves_a_hole_and_so_no_answer(broken: bytes) -> None:
    with pytest.raises(errors.APIResponseError) as caught:
        answer([said("Hel"), data(broken), said("lo."), STOP, DONE])
    assert caught.value.status == 200


@pytest.mark.parametrize("broken", [*MALFORMED, b'{"error": {"message": "boom"}}'])
def test_what_is_broken_after_the_end_of_the_answer_does_no_harm(broken: bytes) -> None:
    assert generation([said("Hello."), STOP, data(broken)]).text == "Hello."


def test_an_error_among_the_pieces_is_an_error() -> None:
    with pytest.raises(errors.APIResponseError, match="boom"):
        answer([said("Hel"), data({"error": {"message": "boom", "code": 500}}), DONE])


def test_an_end_mark_alone_is_no_answer() -> None:
    for endpoint in Endpoint:
        with pytest.raises(errors.APIResponseError):
            answer([DONE], endpoint)


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (b'{"choices": [{"index": "0", "delta": {"content": "caf\xe9"}}]}', "caf\ufffd"),
        (rb'{"choices": [{"delta": {"content": "a\ud800b"}}]}', "a?b"),
        (b'{"choices": [{"index": null, "delta": {"content": ["a", {"text": "b"}]}}]}', "ab"),
        (b'{"choices": [{"delta": {"content": 7}}], "usage": NaN}', "7"),
        (b'{"choices": [{"delta": {"content": "a", "role": null}}], "usage": {"prompt_tokens": "3"}}', "a"),
    ],
)
def test_sloppy_events_are_read(event: bytes, text: str) -> None:
    assert generation([data(event), DONE]).text == text


# Anything at all

EXAMPLES = [
    (CHAT, HELLO),
    (CHAT, [*calls(call(0, "", id="a", name="f"), call(0, "{}")), USAGE, DONE]),
    (RESPONSES, [*SAYS_HELLO, response_event("completed", response={"status": "completed", "output": [ITEM]})]),
    (TEXT, [data({"choices": [{"index": 0, "text": "Hello.", "finish_reason": "stop"}]}), DONE]),
]


@st.composite
def mutated(draw: st.DrawFn) -> tuple[Endpoint, list[bytes]]:
    """A good stream with bytes changed, parts lost, repeated or swapped, and values replaced by anything."""
    endpoint, example_parts = draw(st.sampled_from(EXAMPLES))
    parts = list(example_parts)
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(parts) - 1))
        match draw(st.sampled_from(["bytes", "lost", "repeated", "swapped", "value"])):
            case "bytes":
                parts[place] = draw(mutated_bytes(parts[place]))
            case "lost":
                parts[place] = b""
            case "repeated":
                parts.insert(place, parts[place])
            case "swapped":
                parts[place], parts[0] = parts[0], parts[place]
            case "value" if parts[place].startswith(b"data: {") and parts[place].endswith(b"}\n\n"):
                parts[place] = data(draw(mutated_json(parts[place][6:])))
    return endpoint, cut(b"".join(parts), draw(st.integers(1, 200)))


@settings(deadline=None, max_examples=400)
@given(case=mutated(), choices=st.none() | st.integers(-1, 3) | st.just("x"))
@example(case=(CHAT, [data(b"[" * 100_000)]), choices=None)
@example(case=(RESPONSES, [data(b'{"a":' * 100_000)]), choices=None)
def test_any_stream_is_an_answer_or_an_error_of_the_tree(case: tuple[Endpoint, list[bytes]], choices: Any) -> None:
    endpoint, parts = case
    try:
        output = generation(parts, endpoint, choices=choices)
    except errors.RequestError:
        return
    assert isinstance(output.text, str)
    assert isinstance(output.reasoning, str | None)
    assert all(isinstance(call.arguments, str | None) for call in output.tool_calls)


@settings(deadline=None)
@given(parts=st.lists(st.binary(max_size=30), max_size=8), endpoint=st.sampled_from(list(Endpoint)))
def test_any_bytes_are_no_answer_and_no_crash(parts: list[bytes], endpoint: Endpoint) -> None:
    with pytest.raises(errors.RequestError):
        answer(parts, endpoint)
