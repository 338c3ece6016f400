"""`LMClient`: the engine as a library."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from types import TracebackType
from typing import Any, Literal, TypeAlias, TypeVar

from runner.background import BackgroundLoop, synchronous
from runner.batch import chunked, run_batch
from runner.calls import EmbeddingCall, GenerationCall, Send, TranscriptionCall
from runner.checks import check_choice, check_count, check_deployment, check_limits, check_request, check_routing
from runner.collector import Collector, OnProgress, OnResult
from runner.concurrency import Window
from runner.config import (
    STRATEGIES,
    DeploymentConfig,
    DeploymentLimitsConfig,
    LimitsConfig,
    PriceConfig,
    RetryConfig,
    RoutingConfig,
    Scope,
    SimulatorConfig,
    TransportKind,
)
from runner.embedding import MICRO_BATCH_SIZE
from runner.engine import Engine, Engines
from runner.errors import ConfigError, ItemError, RowError
from runner.keywords import spelt
from runner.media import MAX_TRANSCRIPTION_BYTES, TranscriptionInput
from runner.response_format import Layout, ResponseFormat
from runner.stack import Limiters, open_limiters, open_stack
from runner.transports import check_addresses
from runner.tuner import Tuner
from runner.types import (
    BatchResult,
    EmbeddingResult,
    Endpoint,
    GenerateInput,
    GenerationResult,
    TranscriptionResult,
)

DEFAULT_PARALLEL_REQUESTS = 128
_CHUNK = 64  # requests whose inputs are read ahead

EndpointName: TypeAlias = Literal["chat_completion", "text_completion", "responses"]

R = TypeVar("R")
T = TypeVar("T")


class LMClient:
    """Sends single requests and batches to a model, under its limits, with retries and routing.

    Every method comes twice: ``agenerate`` for asynchronous code, ``generate`` for scripts and notebooks, where it
    runs on a background event loop. Both may be used in one session, from several threads, and by several event loops:
    the quota is one for all of them, slots and connections are each loop's own. Close the client, or use it in a
    ``with``: later calls are errors.

    The batch methods have these in common. At most ``max_parallel_requests`` are at work at once. Inputs may be any
    iterable, asynchronous ones too; they are read as they are needed, on the event loop. Callbacks are called there as
    well, in the order in which requests settle: keep them short. One that raises cancels the batch, and what it raised
    is raised. So does Ctrl-C, and the errors that are no single input's failure (`ConfigError`). One of these comes
    before the first request where nobody listens at the address.

    Args:
        model: LiteLLM model string (``openai/gpt-4.1-mini``, ``hosted_vllm/llama``, ``simulated/echo``); with
            ``deployments``, the logical name that they share.
        api_base: Address of an OpenAI-compatible server, up to and including ``/v1``.
        api_key: The key. None: from the provider's usual environment variable.
        deployments: Several places that answer for ``model``, by label.
        endpoint: Which interface generations use by default.
        max_parallel_requests: Requests in flight at once; ``"auto"`` finds out how many are best. None: 128.
        rpm, tpm, rpd, tpd: Requests and tokens per minute and per day.
        max_request_burst, max_token_burst: What may go out at once after a pause. None: 2 % of the limit.
        header_bucket_scope: Whether the provider's rate-limit headers speak of the minute or the day.
        default_output_tokens: Tokens reserved for an answer where the call sets no maximum.
        timeout: Seconds that a request may take. None: 600.
        max_retries: How often a request that failed for a passing reason is sent again.
        default_request_kwargs: LiteLLM keyword arguments for every request, under those of the call.
        routing_strategy: How requests spread over ``deployments``.
        router_kwargs: More on that: the fields of `RoutingConfig` (``failover``, ``max_wait_s``, ``cooldown_s``,
            ``hedge``), and LiteLLM's ``cooldown_time``.
        simulator: Settings of ``simulated/…`` models.

    Raises:
        ConfigError: An argument cannot be used.
    """

    @spelt
    def __init__(
        self,
        *,
        model: str | None = None,
        api_base: str | None = None,
        api_key: str | None = None,
        deployments: Mapping[str, DeploymentConfig | Mapping[str, Any]] | None = None,
        endpoint: EndpointName = "chat_completion",
        max_parallel_requests: int | Literal["auto"] | None = None,
        rpm: float | None = None,
        tpm: float | None = None,
        rpd: float | None = None,
        tpd: float | None = None,
        max_request_burst: float | None = None,
        max_token_burst: float | None = None,
        header_bucket_scope: Literal["auto", "minute", "day"] = "auto",
        default_output_tokens: int = 0,
        timeout: float | None = None,
        max_retries: int = 3,
        default_request_kwargs: Mapping[str, Any] | None = None,
        routing_strategy: str = "simple-shuffle",
        router_kwargs: Mapping[str, Any] | None = None,
        simulator: SimulatorConfig | None = None,
    ) -> None:
        self._endpoint = _endpoint(endpoint)
        for name, value, kind in (
            ("default_request_kwargs", default_request_kwargs, Mapping),
            ("router_kwargs", router_kwargs, Mapping),
            ("deployments", deployments, Mapping),
            ("simulator", simulator, SimulatorConfig),
        ):
            if value is not None and not isinstance(value, kind):
                raise ConfigError(f"{name} is of type {type(value).__name__}: {_EXAMPLES[name]}")
        if max_parallel_requests not in (None, "auto"):
            check_count("max_parallel_requests", max_parallel_requests)
        check_count("default_output_tokens", default_output_tokens, 0)
        check_count("max_retries", max_retries, 0)
        self._defaults = dict(default_request_kwargs or {})
        limits = LimitsConfig(
            concurrency=DEFAULT_PARALLEL_REQUESTS if max_parallel_requests is None else max_parallel_requests,
            rpm=rpm,
            tpm=tpm,
            rpd=rpd,
            tpd=tpd,
            max_request_burst=max_request_burst,
            max_token_burst=max_token_burst,
            header_bucket_scope=_scope(header_bucket_scope),
            default_output_tokens=default_output_tokens,
        )
        retry = RetryConfig(max_retries=max_retries)
        check_choice("routing_strategy", routing_strategy, STRATEGIES)
        check_limits("", limits)
        routing = _routing(routing_strategy, router_kwargs or {})
        check_routing(routing)
        check_request("", {"timeout": timeout})
        _check_params("default_request_kwargs", self._defaults)
        self.background = BackgroundLoop()
        self._reached = False
        self._replicas = replicas = _deployments(model, api_base, api_key, deployments)
        self._engines = Engines(
            partial(
                _open_engine,
                replicas,
                limiters=open_limiters(replicas, limits),
                limits=limits,
                retry=retry,
                routing=routing,
                simulator=simulator or SimulatorConfig(),
                timeout_s=timeout,
            )
        )
        self._end = weakref.finalize(self, _end, self.background, self._engines)  # at the latest when Python ends

    async def agenerate(
        self,
        input_data: GenerateInput,
        *,
        endpoint: EndpointName | None = None,
        response_format: Layout | None = None,
        parse_output: bool = False,
        **kwargs: Any,
    ) -> GenerationResult:
        """Answer one input.

        Args:
            input_data: A prompt, a list of chat messages (with image blocks too, see `image_block`), or a Responses
                input ``{"input": …, "instructions": …}``.
            endpoint: Which interface to use; None: the client's.
            response_format: A Pydantic model or a JSON schema that the answer is to fit. It is sent with the request,
                and the answer is parsed into ``output_parsed``: an instance of the model, or plain Python objects.
                An answer that does not fit is a logged warning, and ``output_parsed`` is None.
            parse_output: Parse the answer as JSON where there is no ``response_format``.
            **kwargs: LiteLLM keyword arguments for this call (``temperature``, ``max_tokens``, ``timeout``, …).

        Raises:
            RequestError: The request failed for good.
            RowError: The endpoint does not take such an input.
            ConfigError: An argument cannot be used.
        """
        if isinstance(input_data, list) and any(isinstance(each, str) for each in input_data):
            raise RowError("the input is a list of texts: generate_batch answers several prompts")
        call = self._generation(endpoint, response_format, parse_output, kwargs)
        return await call((await self._engine()).send, input_data)

    async def agenerate_batch(
        self,
        input_batch: Iterable[GenerateInput] | AsyncIterable[GenerateInput],
        *,
        endpoint: EndpointName | None = None,
        response_format: Layout | None = None,
        parse_output: bool = False,
        return_exceptions: bool = True,
        on_progress: OnProgress | None = None,
        on_result: OnResult[GenerationResult] | None = None,
        **kwargs: Any,
    ) -> BatchResult[GenerationResult]:
        """Answer many inputs.

        Args:
            input_batch: Inputs as for `agenerate`; a generator is read as it is needed.
            endpoint, response_format, parse_output: As for `agenerate`.
            return_exceptions: True: a failed input is None in ``results`` and its error is in ``errors``. False: the
                first failure cancels the rest and is raised.
            on_progress: Called with (settled, total) after each input; total counts what has been read so far where
                the iterable has no length.
            on_result: Called with (index, result or None, error or None) as each input settles.
            **kwargs: LiteLLM keyword arguments for every request of the batch.

        Returns:
            The outcomes in the order of the inputs.

        Raises:
            ConfigError: An argument cannot be used.
        """
        call = self._generation(endpoint, response_format, parse_output, kwargs)
        collector = Collector[GenerateInput, GenerationResult](
            input_batch, return_exceptions=return_exceptions, on_result=on_result, on_progress=on_progress
        )
        return await self._batch(collector, call)

    async def aembed(self, input_data: str, **kwargs: Any) -> EmbeddingResult:
        """The vector of one text.

        Args:
            input_data: The text.
            **kwargs: LiteLLM keyword arguments for this call (``dimensions``, ``timeout``, …).

        Raises:
            RequestError: The request failed for good.
            RowError: The input is no text.
            ConfigError: An argument cannot be used.
        """
        if not isinstance(input_data, str):
            raise RowError(f"the input is of type {type(input_data).__name__}, not a text; embed_batch takes several")
        return await self._embedding(kwargs)((await self._engine()).send, input_data)

    async def aembed_batch(
        self,
        input_batch: Iterable[str] | AsyncIterable[str],
        *,
        micro_batch_size: int = MICRO_BATCH_SIZE,
        return_exceptions: bool = True,
        on_progress: OnProgress | None = None,
        on_result: OnResult[EmbeddingResult] | None = None,
        **kwargs: Any,
    ) -> BatchResult[EmbeddingResult]:
        """The vectors of many texts, of which several share a request.

        A request that fails for what may be the fault of one text is asked again in halves, so that a bad text fails
        alone. Tokens and cost of a request are shared out over its texts, by length.

        Args:
            input_batch: Texts; a generator is read as it is needed.
            micro_batch_size: Texts in a request. Each request takes one of the ``max_parallel_requests``.
            return_exceptions, on_progress, on_result: As for `agenerate_batch`, for each text.
            **kwargs: LiteLLM keyword arguments for every request of the batch.

        Returns:
            The outcomes in the order of the texts.

        Raises:
            ConfigError: An argument cannot be used.
        """
        check_count("micro_batch_size", micro_batch_size)
        call = self._embedding(kwargs)
        engine = await self._engine()
        collector = Collector[str, EmbeddingResult](
            input_batch, return_exceptions=return_exceptions, on_result=on_result, on_progress=on_progress
        )

        async def settle(micro_batch: Sequence[tuple[int, Any]]) -> None:
            asked = []
            for index, text in micro_batch:
                if isinstance(text, str):
                    asked.append((index, text))
                else:
                    collector.failed(index, _no_text(text))
            texts = [text for _, text in asked]
            async for settled in call.many(engine.client.send, texts):
                for place, result in settled:
                    if isinstance(result, ItemError):
                        collector.failed(asked[place][0], result)
                    else:
                        collector.answered(asked[place][0], result)

        micro_batches = chunked(collector.chunks(micro_batch_size), _CHUNK)
        await run_batch(micro_batches, settle, window=engine.window)
        return collector.batch()

    async def atranscribe(
        self,
        input_data: TranscriptionInput,
        *,
        max_transcription_bytes: int | None = MAX_TRANSCRIPTION_BYTES,
        **kwargs: Any,
    ) -> TranscriptionResult:
        """The text of one recording.

        Args:
            input_data: The path of an audio file, its content as bytes, or a file opened in binary.
            max_transcription_bytes: Larger audio is refused before it is read: 25 MB, as OpenAI does. None: any size
                is read and sent whole.
            **kwargs: LiteLLM keyword arguments for this call (``language``, ``timeout``, …).

        Raises:
            RequestTooLargeError: The audio is larger than ``max_transcription_bytes``.
            RowError: The audio cannot be read.
            RequestError: The request failed for good.
            ConfigError: An argument cannot be used.
        """
        return await self._transcription(max_transcription_bytes, kwargs)((await self._engine()).send, input_data)

    async def atranscribe_batch(
        self,
        input_batch: Iterable[TranscriptionInput] | AsyncIterable[TranscriptionInput],
        *,
        max_transcription_bytes: int | None = MAX_TRANSCRIPTION_BYTES,
        return_exceptions: bool = True,
        on_progress: OnProgress | None = None,
        on_result: OnResult[TranscriptionResult] | None = None,
        **kwargs: Any,
    ) -> BatchResult[TranscriptionResult]:
        """The texts of many recordings. A file is read when its turn comes.

        Args:
            input_batch: Recordings as for `atranscribe`; a generator is read as it is needed.
            max_transcription_bytes: As for `atranscribe`.
            return_exceptions, on_progress, on_result: As for `agenerate_batch`.
            **kwargs: LiteLLM keyword arguments for every request of the batch.

        Returns:
            The outcomes in the order of the recordings.

        Raises:
            ConfigError: An argument cannot be used.
        """
        call = self._transcription(max_transcription_bytes, kwargs)
        collector = Collector[TranscriptionInput, TranscriptionResult](
            input_batch, return_exceptions=return_exceptions, on_result=on_result, on_progress=on_progress
        )
        return await self._batch(collector, call)

    async def aclose(self) -> None:
        """Free all connections. What is still running on the background loop is cancelled. Safe to call twice."""
        await self._engines.aclose()
        await asyncio.to_thread(self._end)

    def close(self) -> None:
        """Free all connections. What is still running on the background loop is cancelled. Safe to call twice."""
        self._end()

    generate = synchronous(agenerate)
    generate_batch = synchronous(agenerate_batch)
    embed = synchronous(aembed)
    embed_batch = synchronous(aembed_batch)
    transcribe = synchronous(atranscribe)
    transcribe_batch = synchronous(atranscribe_batch)

    def __enter__(self) -> LMClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> LMClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _engine(self) -> Engine:
        self.background.require_open()
        engine = await self._engines.current()
        if not self._reached:
            async with engine.first:
                if not self._reached:
                    await check_addresses(self._replicas)
                    self._reached = True
        return engine

    async def _batch(self, collector: Collector[T, R], call: Callable[[Send, T], Awaitable[R]]) -> BatchResult[R]:
        """Each input by a request of its own."""
        engine = await self._engine()

        async def settle(item: tuple[int, T]) -> None:
            index, input_data = item
            try:
                result = await call(engine.client.send, input_data)
            except ItemError as error:
                collector.failed(index, error)
            else:
                collector.answered(index, result)

        await run_batch(collector.chunks(_CHUNK), settle, window=engine.window)
        return collector.batch()

    def _generation(
        self,
        endpoint: EndpointName | None,
        response_format: Layout | None,
        parse_output: bool,
        kwargs: Mapping[str, Any],
    ) -> GenerationCall:
        params, timeout_s = self._params(kwargs)
        wanted = params.pop("response_format", None) if response_format is None else response_format
        layout = None if wanted is None else ResponseFormat.of(wanted)
        if layout is not None:
            params["response_format"] = layout.schema_param
        elif parse_output:
            layout = ResponseFormat.of({"type": "json_object"})
        return GenerationCall(
            endpoint=self._endpoint if endpoint is None else _endpoint(endpoint),
            params=params,
            timeout_s=timeout_s,
            layout=layout,
        )

    def _embedding(self, kwargs: Mapping[str, Any]) -> EmbeddingCall:
        params, timeout_s = self._params(kwargs)
        return EmbeddingCall(params=params, timeout_s=timeout_s)

    def _transcription(self, max_bytes: int | None, kwargs: Mapping[str, Any]) -> TranscriptionCall:
        if max_bytes is not None:
            check_count("max_transcription_bytes", max_bytes)
        params, timeout_s = self._params(kwargs)
        return TranscriptionCall(params=params, timeout_s=timeout_s, max_bytes=max_bytes)

    def _params(self, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], float | None]:
        """The keyword arguments of a call over the client's, and the timeout among them."""
        _check_params("", kwargs)
        params = {**self._defaults, **kwargs}
        return params, params.pop("timeout", None)


