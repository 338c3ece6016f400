from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.concurrency import SoftStart, Window
from virtual_time import now, other_tasks, settle, virtual_time


class Users:
    """Tasks that hold a slot for a while, and who got one when."""

    def __init__(self, window: Window) -> None:
        self.window = window
        self.served: list[str] = []
        self.most = 0

    def start(self, name: str, seconds: float = 1.0) -> asyncio.Task[None]:
        return asyncio.create_task(self._use(name, seconds))

    async def _use(self, name: str, seconds: float) -> None:
        async with self.window:
            self.served.append(name)
            self.most = max(self.most, self.window.active)
            await asyncio.sleep(seconds)


@virtual_time
async def test_no_more_slots_are_taken_than_there_are() -> None:
    window = Window(3)
    users = Users(window)
    await asyncio.gather(*(users.start(f"user {n}") for n in range(10)))
    assert users.most == 3
    assert now() == pytest.approx(4.0)
    assert window.active == 0


@virtual_time
async def test_slots_are_handed_out_first_come_first_served() -> None:
    users = Users(Window(1))
    await asyncio.gather(*(users.start(f"user {n}") for n in range(5)))
    assert users.served == [f"user {n}" for n in range(5)]


@virtual_time
async def test_nobody_gets_in_before_those_who_wait() -> None:
    window = Window(1)
    await window.enter()
    waiting = asyncio.create_task(window.enter())
    await settle()
    window.leave()
    assert not window.try_enter()
    await waiting
    window.leave()
    assert window.try_enter()


@virtual_time
async def test_one_who_enters_first_goes_before_all_others() -> None:
    window = Window(1)
    users = Users(window)
    users.start("holder", 5)
    await settle()
    users.start("ordinary")
    await settle()
    await window.enter(first=True)
    assert users.served == ["holder"]
    window.leave()
    await settle()
    assert users.served == ["holder", "ordinary"]


@virtual_time
async def test_a_larger_limit_lets_those_in_who_wait() -> None:
    window = Window(1)
    users = Users(window)
    for n in range(4):
        users.start(f"user {n}", 10)
    await settle()
    window.limit = 3
    await settle()
    assert (window.active, len(users.served)) == (3, 3)


@virtual_time
async def test_a_smaller_limit_takes_effect_as_slots_come_back() -> None:
    window = Window(3)
    users = Users(window)
    for n in range(3):
        users.start(f"user {n}", n + 1)
    await settle()
    users.start("late", 10)
    window.limit = 1
    assert window.crowded
    await asyncio.sleep(2.5)
    assert (window.active, users.served[-1]) == (1, "user 2")
    await asyncio.sleep(1)
    assert (window.active, users.served[-1]) == (1, "late")


@virtual_time
async def test_a_window_is_crowded_while_somebody_waits() -> None:
    window = Window(1)
    crowded = [window.crowded]
    await window.enter()
    crowded.append(window.crowded)
    waiting = asyncio.create_task(window.enter())
    await settle()
    crowded.append(window.crowded)
    window.leave()
    await waiting
    crowded.append(window.crowded)
    assert crowded == [False, False, True, False]


@virtual_time
async def test_one_who_stops_waiting_is_passed_over() -> None:
    window = Window(1)
    users = Users(window)
    users.start("holder")
    await settle()
    impatient = users.start("impatient")
    users.start("patient")
    await settle()
    impatient.cancel()
    await asyncio.sleep(1.5)
    assert users.served == ["holder", "patient"]
    assert window.active == 1


@virtual_time
async def test_a_slot_that_comes_in_the_moment_of_a_cancellation_is_handed_on() -> None:
    window = Window(1)
    users = Users(window)
    await window.enter()
    impatient = users.start("impatient")
    users.start("patient")
    await settle()
    window.leave()
    impatient.cancel()
    await settle()
    assert impatient.cancelled()
    assert users.served == ["patient"]
    await asyncio.sleep(2)
    assert window.active == 0


