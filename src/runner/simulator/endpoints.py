"""OpenAI's endpoints: what each one asks of the model, and how the answer is written down."""

from __future__ import annotations

import base64
import io
import math
import time
import wave
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import orjson

from runner.simulator.body import Body, conversation
from runner.simulator.faults import Refusal
from runner.simulator.model import Choice, Model
from runner.simulator.text import tokens_in

Json = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What one request will be answered."""

    prompts: Sequence[str]  # what the ledger knows it by
    prompt_tokens: int
    choices: Sequence[Choice] = ()
    document: Json | str  # a text is sent as it is
    frames: Iterator[bytes] | None = None  # the document as a stream, in the order of the tokens

    @property
    def completion_tokens(self) -> int:
        return sum(choice.tokens for choice in self.choices)

    @property
    def steps(self) -> int:
        """Turns of the model: the tokens of the longest choice."""
        return max((choice.tokens for choice in self.choices), default=1)


def chat_completions(model: Model, body: Body) -> Reply:
    prompt, prompt_tokens = conversation(body.required("messages", list))
    return _completion(model, body, [prompt], prompt_tokens, chat=True)


def completions(model: Model, body: Body) -> Reply:
    prompts = body.texts("prompt")
    return _completion(model, body, prompts, sum(map(tokens_in, prompts)), chat=False)


def responses(model: Model, body: Body) -> Reply:
    given = body.fields.get("input")
    items = [{"role": "user", "content": given}] if given and isinstance(given, str) else body.required("input", list)
    prompt, prompt_tokens = conversation([*items, {"content": body.fields.get("instructions")}])
    choice = model.answer(body, prompt)
    status = "incomplete" if choice.finish_reason == "length" else "completed"
    content = [{"type": "output_text", "text": choice.text, "annotations": [], "logprobs": []}]
    output = {"type": "message", "id": f"msg_{body.id}", "role": "assistant", "content": content}
    if choice.tool:
        call = {"call_id": choice.call_id, "name": choice.tool, "arguments": choice.text}
        output = {"type": "function_call", "id": f"fc_{body.id}", **call}
    head = {"id": f"resp_{body.id}", "object": "response", "created_at": int(time.time()), "model": body.model}
    incomplete = {"reason": "max_output_tokens"} if status == "incomplete" else None
    state = {"status": status, "error": None, "incomplete_details": incomplete, "output": [output | {"status": status}]}
    usage = {
        "input_tokens": prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": choice.tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt_tokens + choice.tokens,
    }
    echoed = {name: body.fields.get(name, default) for name, default in _ECHOED.items()}
    text = {"format": {"type": "text"}, **(body.fields.get("text") or {})}
    document = {**echoed, **head, **state, "text": text, "usage": usage}
    return Reply(
        prompts=[prompt],
        prompt_tokens=prompt_tokens,
        choices=[choice],
        document=document,
        frames=_events(document, choice) if body.fields.get("stream") else None,
    )


def _events(document: Json, choice: Choice) -> Iterator[bytes]:
    """A step for each token of the answer, and one with what ends the stream."""
    [item] = document["output"]
    place: Json = {"item_id": item["id"], "output_index": 0}
    begun = {**document, "status": "in_progress", "incomplete_details": None, "output": [], "usage": None}
    before: list[Json] = [{"type": "response.created", "response": begun}]
    after: list[Json] = []
    if choice.tool:
        kind, empty = "response.function_call_arguments", {**item, "arguments": "", "status": "in_progress"}
        before += [{"type": "response.output_item.added", "output_index": 0, "item": empty}]
        after += [{"type": f"{kind}.done", **place, "arguments": choice.text}]
    else:
        kind, empty = "response.output_text", {**item, "content": [], "status": "in_progress"}
        place["content_index"] = 0
        [part] = item["content"]
        before += [{"type": "response.output_item.added", "output_index": 0, "item": empty}]
        before += [{"type": "response.content_part.added", **place, "part": {**part, "text": ""}}]
        after += [{"type": f"{kind}.done", **place, "text": choice.text, "logprobs": []}]
        after += [{"type": "response.content_part.done", **place, "part": part}]
    after += [{"type": "response.output_item.done", "output_index": 0, "item": item}]
    after += [{"type": f"response.{document['status']}", "response": document}]
    numbers = count()
    for step in range(choice.tokens):
        delta = {"type": f"{kind}.delta", **place, "delta": choice.piece(step)}
        yield b"".join(_event(event, next(numbers)) for event in (*before, delta))
        before = []
    yield b"".join(_event(event, next(numbers)) for event in after)


def _event(event: Json, number: int) -> bytes:
    data = orjson.dumps({**event, "sequence_number": number})
    return b"event: %b\ndata: %b\n\n" % (event["type"].encode(), data)


# What a response repeats of its request, and what it says where the request is silent.
_ECHOED: Json = (
    {"instructions": None, "metadata": {}, "max_output_tokens": None, "previous_response_id": None, "user": None}
    | {"parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "temperature": 1.0, "top_p": 1.0}
    | {"background": False, "store": True, "truncation": "disabled", "reasoning": {"effort": None, "summary": None}}
)


def embeddings(model: Model, body: Body) -> Reply:
    texts, size = body.texts("input"), body.positive("dimensions")
    values: list[Any] = [model.vector(body.model, text, size) for text in texts]
    if body.fields.get("encoding_format") == "base64":
        values = [base64.b64encode(array("f", vector)).decode() for vector in values]
    data = [{"object": "embedding", "index": index, "embedding": value} for index, value in enumerate(values)]
    tokens = sum(map(tokens_in, texts))
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    document = {"object": "list", "data": data, "model": body.model, "usage": usage}
    return Reply(prompts=texts, prompt_tokens=tokens, document=document)


def transcriptions(model: Model, body: Body) -> Reply:
    name, data = body.required("file", tuple)
    layout = body.fields.get("response_format", "json")
    choice, duration_s = model.answer(body, name), _duration_s(data)
    heard = math.ceil(duration_s * 10)  # audio tokens, ten a second
    document: Json = {"text": choice.text}
    if layout in _LAYOUTS:
        text = _LAYOUTS[layout](choice.text, duration_s)
        return Reply(prompts=[name], prompt_tokens=heard, choices=[choice], document=text)
    if layout == "json":
        counts = {"input_tokens": heard, "output_tokens": choice.tokens, "total_tokens": heard + choice.tokens}
        details = {"text_tokens": 0, "audio_tokens": heard}
        document["usage"] = {"type": "tokens", **counts, "input_token_details": details}
    elif layout == "verbose_json":
        segment: Json = {"id": 0, "seek": 0, "start": 0.0, "end": duration_s, "text": choice.text, "tokens": []}
        segment |= {"temperature": 0.0, "avg_logprob": -0.2, "compression_ratio": 1.2, "no_speech_prob": 0.0}
        language = body.fields.get("language") or "english"
        document |= {"task": "transcribe", "language": language, "duration": duration_s, "segments": [segment]}
        document["usage"] = {"type": "duration", "seconds": math.ceil(duration_s)}
    else:
        raise Refusal(f"The simulator does not write {layout!r}.", param="response_format", code="unsupported_value")
    return Reply(prompts=[name], prompt_tokens=heard, choices=[choice], document=document)


def _srt(text: str, duration_s: float) -> str:
    return f"1\n{_clock(0, ',')} --> {_clock(duration_s, ',')}\n{text}\n\n"


def _vtt(text: str, duration_s: float) -> str:
    return f"WEBVTT\n\n{_clock(0, '.')} --> {_clock(duration_s, '.')}\n{text}\n\n"


_LAYOUTS: dict[str, Callable[[str, float], str]] = {"text": lambda text, _: f"{text}\n", "srt": _srt, "vtt": _vtt}


def _clock(seconds: float, point: str) -> str:
    whole, thousandths = divmod(round(seconds * 1000), 1000)
    return f"{whole // 3600:02}:{whole // 60 % 60:02}:{whole % 60:02}{point}{thousandths:03}"


def _duration_s(audio: bytes) -> float:
    """As a WAV file says; of any other, its length at 128 kbit/s."""
    try:
        with wave.open(io.BytesIO(audio)) as file:
            return float(file.getnframes() / file.getframerate())
    except (wave.Error, EOFError, ZeroDivisionError):
        return round(len(audio) / 16_000, 3)


ENDPOINTS: dict[str, Callable[[Model, Body], Reply]] = {
    "/v1/chat/completions": chat_completions,
    "/v1/completions": completions,
    "/v1/responses": responses,
    "/v1/embeddings": embeddings,
    "/v1/audio/transcriptions": transcriptions,
}


def _completion(model: Model, body: Body, prompts: list[str], prompt_tokens: int, *, chat: bool) -> Reply:
    n = body.positive("n") or 1
    choices = [model.answer(body, prompt, place) for place, prompt in enumerate(p for p in prompts for _ in range(n))]
    said = sum(choice.tokens for choice in choices)
    usage = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": said,
        "total_tokens": prompt_tokens + said,
        "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
        "completion_tokens_details": _COMPLETION_DETAILS,
    }
    ids: Json = {"id": f"chatcmpl-{body.id}", "object": "chat.completion"}
    if not chat:
        ids = {"id": f"cmpl-{body.id}", "object": "text_completion"}
    head = {**ids, "created": int(time.time()), "model": body.model, "system_fingerprint": "fp_simulated"}
    wholes = [_message(choice) if chat else {"text": choice.text} for choice in choices]
    entries = [_entry(index, whole, choices[index].finish_reason) for index, whole in enumerate(wholes)]
    return Reply(
        prompts=prompts,
        prompt_tokens=prompt_tokens,
        choices=choices,
        document={**head, "choices": entries, "usage": usage},
        frames=_frames(body, head, choices, usage, chat=chat) if body.fields.get("stream") else None,
    )


_COMPLETION_DETAILS = {
    "reasoning_tokens": 0,
    "audio_tokens": 0,
    "accepted_prediction_tokens": 0,
    "rejected_prediction_tokens": 0,
}


def _frames(body: Body, head: Json, choices: list[Choice], usage: Json, *, chat: bool) -> Iterator[bytes]:
    """A step for each token of the longest choice, one with the finish reason, and what ends the stream."""
    counts = (body.fields.get("stream_options") or {}).get("include_usage")
    head |= ({"object": "chat.completion.chunk"} if chat else {}) | ({"usage": None} if counts else {})
    for step in range(max(choice.tokens for choice in choices) + 1):
        entries = []
        for index, choice in enumerate(choices):
            if step <= choice.tokens:
                pieces = _deltas(choice, step) if chat else [{"text": choice.piece(step)}]
                finish_reason = choice.finish_reason if step == choice.tokens else None
                entries += [_entry(index, piece, finish_reason) for piece in pieces]
        yield b"".join([b"data: %b\n\n" % orjson.dumps({**head, "choices": [entry]}) for entry in entries])
    if counts:
        yield b"data: %b\n\n" % orjson.dumps({**head, "choices": [], "usage": usage})
    yield b"data: [DONE]\n\n"


def _entry(index: int, said: Json, finish_reason: str | None) -> Json:
    return {"index": index, **said, "logprobs": None, "finish_reason": finish_reason}


def _message(choice: Choice) -> Json:
    said: Json = {"role": "assistant", "content": choice.text, "refusal": None, "annotations": []}
    if choice.tool:
        said |= {"content": None, "tool_calls": [_tool_call(choice, choice.text)]}
    return {"message": said}


def _deltas(choice: Choice, step: int) -> list[Json]:
    piece = choice.piece(step)
    if step == choice.tokens:
        return [{"delta": {}}]
    if choice.tool is None:
        start = [{"delta": {"role": "assistant", "content": "", "refusal": None}}] if step == 0 else []
        return [*start, {"delta": {"content": piece}}]
    if step > 0:
        return [{"delta": {"tool_calls": [{"index": 0, "function": {"arguments": piece}}]}}]
    calls = [{"index": 0, **_tool_call(choice, piece)}]
    return [{"delta": {"role": "assistant", "content": None, "tool_calls": calls}}]


def _tool_call(choice: Choice, arguments: str) -> Json:
    return {"id": choice.call_id, "type": "function", "function": {"name": choice.tool, "arguments": arguments}}
