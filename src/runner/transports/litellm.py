"""The LiteLLM transport: every provider that LiteLLM knows, for about 2.5 ms of CPU a request."""

from __future__ import annotations

import asyncio
import difflib
import importlib
import importlib.util
import io
import json
import os
import re
import sys
import warnings
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

from runner import errors
from runner.transports import wire
from runner.transports.form import media_type
from runner.transports.locality import warn_of_plain_http
from runner.transports.stream import Stream
from runner.types import EmbeddingRequest, Endpoint, GenerationRequest, Request, Response, TranscriptionRequest

if TYPE_CHECKING:
    import httpx

    from runner.transports.guard import Exchange

_BY_NAME: dict[str, type[errors.RequestError]] = {
    "APIConnectionError": errors.APIConnectionError,
    "APIResponseValidationError": errors.APIResponseError,
    "AuthenticationError": errors.AuthenticationError,
    "BadGatewayError": errors.InternalServerError,
    "BadRequestError": errors.BadRequestError,
    "ContentPolicyViolationError": errors.ContentPolicyViolationError,
    "ContextWindowExceededError": errors.ContextWindowExceededError,
    "InternalServerError": errors.InternalServerError,
    "MidStreamFallbackError": errors.APIResponseError,
    "NotFoundError": errors.NotFoundError,
    "PaymentRequiredError": errors.InsufficientQuotaError,
    "PermissionDeniedError": errors.PermissionDeniedError,
    "RateLimitError": errors.RateLimitError,
    "ServiceUnavailableError": errors.ServiceUnavailableError,
    "Timeout": errors.Timeout,
    "UnprocessableEntityError": errors.BadRequestError,
}
"""LiteLLM's exceptions, for failures that left no HTTP answer behind; looked up along the class's ancestors."""

_NOISE = re.compile(r"^(?:(?:litellm\.)?\w*(?:Error|Exception|Timeout)(?: Error)?(?: - |: ))+")
"""What LiteLLM puts before a provider's words: ``litellm.RateLimitError: RateLimitError: GroqException - ``."""

_EXACT = (errors.ContextWindowExceededError, errors.ContentPolicyViolationError)
"""Kinds of bad requests that LiteLLM knows from more providers' words than `wire` does."""

_VAGUE = (None, errors.APIConnectionError, errors.InternalServerError)
"""What LiteLLM's catch-all becomes, which its own trouble with an answer ends in, too."""

_UNREADABLE = (AttributeError, LookupError, TypeError, ValueError)

_PROVIDER_HEADER = "llm_provider-"


