"""OpenAI's wire format: requests to bodies, bodies to responses, failures to the error tree. No I/O.

Servers are untrusted: whatever a body holds, decoding ends in a `Response` or in an error of the tree, and an answer
that was paid for is not lost over a missing or odd detail. Shapes follow https://platform.openai.com/docs/api-reference.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from typing import Any

import orjson

from runner import errors
from runner.quota import retry_after_s
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
)

PATHS = {
    Endpoint.chat_completion: "/chat/completions",
    Endpoint.text_completion: "/completions",
    Endpoint.responses: "/responses",
}

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

_LARGEST_COUNT = 2**48
"""A larger number of tokens is nonsense, and larger than a database's integers before long."""

_LONGEST_MESSAGE = 2000
_SHORTEST_SECRET = 12


def encode(request: Request, model: str, params: Mapping[str, Any]) -> tuple[str, bytes]:
    """The path below ``/v1`` and the JSON body of ``request`` for ``model``, with ``params`` in it."""
    if isinstance(request, GenerationRequest):
        body = {"model": model, **input_fields(request)}
        path = PATHS[request.endpoint]
    elif isinstance(request, EmbeddingRequest):
        body = {"model": model, "input": list(request.texts)}
        path = "/embeddings"
    else:
        raise TypeError(f"{type(request).__name__} has no JSON form")
    try:
        if params:
            for key, value in params.items():
                if key not in NOT_IN_BODY:
                    body[key] = value
            body.update(params.get("extra_body") or {})
        return path, orjson.dumps(body)
    except (TypeError, ValueError) as error:
        raise errors.RowError(f"the request cannot be written as JSON: {error}") from None


def decode(request: Request, payload: bytes, headers: Mapping[str, str]) -> Response:
    """The response in a 200's body.

    Raises:
        APIResponseError: The body is no JSON, or holds no answer.
        RequestError: The body is an error in the clothes of a success.
    """
    try:
        body = parse_json(payload)
    except ValueError as error:
        raise errors.APIResponseError(
            f"the server's answer is not JSON ({error}): {_excerpt(payload)}", status=200, headers=dict(headers)
        ) from None
    return response_from(request, body, headers)


def response_from(request: Request, body: Any, headers: Mapping[str, str]) -> Response:
    """The response in a decoded 200 ``body``; raises as `decode` does."""
    if not isinstance(body, dict):
        raise errors.APIResponseError(f"the server's answer is no JSON object: {_excerpt(body)}", status=200)
    if body.get("error"):
        raise error_from(None, body, headers)
    try:
        output = _output(request, body)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError):
        raise errors.APIResponseError(f"the server's answer holds no result: {_excerpt(body)}", status=200) from None
    return Response(
        output=output,
        model_id=_text(body.get("model")),
        request_id=_printable(headers.get("x-request-id") or headers.get("request-id"))
        or _text(body.get("id"))
        or None,
        usage=usage_from(body.get("usage")),
        headers=headers,
    )


def error_from(status: int | None, body: Any, headers: Mapping[str, str]) -> errors.RequestError:
    """The error of the tree for an HTTP ``status`` (None: an error body behind a 200) and its body, decoded or not."""
    if isinstance(body, bytes):
        body = _json_or_raw(body)
    detail = (body.get("error") or body) if isinstance(body, dict) else body
    codes: tuple[Any, ...] = ()
    message = ""
    if isinstance(detail, dict):
        codes = (detail.get("code"), detail.get("type"))
        message = _one_line(_text(detail.get("message") or detail.get("detail")), _LONGEST_MESSAGE)
    message = message or _excerpt(detail)
    kind = _kind_of(status, codes, message)
    where = f"HTTP {status}" if status is not None else "an error in a 200 answer"
    return kind(
        f"{where}: {message}" if message else where,
        status=status,
        retry_after_s=retry_after_s(headers, body, now=time.time()),
        headers={name.lower(): value for name, value in headers.items()},
    )


