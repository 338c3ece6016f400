"""OpenAI's wire format: requests to bodies, bodies to responses, failures to the error tree. No I/O.

What comes in pieces is put together by `runner.transports.stream`, and read here as if it had come in one.

Servers are untrusted: whatever a body holds, decoding ends in a `Response` or in an error of the tree, and an answer
that was paid for is not lost over a missing or odd detail. Shapes follow https://platform.openai.com/docs/api-reference.
"""

from __future__ import annotations

import binascii
import json
import math
import re
import sys
from array import array
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import orjson

from runner import errors
from runner.quota import clock_of, retry_after_s
from runner.transports.form import encode_form, form_fields
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

MAX_RESPONSE_BYTES = 64 * 2**20
"""A larger answer is refused: no model writes so much, but a broken server does."""

PATHS = {
    Endpoint.chat_completion: "/chat/completions",
    Endpoint.text_completion: "/completions",
    Endpoint.responses: "/responses",
}

_ENDPOINTS = (*PATHS.values(), "/embeddings", "/audio/transcriptions", "/models")

_VERSION = re.compile(r"/v\d")
"""What the address of an OpenAI-compatible server ends with, or has in it."""

NOT_IN_BODY = frozenset(
    {
        "api_base",
        "api_key",
        "base_url",
        "custom_llm_provider",
        "drop_params",
        "extra_body",
        "extra_headers",
        "max_retries",
        "num_retries",
        "timeout",
    }
)
"""Parameters of LiteLLM and the OpenAI SDK that steer the call and are no part of its JSON."""

_BY_STATUS: dict[int, type[errors.RequestError]] = {
    401: errors.AuthenticationError,
    402: errors.InsufficientQuotaError,
    403: errors.PermissionDeniedError,
    404: errors.NotFoundError,
    408: errors.Timeout,
    409: errors.ConflictError,
    413: errors.RequestTooLargeError,
    429: errors.RateLimitError,
    503: errors.ServiceUnavailableError,
    529: errors.ServiceUnavailableError,
}

_BY_CODE: dict[str, type[errors.RequestError]] = {
    "insufficient_quota": errors.InsufficientQuotaError,
    "billing_hard_limit_reached": errors.InsufficientQuotaError,
    "billing_not_active": errors.InsufficientQuotaError,
    "rate_limit_exceeded": errors.RateLimitError,
    "context_length_exceeded": errors.ContextWindowExceededError,
    "string_above_max_length": errors.ContextWindowExceededError,
    "content_filter": errors.ContentPolicyViolationError,
    "content_policy_violation": errors.ContentPolicyViolationError,
}

_CONTEXT_WORDS = (
    "maximum context length",
    "maximum model length",
    "context window",
    "model's context length",  # SGLang
    "available context size",  # llama.cpp
    "`inputs` tokens + `max_new_tokens`",  # TGI
    "prompt is too long",
)

UNREADABLE = (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError, RecursionError)
"""What reading a body ends in that is not of the shape it should have."""

_LARGEST_COUNT = 2**48
"""A larger number of tokens is nonsense, and larger than a database's integers before long."""

_LONGEST_MESSAGE = 2000
_SHORTEST_SECRET = 12
_SHORTEST_PART = 8


_JSON = "application/json"


class Call(NamedTuple):
    """A request as it is sent."""

    path: str  # below /v1
    body: bytes
    content_type: str = _JSON
    streamed: bool = False  # the answer comes in pieces


def encode(request: Request, model: str, params: Mapping[str, Any]) -> Call:
    """``request`` for ``model``, with ``params`` in its body.

    Raises:
        RowError: A parameter, or the input, cannot be written in a body.
    """
    try:
        extra = params.get("extra_body")
        fields = {key: value for key, value in params.items() if key not in NOT_IN_BODY}
        fields = native_params(request, {**fields, **extra} if extra else fields)
        if isinstance(request, GenerationRequest):
            body = {"model": model, **input_fields(request), **fields}
            return Call(PATHS[request.endpoint], orjson.dumps(body), streamed=bool(body.get("stream")))
        if isinstance(request, EmbeddingRequest):
            return Call("/embeddings", orjson.dumps({"model": model, "input": list(request.texts), **fields}))
        if isinstance(request, TranscriptionRequest):
            if model == _TELLS_LANGUAGE:
                fields.setdefault("response_format", "verbose_json")
            form = form_fields({"model": model, **fields})
            content_type, payload = encode_form(form, filename=request.filename, content=request.audio)
            return Call("/audio/transcriptions", payload, content_type)
    except (TypeError, ValueError) as error:
        raise errors.RowError(f"the request cannot be written: {error}") from None
    raise AssertionError(f"{type(request).__name__} is no request")


_TELLS_LANGUAGE = "whisper-1"
"""OpenAI's one transcriber that tells language and duration, if it is asked to. LiteLLM asks it, too."""