class LiteLLMTransport:
    """A `Client` that speaks to a provider through LiteLLM.

    Choose it for providers whose wire is not OpenAI's. Importing LiteLLM takes some five seconds, once per process,
    when the first such transport is made. Its callbacks and its own retries are off: there is one retry layer, ours.

    Args:
        model: LiteLLM model string with its provider, ``anthropic/claude-sonnet-4-5``.
        api_base: Address of the server; None for the provider's own.
        api_key: The key; None for the environment variable that LiteLLM reads for this provider.
        params: LiteLLM keyword arguments added to every request, under its own.
        timeout_s: How long a request may take, from sending to the last byte.
        max_response_bytes: Larger answers are refused with an `APIResponseError`.

    Raises:
        ConfigError: There is no such provider, or its key is nowhere to be found.
    """

    def __init__(
        self,
        *,
        model: str,
        api_base: str | None = None,
        api_key: str | None = None,
        params: Mapping[str, Any] | None = None,
        timeout_s: float = 600.0,
        max_response_bytes: int = wire.MAX_RESPONSE_BYTES,
    ) -> None:
        self._litellm = _import_litellm()
        self._model = model
        self._provider = model.partition("/")[0]
        self._params = {key: value for key, value in (params or {}).items() if key != "timeout"}
        self._fixed: dict[str, Any] = {"model": model, "max_retries": 0, "num_retries": 0}
        self._fixed |= {"api_base": api_base} if api_base else {}
        self._fixed |= {"api_key": api_key} if api_key else {}
        self._timeout_s = timeout_s
        self._max_response_bytes = max_response_bytes
        self._closed = False
        _check_provider(self._litellm, model)
        if not {"api_base", "api_key"} & (self._fixed.keys() | self._params.keys()):
            _check_key(self._litellm, model)
        keys = (api_key, self._params.get("api_key"), os.environ.get(f"{self._provider.upper()}_API_KEY"))
        self._secrets = [key for key in keys if key]
        _connections.enter(self, self._litellm)

    async def send(self, request: Request) -> Response:
        if self._closed:
            raise RuntimeError("the transport is closed")
        warn_of_plain_http(self._fixed.get("api_base", ""))
        ask, fields = self._call(request)
        params = self._params_of(request)
        timeout_s = self._timeout_s if request.timeout_s is None else request.timeout_s
        options = {**fields, **params, **self._fixed, "timeout": timeout_s}
        stream = None
        if params.get("stream") and isinstance(request, GenerationRequest):
            stream = Stream(request, choices=params.get("n"))
        from runner.transports.guard import Exchange, exchange

        ours = Exchange(max_response_bytes=self._max_response_bytes, watch=stream.feed if stream else None)
        outer = sys.exception()
        answer: Any = None
        with exchange(ours):
            try:
                async with asyncio.timeout(timeout_s):  # LiteLLM's own limit is one per read, not for the whole answer
                    answer = await ask(**options)
                    if stream is not None:
                        await _follow(answer, stream, ours)
            except errors.RequestError as error:  # of the stream
                raise wire.without_secrets(error, self._secrets) from None
            except Exception as error:
                if stream is None or not stream.is_whole:
                    raise self._translated(error, list(_causes(error, outer)), timeout_s) from None
        try:
            body = _body(answer) if stream is None else stream.body()
            return wire.response_from(
                request, body, _headers(answer, ours.headers), model=self._model.partition("/")[2]
            )
        except errors.RequestError as error:
            raise wire.without_secrets(error, self._secrets) from None

    async def aclose(self) -> None:
        self._closed = True
        await _connections.leave(self, self._litellm)

    def _call(self, request: Request) -> tuple[Callable[..., Awaitable[Any]], dict[str, Any]]:
        """LiteLLM's function for ``request``, and its arguments that hold the input."""
        if isinstance(request, EmbeddingRequest):
            return self._litellm.aembedding, {"input": list(request.texts)}
        if isinstance(request, TranscriptionRequest):
            file = (request.filename, io.BytesIO(request.audio), media_type(request.filename))
            return self._litellm.atranscription, {"file": file}
        assert isinstance(request, GenerationRequest)
        functions = {
            Endpoint.chat_completion: self._litellm.acompletion,
            Endpoint.text_completion: self._litellm.atext_completion,
            Endpoint.responses: self._litellm.aresponses,
        }
        return functions[request.endpoint], wire.input_fields(request)

    def _params_of(self, request: Request) -> dict[str, Any]:
        try:
            params = wire.native_params(request, {**self._params, **request.params})
            endpoint = request.endpoint if isinstance(request, GenerationRequest) else None
            if endpoint is Endpoint.text_completion and "response_format" in params and self._has_completions():
                # OpenAI's SDK, which LiteLLM uses for these, knows no such argument.
                layout = params.pop("response_format")
                params["extra_body"] = {"response_format": layout, **(params.get("extra_body") or {})}
        except (TypeError, ValueError) as error:
            raise errors.RowError(f"the request cannot be written: {error}") from None
        if endpoint is Endpoint.responses and params.get("stream"):
            self._allow_streams()
        return params

    def _has_completions(self) -> bool:
        """Whether the provider has an interface for completions. LiteLLM sends others a chat."""
        return self._provider in ("openai", *self._litellm.openai_text_completion_compatible_providers)

    def _allow_streams(self) -> None:
        """Make the model known: LiteLLM asks those that are not for the whole answer, and makes a stream of it."""
        try:
            self._litellm.get_model_info(self._model)
        except Exception:
            self._litellm.register_model({self._model: {"litellm_provider": self._provider, "mode": "chat"}})

    def _translated(
        self, error: Exception, causes: Sequence[BaseException], timeout_s: float
    ) -> errors.RequestError | errors.ConfigError:
        """The error of the tree for whatever LiteLLM raised.

        LiteLLM guesses its exception's class from the words of an answer, and changes the status of some. The answer
        itself, or what became of the connection, is further down the chain of causes: that decides, where it is there.
        """
        import httpx

        where = wire.address(self._fixed.get("api_base") or self._provider)
        for cause in causes:
            if isinstance(cause, errors.RequestError):  # by the guard, or of a stream
                return wire.without_secrets(cause, self._secrets)
            if isinstance(cause, httpx.HTTPStatusError):
                return self._refusal(cause.response, _kind_of(error))
            if isinstance(cause, (TimeoutError, httpx.TimeoutException)):
                return errors.Timeout(f"no answer from {where} within {timeout_s:g} s")
            if isinstance(cause, httpx.RequestError):
                if isinstance(cause, httpx.ConnectError):
                    return errors.ConnectError(f"cannot connect to {where}: {self._words(cause)}")
                return errors.APIConnectionError(
                    f"the connection to {where} broke before the answer was whole ({self._words(cause)})"
                )
        kind = _kind_of(error)
        for cause in causes:
            if isinstance(cause, ImportError):
                return errors.ConfigError(f"model={self._model!r}: LiteLLM cannot serve it here: {self._words(cause)}")
            if type(cause) is Exception and hasattr(cause, "status_code"):  # how LiteLLM raises an error behind a 200
                return wire.error_from(None, {"error": {"code": cause.status_code, "message": self._words(cause)}}, {})
            if isinstance(cause, json.JSONDecodeError) or getattr(cause, "status_code", None) == 200:
                return self._no_answer(cause)
            if isinstance(cause, TypeError) and "unexpected keyword argument" in str(cause):  # of a provider's SDK
                return errors.BadRequestError(f"not sent: {self._words(cause)}")
            if kind in _VAGUE and (isinstance(cause, _UNREADABLE) or type(cause) is Exception):
                words = f"{type(cause).__name__}: {self._words(cause)}"
                return errors.APIResponseError(f"LiteLLM cannot read the server's answer ({words})")
        # A provider with an SDK of its own, or LiteLLM itself before it sent anything.
        headers = getattr(error, "litellm_response_headers", None) or {}
        status = getattr(error, "status_code", None) if headers else None
        words = self._words(error)
        plain = wire.error_from(status, words, headers)
        kind = kind or type(plain)
        return kind(words, status=status, retry_after_s=plain.retry_after_s, headers=plain.headers)

    def _refusal(self, response: httpx.Response, guess: type[errors.RequestError] | None) -> errors.RequestError:
        """The error in an HTTP answer. LiteLLM's guess counts where it is a more exact kind of bad request."""
        import httpx

        try:
            payload = wire.redacted(response.content, self._secrets)
        except httpx.StreamError:
            payload = b""  # LiteLLM did not read it
        refusal = wire.error_from(response.status_code, payload, response.headers)
        if type(refusal) is errors.BadRequestError and guess in _EXACT:
            return guess(
                refusal.message,
                status=refusal.status,
                retry_after_s=refusal.retry_after_s,
                headers=refusal.headers,
            )
        return refusal

    def _no_answer(self, cause: BaseException) -> errors.RequestError:
        """The error in a 200 that LiteLLM could not read, whose body it keeps in its message."""
        words = self._words(cause)
        try:
            body = wire.parse_json(words.encode())
        except ValueError:
            body = None
        if isinstance(body, dict):
            return wire.error_from(None, body, {})
        return errors.APIResponseError(f"the server's answer is not JSON: {words}", status=200)

    def _words(self, error: BaseException) -> str:
        """What ``error`` says, in one line, without LiteLLM's prefixes and without the key."""
        text = str(getattr(error, "message", "") or error).partition("Traceback (most recent call last)")[0]
        text = " ".join(_NOISE.sub("", text).split())[:500] or type(error).__name__
        return wire.redacted(text.encode("utf-8", "replace"), self._secrets).decode("utf-8", "replace")


