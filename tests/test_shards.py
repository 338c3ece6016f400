from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
from collections.abc import AsyncIterator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from harness import Asked, Command, Experiment, Provider, numbered, read_rows, read_summary, refusal, serving, shout
from runner.config import DatasetConfig, DatasetKind, DeploymentConfig, RetryConfig, ScorerConfig, ShardConfig
from runner.export import main as export
from runner.results import summarize
from runner.shards import Shards, find_shards, merge, opened
from runner.store import Store
from runner.sweep import Cell, Sweep

COUNT = 3


class Sharded:
    """A dataset that goes to one run, and to the shards of a sweep."""

    def __init__(self, folder: Path, provider: Provider) -> None:
        self.sweep = Sweep(folder / "runs" / "sweep-1")
        self._folder = folder
        self._settings: dict[str, Any] = {
            "deployments": {"a": DeploymentConfig(model="openai_like/m", api_base=provider.url)},
            "scorers": {"capitals": ScorerConfig(kind="regex", pattern="^ROW [0-4]")},
            "retry": RetryConfig(max_retries=0),
        }

    async def whole(self, rows: Sequence[dict[str, Any]], **changes: Any) -> Path:
        return await self._run("whole", rows, ShardConfig(), **changes)

    async def shard(self, index: int, rows: Sequence[dict[str, Any]], *, whole: str = "", **changes: Any) -> Cell:
        """Run one and note it in the sweep."""
        folder = await self._run(f"{whole}shard-{index}", rows, ShardConfig(index=index, count=COUNT), **changes)
        number = len(self.sweep.cells())
        cell = Cell(
            number=number,
            name=f"{whole} dataset.shard.index={index}".strip(),
            folder=str(folder),
            shard=index,
            shards=COUNT,
            whole=whole,
            exit_code=0,
            summary=read_summary(folder),
        )
        self.sweep.note(cell)
        return cell

    async def _run(self, name: str, rows: Sequence[dict[str, Any]], shard: ShardConfig, **changes: Any) -> Path:
        folder = self._folder / "runs" / name
        folder.mkdir(parents=True, exist_ok=True)
        experiment = Experiment(folder, **self._settings)
        dataset = DatasetConfig(kind=DatasetKind.jsonl, path=str(folder / "rows.jsonl"), shard=shard)
        await experiment(list(rows), dataset=dataset, **changes)
        return experiment.folder


def fussy(asked: Asked) -> Any:
    return refusal(400, "bad") if asked.text.endswith("3") else shout(asked)


@pytest.fixture
async def sharded(tmp_path: Path) -> AsyncIterator[Sharded]:
    async with serving(fussy) as provider:
        yield Sharded(tmp_path, provider)


def found(sharded: Sharded) -> Shards:
    [shards] = find_shards(sharded.sweep)
    return shards


