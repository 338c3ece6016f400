from __future__ import annotations

import asyncio

import pytest

from runner.transports.deadlines import Deadlines
from virtual_time import now, other_tasks, virtual_time


async def wait(deadlines: Deadlines, limit_s: float, needs_s: float) -> str:
    try:
        with deadlines.within(limit_s):
            await asyncio.sleep(needs_s)
    except TimeoutError:
        return f"over at {now():g}"
    return f"done at {now():g}"


@virtual_time
async def test_a_block_ends_at_its_limit() -> None:
    assert await wait(Deadlines(), 10, 60) == "over at 10"


@virtual_time
async def test_blocks_of_any_limits_end_at_their_own() -> None:
    deadlines = Deadlines()

    async def later(delay_s: float, limit_s: float, needs_s: float) -> str:
        await asyncio.sleep(delay_s)
        return await wait(deadlines, limit_s, needs_s)

    cases = [(0, 10, 60), (0, 10, 5), (3, 10, 60), (9, 10, 2), (12, 10, 60), (1, 2, 60), (2, 100, 50), (30, 10, 11)]
    assert await asyncio.gather(*(later(*case) for case in cases)) == [
        "over at 10",
        "done at 5",
        "over at 13",
        "done at 11",
        "over at 22",
        "over at 3",
        "done at 52",
        "over at 40",
    ]


@virtual_time
async def test_a_block_that_ends_in_time_is_left_alone() -> None:
    deadlines = Deadlines()
    with deadlines.within(10):
        await asyncio.sleep(1)
    await asyncio.sleep(60)  # past the limit, in the same task
    assert now() == 61


@virtual_time
async def test_an_error_of_the_block_passes() -> None:
    with pytest.raises(ValueError, match="mine"), Deadlines().within(10):
        raise ValueError("mine")


@virtual_time
async def test_a_cancelled_block_is_cancelled_and_not_late() -> None:
    task = asyncio.create_task(wait(Deadlines(), 10, 60))
    await asyncio.sleep(5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@virtual_time
async def test_a_cancellation_at_the_limit_wins() -> None:
    task = asyncio.create_task(wait(Deadlines(), 10, 60))
    asyncio.get_running_loop().call_later(10, task.cancel)
    await asyncio.wait([task])
    assert task.cancelled()


@virtual_time
async def test_a_late_block_can_be_followed_by_another() -> None:
    deadlines = Deadlines()
    assert await wait(deadlines, 10, 60) == "over at 10"
    assert await wait(deadlines, 10, 60) == "over at 20"
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


@virtual_time
async def test_blocks_nest() -> None:
    deadlines = Deadlines()
    with pytest.raises(TimeoutError), deadlines.within(10):
        assert await wait(deadlines, 20, 60) == "never"
    assert now() == 10


@virtual_time
async def test_many_limits_leave_nothing_behind() -> None:
    deadlines = Deadlines()
    waiting = [asyncio.create_task(wait(deadlines, 500 + limit, 1000)) for limit in range(100)]
    for limit in range(1, 500):
        await wait(deadlines, limit, 0)
    assert (await asyncio.gather(*waiting))[0] == "over at 500"
    assert not other_tasks()