class _Connections:
    """LiteLLM's connections: one pool for the process, whoever uses it. The last transport to leave closes it."""

    def __init__(self) -> None:
        self._users: weakref.WeakSet[LiteLLMTransport] = weakref.WeakSet()
        self._session: httpx.AsyncClient | None = None

    def enter(self, user: LiteLLMTransport, litellm: Any) -> None:
        self._users.add(user)
        if litellm.aclient_session is None:
            # For the providers that LiteLLM reaches through OpenAI's SDK. Without a session of ours it opens a new
            # connection for each text completion, and leaves it open.
            handler = importlib.import_module("litellm.llms.custom_httpx.http_handler").AsyncHTTPHandler()
            self._session = litellm.aclient_session = handler.client

    async def leave(self, user: LiteLLMTransport, litellm: Any) -> None:
        self._users.discard(user)
        if self._users:
            return
        if self._session is not None:
            await self._session.aclose()
            self._session = litellm.aclient_session = None
        if (shared := vars(litellm).get("module_level_aclient")) is not None:  # made at its first use
            await shared.close()
        await litellm.close_litellm_async_clients()
        litellm.in_memory_llm_clients_cache.flush_cache()


_connections = _Connections()


def _import_litellm() -> Any:
    """LiteLLM, with its network look-ups, prints, connection limits and background logging off."""
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it fetches the price map on import
    os.environ.setdefault("AIOHTTP_CONNECTOR_LIMIT", "1000000")  # connections follow from the concurrency above;
    os.environ.setdefault("AIOHTTP_CONNECTOR_LIMIT_PER_HOST", "0")  # a 0 in the former would mean aiohttp's 100
    litellm: Any = importlib.import_module("litellm")
    litellm.suppress_debug_info = True
    warnings.filterwarnings("ignore", r"Item '\w+' on TypedDict class", UserWarning)  # its types, when first used
    warnings.filterwarnings("ignore", "Pydantic serializer warnings", UserWarning)  # its logs of an odd answer
    # A request that is cancelled while a thread prepares it leaves a coroutine that was not begun. Nothing is lost.
    warnings.filterwarnings("ignore", r"coroutine '\w+\.\w*completion\w*' was never awaited", RuntimeWarning)
    _guard_connections()
    worker = importlib.import_module("litellm.litellm_core_utils.logging_worker").GLOBAL_LOGGING_WORKER
    worker.ensure_initialized_and_enqueue = _discard
    if importlib.util.find_spec("mcp") is None:
        # LiteLLM imports its MCP gateway for every call of the Responses API, and that needs a package it does not
        # install. No tool of ours lives in that gateway.
        name = "litellm.responses.mcp.litellm_proxy_mcp_handler"
        gateway = SimpleNamespace(should_use_litellm_mcp_gateway=lambda tools: False)
        stub = ModuleType(name)
        stub.__dict__["LiteLLM_Proxy_MCP_Handler"] = gateway
        sys.modules.setdefault(name, stub)
    return litellm


