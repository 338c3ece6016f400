"""Answers other than the one asked for: refusals, and the faults that are HTTP errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import orjson

from runner.simulator.quota import duration_text


class Refusal(Exception):
    """An HTTP answer other than the one asked for: by default a 400, with a body as OpenAI's errors have it.

    ``error`` overrides ``type``, ``param`` and ``code`` in that body; ``body`` replaces it.
    """

    def __init__(
        self, message: str, *, status: int = 400, headers: Mapping[str, str] = {}, body: bytes = b"", **error: str
    ) -> None:
        super().__init__(message)
        told = {"message": message, "type": "invalid_request_error", "param": None, "code": None, **error}
        self.status = status
        self.headers = {"content-type": "application/json", **headers}
        self.body = body or orjson.dumps({"error": told})


def missing(name: str) -> Refusal:
    return Refusal(f"Missing required parameter: '{name}'.", param=name, code="missing_required_parameter")


def rate_limited(model: str, wait_s: float) -> Refusal:
    """A 429 that says to the millisecond when to come back."""
    message = f"Rate limit reached for {model}. Please try again in {duration_text(wait_s)}."
    headers = {"retry-after-ms": str(math.ceil(wait_s * 1000))}
    return Refusal(message, status=429, headers=headers, type="requests", code="rate_limit_exceeded")


def crowded(model: str, most: int) -> Refusal:
    """A 429 of a provider that bounds what is under way at once. It cannot say when to come back."""
    message = f"Too many concurrent requests for {model}: Limit {most}."
    return Refusal(message, status=429, type="requests", code="rate_limit_exceeded")


def http_fault(fault: str, model: str, *, streamed: bool, retry_after: str | None = None) -> Refusal | None:
    """The answer of a fault that comes at once; None for those that delay or spoil the model's answer."""
    if fault not in _HTTP_FAULTS:
        return None
    refusal = _HTTP_FAULTS[fault](model)
    if refusal.status == 429 and retry_after is not None:
        refusal.headers.pop("retry-after-ms")
        refusal.headers["retry-after"] = retry_after
    if streamed and refusal.status == 200:
        refusal.headers["content-type"] = "text/event-stream"
        refusal.body = b"data: %b\n\n" % refusal.body
    return refusal


_ERROR = "The server had an error while processing your request. Sorry about that!"
_OVERLOADED = "The engine is currently overloaded, please try again later."
_FAILED = "The model failed to generate an answer."
_PAGE = (
    b"<html><head><title>502 Bad Gateway</title></head><body><center><h1>502 Bad Gateway</h1></center></body></html>"
)
_ANTHROPIC = b'{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}'
_HTTP_FAULTS: dict[str, Callable[[str], Refusal]] = {
    "http_429": lambda model: rate_limited(model, 0.02),
    "http_500": lambda _: Refusal(_ERROR, status=500, type="server_error"),
    "http_502": lambda _: Refusal("Bad Gateway", status=502, headers={"content-type": "text/html"}, body=_PAGE),
    "http_503": lambda _: Refusal(_OVERLOADED, status=503, type="service_unavailable_error"),
    "http_529": lambda _: Refusal("Overloaded", status=529, body=_ANTHROPIC),
    "error_200": lambda _: Refusal(_FAILED, status=200, type="server_error", code="internal_error"),
}