@virtual_time
async def test_a_slot_that_comes_back_right_after_a_cancellation_is_not_lost() -> None:
    window = Window(1)
    users = Users(window)
    await window.enter()
    impatient = users.start("impatient")
    users.start("patient")
    await settle()
    impatient.cancel()
    window.leave()
    await settle()
    assert impatient.cancelled()
    assert users.served == ["patient"]
    await asyncio.sleep(2)
    assert window.active == 0


@virtual_time
async def test_who_steps_aside_frees_the_slot_and_takes_one_again() -> None:
    window = Window(1)
    users = Users(window)
    async with window:
        users.start("other", 3)
        async with window.aside():
            await settle()
            assert users.served == ["other"]
            await asyncio.sleep(1)
        assert now() == pytest.approx(3.0, abs=0.01)
        assert window.active == 1
    assert window.active == 0


@virtual_time
async def test_those_who_come_back_go_before_newcomers_in_the_order_they_came_back() -> None:
    window = Window(1)
    users = Users(window)
    back: list[str] = []

    async def step_aside(name: str, seconds: float) -> None:
        async with window:
            async with window.aside():
                await asyncio.sleep(seconds)
            back.append(name)
            users.served.append(name)
            await asyncio.sleep(1)

    for n in range(3):
        asyncio.create_task(step_aside(f"back {n}", n + 1))  # noqa: RUF006
    await asyncio.sleep(0.5)
    users.start("holder", 5)
    users.start("newcomer", 5)
    await asyncio.sleep(20)
    assert users.served == ["holder", "back 0", "back 1", "back 2", "newcomer"]
    assert window.active == 0


@virtual_time
async def test_who_is_cancelled_while_aside_leaves_at_once_and_the_count_stays_right() -> None:
    window = Window(1)
    users = Users(window)
    retrying = asyncio.create_task(step_aside_for(window, 2))
    await settle()
    users.start("holder", 100)
    await settle()
    retrying.cancel()
    await settle()
    assert retrying.cancelled()
    assert window.active == 1
    await asyncio.sleep(101)
    assert window.active == 0


@virtual_time
async def test_who_is_cancelled_while_coming_back_leaves_at_once_and_the_count_stays_right() -> None:
    window = Window(1)
    users = Users(window)
    retrying = asyncio.create_task(step_aside_for(window, 2))
    await settle()
    users.start("holder", 100)
    await asyncio.sleep(3)
    retrying.cancel()
    await settle()
    assert retrying.cancelled()
    assert window.active == 1
    assert not window.try_enter()
    await asyncio.sleep(101)
    assert window.active == 0


async def step_aside_for(window: Window, seconds: float) -> None:
    async with window, window.aside():
        await asyncio.sleep(seconds)


@virtual_time
async def test_an_error_while_aside_goes_on_and_the_count_stays_right() -> None:
    window = Window(1)
    users = Users(window)

    async def fail() -> None:
        async with window, window.aside():
            users.start("other", 3)
            await settle()
            raise LookupError

    with pytest.raises(LookupError):
        await fail()
    assert window.active == 1
    await asyncio.sleep(4)
    assert window.active == 0


@virtual_time
async def test_a_filler_is_called_when_a_slot_is_free_and_nobody_waits() -> None:
    window = Window(1)
    users = Users(window)
    calls: list[float] = []
    users.start("first")
    users.start("second")
    await settle()
    with filled(window, lambda: calls.append(round(now(), 3))):
        await asyncio.sleep(1.5)
        assert calls == []
        await asyncio.sleep(1)
        assert calls == [2.0]
        window.limit = 2
        assert len(calls) == 2
    window.limit = 3
    assert len(calls) == 2


@contextmanager
def filled(window: Window, fill: object) -> Iterator[None]:
    assert callable(fill)
    window.add_filler(fill)
    try:
        yield
    finally:
        window.remove_filler(fill)