def parse_json(payload: bytes) -> Any:
    """Decode JSON, forgiving what real servers send: invalid UTF-8, lone surrogates, NaN and Infinity (read as null).

    Raises:
        ValueError: It is no JSON even so.
    """
    try:
        return orjson.loads(payload)
    except orjson.JSONDecodeError:
        pass
    try:
        body = json.loads(payload.decode("utf-8", "replace"), parse_constant=lambda _: None)
        text = json.dumps(body, ensure_ascii=False)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return orjson.loads(text.encode("utf-8", "replace"))


def redacted(payload: bytes, secrets: Iterable[str]) -> bytes:
    """``payload`` without the keys that some servers repeat in their refusals. Placeholders such as ``none`` stay."""
    for secret in secrets:
        if len(secret) >= _SHORTEST_SECRET:
            payload = payload.replace(secret.encode(), b"***")
    return payload


def usage_from(usage: Any) -> TokenUsage | None:
    """Token counts under any of OpenAI's names, with what is missing derived and nonsense taken for 0."""
    if not isinstance(usage, dict):
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


def _output(request: Request, body: dict[str, Any]) -> Generation | Embeddings:
    if isinstance(request, EmbeddingRequest):
        ordered = sorted(body["data"], key=lambda entry: entry.get("index", 0))
        if len(ordered) != len(request.texts):
            raise KeyError("data")
        return Embeddings(vectors=tuple([float(value) for value in entry["embedding"]] for entry in ordered))
    if isinstance(request, GenerationRequest) and request.endpoint is Endpoint.responses:
        return _responses_output(body)
    choices = body["choices"]
    first = choices[0]
    several = tuple(choice for choice in choices if isinstance(choice, dict)) if len(choices) > 1 else ()
    finish_reason = _text(first.get("finish_reason")) or None
    if "message" not in first:
        return Generation(text=_text(first["text"]), finish_reason=finish_reason, choices=several)
    message = first["message"]
    return Generation(
        text=_text(message.get("content") or message.get("refusal")),
        finish_reason=finish_reason,
        reasoning=_text(message.get("reasoning_content") or message.get("reasoning")) or None,
        tool_calls=_tool_calls(message["tool_calls"]) if message.get("tool_calls") else (),
        choices=several,
    )


def _responses_output(body: dict[str, Any]) -> Generation:
    texts: list[str] = []
    reasoning: list[str] = []
    calls: list[ToolCall] = []
    for item in body["output"]:
        kind = item.get("type")
        if kind == "message":
            texts += [_text(part.get("text") or part.get("refusal")) for part in item.get("content") or ()]
        elif kind == "reasoning":
            reasoning += [_text(part.get("text")) for part in item.get("summary") or ()]
        elif kind == "function_call":
            calls.append(_tool_call(item.get("call_id"), item))
    incomplete = _text((body.get("incomplete_details") or {}).get("reason"))
    reason = "length" if incomplete == "max_output_tokens" else incomplete
    return Generation(
        text="".join(texts),
        finish_reason=reason or ("tool_calls" if calls else "stop"),
        reasoning="\n".join(reasoning) or None,
        tool_calls=tuple(calls),
    )


def _tool_calls(entries: Any) -> tuple[ToolCall, ...]:
    return tuple(_tool_call(entry.get("id"), entry["function"]) for entry in entries)


def _tool_call(call_id: Any, function: dict[str, Any]) -> ToolCall:
    arguments = function.get("arguments")
    if arguments is not None and not isinstance(arguments, str):  # some servers send the object itself
        arguments = orjson.dumps(arguments).decode()
    return ToolCall(id=_text(call_id), name=_text(function.get("name")), arguments=arguments)


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


def _text(value: Any) -> str:
    """A text field, whatever the server put there; content may be a list of parts."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "".join(_part(part) for part in value)
    return _part(value)


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


def _excerpt(value: Any) -> str:
    """The beginning of an unexpected body, on one line."""
    try:
        text = value.decode("utf-8", "replace") if isinstance(value, bytes) else "" if value is None else str(value)
    except RecursionError:
        text = "nested too deeply"
    return _one_line(text, 200)


def _one_line(text: str, longest: int) -> str:
    return " ".join(text[: 2 * longest].split())[:longest]