def _open_engine(
    deployments: Mapping[str, DeploymentConfig],
    *,
    limiters: Limiters,
    limits: LimitsConfig,
    retry: RetryConfig,
    routing: RoutingConfig,
    simulator: SimulatorConfig,
    timeout_s: float | None,
) -> Engine:
    window = Window.of(limits)
    client = open_stack(
        deployments,
        limits=limits,
        retry=retry,
        routing=routing,
        simulator=simulator,
        window=window,
        tuner=Tuner.of(limits, window),
        timeout_s=timeout_s,
        limiters=limiters,
    )
    return Engine(client=client, window=window)


def _end(background: BackgroundLoop, engines: Engines) -> None:
    background.close()
    engines.close()


def _deployments(
    model: str | None,
    api_base: str | None,
    api_key: str | None,
    deployments: Mapping[str, DeploymentConfig | Mapping[str, Any]] | None,
) -> dict[str, DeploymentConfig]:
    if deployments and (api_base is not None or api_key is not None):
        raise ConfigError("api_base and api_key belong to each of the deployments, where there are several")
    if not deployments:
        if model is None:
            raise ConfigError("LMClient needs a model, for example model='openai/gpt-4.1-mini'")
        alone = DeploymentConfig(model=model, api_base=api_base, api_key=api_key)
        check_deployment("", alone)
        return {model: alone}
    built: dict[str, DeploymentConfig] = {}
    for label, entry in deployments.items():
        try:
            built[label] = entry if isinstance(entry, DeploymentConfig) else _deployment(entry)
        except (TypeError, ConfigError) as error:
            raise ConfigError(f"deployments[{label!r}]: {error}") from None
        check_deployment(f"deployments[{label!r}]", built[label])
    return built


