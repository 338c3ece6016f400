"""Shards: the parts of one dataset that cells of a sweep go through, read together as the one run that they are.

    for shards in find_shards(sweep):
        summary = await merge(shards)

Each shard has a folder and a store of its own. What is merged is made from the stores, at any time: while shards run,
after some have died, and once all have ended.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from runner.database import RUN_DATABASE
from runner.errors import FINISHED, SOME_FAILED, Interrupted
from runner.results import replace_file, result_rows, summarize, write_jsonl
from runner.store import Store
from runner.sweep import Cell, Sweep


@dataclass(frozen=True, slots=True, kw_only=True)
class Shards:
    """Cells that differ in nothing but their part of the dataset."""

    name: str  # what sets them apart from the other cells of their sweep; empty where they are all of it
    folder: Path  # where what is merged goes
    count: int  # parts that the dataset was divided into
    cells: Sequence[Cell]  # in the order of their parts

    @property
    def stores(self) -> list[Path]:
        """The databases that there are."""
        paths = (Path(cell.folder, RUN_DATABASE) for cell in self.cells)
        return [path for path in paths if path.is_file()]

    @property
    def unfinished(self) -> list[int]:
        """The parts that are not all settled: at work, stopped, killed, or of no cell."""
        finished = {cell.shard for cell in self.cells if cell.exit_code in (FINISHED, SOME_FAILED)}
        return [part for part in range(self.count) if part not in finished]


def find_shards(sweep: Sweep) -> list[Shards]:
    """The runs whose parts are cells of ``sweep``. Where there is one, what is merged goes into the sweep's folder."""
    runs: dict[tuple[str, int], dict[int, Cell]] = {}
    for cell in sweep.cells():
        if cell.shard is not None:
            runs.setdefault((cell.whole, cell.shards), {})[cell.shard] = cell
    return [
        Shards(
            name=name,
            folder=sweep.folder if len(runs) == 1 else sweep.folder / f"merged-{number}",
            count=count,
            cells=[cells[part] for part in sorted(cells)],
        )
        for number, ((name, count), cells) in enumerate(runs.items())
    ]


async def merge(shards: Shards) -> dict[str, Any]:
    """Write ``results.jsonl`` and ``summary.json`` of all shards together, and return the summary.

    Memory does not grow with the rows. Percentiles are those of all rows, and not means of the shards' own.

    Raises:
        StoreError: A shard's database cannot be read.
        OSError: The folder cannot be written.
    """
    shards.folder.mkdir(parents=True, exist_ok=True)
    async with opened(shards.stores) as stores:
        await write_jsonl(result_rows(*stores), shards.folder / "results.jsonl")
        summary = await summarize_shards(shards, stores)
    replace_file(shards.folder / "summary.json", orjson.dumps(summary, option=orjson.OPT_INDENT_2))
    return summary


async def summarize_shards(shards: Shards, stores: Sequence[Store]) -> dict[str, Any]:
    """The summary of all shards as of one run, and which of them are ``unfinished``."""
    summary = await summarize(*stores)
    known = [cell.summary for cell in shards.cells if cell.summary]
    if len(known) == shards.count:  # a shard that stopped has not laid down all of its rows
        summary["rows"] = sum(each["rows"] for each in known)
    reasons = [each["stopped"] for each in known if each.get("stopped")]
    return summary | {
        "reused": sum(each.get("reused", 0) for each in known),
        "stopped": reasons[0] if reasons else Interrupted.reason if shards.unfinished else None,
        "why": next((each["why"] for each in known if each.get("why")), None),
        "shards": {"count": shards.count, "unfinished": shards.unfinished},
    }


@asynccontextmanager
async def opened(paths: Sequence[Path]) -> AsyncIterator[list[Store]]:
    """The stores at ``paths``, to be read.

    Raises:
        StoreError: One of them cannot be.
    """
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(await Store.open_readonly(path)) for path in paths]
