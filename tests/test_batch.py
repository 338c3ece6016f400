from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.batch import Stop, chunked, run_batch
from runner.concurrency import Window
from runner.errors import Interrupted, RunStopped, SystemicError
from virtual_time import now, other_tasks, virtual_time


class Source:
    """A source that counts what is read of it, and knows whether it was closed."""

    def __init__(self, items: Iterable[int], size: int = 10, delay_s: float = 0.0) -> None:
        self.items = list(items)
        self.size = size
        self.delay_s = delay_s
        self.read = 0
        self.closed = False

    async def __call__(self) -> AsyncIterator[Sequence[int]]:
        try:
            for begin in range(0, len(self.items), self.size):
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                self.read += self.size
                yield self.items[begin : begin + self.size]
        finally:
            self.closed = True


class Work:
    """Work of a certain length, and what is known about it."""

    def __init__(self, seconds: float | Callable[[int], float] = 1.0) -> None:
        self.seconds = seconds if callable(seconds) else lambda _: seconds
        self.taken: list[int] = []
        self.done: list[int] = []
        self.at_work = 0
        self.most = 0

    async def __call__(self, item: int) -> None:
        self.taken.append(item)
        self.at_work += 1
        self.most = max(self.most, self.at_work)
        try:
            await asyncio.sleep(self.seconds(item))
        finally:
            self.at_work -= 1
        self.done.append(item)


@virtual_time
async def test_every_item_is_done_once() -> None:
    work = Work()
    window = Window(8)
    await run_batch(chunked(range(100), 7), work, window=window)
    assert sorted(work.done) == list(range(100))
    assert window.active == 0
    assert not other_tasks()


@virtual_time
async def test_as_many_are_at_work_as_the_window_has_slots_and_no_more() -> None:
    work = Work()
    await run_batch(chunked(range(100), 7), work, window=Window(8))
    assert work.most == 8
    assert now() == pytest.approx(13.0)


@virtual_time
async def test_items_are_taken_in_order() -> None:
    work = Work(lambda item: (item * 7 % 5) * 0.5)
    await run_batch(chunked(range(60), 7), work, window=Window(4))
    assert work.taken == list(range(60))


@virtual_time
async def test_a_long_item_holds_up_nobody() -> None:
    work = Work(lambda item: 50.0 if item == 0 else 1.0)
    await run_batch(chunked(range(51), 5), work, window=Window(2))
    assert now() == pytest.approx(50.0)


@virtual_time
async def test_one_chunk_is_read_ahead_and_no_more() -> None:
    source = Source(range(1000), size=10)
    work = Work()
    ahead: list[int] = []

    async def watched(item: int) -> None:
        ahead.append(source.read - len(work.taken))
        await work(item)

    await run_batch(source(), watched, window=Window(4))
    assert max(ahead) <= 20
    assert source.read == 1000


@virtual_time
async def test_the_next_chunk_is_read_while_the_last_one_is_at_work() -> None:
    work = Work(2.0)
    await run_batch(Source(range(100), size=10, delay_s=1.0)(), work, window=Window(10))
    assert now() == pytest.approx(1 + 10 * 2)


@virtual_time
async def test_a_source_that_knows_no_end_is_read_as_it_is_needed() -> None:
    stop = Stop()
    work = Work()

    async def endless() -> AsyncIterator[Sequence[int]]:
        n = 0
        while True:
            yield [n]
            n += 1

    async def until_fifty(item: int) -> None:
        await work(item)
        if item == 50:
            stop(RunStopped("enough"))

    await run_batch(endless(), until_fifty, window=Window(3), stop=stop)
    assert len(work.done) <= 53
    assert not other_tasks()


@pytest.mark.parametrize("chunks", [[], [[]], [[], [], []]])
@virtual_time
async def test_an_empty_source_is_an_empty_batch(chunks: list[list[int]]) -> None:
    work = Work()
    window = Window(4)
    await run_batch(stream(chunks), work, window=window)
    assert work.taken == []
    assert window.active == 0


@virtual_time
async def test_empty_chunks_are_passed_over() -> None:
    work = Work()
    await run_batch(stream([[], [1], [], [], [2, 3], []]), work, window=Window(4))
    assert work.done == [1, 2, 3]


async def stream(chunks: Iterable[Sequence[int]]) -> AsyncIterator[Sequence[int]]:
    for chunk in chunks:
        yield chunk


