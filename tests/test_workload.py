from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from runner.errors import DatasetError
from runner.task import Item
from runner.workload import ChunkSize, Reader


class Pace:
    """A run's, with its clock."""

    def __init__(self) -> None:
        self.now = 0.0
        self.settled = 0
        self.size = ChunkSize(clock=lambda: self.now)

    def after(self, seconds: float, *, settled: int, slots: int = 64) -> int:
        self.now += seconds
        self.settled += settled
        return self.size.next(slots=slots, settled=self.settled)


def test_a_fast_run_claims_what_is_settled_soon() -> None:
    pace = Pace()
    assert pace.after(0, settled=0) == 16
    assert pace.after(0.05, settled=100) == 100
    assert pace.after(0.2, settled=700) == 256
    assert pace.after(1, settled=400) == 240
    assert pace.after(1, settled=400) == 100


def test_a_slow_run_claims_a_part_of_its_slots_whatever_goes_out_at_first() -> None:
    pace = Pace()
    assert [pace.after(0.01, settled=8) for _ in range(4)] == [16, 16, 24, 32]
    assert [pace.after(2, settled=40) for _ in range(3)] == [16, 16, 16]
    assert pace.after(100, settled=10, slots=4) == 8


def test_a_chunk_is_never_larger_than_a_transaction_should_be() -> None:
    assert ChunkSize().next(slots=5000, settled=0) == ChunkSize.MOST


def items(count: int, *, each_s: float = 0.0, error: str | None = None) -> Iterator[Item]:
    for position in range(count):
        time.sleep(each_s)
        yield Item(position=position, fields={}, content=b"", metadata="{}", input=position)
    if error is not None:
        raise DatasetError(error)


async def as_they_are(some: Sequence[Item]) -> Sequence[Item]:
    return some


async def test_what_comes_before_an_error_is_read_first() -> None:
    reader = Reader(items(5, error="line 6"), as_they_are)

    assert [len(await reader.read(3)) for _ in range(4)] == [3, 2, 0, 0]
    assert str(reader.error) == "line 6"


async def test_what_cannot_be_identified_ends_the_reading() -> None:
    async def refuse(some: Sequence[Item]) -> Sequence[Item]:
        raise DatasetError("gone")

    reader = Reader(items(5), refuse)

    assert await reader.read(3) == []
    assert str(reader.error) == "gone"


async def test_a_slow_dataset_is_read_a_little_at_a_time() -> None:
    reader = Reader(items(200, each_s=0.02), as_they_are)

    assert len(await reader.read(256)) <= 3
    assert reader.error is None