def native_params(request: Request, params: dict[str, Any]) -> dict[str, Any]:
    """``params`` in the forms that the endpoint of ``request`` takes. Changes and returns them.

    - ``response_format`` comes in chat's form. The Responses interface has it below ``text``. Completions get it as it
      is: OpenAI's have none, and vLLM's documentation names this one.
    - A stream is asked for its usage, which OpenAI's otherwise leaves out. Vectors and transcripts are not streamed.

    Raises:
        TypeError: A parameter is of no possible type.
    """
    if not isinstance(request, GenerationRequest):
        params.pop("stream", None)
        params.pop("stream_options", None)
    elif request.endpoint is not Endpoint.responses:
        if params.get("stream"):
            params["stream_options"] = {"include_usage": True, **(params.get("stream_options") or {})}
    elif (layout := params.pop("response_format", None)) is not None:
        if not isinstance(layout, Mapping):
            raise TypeError(f"response_format is {type(layout).__name__}")
        if isinstance(schema := layout.get("json_schema"), Mapping):
            layout = {"type": "json_schema", **schema}
        params["text"] = {"format": layout, **(params.get("text") or {})}
    return params


def decode(request: Request, payload: bytes, headers: Mapping[str, str], *, model: str = "") -> Response:
    """The response in a 200's body, from ``model`` where it names none itself.

    Raises:
        APIResponseError: The body is no JSON, or holds no answer.
        RequestError: The body is an error in the clothes of a success.
    """
    if isinstance(request, TranscriptionRequest) and _is_plain_text(payload, headers):
        # As `text`, `srt` or `vtt`. An answer without JSON names neither its model nor its usage.
        return response_from(request, {"text": payload.decode("utf-8", "replace")}, headers, model=model)
    try:
        body = parse_json(payload)
    except ValueError as error:
        raise errors.APIResponseError(
            f"the server's answer is not JSON ({error}): {excerpt(payload)}", status=200, headers=dict(headers)
        ) from None
    return response_from(request, body, headers, model=model)


def response_from(request: Request, body: Any, headers: Mapping[str, str], *, model: str = "") -> Response:
    """The response in a decoded 200 ``body``; raises as `decode` does."""
    if isinstance(request, TranscriptionRequest) and isinstance(body, str):  # the text as JSON, from FastAPI's servers
        body = {"text": body}
    if not isinstance(body, dict):
        raise errors.APIResponseError(f"the server's answer is no JSON object: {excerpt(body)}", status=200)
    if body.get("error"):
        raise error_from(None, body, headers)
    try:
        output = _output(request, body)
    except UNREADABLE:
        raise errors.APIResponseError(f"the server's answer holds no result: {excerpt(body)}", status=200) from None
    return Response(
        output=output,
        model_id=text_of(body.get("model")) or model,
        request_id=_printable(headers.get("x-request-id") or headers.get("request-id"))
        or text_of(body.get("id"))
        or None,
        usage=usage_from(body.get("usage")),
        headers=headers,
        body=None if isinstance(request, EmbeddingRequest) else body,
    )


def error_from(status: int | None, body: Any, headers: Mapping[str, str]) -> errors.RequestError:
    """The error of the tree for an HTTP ``status`` (None: an error body behind a 200) and its body, decoded or not."""
    if isinstance(body, bytes):
        body = _json_or_raw(body)
    detail = (body.get("error") or body) if isinstance(body, dict) else body
    codes: tuple[Any, ...] = ()
    message = ""
    headers = {name.lower(): value for name, value in headers.items()}
    if status is not None and 300 <= status < 400:
        place = address(headers.get("location", "")) or "another address"
        message = f"the server sends on to {place}, and the key stays here: set api_base to where it really is"
        return errors.NotFoundError(f"HTTP {status}: {message}", status=status, headers=headers)
    if isinstance(detail, dict):
        codes = (detail.get("code"), detail.get("type"))
        message = _one_line(text_of(detail.get("message") or detail.get("detail")), _LONGEST_MESSAGE)
    message = message or excerpt(detail)
    kind = _kind_of(status, codes, message)
    where = f"HTTP {status}" if status is not None else "an error in a 200 answer"
    return kind(
        f"{where}: {message}" if message else where,
        status=status,
        retry_after_s=retry_after_s(headers, body, now=clock_of(headers)),
        headers=headers,
    )


def parse_json(payload: bytes) -> Any:
    """Decode JSON, forgiving what real servers send: invalid UTF-8, lone surrogates, NaN and Infinity (read as null).

    Numbers that are too large for a float are null, too.

    Raises:
        ValueError: It is no JSON even so.
    """
    try:
        return orjson.loads(payload)
    except orjson.JSONDecodeError:
        pass
    try:
        body = json.loads(payload.decode("utf-8", "replace"), parse_float=_finite, parse_constant=lambda _: None)
        text = json.dumps(body, ensure_ascii=False)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return orjson.loads(text.encode("utf-8", "replace"))