@virtual_time
async def test_a_failing_work_cancels_the_others_and_its_exception_comes_out() -> None:
    window = Window(4)
    source = Source(range(1000))
    work = Work(10.0)

    async def fail_at_five(item: int) -> None:
        if item == 2:
            await asyncio.sleep(1)
            raise ZeroDivisionError("two")
        await work(item)

    with pytest.raises(ZeroDivisionError, match="two"):
        await run_batch(source(), fail_at_five, window=window)
    assert now() == pytest.approx(1.0)
    assert work.taken == [0, 1, 3]
    assert (work.done, work.at_work, window.active) == ([], 0, 0)
    assert source.closed
    assert not other_tasks()


@virtual_time
async def test_work_that_fails_before_it_waits_leaves_no_slot_taken() -> None:
    window = Window(4)

    async def fail(item: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await run_batch(Source(range(100))(), fail, window=window)
    assert window.active == 0
    assert not other_tasks()


@virtual_time
async def test_work_is_not_begun_after_a_failure() -> None:
    work = Work()

    async def fail_at_once(item: int) -> None:
        if item == 3:
            raise ZeroDivisionError
        await work(item)

    with pytest.raises(ZeroDivisionError):
        await run_batch(Source(range(100))(), fail_at_once, window=Window(1))
    assert work.taken == [0, 1, 2]


@virtual_time
async def test_work_that_is_cancelled_from_within_does_not_pass_for_done() -> None:
    window = Window(2)

    async def lose(item: int) -> None:
        broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        broken.cancel()
        await broken

    with pytest.raises((asyncio.CancelledError, RuntimeError)):
        await run_batch(Source(range(100))(), lose, window=window)
    assert window.active == 0


@virtual_time
async def test_stop_lets_what_is_at_work_finish_and_takes_no_more() -> None:
    window = Window(4)
    stop = Stop()
    source = Source(range(1000))
    work = Work(10.0)
    batch = asyncio.create_task(run_batch(source(), work, window=window, stop=stop))
    await asyncio.sleep(15)
    stop(Interrupted(2))
    await batch
    assert now() == pytest.approx(20.0)
    assert work.taken == sorted(work.done) == list(range(8))
    assert source.closed
    assert window.active == 0


@virtual_time
async def test_stop_does_not_wait_for_a_slow_source() -> None:
    stop = Stop()
    source = Source(range(100), size=2, delay_s=100.0)
    work = Work(1.0)
    batch = asyncio.create_task(run_batch(source(), work, window=Window(4), stop=stop))
    await asyncio.sleep(150)
    stop(Interrupted(2))
    await batch
    assert now() == pytest.approx(150.0)
    assert work.done == [0, 1]
    assert not other_tasks()


@virtual_time
async def test_a_chunk_that_arrives_with_the_stop_is_not_taken() -> None:
    stop = Stop()
    work = Work()

    async def last_words() -> AsyncIterator[Sequence[int]]:
        yield [1]
        await asyncio.sleep(5)
        stop(RunStopped("the source says so"))
        yield [2]
        yield [3]

    await run_batch(last_words(), work, window=Window(4), stop=stop)
    assert work.taken == [1]


@virtual_time
async def test_a_batch_that_was_stopped_before_it_began_takes_nothing() -> None:
    stop = Stop()
    stop(Interrupted(2))
    work = Work()
    window = Window(4)
    await run_batch(Source(range(100))(), work, window=window, stop=stop)
    assert (work.taken, window.active) == ([], 0)


def test_the_first_reason_to_stop_counts() -> None:
    stop = Stop()
    calls: list[str] = []
    stop.listen(lambda: calls.append("early"))
    first = SystemicError("a wrong key")
    stop(first)
    stop(Interrupted(2))
    assert stop.reason is first
    stop.listen(lambda: calls.append("late"))
    assert set(calls) == {"early", "late"}


@virtual_time
async def test_cancelling_a_batch_cancels_its_work_and_leaves_nothing_behind() -> None:
    window = Window(4)
    source = Source(range(1000), delay_s=1.0)
    work = Work(10.0)
    batch = asyncio.create_task(run_batch(source(), work, window=window))
    await asyncio.sleep(15)
    batch.cancel()
    with pytest.raises(asyncio.CancelledError):
        await batch
    assert now() == pytest.approx(15.0)
    assert (work.at_work, window.active) == (0, 0)
    assert source.closed
    assert not other_tasks()


@virtual_time
async def test_a_batch_that_is_cancelled_before_its_workers_began_leaves_no_slot_taken() -> None:
    window = Window(4)
    batch = asyncio.create_task(run_batch(Source(range(1000))(), Work(), window=window))
    for _ in range(20):
        await asyncio.sleep(0)
        if window.active:
            break
    batch.cancel()
    with pytest.raises(asyncio.CancelledError):
        await batch
    assert window.active == 0
    assert window.try_enter()


@pytest.mark.parametrize("steps", range(12))
@virtual_time
async def test_a_batch_may_be_cancelled_at_any_step(steps: int) -> None:
    window = Window(3)
    source = Source(range(1000), size=2)
    batch = asyncio.create_task(run_batch(source(), Work(0.0), window=window))
    for _ in range(steps):
        await asyncio.sleep(0)
    batch.cancel()
    await asyncio.wait([batch])
    assert batch.cancelled()
    assert window.active == 0
    assert not window.crowded
    assert not other_tasks()


@virtual_time
async def test_an_error_of_the_source_comes_out_after_what_it_gave_before() -> None:
    window = Window(2)
    work = Work()

    async def broken() -> AsyncIterator[Sequence[int]]:
        yield [0, 1]
        yield [2, 3, 4]
        raise LookupError("line 6")

    with pytest.raises(LookupError, match="line 6"):
        await run_batch(broken(), work, window=window)
    assert work.taken == [0, 1, 2, 3, 4]
    assert window.active == 0
    assert not other_tasks()


@virtual_time
async def test_an_error_of_the_source_at_once_comes_out() -> None:
    window = Window(2)

    async def broken(path: str) -> AsyncIterator[Sequence[int]]:
        if path:
            raise LookupError("no such file")
        yield []

    with pytest.raises(LookupError):
        await run_batch(broken("x"), Work(), window=window)
    assert window.active == 0


@virtual_time
async def test_an_error_that_the_source_meets_after_a_stop_is_nobodys_business(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stop = Stop()
    work = Work(10.0)

    async def broken() -> AsyncIterator[Sequence[int]]:
        yield [0, 1, 2]
        raise LookupError

    batch = asyncio.create_task(run_batch(broken(), work, window=Window(1), stop=stop))
    await asyncio.sleep(1)
    stop(Interrupted(2))
    with caplog.at_level(logging.ERROR, logger="asyncio"):
        await batch
        del batch
    assert work.done == [0]
    assert not caplog.records


@virtual_time
async def test_a_single_user_of_the_window_is_served_while_a_batch_runs() -> None:
    window = Window(4)
    batch = asyncio.create_task(run_batch(Source(range(1000))(), Work(1.0), window=window))
    await asyncio.sleep(10.5)
    async with window:
        assert now() == pytest.approx(11.0)
        await asyncio.sleep(1)
    await batch
    assert window.active == 0


@virtual_time
async def test_a_batch_makes_progress_among_single_users_that_never_stop_coming() -> None:
    window = Window(1)

    async def keep_coming() -> None:
        while True:
            async with window:
                await asyncio.sleep(1)

    guests = [asyncio.create_task(keep_coming()) for _ in range(3)]
    await asyncio.sleep(0.5)
    work = Work(1.0)
    await run_batch(chunked(range(5), 2), work, window=window)
    assert now() == pytest.approx(20.0)
    for guest in guests:
        guest.cancel()
    await asyncio.wait(guests)
    assert window.active == 0


@virtual_time
async def test_a_batch_takes_no_more_slots_than_it_has_items() -> None:
    window = Window(8)
    seen: list[int] = []

    async def look(item: int) -> None:
        seen.append(window.active)
        await asyncio.sleep(1)

    await run_batch(chunked(range(6), 3), look, window=window)
    assert seen == [3, 3, 3, 6, 6, 6]


@virtual_time
async def test_a_single_user_is_served_while_a_batch_waits_for_its_source() -> None:
    window = Window(4)
    batch = asyncio.create_task(run_batch(Source(range(4), size=2, delay_s=100.0)(), Work(1.0), window=window))
    await asyncio.sleep(50)
    assert window.active == 0
    async with window:
        assert now() == pytest.approx(50.0)
    await batch


@virtual_time
async def test_who_steps_aside_lets_the_next_item_begin_and_comes_back_first() -> None:
    window = Window(1)
    events: list[tuple[float, str]] = []

    async def work(item: int) -> None:
        events.append((round(now()), f"begin {item}"))
        if item == 0:
            async with window.aside():
                await asyncio.sleep(5)
        await asyncio.sleep(2)
        events.append((round(now()), f"end {item}"))

    await run_batch(chunked(range(5), 2), work, window=window)
    assert events[:3] == [(0, "begin 0"), (0, "begin 1"), (2, "end 1")]
    assert events.index((8, "end 0")) < events.index((8, "begin 4"))
    assert window.active == 0


@virtual_time
async def test_several_batches_share_a_window() -> None:
    window = Window(5)
    works = [Work(1.0) for _ in range(3)]
    most = 0

    def counted(work: Work) -> Callable[[int], Any]:
        async def count(item: int) -> None:
            nonlocal most
            most = max(most, sum(each.at_work for each in works) + 1)
            await work(item)

        return count

    await asyncio.gather(*(run_batch(chunked(range(50), 10), counted(work), window=window) for work in works))
    assert [sorted(work.done) for work in works] == [list(range(50))] * 3
    assert most == 5
    assert now() == pytest.approx(30.0, abs=1.5)
    assert window.active == 0


@virtual_time
async def test_a_small_batch_does_not_wait_for_a_large_one_to_end() -> None:
    window = Window(4)
    large = asyncio.create_task(run_batch(chunked(range(1000), 10), Work(1.0), window=window))
    await asyncio.sleep(10.5)
    small = Work(1.0)
    await run_batch(chunked(range(3), 10), small, window=window)
    assert now() < 20
    await large
    assert small.done == [0, 1, 2]


@virtual_time
async def test_the_window_may_shrink_to_one_and_grow_again() -> None:
    window = Window(8)
    work = Work(1.0)
    at_work: dict[float, int] = {}

    async def watch() -> None:
        for limit, seconds in ((8, 3.5), (1, 5), (6, 3)):
            window.limit = limit
            await asyncio.sleep(seconds)
            at_work[limit] = work.at_work

    watching = asyncio.create_task(watch())
    await run_batch(chunked(range(100), 10), work, window=window)
    await watching
    assert at_work == {8: 8, 1: 1, 6: 6}
    assert sorted(work.done) == list(range(100))
    assert window.active == 0


@given(
    sizes=st.lists(st.integers(0, 7), max_size=12),
    durations=st.lists(st.sampled_from([0.0, 0.0, 0.1, 1.0, 2.5]), min_size=1, max_size=9),
    delay_s=st.sampled_from([0.0, 0.3]),
    limits=st.lists(st.integers(1, 6), min_size=1, max_size=6),
    asides=st.sets(st.integers(0, 20)),
    guests=st.integers(0, 5),
)
@virtual_time
async def test_whatever_the_durations_every_item_is_done_once_and_in_order_of_taking(
    sizes: list[int], durations: list[float], delay_s: float, limits: list[int], asides: set[int], guests: int
) -> None:
    window = Window(limits[0])
    work = Work(lambda item: durations[item % len(durations)])
    items = range(sum(sizes))

    async def chunks() -> AsyncIterator[Sequence[int]]:
        begin = 0
        for size in sizes:
            await asyncio.sleep(delay_s)
            yield items[begin : begin + size]
            begin += size

    async def sometimes_aside(item: int) -> None:
        await work(item)
        if item in asides:
            async with window.aside():
                await asyncio.sleep(0.7)

    async def guest(n: int) -> None:
        await asyncio.sleep(n * 0.4)
        async with window:
            await asyncio.sleep(0.2)

    async def change_limits() -> None:
        for limit in limits:
            window.limit = limit
            await asyncio.sleep(0.5)

    await asyncio.gather(
        run_batch(chunks(), sometimes_aside, window=window), change_limits(), *(guest(n) for n in range(guests))
    )
    assert work.taken == list(items)
    assert sorted(work.done) == list(items)
    assert work.most <= max(limits)
    assert window.active == 0
    assert not other_tasks()


async def test_chunks_of_an_iterable_are_read_as_they_are_asked_for() -> None:
    read: list[int] = []

    def numbers() -> Iterable[int]:
        for n in range(10):
            read.append(n)
            yield n

    chunks = chunked(numbers(), 4)
    assert await anext(chunks) == [0, 1, 2, 3]
    assert read == [0, 1, 2, 3]
    assert [chunk async for chunk in chunks] == [[4, 5, 6, 7], [8, 9]]


async def test_an_async_iterable_is_chunked_likewise() -> None:
    async def numbers() -> AsyncIterator[int]:
        for n in range(5):
            yield n

    assert [chunk async for chunk in chunked(numbers(), 2)] == [[0, 1], [2, 3], [4]]
    assert [chunk async for chunk in chunked(numbers(), 5)] == [[0, 1, 2, 3, 4]]
