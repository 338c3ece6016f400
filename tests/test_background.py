from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextvars import ContextVar

import pytest

from runner.background import BackgroundLoop

VARIABLE: ContextVar[str] = ContextVar("VARIABLE", default="unset")


async def double(number: int) -> int:
    await asyncio.sleep(0)
    return 2 * number


def test_work_runs_on_another_thread_in_the_context_of_the_caller() -> None:
    background = BackgroundLoop()

    async def where() -> tuple[str, str]:
        return threading.current_thread().name, VARIABLE.get()

    token = VARIABLE.set("mine")
    try:
        assert background.run(where()) == ("runner", "mine")
    finally:
        VARIABLE.reset(token)
        background.close()


@pytest.mark.parametrize("kind", [ValueError, SystemExit, KeyboardInterrupt])
def test_what_work_raises_is_the_callers_and_the_loop_goes_on(kind: type[BaseException]) -> None:
    background = BackgroundLoop()

    async def fail() -> None:
        raise kind

    with pytest.raises(kind):
        background.run(fail())

    assert background.run(double(4)) == 8
    background.close()


def test_closing_closes_the_asynchronous_generators_and_ends_the_tasks_that_are_left() -> None:
    background = BackgroundLoop()
    ended: list[str] = []

    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("task")

    async def numbers() -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            ended.append("generator")

    async def leave_both() -> None:
        await anext(generator)
        tasks.append(asyncio.ensure_future(wait()))
        await asyncio.sleep(0)

    generator = numbers()
    tasks: list[asyncio.Future[None]] = []
    background.run(leave_both())
    background.close()

    assert ended == ["generator", "task"]


def test_closing_from_a_task_of_the_loop_does_not_wait_for_itself() -> None:
    background = BackgroundLoop()
    closed = threading.Event()

    async def close() -> None:
        background.close()
        closed.set()

    background.run(close())

    assert closed.is_set()
    with pytest.raises(RuntimeError, match="closed"):
        background.run(double(1))


def test_closing_before_the_first_use_is_fine() -> None:
    background = BackgroundLoop()
    background.close()
    background.close()

    with pytest.raises(RuntimeError, match="closed"):
        background.run(double(1))