def _deployment(entry: Mapping[str, Any]) -> DeploymentConfig:
    """A deployment of plain data."""
    if not isinstance(entry, Mapping):
        raise TypeError(f"it is of type {type(entry).__name__}: {_EXAMPLES['deployments']}")
    parts = {
        name: spelt(kind)(**entry[name])
        for name, kind in (("limits", DeploymentLimitsConfig), ("price", PriceConfig))
        if isinstance(entry.get(name), Mapping)
    }
    return spelt(DeploymentConfig)(**{**entry, **parts, "transport": _transport(entry.get("transport", "auto"))})


_EXAMPLES = {
    "default_request_kwargs": "a dictionary, as in {'temperature': 0}",
    "router_kwargs": "a dictionary, as in {'max_wait_s': 60}",
    "deployments": "a dictionary, as in {'local': {'model': 'hosted_vllm/llama', 'api_base': 'http://HOST:PORT/v1'}}",
    "simulator": "a runner.config.SimulatorConfig",
}
"""What is wanted of arguments whose type says little."""


def _transport(name: str) -> TransportKind:
    try:
        return TransportKind(name)
    except ValueError:
        raise ConfigError(f"transport={name!r}: choose one of {', '.join(TransportKind)}") from None


def _endpoint(name: str) -> Endpoint:
    try:
        return Endpoint(name)
    except ValueError:
        raise ConfigError(f"endpoint={name!r}: choose one of {', '.join(Endpoint)}") from None