@given(
    limits=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    users=st.lists(
        st.tuples(
            st.integers(0, 9),  # arrives
            st.integers(0, 5),  # holds its slot
            st.none() | st.integers(0, 5),  # steps aside
            st.none() | st.integers(0, 9),  # is cancelled, so long after its arrival
        ),
        max_size=12,
    ),
)
@virtual_time
async def test_whatever_its_users_do_the_window_holds_and_ends_empty(
    limits: list[int], users: list[tuple[int, int, int | None, int | None]]
) -> None:
    window = Window(limits[0])
    inside = 0

    async def use(holds: int, aside: int | None) -> None:
        nonlocal inside
        async with window:
            inside += 1
            try:
                assert inside <= max(limits)
                await asyncio.sleep(holds)
            finally:
                inside -= 1
            if aside is not None:
                async with window.aside():
                    await asyncio.sleep(aside)

    async def live(arrives: int, holds: int, aside: int | None, cancelled: int | None) -> None:
        await asyncio.sleep(arrives)
        task = asyncio.create_task(use(holds, aside))
        if cancelled is not None:
            await asyncio.sleep(cancelled)
            task.cancel()
        await asyncio.wait([task])
        if not task.cancelled():
            task.result()

    async with asyncio.TaskGroup() as group:
        for user in users:
            group.create_task(live(*user))
        for limit in limits:
            window.limit = limit
            await asyncio.sleep(3)
    assert (window.active, inside) == (0, 0)
    assert not window.crowded
    assert not other_tasks()


@virtual_time
async def test_a_soft_start_opens_the_window_in_steps() -> None:
    window = Window(32)
    start = SoftStart(window, step_s=0.1)
    seen = [window.limit]
    for _ in range(5):
        await asyncio.sleep(0.1)
        seen.append(window.limit)
    assert seen == [4, 8, 16, 32, 32, 32]
    start.close()


@virtual_time
async def test_a_soft_start_ends_at_its_target_exactly() -> None:
    window = Window(21)
    SoftStart(window, step_s=0.1)
    await asyncio.sleep(1)
    assert window.limit == 21


@virtual_time
async def test_the_first_answer_opens_the_window_at_once() -> None:
    window = Window(100)
    start = SoftStart(window, step_s=0.1)
    await asyncio.sleep(0.15)
    start.open()
    assert window.limit == 100
    window.limit = 7
    start.open()
    await asyncio.sleep(1)
    assert window.limit == 7


@virtual_time
async def test_a_soft_start_that_is_closed_grows_no_more() -> None:
    window = Window(100)
    start = SoftStart(window, step_s=0.1)
    start.close()
    await asyncio.sleep(1)
    start.open()
    assert window.limit == SoftStart.FIRST


@pytest.mark.parametrize("limit", [1, 4])
@virtual_time
async def test_a_small_window_needs_no_soft_start(limit: int) -> None:
    window = Window(limit)
    SoftStart(window)
    assert window.limit == limit


@virtual_time
async def test_a_soft_start_wakes_those_who_wait() -> None:
    window = Window(8)
    SoftStart(window, step_s=0.1)
    users = Users(window)
    await asyncio.gather(*(users.start(f"user {n}") for n in range(8)))
    assert users.most == 8
    assert now() == pytest.approx(1.1)


@virtual_time
async def test_no_more_step_aside_than_four_for_each_slot() -> None:
    window = Window(1)
    begun = 0

    async def wait_for_long() -> None:
        nonlocal begun
        async with window:
            begun += 1
            async with window.aside():
                await asyncio.sleep(1000)

    tasks = [asyncio.create_task(wait_for_long()) for _ in range(20)]
    await asyncio.sleep(1)
    assert begun == 5  # four are aside, the fifth keeps the slot
    await asyncio.gather(*tasks)
    assert begun == 20
    assert window.active == 0
