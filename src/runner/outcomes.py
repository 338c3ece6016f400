"""Outcomes: what came of a request, in the form that the store keeps and the meter counts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from runner.errors import ItemError, ParseError, RequestError
from runner.identity import dump_text
from runner.metrics import Meter
from runner.response_format import ResponseFormat
from runner.store import Outcome
from runner.types import Embeddings, Generation, Response, Trace, Transcript
from runner.vector import pack


def success(
    key: tuple[bytes, int],
    trace: Trace,
    response: Response,
    *,
    response_format: ResponseFormat | None = None,
    shared: bool = False,
) -> Outcome:
    """The stored form of an answered request, read as ``response_format`` says.

    ``shared``: the request is counted with another of its rows.
    """
    usage = response.usage
    return Outcome(
        ticket=key[1],
        content=key[0],
        settled_at=time.time(),
        **_columns(response.output, response_format),
        request_id=response.request_id,
        model_id=response.model_id,
        prompt_tokens=usage.prompt_tokens if usage else None,
        completion_tokens=usage.completion_tokens if usage else None,
        total_tokens=usage.total_tokens if usage else None,
        reasoning_tokens=usage.reasoning_tokens if usage else None,
        cached_tokens=usage.cached_tokens if usage else None,
        deployment=trace.deployment,
        retries=trace.retries,
        queue_wait_s=trace.queue_wait_s,
        service_time_s=trace.service_time_s,
        end_to_end_s=trace.end_to_end_s,
        ttft_s=trace.ttft_s,
        cost_usd=trace.cost_usd(usage),
        shared=shared,
    )


def failure(key: tuple[bytes, int], trace: Trace, error: ItemError, *, shared: bool = False) -> Outcome:
    """The stored form of a row that failed; ``shared`` as in `success`."""
    row = error.as_row()
    return Outcome(
        ticket=key[1],
        content=key[0],
        settled_at=time.time(),
        error_type=row["type"],
        error_message=row["message"],
        error_status=row["status"],
        deployment=trace.deployment or None,
        retries=trace.retries,
        queue_wait_s=trace.queue_wait_s,
        service_time_s=trace.service_time_s,
        end_to_end_s=trace.end_to_end_s,
        cost_usd=None if isinstance(error, RequestError) and error.billing == "unknown" else 0.0,
        shared=shared,
    )


def count(meter: Meter, outcomes: Sequence[Outcome]) -> None:
    """Count what has just become durable."""
    for outcome in outcomes:
        if outcome.error_type is not None:
            meter.failed(outcome.error_type)
            continue
        meter.answered(
            None if outcome.total_tokens is None else outcome,
            cost_usd=outcome.cost_usd,
            latency_s=outcome.service_time_s,
            queue_wait_s=outcome.queue_wait_s,
        )


def _columns(output: Generation | Embeddings | Transcript, response_format: ResponseFormat | None) -> dict[str, Any]:
    """What was answered, by the columns that hold it."""
    match output:
        case Generation():
            details = _details(output, response_format)
            return {"output_text": output.text, "finish_reason": output.finish_reason, "details": details}
        case Embeddings():
            [vector] = output.vectors
            return {"embedding": pack(vector)}
        case Transcript():
            heard = {"language": output.language, "duration_s": output.duration_s}
            return {"output_text": output.text, "details": dump_text(heard)}


def _details(output: Generation, response_format: ResponseFormat | None) -> str | None:
    """What few answers have, as JSON; None where this one has none of it."""
    details: dict[str, Any] = {}
    if response_format is not None:
        details |= _parsed(output.text, response_format)
    if output.reasoning:
        details["reasoning"] = output.reasoning
    if output.tool_calls:
        details["tool_calls"] = [asdict(call) for call in output.tool_calls]
    if output.choices:
        details["choices"] = output.choices
    try:
        return dump_text(details) if details else None
    except ValueError:  # nested beyond measure: the text is what was paid for
        details.pop("choices", None)
        details.pop("output_parsed", None)
        return dump_text(details)


def _parsed(text: str, response_format: ResponseFormat) -> dict[str, Any]:
    """The answer as the format reads it, or why it cannot."""
    try:
        value = response_format.parse(text)
        return {"output_parsed": value.model_dump(mode="json") if hasattr(value, "model_dump") else value}
    except ParseError as error:
        return {"parse_error": str(error)}
    except Exception as error:  # a serializer of the user's model
        return {"parse_error": f"the answer cannot be written as JSON: {type(error).__name__}: {error}"}
