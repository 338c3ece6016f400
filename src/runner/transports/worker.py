"""The worker transport: the caller's own function in a provider's place."""

from __future__ import annotations

import asyncio
import contextvars
import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import CodeType
from typing import Any

from pydantic import BaseModel

from runner.errors import RequestError, WorkerError
from runner.identity import dump_json, dump_text
from runner.types import Generation, GenerationRequest, Request, Response

Worker = Callable[..., Any]
"""A function of a prompt that returns its answer, or an awaitable of it."""


class WorkerTransport:
    """A `Client` that answers prompts with a function of the caller's.

    A coroutine function runs on the event loop, any other in a thread. An answer is text; a Pydantic model becomes
    its JSON, and so does what JSON has a form for. What the function raises is a `WorkerError`, and worth another
    attempt; errors of runner's own tree keep their class.

    Args:
        worker: The function.
        threads: How many calls of a plain function may run at once.
    """

    def __init__(self, worker: Worker, *, threads: int) -> None:
        self._worker = worker
        self._threads = None if _is_async(worker) else ThreadPoolExecutor(threads, thread_name_prefix="worker")

    async def send(self, request: Request) -> Response:
        assert isinstance(request, GenerationRequest)
        try:
            answer = await self._answer(request.input)
        except RequestError:
            raise
        except Exception as error:
            raise WorkerError(f"the worker raised {type(error).__name__}: {error}") from error
        if answer is None:
            raise WorkerError("the worker returned None, and not text")
        return Response(
            output=Generation(text=_text(answer)), model_id="worker", request_id=None, usage=None, headers={}
        )

    async def aclose(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    async def _answer(self, prompt: Any) -> Any:
        if self._threads is None:
            return await self._worker(prompt)
        call = partial(contextvars.copy_context().run, self._worker, prompt)
        answer = await asyncio.get_running_loop().run_in_executor(self._threads, call)
        return await answer if inspect.isawaitable(answer) else answer  # a lambda around a coroutine function


def identity_of(worker: Worker) -> str:
    """What tells one worker from another, over processes: its name, and a digest of what decides its answers.

    These are its code, its defaults and bound arguments, and the texts that it refers to (a model's name, a template)
    in its closure, its module or its object. Other objects may change while it works, and do not count.
    """
    fixed: list[Any] = []
    while isinstance(worker, partial):
        fixed += [*worker.args, *sorted(worker.keywords.items())]
        worker = worker.func
    owner = getattr(worker, "__self__", None)
    if not inspect.isroutine(worker):
        owner, worker = worker, type(worker).__call__
    function = inspect.unwrap(getattr(worker, "__func__", worker))
    name = f"{getattr(function, '__module__', None)}.{function.__qualname__}"
    decisive: list[Any] = [_texts(getattr(owner, "__dict__", {}))]
    if inspect.isfunction(function):
        fixed += [*(function.__defaults__ or ()), *sorted((function.__kwdefaults__ or {}).items())]
        decisive += [list(_code(function.__code__)), _texts(_referred(function))]
    digest = hashlib.blake2b(dump_json([*decisive, _plain(tuple(fixed))]), digest_size=8)
    return f"{name}#{digest.hexdigest()}"


def _is_async(worker: Worker) -> bool:
    return inspect.iscoroutinefunction(worker) or inspect.iscoroutinefunction(type(worker).__call__)


def _text(answer: Any) -> str:
    if isinstance(answer, str):
        return answer
    return answer.model_dump_json() if isinstance(answer, BaseModel) else dump_text(answer)


def _code(code: CodeType) -> Iterator[Any]:
    """What a function's code does, without where it stands."""
    yield code.co_code.hex()
    yield code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield list(_code(constant))
        else:  # a set's order differs from process to process
            yield sorted(map(repr, constant)) if isinstance(constant, frozenset) else repr(constant)


def _referred(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        variables = inspect.getclosurevars(function)
    except ValueError:  # a variable that has no value yet
        return {}
    return {**variables.globals, **variables.nonlocals}


def _texts(variables: Mapping[str, Any]) -> dict[str, str]:
    return {name: value for name, value in variables.items() if isinstance(value, str)}


def _plain(value: Any) -> Any:
    """Numbers and texts as they are, other objects as their class: they may change, or show an address."""
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return value if isinstance(value, str | int | float | None) else type(value).__qualname__
