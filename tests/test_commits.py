from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from runner.commits import GroupCommit
from virtual_time import virtual_time


class Disk:
    """Commits take a while, fail while it is full, and are all or nothing."""

    def __init__(self) -> None:
        self.groups: list[list[int]] = []
        self.reported: list[int] = []
        self.full = False
        self.commits: GroupCommit[int] = GroupCommit(self._commit, self.reported.extend)

    @property
    def entries(self) -> list[int]:
        return [entry for group in self.groups for entry in group]

    async def _commit(self, group: Sequence[int]) -> None:
        await asyncio.sleep(0.1)
        if self.full:
            raise OSError("full")
        self.groups.append(list(group))


@virtual_time
async def test_what_is_handed_in_together_is_committed_together() -> None:
    disk = Disk()
    for entry in range(5):
        await disk.commits.put_all([entry])
    await disk.commits.put_durably([5, 6])
    assert disk.groups == [[0, 1, 2, 3, 4, 5, 6]]
    assert disk.reported == [0, 1, 2, 3, 4, 5, 6]


@virtual_time
async def test_while_one_group_is_committed_the_next_one_gathers() -> None:
    disk = Disk()
    for entry in range(30):
        await disk.commits.put_all([entry])
        await asyncio.sleep(0.01)
    await disk.commits.flush()
    assert disk.entries == list(range(30))
    assert len(disk.groups) <= 5


@virtual_time
async def test_whoever_waits_may_be_cancelled_at_any_moment_and_each_entry_is_committed_once() -> None:
    disk = Disk()
    for entry in range(40):
        waiting = asyncio.create_task(disk.commits.put_durably([entry]))
        await asyncio.sleep(entry * 0.005)
        waiting.cancel()
        flushing = asyncio.create_task(disk.commits.flush())
        await asyncio.sleep(0.003)
        flushing.cancel()
    await disk.commits.flush()
    assert disk.entries == disk.reported == list(range(40))


@virtual_time
async def test_what_could_not_be_committed_waits_and_is_committed_once_when_there_is_room() -> None:
    disk = Disk()
    disk.full = True
    with pytest.raises(OSError, match="full"):
        await disk.commits.put_durably([1, 2])
    with pytest.raises(OSError, match="full"):
        await disk.commits.put_all([3])
    with pytest.raises(OSError, match="full"):
        await disk.commits.flush()
    assert disk.reported == []
    disk.full = False
    await disk.commits.flush()
    await disk.commits.put_durably([4])
    assert disk.groups == [[1, 2], [4]]


@virtual_time
async def test_those_who_hand_in_wait_while_too_much_is_waiting() -> None:
    disk = Disk()
    most = 0
    for entry in range(5_000):
        await disk.commits.put_all([entry])
        most = max(most, entry + 1 - len(disk.reported))
    await disk.commits.flush()
    assert most <= 256
    assert disk.entries == list(range(5_000))


@virtual_time
async def test_a_flush_of_nothing_returns_at_once() -> None:
    await Disk().commits.flush()
