"""A sweep: the cells of one multirun, gathered through files in a folder that all of them see.

Cells run wherever the launcher puts them: in this process, in others, on other hosts. Each notes how it stands in the
sweep's folder, ``runs_dir/name/sweep-ID``, and the process that started them reads it there when they have ended.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import shutil
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from runner.errors import StoreError
from runner.results import replace_file

_SAME_CELLS = ("hydra.", "hydra/", "+scale=", "scale=", "budget.", "plan=", "pilot=", "-")
"""Beginnings of arguments that say where the cells run and how far, and not which there are."""

_TURN_S = 0.2
"""Seconds between two looks at whether it is one's turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One cell, as it notes itself."""

    number: int  # in the order of the multirun
    name: str  # its own overrides: what sets it apart
    folder: str  # of its run
    shard: int | None = None  # the part of the dataset that it goes through, where the sweep is over parts
    shards: int = 1  # how many parts there are
    whole: str = ""  # its own overrides but for the part: the cells that share them are one run
    exit_code: int | None = None  # None: at work, or killed
    message: str | None = None  # why it failed or stopped
    summary: Mapping[str, Any] = field(default_factory=dict)  # the content of summary.json


class Sweep:
    """The folder of a sweep.

    Args:
        folder: On a file system that the cells share.
        is_parallel: Whether its cells run in processes of their own, several at once.
    """

    def __init__(self, folder: Path, *, is_parallel: bool = False) -> None:
        self.folder = folder
        self.is_parallel = is_parallel

    def begin(self) -> None:
        """Forget how the cells ended last time. Their runs stay, and so does the knowledge of where they are."""
        self._stop.unlink(missing_ok=True)
        self._before.mkdir(parents=True, exist_ok=True)
        for note in self._cells.glob("*.json"):
            note.replace(self._before / note.name)

    def end(self) -> None:
        """All cells have had their turn: forget those of an earlier time that are none any more."""
        shutil.rmtree(self._before, ignore_errors=True)

    def note(self, cell: Cell) -> None:
        """Write down how a cell stands. Safe from any process; the last note counts."""
        self._cells.mkdir(parents=True, exist_ok=True)
        replace_file(self._cells / f"{cell.number}.json", json.dumps(asdict(cell)).encode())

    def cells(self) -> list[Cell]:
        """The cells in their order. One that had begun at an earlier time alone has no exit code.

        Raises:
            StoreError: A note is none of a cell.
        """
        cells = {
            cell.number: replace(cell, exit_code=None, message=_NOT_BEGUN, summary={}) for cell in _read(self._before)
        }
        cells |= {cell.number: cell for cell in _read(self._cells)}
        return [cells[number] for number in sorted(cells)]

    def stop(self, signum: int) -> None:
        """Have all cells end, wherever they are, as if they had got this signal; those that wait do not begin."""
        replace_file(self._stop, str(signum).encode())

    @property
    def stopped_by(self) -> int | None:
        """The signal that ended the sweep, if one did."""
        try:
            return int(self._stop.read_bytes())
        except FileNotFoundError:
            return None

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait until no other cell is in its turn. A turn ends with its process, however that ends."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".turn").open("a") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    await asyncio.sleep(_TURN_S)
            yield

    @property
    def wandb_is_away(self) -> Path:
        """A file that is there once a cell could not reach W&B, so that the others do not wait for it as well."""
        return self._cells / "wandb-is-away"

    @property
    def _cells(self) -> Path:
        return self.folder / "cells"

    @property
    def _stop(self) -> Path:
        return self.folder / "stop"

    @property
    def _before(self) -> Path:
        return self.folder / "cells-before"


_NOT_BEGUN = "not begun this time"


def _read(folder: Path) -> Iterator[Cell]:
    for path in folder.glob("*.json"):
        with suppress(FileNotFoundError):  # its cell, or the whole sweep, has just begun anew
            yield _cell(path)


def _cell(path: Path) -> Cell:
    try:
        cell = Cell(**json.loads(path.read_bytes()))
    except (ValueError, TypeError, RecursionError) as error:
        raise StoreError(f"{path} is no note of a sweep's cell ({error})") from None
    types = (
        *((cell.number, int), (cell.name, str), (cell.folder, str), (cell.summary, dict), (cell.message, str | None)),
        *((cell.shard, int | None), (cell.shards, int), (cell.whole, str)),
    )
    if not all(isinstance(value, kind) for value, kind in types):
        raise StoreError(f"{path} is no note of a sweep's cell")
    return cell


def cell_names(path: Path) -> dict[str, str]:
    """What the sweeps in a folder call its runs, by the name of their folder: the latest sweep first, in its order.

    Raises:
        StoreError: There is something else in the place of a sweep's notes.
    """
    sweeps = sorted(path.glob("sweep-*/cells"), key=lambda folder: folder.stat().st_mtime, reverse=True)
    names: dict[str, str] = {}
    for sweep in sweeps:
        for cell in Sweep(sweep.parent).cells():
            names.setdefault(Path(cell.folder).name, cell.name)
    return names


def place_of(names: Mapping[str, str], folder: Path) -> tuple[int, Path]:
    """Where a run's folder stands among others: as in the sweeps of `cell_names`, and after these if it is in none."""
    order = list(names)
    return order.index(folder.name) if folder.name in names else len(order), folder


def sweep_id(arguments: Sequence[str]) -> str:
    """Eight hex digits that name the sweep of a command line: the same for the same cells, wherever they run."""
    asked = sorted(argument for argument in arguments if not argument.startswith(_SAME_CELLS))
    return hashlib.sha256("\0".join(asked).encode("utf-8", "surrogateescape")).hexdigest()[:8]