def _finite(text: str) -> float | None:
    number = float(text)
    return number if math.isfinite(number) else None


def redacted(payload: bytes, secrets: Iterable[str]) -> bytes:
    """``payload`` without the keys that some servers repeat in their refusals. Placeholders such as ``none`` stay.

    The beginning of a key goes too where the payload was cut within it.
    """
    for secret in secrets:
        if len(secret) >= _SHORTEST_SECRET:
            key = secret.encode()
            payload = payload.replace(key, b"***")
            for size in range(len(key) - 1, _SHORTEST_PART - 1, -1):
                if payload.endswith(key[:size]):
                    payload = payload[:-size] + b"***"
                    break
    return payload


def without_secrets(error: errors.RequestError, secrets: Iterable[str]) -> errors.RequestError:
    """``error`` with the keys blotted out of its message."""
    message = redacted(error.message.encode("utf-8", "replace"), secrets).decode()
    if message == error.message:
        return error
    return type(error)(message, status=error.status, retry_after_s=error.retry_after_s, headers=dict(error.headers))


def address(url: str) -> str:
    """``url`` for a message: without user, password and query."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return ""
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def meant_base(base: str) -> str | None:
    """The ``api_base`` that was probably meant, where nothing is found at this one; None where it looks right.

    It ends with its version: ``http://host:8000`` lacks that, ``…/v1/chat/completions`` goes on after it.
    """
    base = base.rstrip("/")
    shorter = next((base.removesuffix(path) for path in _ENDPOINTS if base.endswith(path)), base)
    meant = shorter if _VERSION.search(shorter) else f"{shorter}/v1"
    return None if meant == base else meant


def usage_from(usage: Any) -> TokenUsage | None:
    """Token counts under any of OpenAI's names, with what is missing derived and nonsense taken for 0.

    None where no tokens are counted: Whisper's usage is in seconds.
    """
    if not isinstance(usage, dict) or usage.get("type") == "duration":
        return None
    prompt = _count(usage.get("prompt_tokens", usage.get("input_tokens"))) or 0
    completion = _count(usage.get("completion_tokens", usage.get("output_tokens"))) or 0
    cached = _detail(usage, "prompt_tokens_details", "input_tokens_details", "cached_tokens")
    return TokenUsage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=_count(usage.get("total_tokens")) or prompt + completion,
        reasoning_tokens=_detail(usage, "completion_tokens_details", "output_tokens_details", "reasoning_tokens"),
        cached_tokens=None if cached is None else min(cached, prompt),
    )


def messages_from(text_or_messages: Any) -> Any:
    """A chat conversation: a string becomes one user message."""
    if isinstance(text_or_messages, str):
        return [{"role": "user", "content": text_or_messages}]
    return text_or_messages


def input_fields(request: GenerationRequest) -> dict[str, Any]:
    """The part of a body that holds the prompt, under its endpoint's name for it."""
    if request.endpoint is Endpoint.chat_completion:
        return {"messages": messages_from(request.input)}
    if request.endpoint is Endpoint.text_completion:
        return {"prompt": request.input}
    return dict(request.input) if isinstance(request.input, dict) else {"input": request.input}