def comparable(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without what differs from one time to the next."""
    times = ("queue_wait_s", "service_time_s", "end_to_end_s", "ttft_s", "retries")
    return [{**row, "request_id": None, "metrics": {**row["metrics"], **dict.fromkeys(times)}} for row in rows]


# Merging


async def test_shards_come_to_the_same_as_the_whole(sharded: Sharded) -> None:
    rows = numbered(20)
    whole = await sharded.whole(rows)
    for index in range(COUNT):
        await sharded.shard(index, rows)

    summary = await merge(found(sharded))

    assert comparable(read_rows(sharded.sweep.folder)) == comparable(read_rows(whole))
    assert read_summary(sharded.sweep.folder) == summary
    alone = read_summary(whole)
    for key in ("rows", "succeeded", "failed", "tokens", "cost_usd", "errors", "scores", "stopped", "reused"):
        assert summary[key] == alone[key], key
    assert summary["shards"] == {"count": COUNT, "unfinished": []}


async def test_a_shard_that_is_run_again_has_all_its_rows_where_they_were(sharded: Sharded) -> None:
    scored = "SELECT position, asked_at FROM rows WHERE scores IS NOT NULL ORDER BY position"
    seen = []
    for _ in range(2):
        cell = await sharded.shard(1, numbered(20), samples=2)
        async with await Store.open_readonly(Path(cell.folder) / "results.sqlite") as store:
            seen.append([tuple(row) async for row in store.query(scored)])
    assert seen[0] == seen[1]
    assert len(seen[0]) == 12


async def test_repeats_of_a_row_stay_together(sharded: Sharded) -> None:
    rows = numbered(5)
    whole = await sharded.whole(rows, samples=2)
    for index in range(COUNT):
        await sharded.shard(index, rows, samples=2)
    await merge(found(sharded))

    merged = read_rows(sharded.sweep.folder)
    assert [(row["_index"], row["_sample"]) for row in merged] == [(n // 2, n % 2) for n in range(10)]
    assert comparable(merged) == comparable(read_rows(whole))


async def test_percentiles_are_those_of_all_rows(sharded: Sharded) -> None:
    rows = numbered(20)
    for index in range(COUNT):
        await sharded.shard(index, rows)

    summary = await merge(found(sharded))

    times = sorted(row["metrics"]["service_time_s"] for row in read_rows(sharded.sweep.folder) if not row["error"])
    places = {f"p{percent}": round((len(times) - 1) * percent / 100) for percent in (50, 95, 99)}
    assert summary["latency_s"] == {name: times[place] for name, place in places.items()}
    assert summary["deployments"]["a"]["latency_s"] == {name: times[places[name]] for name in ("p50", "p95")}


async def test_time_that_shards_spend_side_by_side_counts_once(sharded: Sharded) -> None:
    rows = numbered(9)
    await asyncio.gather(*(sharded.shard(index, rows) for index in range(COUNT)))
    shards = found(sharded)

    async with opened(shards.stores) as stores:
        alone = [(await summarize(store))["elapsed_s"] for store in stores]
        together = (await summarize(*stores))["elapsed_s"]
    assert max(alone) <= together < sum(alone)


async def test_a_shard_that_is_not_there_is_named(sharded: Sharded) -> None:
    rows = numbered(9)
    await sharded.shard(0, rows)
    killed = await sharded.shard(2, rows)
    sharded.sweep.note(Cell(**{**_plain(killed), "exit_code": None, "summary": {}}))

    summary = await merge(found(sharded))

    assert summary["shards"] == {"count": COUNT, "unfinished": [1, 2]}
    assert summary["stopped"] == "interrupted"
    assert [row["_index"] for row in read_rows(sharded.sweep.folder)] == [0, 2, 3, 5, 6, 8]


async def test_runs_that_are_sharded_alike_are_merged_each_by_itself(sharded: Sharded) -> None:
    rows = numbered(6)
    for whole in ("model=a", "model=b"):
        for index in range(COUNT):
            await sharded.shard(index, rows, whole=whole)

    runs = find_shards(sharded.sweep)

    for shards in runs:
        assert (await merge(shards))["succeeded"] == 5
    assert [shards.name for shards in runs] == ["model=a", "model=b"]
    assert len({shards.folder for shards in runs}) == 2


async def test_cells_that_are_no_shards_are_not_merged(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    sweep.note(Cell(number=0, name="model=a", folder=str(tmp_path / "a"), exit_code=0))

    assert find_shards(sweep) == []


# Elsewhere


@pytest.mark.parametrize("form", ["jsonl", "csv"])
async def test_a_sweep_of_shards_is_exported_as_one_run(sharded: Sharded, tmp_path: Path, form: str) -> None:
    rows = numbered(12)
    whole = await sharded.whole(rows)
    for index in reversed(range(COUNT)):
        await sharded.shard(index, rows)

    for source, name in ((sharded.sweep.folder, "parts"), (whole, "whole")):
        assert await asyncio.to_thread(export, [str(source), "-o", str(tmp_path / f"{name}.{form}")]) == 0

    lines = [(tmp_path / f"{name}.{form}").read_text(encoding="utf-8").splitlines() for name in ("parts", "whole")]
    assert len(lines[0]) == len(lines[1])
    if form == "jsonl":
        parts, alone = ([json.loads(line) for line in each] for each in lines)
        assert comparable(parts) == comparable(alone)


# The command


def settings(name: str) -> list[str]:
    return [f"name={name}", "dataset=jsonl", "dataset.path=rows.jsonl", "tracker=none", "simulator.latency_s=0.1"]


def shards(count: int = COUNT) -> list[str]:
    return ["-m", f"dataset.shard.index=range(0,{count})", f"dataset.shard.count={count}"]


def sweep_of(command: Command, name: str) -> Sweep:
    [folder] = command.folder.glob(f"runs/{name}/sweep-*")
    return Sweep(folder)


async def whole_rows(command: Command) -> list[dict[str, Any]]:
    done = await command(*settings("whole"))
    assert done.exit_code == 0, done.err
    [folder] = [run for run in command.runs() if run.parent.name == "whole"]
    return comparable(read_rows(folder))


async def at_work(command: Command, name: str, answers: int) -> tuple[Cell, int]:
    """A cell that has so many answers and is not done, and the process it is in."""
    while True:
        await asyncio.sleep(0.05)
        for folder in command.folder.glob(f"runs/{name}/sweep-*"):
            for cell in Sweep(folder).cells():
                path = Path(cell.folder, "results.sqlite")
                if cell.exit_code is not None or not path.is_file():
                    continue
                try:
                    with closing(sqlite3.connect(path)) as database:
                        [(count,)] = database.execute("SELECT count(*) FROM answers")
                except sqlite3.OperationalError:
                    continue
                if count >= answers:
                    return cell, int(Path(cell.folder, ".lock").read_text().removeprefix("pid "))


async def test_joblib_goes_on_with_a_shard_that_was_killed(command: Command) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="pip install -e '.[joblib]'")
    command.write_rows("rows.jsonl", numbered(60))
    go = [*shards(), "+scale=joblib", *settings("parts"), "hydra.launcher.n_jobs=2", "limits.concurrency=2"]

    async with command.running(*go) as process:
        _, pid = await at_work(command, "parts", answers=3)
        os.kill(pid, signal.SIGKILL)
        _, err = await process.communicate()
    assert process.returncode == 1
    assert b"the same command goes on" in err
    assert b"Traceback" not in err
    sweep = sweep_of(command, "parts")
    assert 0 < len(read_rows(sweep.folder)) < 60

    again = await command(*go)
    assert again.exit_code == 0, again.err
    assert comparable(read_rows(sweep.folder)) == await whole_rows(command)
    assert read_summary(sweep.folder)["reused"] >= 3


async def test_submitit_requeues_a_shard_that_is_preempted(command: Command) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="pip install -e '.[slurm]'")
    command.write_rows("rows.jsonl", numbered(60))
    go = [*shards(2), "hydra/launcher=submitit_local", *settings("parts"), "limits.concurrency=2"]

    async with command.running(*go) as process:
        cell, pid = await at_work(command, "parts", answers=3)
        os.kill(pid, signal.SIGTERM)  # Slurm sends it along; it is not meant
        os.kill(pid, signal.SIGUSR2)
        _, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    sweep = sweep_of(command, "parts")
    assert comparable(read_rows(sweep.folder)) == await whole_rows(command)
    summary = sweep.cells()[cell.number].summary
    assert summary["reused"] >= 3
    assert summary["attempts_of_unknown_cost"] == 0  # what was on its way was waited for


async def test_an_interrupt_ends_all_shards_as_it_ends_a_run(command: Command) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="pip install -e '.[joblib]'")
    command.write_rows("rows.jsonl", numbered(60))
    go = [*shards(), "+scale=joblib", *settings("parts"), "hydra.launcher.n_jobs=2", "limits.concurrency=1"]

    async with command.running(*go) as process:
        await at_work(command, "parts", answers=2)
        process.send_signal(signal.SIGTERM)
        await process.communicate()
    assert process.returncode == 143
    summary = read_summary(sweep_of(command, "parts").folder)
    assert summary["stopped"] == "interrupted"
    assert summary["attempts_of_unknown_cost"] == 0
    assert 2 <= summary["succeeded"] < 60


async def test_ray_comes_to_the_same(command: Command) -> None:
    pytest.importorskip("ray", reason="pip install -e '.[ray]'")
    command.write_rows("rows.jsonl", numbered(60))

    done = await command(*shards(2), "+scale=ray", *settings("parts"), RAY_USAGE_STATS_ENABLED="0")

    assert done.exit_code == 0, done.err
    assert comparable(read_rows(sweep_of(command, "parts").folder)) == await whole_rows(command)


async def test_shards_share_limits_by_default_and_ask_for_redis_where_they_must(command: Command) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="pip install -e '.[slurm]'")
    command.write_rows("rows.jsonl", numbered(4))
    go = [*shards(2), *settings("parts"), "limits.rpm=6000"]

    alone = await command(*go, "+scale=slurm")
    assert alone.exit_code == 2
    assert alone.err.count("limits.redis_url is not set") == 1
    assert command.runs() == []


def _plain(cell: Cell) -> dict[str, Any]:
    return asdict(cell)
