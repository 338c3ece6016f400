from __future__ import annotations

import asyncio
import contextvars
import functools
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from pydantic import BaseModel

from runner.errors import AuthenticationError, WorkerError
from runner.transports.worker import Worker, WorkerTransport, identity_of
from runner.types import Generation, GenerationRequest


@asynccontextmanager
async def opened(worker: Worker, *, threads: int = 4) -> AsyncIterator[WorkerTransport]:
    transport = WorkerTransport(worker, threads=threads)
    try:
        yield transport
    finally:
        await transport.aclose()


async def answer(worker: Worker, prompt: str = "hello") -> str:
    async with opened(worker) as transport:
        response = await transport.send(GenerationRequest(input=prompt))
    assert isinstance(response.output, Generation)
    return response.output.text


class Point(BaseModel):
    x: int


class Shouter:
    def __init__(self, mark: str = "!") -> None:
        self.mark = mark
        self.calls = 0

    async def __call__(self, prompt: str) -> str:
        self.calls += 1
        return prompt + self.mark

    def shout(self, prompt: str) -> str:
        self.calls += 1
        return prompt + self.mark


async def ask(prompt: str, mark: str = "?") -> str:
    return prompt + mark


def plain(prompt: str) -> str:
    return prompt.upper()


@pytest.mark.parametrize(
    ("worker", "text"),
    [
        (ask, "hello?"),
        (plain, "HELLO"),
        (Shouter(), "hello!"),
        (Shouter().shout, "hello!"),
        (lambda prompt: ask(prompt), "hello?"),
        (functools.partial(ask, mark="."), "hello."),
        (str.upper, "HELLO"),
        (lambda prompt: Point(x=1), '{"x":1}'),
        (lambda prompt: {"a": [1]}, '{"a":[1]}'),
    ],
)
async def test_whatever_can_be_called_with_a_prompt_answers(worker: Worker, text: str) -> None:
    assert await answer(worker) == text


async def test_what_a_worker_raises_is_its_error_and_worth_another_attempt() -> None:
    async def worker(prompt: str) -> str:
        raise ValueError("boom")

    with pytest.raises(WorkerError, match="the worker raised ValueError: boom") as caught:
        await answer(worker)
    assert caught.value.retryable


async def test_an_error_of_our_own_tree_keeps_its_class() -> None:
    async def worker(prompt: str) -> str:
        raise AuthenticationError("wrong key", status=401)

    with pytest.raises(AuthenticationError):
        await answer(worker)


async def test_nothing_is_no_answer() -> None:
    with pytest.raises(WorkerError, match="returned None"):
        await answer(lambda prompt: None)


async def test_plain_functions_run_at_once_up_to_the_number_of_threads() -> None:
    together = threading.Barrier(3, timeout=5)

    def worker(prompt: str) -> str:
        together.wait()
        return prompt

    async with opened(worker, threads=3) as transport:
        await asyncio.gather(*(transport.send(GenerationRequest(input=str(n))) for n in range(3)))


async def test_a_plain_function_sees_the_callers_context() -> None:
    variable = contextvars.ContextVar("variable", default="unset")
    variable.set("set")

    assert await answer(lambda prompt: variable.get()) == "set"


# Identity


def make(template: str) -> Callable[[str], Any]:
    calls = 0
    seen: list[str] = []

    async def worker(prompt: str) -> str:
        nonlocal calls
        calls += 1
        seen.append(prompt)
        return template.format(prompt)

    return worker


async def test_a_worker_stays_the_same_while_it_works() -> None:
    worker, shouter = make("a {}"), Shouter()
    before = identity_of(worker), identity_of(shouter), identity_of(shouter.shout)

    await worker("hello")
    await shouter("hello")

    assert (identity_of(worker), identity_of(shouter), identity_of(shouter.shout)) == before
    assert identity_of(make("a {}")) == identity_of(worker)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (make("a {}"), make("b {}")),
        (ask, plain),
        (lambda prompt: prompt + "a", lambda prompt: prompt + "b"),
        (lambda prompt: [prompt], lambda prompt: (prompt,)),
        (functools.partial(ask, mark="."), functools.partial(ask, mark="!")),
        (functools.partial(ask, mark="."), ask),
        (Shouter("!"), Shouter("?")),
        (Shouter().shout, Shouter()),
        (str.upper, str.lower),
    ],
)
def test_workers_that_answer_otherwise_are_told_apart(one: Worker, other: Worker) -> None:
    assert identity_of(one) != identity_of(other)


def test_the_name_of_a_worker_is_in_its_identity() -> None:
    assert identity_of(plain).startswith(f"{__name__}.plain#")


def test_a_worker_is_the_same_in_every_process() -> None:
    code = (
        "from runner.transports.worker import identity_of\n"
        "def worker(prompt, kind={'a', 'b'}): return prompt if prompt in {'x', 'y', 'z'} else str(lambda: prompt)\n"
        "print(identity_of(worker))\n"
    )
    identities = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
        ).stdout
        for seed in ("1", "2", "3")
    }

    assert len(identities) == 1