def _scope(name: str) -> Scope:
    try:
        return Scope(name)
    except ValueError:
        raise ConfigError(f"header_bucket_scope={name!r}: choose one of {', '.join(Scope)}") from None


def _routing(strategy: str, options: Mapping[str, Any]) -> RoutingConfig:
    named = {"cooldown_s" if key == "cooldown_time" else key: value for key, value in options.items()}
    kinds = {field.name: type(field.default) for field in fields(RoutingConfig) if field.name != "strategy"}
    for key, value in named.items():
        if key not in kinds:
            raise ConfigError(f"router_kwargs has {key!r}, and this router takes {', '.join(kinds)}")
        if not isinstance(value, bool if kinds[key] is bool else int | float):
            raise ConfigError(f"router_kwargs: {key}={value!r} is of type {type(value).__name__}")
    return RoutingConfig(strategy=strategy, **named)


def _check_params(where: str, params: Mapping[str, Any]) -> None:
    check_request(where, params, beside=_OF_THE_METHODS)
    for key in _OF_THE_CLIENT & params.keys():
        place = "LMClient, or to one of its deployments"
        raise ConfigError(f"{where or 'this call'} has {key!r}, which belongs to {place}: LMClient({key}=…)")


_OF_THE_METHODS = (
    *("endpoint", "response_format", "parse_output", "return_exceptions", "on_progress", "on_result"),
    *("micro_batch_size", "max_transcription_bytes"),
)
"""Keywords that a misspelt one may be meant for, beside the parameters of requests."""

_OF_THE_CLIENT = {"api_base", "api_key", "base_url", "max_retries", "model", "num_retries"}


def _no_text(found: object) -> RowError:
    return RowError(f"the input is of type {type(found).__name__}, not a text")
