"""Disks that are really full or read-only: small ones in memory, which takes root to mount."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
from aiohttp import web

from harness import Asked, Command, read_rows, serving, shout
from runner.errors import StoreError
from runner.store import Store

ROWS = 1_200
CONCURRENCY = 16


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder that holds 48 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def remount(disk: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", disk], check=True)


async def test_a_full_disk_ends_the_run_and_after_room_was_made_it_goes_on(command: Command, small_disk: Path) -> None:
    command.write_rows("rows.jsonl", [{"prompt": f"row {index} {'x' * 2_000}"} for index in range(ROWS)])

    def answer(asked: Asked) -> web.Response:
        if len(provider.requests) >= ROWS // 4 and not (small_disk / "filler").exists():
            fill(small_disk)
        return shout(asked)

    async with serving(answer) as provider:
        arguments = (
            *("model=openai_like/m", f"api_base={provider.url}", f"runs_dir={small_disk}", "name=full"),
            *("dataset=jsonl", "dataset.path=rows.jsonl", f"limits.concurrency={CONCURRENCY}", "tracker=none"),
        )
        full = await command(*arguments)
        [folder] = small_disk.glob("full/*")
        held = stored(folder)
        asked = [request.text for request in provider.requests]
        fill(small_disk)
        again = await command(*arguments)
        asked_again = len(provider.requests) - len(asked)
        await asyncio.to_thread(remount, small_disk, "size=128m")
        done = await command(*arguments)

    assert full.exit_code == 4, full.err
    assert again.exit_code in (2, 4), again.err  # it cannot be begun, or gets no further
    assert done.exit_code == 0, done.err
    for ended in (full, again):
        assert f"the disk that holds {folder} is full: make room" in ended.err
        assert "Traceback" not in ended.err
    assert ROWS // 4 <= len(asked) < ROWS
    assert set(asked) == held  # even what was in flight still found a place
    assert asked_again <= CONCURRENCY
    assert [row["output_text"] for row in read_rows(folder)] == [f"ROW {index} {'X' * 2_000}" for index in range(ROWS)]
    assert max(Counter(request.text for request in provider.requests).values()) <= 1 + bool(asked_again)


def fill(disk: Path) -> None:
    """Leave no room at all."""
    with (disk / "filler").open("ab", buffering=0) as file, suppress(OSError):
        while file.write(bytes(2**16)):
            pass


async def test_a_run_on_a_read_only_disk_can_be_read_and_not_gone_on_with(small_disk: Path) -> None:
    path = small_disk / "run" / "results.sqlite"
    async with await Store.open(path) as store:
        await store.put_meta({"kept": "yes"})
    await asyncio.to_thread(remount, small_disk, "ro")
    with pytest.raises(StoreError, match=rf"{path.parent}: cannot write there \(Read-only file system\).*runs_dir"):
        await Store.open(path)
    async with await Store.open_readonly(path) as store:
        assert await store.meta() == {"kept": "yes"}


async def test_a_disk_that_is_full_from_the_start_is_told_and_nothing_is_begun(small_disk: Path) -> None:
    fill(small_disk)
    with pytest.raises(StoreError, match=rf"the disk that holds {small_disk / 'run'} is full: make room"):
        await Store.open(small_disk / "run" / "results.sqlite")


def stored(folder: Path) -> set[str]:
    """The questions that have an answer in the store."""
    with closing(sqlite3.connect(f"file:{folder / 'results.sqlite'}?mode=ro", uri=True)) as database:
        return {text.lower() for (text,) in database.execute("SELECT output_text FROM answers")}
