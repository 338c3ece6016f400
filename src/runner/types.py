"""The nouns that travel through the client stack, and the results that callers get.

A `Request` goes down the stack, a `Response` comes up. What happened on the way (waits, attempts, the deployment
that answered) is noted in the request's `Trace`, so that it is known for a failure too.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Generic, Protocol, TypeAlias, TypeVar, overload

ChatMessage: TypeAlias = dict[str, Any]
"""``{"role": …, "content": text or a list of content blocks}``."""

GenerateInput: TypeAlias = str | list[ChatMessage] | dict[str, Any]
"""A prompt, a conversation, or a Responses input ``{"input": …, "instructions": …}``."""


OUTPUT_LIMITS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
"""Request parameters that say how long an answer may be, in tokens."""


class Endpoint(StrEnum):
    """Which of OpenAI's three text interfaces a generation uses. Names equal values: OmegaConf reads names."""

    chat_completion = "chat_completion"
    text_completion = "text_completion"
    responses = "responses"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenUsage:
    """What the provider counted. ``None``: it did not say."""

    prompt_tokens: int = 0
    completion_tokens: int = 0  # reasoning included
    total_tokens: int = 0
    reasoning_tokens: int | None = None  # part of completion_tokens
    cached_tokens: int | None = None  # part of prompt_tokens

    @property
    def output_tokens(self) -> int:
        """Another name for `completion_tokens`."""
        return self.completion_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenPrice:
    """US dollars per token."""

    prompt: float
    completion: float
    cached: float | None = None  # per cached prompt token; None: as `prompt`

    def cost_usd(self, usage: TokenUsage) -> float:
        cached = usage.cached_tokens or 0
        cached_price = self.prompt if self.cached is None else self.cached
        return (
            (usage.prompt_tokens - cached) * self.prompt
            + cached * cached_price
            + usage.completion_tokens * self.completion
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """One function call that the model asks for."""

    id: str
    name: str
    arguments: str | None = None  # JSON text as the model wrote it: untrusted, perhaps invalid


# Requests: down the stack


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One try of a request at one deployment that failed, as the ledger keeps it."""

    number: int  # 1 for the first
    deployment: str
    started_at: float  # Unix time, seconds
    service_time_s: float
    error: str  # class name
    message: str
    status: int | None
    cost_usd: float | None  # None: unknown, it may have been charged


@dataclass(slots=True, kw_only=True)
class Trace:
    """What happened to one request on its way. The only mutable part of a request; each layer notes its own.

    Args:
        on_failure: Awaited after each attempt that will be followed by another, so that a ledger can keep it
            before more money is spent.
    """

    row: int | None = None  # index in the dataset, of the first of a group; None: of no dataset
    started: float = field(default_factory=time.perf_counter)
    queue_wait_s: float = 0.0  # waiting for quota, slot or pause, over all attempts; backoff excluded
    service_time_s: float = 0.0  # of the last attempt
    on_the_wire: bool = False  # an attempt was sent, and nothing has come of it yet
    sent_at: float = 0.0  # when the last attempt was, by `time.perf_counter`; 0: it was not
    ttft_s: float | None = None  # time to first token of the last attempt, streamed answers only
    chunk_times: Sequence[float] = ()  # when each piece of a streamed answer came, seconds after the last attempt began
    deployment: str = ""
    price: TokenPrice | None = None  # of the deployment that answered
    at_once: bool = False  # the attempt that failed last may be followed by another one without a wait
    garbled: bool = False  # part of a larger request that got garbage: more of it is not retried
    called_back: bool = False  # from a deployment that did not answer; once is enough
    avoid: set[str] = field(default_factory=set)  # deployments that failed this request since it last waited
    failures: list[Attempt] = field(default_factory=list)
    on_failure: Callable[[Attempt], Awaitable[None]] | None = None

    @property
    def retries(self) -> int:
        return len(self.failures)

    @property
    def end_to_end_s(self) -> float:
        """Since the request was made, everything included."""
        return time.perf_counter() - self.started

    def cost_usd(self, usage: TokenUsage | None) -> float | None:
        """What an answer with ``usage`` costs at the deployment that gave it; None: unknown."""
        return self.price.cost_usd(usage) if self.price and usage else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One call of the provider. The three kinds below are all that the stack carries.

    ``params`` are LiteLLM's keyword arguments (``temperature``, ``max_tokens``, …), passed on as they are.
    """

    params: Mapping[str, Any] = field(default_factory=dict)
    timeout_s: float | None = None  # None: the transport's default
    trace: Trace = field(default_factory=Trace)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest(Request):
    """Text in, text out."""

    input: GenerateInput
    endpoint: Endpoint = Endpoint.chat_completion


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingRequest(Request):
    """Texts in, one vector each out."""

    texts: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class TranscriptionRequest(Request):
    """Audio in, text out."""

    audio: bytes
    filename: str = "audio.wav"


# Responses: up the stack


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """The answer to a `GenerationRequest`: its first choice, and all of them as the provider sent them."""

    text: str
    finish_reason: str | None = None
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    choices: tuple[dict[str, Any], ...] = ()  # only where n > 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Embeddings:
    """The answer to an `EmbeddingRequest`: a vector per text, in their order."""

    vectors: tuple[list[float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Transcript:
    """The answer to a `TranscriptionRequest`."""

    text: str
    language: str | None = None
    duration_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """What a provider answered."""

    output: Generation | Embeddings | Transcript
    model_id: str  # as the provider names it, or as it was asked for where the answer names none
    request_id: str | None
    usage: TokenUsage | None  # None: the provider did not say
    headers: Mapping[str, str]  # lower-case names
    body: Any = field(default=None, repr=False, compare=False)  # the answer, decoded; None where it is not kept


class Client(Protocol):
    """Answers one request. Transports are clients, and so is everything that wraps one."""

    async def send(self, request: Request) -> Response:
        """Answer ``request``.

        Raises:
            RequestError: The request failed.
        """
        ...

    async def aclose(self) -> None:
        """Free connections. Further sends are errors."""
        ...


# Results: what callers get


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestMetrics:
    """How one request went. Seconds and US dollars."""

    queue_wait_s: float  # in this client: quota, slot, pause
    service_time_s: float  # the attempt that was answered, send to last byte
    end_to_end_s: float  # everything, backoff included
    deployment: str | None = None
    retries: int = 0
    cost_usd: float | None = None  # None: no price is known for the model
    ttft_s: float | None = None  # streamed answers only


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationResult:
    model_id: str
    output_text: str
    output_parsed: Any | None = None  # by `response_format`; None where parsing failed
    reasoning: str | None = None
    token_usage: TokenUsage | None = None
    finish_reason: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    choices: tuple[dict[str, Any], ...] = ()  # every choice as the provider sent it, where n > 1
    raw_response: Any | None = field(default=None, repr=False)  # the decoded answer, a stream put together
    request_id: str | None = None
    cost: float | None = None  # US dollars, as in `metrics`
    metrics: RequestMetrics | None = None

    def __str__(self) -> str:
        return self.output_text


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingResult:
    model_id: str
    embedding: list[float] = field(repr=False)  # it would fill the screen
    token_usage: TokenUsage | None = None  # its share of a micro-batch, by length
    raw_response: Any | None = None  # always None: it would hold the vectors of the whole micro-batch once more
    request_id: str | None = None
    metrics: RequestMetrics | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TranscriptionResult:
    model_id: str
    text: str
    language: str | None = None
    duration_s: float | None = None
    token_usage: TokenUsage | None = None
    raw_response: Any | None = field(default=None, repr=False)  # the decoded answer
    request_id: str | None = None
    metrics: RequestMetrics | None = None


R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class BatchResult(Generic[R]):
    """The outcomes of a batch, in the order of its inputs.

    ``results[i]`` is None where item i failed, and ``errors[i]`` says why.
    """

    results: list[R | None]
    errors: list[BaseException | None]

    def __repr__(self) -> str:
        """``BatchResult(498 results, 2 errors: 2 Timeout)``: the items themselves would fill pages."""
        kinds = Counter(type(error).__name__ for error in self.errors if error is not None)
        failed = sum(kinds.values())
        counts = _counted(len(self.results) - failed, "result"), _counted(failed, "error")
        which = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
        return f"BatchResult({', '.join(counts)}{which and f': {which}'})"

    def __len__(self) -> int:
        return len(self.results)

    def __iter__(self) -> Iterator[R | None]:
        return iter(self.results)

    @overload
    def __getitem__(self, index: int) -> R | None: ...
    @overload
    def __getitem__(self, index: slice) -> list[R | None]: ...
    def __getitem__(self, index: int | slice) -> R | list[R | None] | None:
        return self.results[index]


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