def text_of(value: Any) -> str:
    """A text field, whatever the server put there; content may be a list of parts."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "".join(_part(part) for part in value)
    return _part(value)


def excerpt(value: Any) -> str:
    """The beginning of an unexpected body, on one line."""
    try:
        text = value.decode("utf-8", "replace") if isinstance(value, bytes) else "" if value is None else str(value)
    except RecursionError:
        text = "nested too deeply"
    return _one_line(text, 200)


def _output(request: Request, body: dict[str, Any]) -> Generation | Embeddings | Transcript:
    if isinstance(request, EmbeddingRequest):
        entries = body["data"]
        if len(entries) != len(request.texts):
            raise KeyError("data")
        if [entry.get("index") for entry in entries] != list(range(len(entries))):
            entries = sorted(entries, key=lambda entry: _count(entry.get("index")) or 0)
        return Embeddings(vectors=tuple([_vector(entry["embedding"]) for entry in entries]))
    if isinstance(request, TranscriptionRequest):
        return _transcript(body)
    if isinstance(request, GenerationRequest) and request.endpoint is Endpoint.responses:
        return _responses_output(body)
    choices = body["choices"]
    first = choices[0]
    several = tuple(choice for choice in choices if isinstance(choice, dict)) if len(choices) > 1 else ()
    finish_reason = text_of(first.get("finish_reason")) or None
    if "message" not in first:
        return Generation(text=text_of(first["text"]), finish_reason=finish_reason, choices=several)
    message = first["message"]
    return Generation(
        text=text_of(message.get("content") or message.get("refusal")),
        finish_reason=finish_reason,
        reasoning=text_of(message.get("reasoning_content") or message.get("reasoning")) or None,
        tool_calls=_tool_calls(message["tool_calls"]) if message.get("tool_calls") else (),
        choices=several,
    )


def _responses_output(body: dict[str, Any]) -> Generation:
    if body.get("status") in _WITHOUT_OUTPUT:
        raise ValueError("status")
    texts: list[str] = []
    reasoning: list[str] = []
    calls: list[ToolCall] = []
    for item in body["output"]:
        kind = item.get("type")
        if kind == "message":
            texts += [text_of(part.get("text") or part.get("refusal")) for part in item.get("content") or ()]
        elif kind == "reasoning":
            reasoning += [text_of(part.get("text")) for part in item.get("summary") or ()]
        elif kind == "function_call":
            calls.append(_tool_call(item.get("call_id"), item))
    incomplete = text_of((body.get("incomplete_details") or {}).get("reason"))
    reason = "length" if incomplete == "max_output_tokens" else incomplete
    return Generation(
        text="".join(texts),
        finish_reason=reason or ("tool_calls" if calls else "stop"),
        reasoning="\n".join(reasoning) or None,
        tool_calls=tuple(calls),
    )


_WITHOUT_OUTPUT = ("failed", "cancelled", "queued", "in_progress")


def _vector(values: Any) -> list[float]:
    """A list of numbers, or base64 of 32-bit floats in little-endian order."""
    if isinstance(values, str):
        vector = array("f", binascii.a2b_base64(values))
        if sys.byteorder == "big":
            vector.byteswap()
        return vector.tolist()
    if set(map(type, values)) == {float}:
        return values  # type: ignore[no-any-return]
    return [float(value) for value in values]


def _transcript(body: dict[str, Any]) -> Transcript:
    usage = body.get("usage")
    seconds = body.get("duration", usage.get("seconds") if isinstance(usage, dict) else None)
    return Transcript(
        text=text_of(body["text"]).rstrip("\r\n"),  # the end of a line, where the server wrote plain text
        language=text_of(body.get("language")) or None,
        duration_s=_seconds(seconds),
    )


def _tool_calls(entries: Any) -> tuple[ToolCall, ...]:
    return tuple(_tool_call(entry.get("id"), entry["function"]) for entry in entries)


def _tool_call(call_id: Any, function: dict[str, Any]) -> ToolCall:
    arguments = function.get("arguments")
    if arguments is not None and not isinstance(arguments, str):  # some servers send the object itself
        arguments = orjson.dumps(arguments).decode()
    return ToolCall(id=text_of(call_id), name=text_of(function.get("name")), arguments=arguments)


def _kind_of(status: int | None, codes: tuple[Any, ...], message: str) -> type[errors.RequestError]:
    for code in codes:
        if isinstance(code, str) and code in _BY_CODE:
            return _BY_CODE[code]
    if status is None:
        return errors.APIResponseError
    if status in _BY_STATUS:
        return _BY_STATUS[status]
    if status >= 500:
        return errors.InternalServerError
    if status == 400 and any(words in message.lower() for words in _CONTEXT_WORDS):
        return errors.ContextWindowExceededError
    return errors.BadRequestError if 400 <= status < 500 else errors.APIResponseError


def _detail(usage: dict[str, Any], chat_name: str, responses_name: str, key: str) -> int | None:
    details = usage.get(chat_name) or usage.get(responses_name)
    return _count(details.get(key)) if isinstance(details, dict) else None


def _count(value: Any) -> int | None:
    try:
        count = max(0, int(value))
    except (TypeError, ValueError, OverflowError):
        return None
    return count if count <= _LARGEST_COUNT else None


def _seconds(value: Any) -> float | None:
    try:
        seconds = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return seconds if 0 <= seconds < math.inf else None


def _is_plain_text(payload: bytes, headers: Mapping[str, str]) -> bool:
    """Whether a transcript came without JSON around it. A page is no transcript, but whisper.cpp calls them HTML."""
    beginning = payload[:64].lstrip().lower()
    return "json" not in headers.get("content-type", "") and not beginning.startswith((b"{", b"<!doctype", b"<html"))


def _part(value: Any) -> str:
    if isinstance(value, dict):
        value = value.get("text")
    return value if isinstance(value, str) else str(value) if isinstance(value, (int, float)) else ""


def _json_or_raw(payload: bytes) -> Any:
    try:
        return parse_json(payload)
    except ValueError:
        return payload


def _printable(header: str | None) -> str:
    """A header's value without the bytes that are no UTF-8."""
    return header.encode("utf-8", "replace").decode() if header else ""


def _one_line(text: str, longest: int) -> str:
    return " ".join(text[: 2 * longest].split())[:longest]