def _guard_connections() -> None:
    import httpx

    from runner.transports.guard import guard

    guard(importlib.import_module("litellm.llms.custom_httpx.aiohttp_transport").LiteLLMAiohttpTransport)
    guard(httpx.AsyncHTTPTransport)  # for those who switch the former off


def _discard(async_coroutine: Coroutine[Any, Any, Any]) -> None:
    """In place of LiteLLM's logging queue, which grows without bound in long runs and holds up the exit."""
    async_coroutine.close()


def _check_provider(litellm: Any, model: str) -> None:
    provider = model.partition("/")[0]
    known = [str(getattr(name, "value", name)) for name in litellm.provider_list]
    if provider in known:
        return
    try:
        litellm.get_llm_provider(model)  # providers that are registered elsewhere, and models that need no prefix
    except Exception:
        near = difflib.get_close_matches(provider, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else " See https://docs.litellm.ai/docs/providers."
        raise errors.ConfigError(f"unknown provider {provider!r} in model={model!r}.{hint}") from None


def _check_key(litellm: Any, model: str) -> None:
    """Providers whose credentials are no key (a cloud's roles and profiles, a local server) pass."""
    missing = litellm.validate_environment(model)["missing_keys"]
    if any(name.endswith("_API_KEY") for name in missing):
        raise errors.ConfigError(
            f"model={model!r} needs a key: set {' or '.join(missing)} in the environment or in .env, or name another"
            " variable with api_key_env=NAME"
        )


def _causes(error: BaseException | None, outer: BaseException | None) -> Iterator[BaseException]:
    """``error`` and what led to it, up to ``outer``, which was being handled before the request began."""
    while error is not None and error is not outer:
        yield error
        error = error.__cause__ or error.__context__


def _kind_of(error: BaseException) -> type[errors.RequestError] | None:
    names = (ancestor.__name__ for ancestor in type(error).__mro__)
    return next((_BY_NAME[name] for name in names if name in _BY_NAME), None)


async def _follow(answer: Any, stream: Stream, ours: Exchange) -> None:
    """Wait for the end of a stream that the guard feeds, where the provider's wire is OpenAI's.

    LiteLLM's own pieces are taken where it is another's. They are the second choice: LiteLLM leaves out what it cannot
    read, and gives a stream that broke off a good end.
    """
    has_own_wire = None
    try:
        async for piece in answer:
            if has_own_wire is None:
                has_own_wire = not stream.has_begun
            if has_own_wire:
                stream.add(piece.model_dump(mode="json", warnings=False))
        if has_own_wire and not stream.has_events and _is_text(ours.headers):
            if stream.has_content:
                stream.forget_times()  # the answer came whole, and LiteLLM has cut it up
            else:
                stream.read_whole()  # and LiteLLM found nothing in it
        stream.end()
    finally:
        if hasattr(answer, "aclose"):
            await answer.aclose()


def _is_text(headers: Mapping[str, str]) -> bool:
    """Whether an answer is JSON, or text of any kind, and no provider's own kind of stream."""
    return headers.get("content-type", "").startswith(("text/", "application/json"))


def _body(answer: Any) -> Any:
    """LiteLLM's answer in the shape of OpenAI's, as a server would have sent it."""
    body = answer.model_dump(warnings=False)
    for choice in body.get("choices") or ():
        message = choice.get("message")
        if message and message.get("provider_specific_fields"):  # fields that LiteLLM does not know by name
            choice["message"] = {**message.pop("provider_specific_fields"), **message}
    return body


def _headers(answer: Any, seen: Mapping[str, str]) -> dict[str, str]:
    """The provider's headers: as they were seen, or as LiteLLM passes them on from an SDK of the provider's own."""
    headers = seen
    if not headers:
        hidden = getattr(answer, "_hidden_params", None) or {}
        headers = hidden.get("headers") or {
            name.removeprefix(_PROVIDER_HEADER): value
            for name, value in (hidden.get("additional_headers") or {}).items()
            if name.startswith(_PROVIDER_HEADER)
        }
    return {name.lower(): str(value) for name, value in headers.items()}
