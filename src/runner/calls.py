"""Calls: what the arguments of a client's method ask of every input, from the input to its result."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

from runner.embedding import EmbeddingOutcome, embed
from runner.errors import ItemError, ParseError
from runner.media import TranscriptionInput, read_audio
from runner.prompt import require_input
from runner.response_format import ResponseFormat
from runner.types import (
    EmbeddingRequest,
    EmbeddingResult,
    Endpoint,
    GenerateInput,
    Generation,
    GenerationRequest,
    GenerationResult,
    Request,
    RequestMetrics,
    Response,
    TokenUsage,
    Trace,
    Transcript,
    TranscriptionRequest,
    TranscriptionResult,
)

logger = logging.getLogger(__name__)

Send: TypeAlias = Callable[[Request], Awaitable[Response]]
"""A client's `send`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationCall:
    """Text in, text out."""

    endpoint: Endpoint
    params: Mapping[str, Any]
    timeout_s: float | None
    layout: ResponseFormat | None  # how to read the answer; None: as text alone

    async def __call__(self, send: Send, input_data: GenerateInput) -> GenerationResult:
        """
        Raises:
            RowError: The endpoint does not take such an input.
            RequestError: The request failed.
        """
        require_input(input_data, self.endpoint, "the input")
        request = GenerationRequest(
            input=input_data, endpoint=self.endpoint, params=self.params, timeout_s=self.timeout_s
        )
        response = await send(request)
        output = response.output
        assert isinstance(output, Generation)
        metrics = _metrics(request.trace, request.trace.cost_usd(response.usage))
        return GenerationResult(
            model_id=response.model_id,
            output_text=output.text,
            output_parsed=self._parsed(output),
            reasoning=output.reasoning,
            token_usage=response.usage,
            finish_reason=output.finish_reason,
            tool_calls=output.tool_calls,
            choices=output.choices,
            raw_response=response.body,
            request_id=response.request_id,
            cost=metrics.cost_usd,
            metrics=metrics,
        )

    def _parsed(self, output: Generation) -> Any:
        if self.layout is None or (output.tool_calls and not output.text):
            return None
        try:
            return self.layout.parse(output.text)
        except ParseError as error:
            logger.warning("output_parsed is None: %s (finish_reason=%s)", error, output.finish_reason)
            return None


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingCall:
    """Text in, vector out."""

    params: Mapping[str, Any]
    timeout_s: float | None

    async def __call__(self, send: Send, text: str) -> EmbeddingResult:
        """
        Raises:
            ItemError: There is no vector for the text.
        """
        [[(_, result)]] = [part async for part in self.many(send, [text])]
        if isinstance(result, ItemError):
            raise result
        return result

    async def many(
        self, send: Send, texts: Sequence[str]
    ) -> AsyncIterator[list[tuple[int, EmbeddingResult | ItemError]]]:
        """What comes of the texts of a micro-batch, with their places, for each request that settles."""

        def request(part: range) -> EmbeddingRequest:
            return EmbeddingRequest(texts=texts[part.start : part.stop], params=self.params, timeout_s=self.timeout_s)

        async for part in embed(send, texts, request):
            metrics = _shared_metrics(part[0].trace)
            yield [
                (outcome.place, outcome.error or _embedding_result(outcome, metrics(outcome.usage))) for outcome in part
            ]


@dataclass(frozen=True, slots=True, kw_only=True)
class TranscriptionCall:
    """Audio in, text out."""

    params: Mapping[str, Any]
    timeout_s: float | None
    max_bytes: int | None

    async def __call__(self, send: Send, source: TranscriptionInput) -> TranscriptionResult:
        """
        Raises:
            RequestTooLargeError: There is more audio than is to be read.
            RowError: The audio cannot be read.
            RequestError: The request failed.
        """
        audio, filename = await read_audio(source, max_bytes=self.max_bytes)
        request = TranscriptionRequest(audio=audio, filename=filename, params=self.params, timeout_s=self.timeout_s)
        response = await send(request)
        output = response.output
        assert isinstance(output, Transcript)
        return TranscriptionResult(
            model_id=response.model_id,
            text=output.text,
            language=output.language,
            duration_s=output.duration_s,
            token_usage=response.usage,
            raw_response=response.body,
            request_id=response.request_id,
            metrics=_metrics(request.trace, request.trace.cost_usd(response.usage)),
        )


def _embedding_result(outcome: EmbeddingOutcome, metrics: RequestMetrics) -> EmbeddingResult:
    assert outcome.embedding is not None
    return EmbeddingResult(
        model_id=outcome.model_id,
        embedding=outcome.embedding,
        token_usage=outcome.usage,
        request_id=outcome.request_id,
        metrics=metrics,
    )


def _shared_metrics(trace: Trace) -> Callable[[TokenUsage | None], RequestMetrics]:
    """The metrics of a text by its share of the usage, which many texts of a request have in common."""
    return cache(lambda usage: _metrics(trace, trace.cost_usd(usage)))


def _metrics(trace: Trace, cost_usd: float | None) -> RequestMetrics:
    return RequestMetrics(
        queue_wait_s=trace.queue_wait_s,
        service_time_s=trace.service_time_s,
        end_to_end_s=trace.end_to_end_s,
        deployment=trace.deployment,
        retries=trace.retries,
        cost_usd=cost_usd,
        ttft_s=trace.ttft_s,
    )
