"""`LMClient`: the engine as a library."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, TypeAlias

from runner.background import BackgroundLoop, synchronous
from runner.batch import chunked, run_batch
from runner.checks import check_deployment, check_limits, check_routing
from runner.concurrency import Window
from runner.config import (
    DeploymentConfig,
    LimitsConfig,
    RetryConfig,
    RoutingConfig,
    Scope,
    SimulatorConfig,
)
from runner.errors import ConfigError, ItemError
from runner.stack import open_stack
from runner.types import (
    BatchResult,
    Client,
    Endpoint,
    GenerateInput,
    Generation,
    GenerationRequest,
    GenerationResult,
    RequestMetrics,
    Response,
    Trace,
)

DEFAULT_PARALLEL_REQUESTS = 128
_CHUNK = 64

EndpointName: TypeAlias = Literal["chat_completion", "text_completion", "responses"]
OnResult: TypeAlias = Callable[[int, GenerationResult | None, BaseException | None], None]


class LMClient:
    """Sends single requests and batches to a model, under its limits, with retries and routing.

    Every method comes twice: ``agenerate`` for asynchronous code, ``generate`` for scripts and notebooks, where it
    runs on a background event loop. Both may be used in one session. Close the client, or use it in a ``with``.

    Args:
        model: LiteLLM model string (``openai/gpt-4.1-mini``, ``hosted_vllm/llama``, ``simulated/echo``); with
            ``deployments``, the logical name that they share.
        api_base: Address of an OpenAI-compatible server, up to and including ``/v1``.
        api_key: The key. None: from the provider's usual environment variable.
        deployments: Several places that answer for ``model``, by label.
        endpoint: Which interface generations use by default.
        max_parallel_requests: Requests in flight at once. None: 128.
        rpm, tpm, rpd, tpd: Requests and tokens per minute and per day.
        max_request_burst, max_token_burst: What may go out at once after a pause. None: 2 % of the limit.
        header_bucket_scope: Whether the provider's rate-limit headers speak of the minute or the day.
        default_output_tokens: Tokens reserved for an answer where the call sets no maximum.
        timeout: Seconds that a request may take. None: 600.
        max_retries: How often a request that failed for a passing reason is sent again.
        default_request_kwargs: LiteLLM keyword arguments for every request, under those of the call.
        routing_strategy: How requests spread over ``deployments``.
        simulator: Settings of ``simulated/…`` models.

    Raises:
        ConfigError: An argument cannot be used.
    """

    def __init__(
        self,
        *,
        model: str | None = None,
        api_base: str | None = None,
        api_key: str | None = None,
        deployments: Mapping[str, DeploymentConfig | Mapping[str, Any]] | None = None,
        endpoint: EndpointName = "chat_completion",
        max_parallel_requests: int | None = None,
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
        simulator: SimulatorConfig | None = None,
    ) -> None:
        self.background = BackgroundLoop()
        self._deployments = _deployments(model, api_base, api_key, deployments)
        self._endpoint = _endpoint(endpoint)
        self._limits = LimitsConfig(
            concurrency=DEFAULT_PARALLEL_REQUESTS if max_parallel_requests is None else max_parallel_requests,
            rpm=rpm,
            tpm=tpm,
            rpd=rpd,
            tpd=tpd,
            max_request_burst=max_request_burst,
            max_token_burst=max_token_burst,
            header_bucket_scope=Scope(header_bucket_scope),
            default_output_tokens=default_output_tokens,
        )
        self._retry = RetryConfig(max_retries=max_retries)
        self._simulator = simulator or SimulatorConfig()
        self._timeout_s = timeout
        self._defaults = dict(default_request_kwargs or {})
        self._engines: dict[asyncio.AbstractEventLoop, _Engine] = {}
        check_limits("limits", self._limits)
        self._routing = RoutingConfig(strategy=routing_strategy)
        check_routing(self._routing)

    async def agenerate(
        self, input_data: GenerateInput, *, endpoint: EndpointName | None = None, **kwargs: Any
    ) -> GenerationResult:
        """Answer one input.

        Args:
            input_data: A prompt, a list of chat messages, or a Responses input ``{"input": …}``.
            endpoint: Which interface to use; None: the client's.
            **kwargs: LiteLLM keyword arguments for this call (``temperature``, ``max_tokens``, ``timeout``, …).

        Raises:
            RequestError: The request failed for good.
        """
        engine = self._engine()
        async with engine.window:
            return await engine.generate(self._request(input_data, endpoint, kwargs))

    async def agenerate_batch(
        self,
        input_batch: Iterable[GenerateInput],
        *,
        endpoint: EndpointName | None = None,
        return_exceptions: bool = True,
        on_progress: Callable[[int, int], None] | None = None,
        on_result: OnResult | None = None,
        **kwargs: Any,
    ) -> BatchResult[GenerationResult]:
        """Answer many inputs, at most ``max_parallel_requests`` at once.

        Args:
            input_batch: Inputs as for `agenerate`. Any iterable; a generator is read as it is needed.
            endpoint: Which interface to use; None: the client's.
            return_exceptions: True: a failed input is None in ``results`` and its error is in ``errors``. False: the
                first failure cancels the rest and is raised.
            on_progress: Called with (settled, total) after each input; total counts what has been read so far where
                the iterable has no length.
            on_result: Called with (index, result or None, error or None) as each input settles.
            **kwargs: LiteLLM keyword arguments for every request of the batch.

        Returns:
            The outcomes in the order of the inputs.
        """
        engine = self._engine()
        results: list[GenerationResult | None] = []
        errors: list[BaseException | None] = []
        settled = 0

        async def answer(item: tuple[int, GenerateInput]) -> None:
            nonlocal settled
            index, input_data = item
            try:
                results[index] = await engine.generate(self._request(input_data, endpoint, kwargs))
            except (ItemError, ConfigError) as error:
                if not return_exceptions:
                    raise
                errors[index] = error
            settled += 1
            if on_result is not None:
                on_result(index, results[index], errors[index])
            if on_progress is not None:
                on_progress(settled, len(input_batch) if isinstance(input_batch, Sequence) else len(results))

        async def chunks() -> AsyncIterator[Sequence[tuple[int, GenerateInput]]]:
            async for chunk in chunked(enumerate(input_batch), _CHUNK):
                results.extend([None] * len(chunk))
                errors.extend([None] * len(chunk))
                yield chunk

        await run_batch(chunks(), answer, window=engine.window)
        return BatchResult(results=results, errors=errors)

    async def aclose(self) -> None:
        """Free the connections of this event loop and of the background one."""
        engine = self._engines.pop(asyncio.get_running_loop(), None)
        if engine is not None:
            await engine.client.aclose()
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """Free the connections of the background loop and end it. Safe to call twice."""
        if self.background.started:
            self.background.run(self._close_engine())
        self.background.close()

    generate = synchronous(agenerate)
    generate_batch = synchronous(agenerate_batch)

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

    def _engine(self) -> _Engine:
        """The engine of the running loop: connections and slots belong to one."""
        loop = asyncio.get_running_loop()
        engine = self._engines.get(loop)
        if engine is None:
            self._engines = {known: engine for known, engine in self._engines.items() if not known.is_closed()}
            window = Window(self._limits.concurrency)
            client = open_stack(
                self._deployments,
                limits=self._limits,
                retry=self._retry,
                routing=self._routing,
                simulator=self._simulator,
                window=window,
                timeout_s=self._timeout_s,
            )
            engine = self._engines[loop] = _Engine(client=client, window=window)
        return engine

    async def _close_engine(self) -> None:
        engine = self._engines.pop(asyncio.get_running_loop(), None)
        if engine is not None:
            await engine.client.aclose()

    def _request(
        self, input_data: GenerateInput, endpoint: EndpointName | None, kwargs: Mapping[str, Any]
    ) -> GenerationRequest:
        params = {**self._defaults, **kwargs}
        return GenerationRequest(
            input=input_data,
            endpoint=self._endpoint if endpoint is None else _endpoint(endpoint),
            timeout_s=params.pop("timeout", None),
            params=params,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Engine:
    """The client stack on one event loop."""

    client: Client
    window: Window

    async def generate(self, request: GenerationRequest) -> GenerationResult:
        return _result(await self.client.send(request), request.trace)


def _result(response: Response, trace: Trace) -> GenerationResult:
    output = response.output
    assert isinstance(output, Generation)
    usage = response.usage
    return GenerationResult(
        model_id=response.model_id,
        output_text=output.text,
        reasoning=output.reasoning,
        token_usage=usage,
        finish_reason=output.finish_reason,
        tool_calls=output.tool_calls,
        choices=output.choices,
        request_id=response.request_id,
        metrics=RequestMetrics(
            queue_wait_s=trace.queue_wait_s,
            service_time_s=trace.service_time_s,
            end_to_end_s=trace.end_to_end_s,
            deployment=trace.deployment,
            retries=trace.retries,
            cost_usd=trace.cost_usd(usage),
            ttft_s=trace.ttft_s,
        ),
    )


def _deployments(
    model: str | None,
    api_base: str | None,
    api_key: str | None,
    deployments: Mapping[str, DeploymentConfig | Mapping[str, Any]] | None,
) -> dict[str, DeploymentConfig]:
    if not deployments:
        if model is None:
            raise ConfigError("LMClient needs a model, for example model='openai/gpt-4.1-mini'")
        deployments = {model: DeploymentConfig(model=model, api_base=api_base, api_key=api_key)}
    built: dict[str, DeploymentConfig] = {}
    for label, entry in deployments.items():
        try:
            built[label] = entry if isinstance(entry, DeploymentConfig) else DeploymentConfig(**entry)
        except TypeError as error:
            raise ConfigError(f"deployments[{label!r}]: {error}") from None
        check_deployment(f"deployments[{label!r}]", built[label])
    return built


def _endpoint(name: str) -> Endpoint:
    try:
        return Endpoint(name)
    except ValueError:
        raise ConfigError(f"endpoint={name!r}: choose one of {', '.join(Endpoint)}") from None
