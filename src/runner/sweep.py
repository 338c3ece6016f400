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
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
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
    exit_code: int | None = None  # None: at work, or killed
    message: str | None = None  # why it failed or stopped
    summary: Mapping[str, Any] = field(default_factory=dict)  # the content of summary.json


class Sweep:
    """The folder of a sweep.

    Args:
        folder: On a file system that the cells share.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def forget(self) -> None:
        """Forget how the cells ended last time. Their runs stay."""
        shutil.rmtree(self._cells, ignore_errors=True)

    def note(self, cell: Cell) -> None:
        """Write down how a cell stands. Safe from any process; the last note counts."""
        self._cells.mkdir(parents=True, exist_ok=True)
        replace_file(self._cells / f"{cell.number}.json", json.dumps(asdict(cell)).encode())

    def cells(self) -> list[Cell]:
        """The cells that have begun, in their order.

        Raises:
            StoreError: A note is none of a cell.
        """
        return sorted(map(_read, self._cells.glob("*.json")), key=lambda cell: cell.number)

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


def _read(path: Path) -> Cell:
    try:
        cell = Cell(**json.loads(path.read_bytes()))
    except (ValueError, TypeError, RecursionError) as error:
        raise StoreError(f"{path} is no note of a sweep's cell ({error})") from None
    types = (cell.number, int), (cell.name, str), (cell.folder, str), (cell.summary, dict), (cell.message, str | None)
    if not all(isinstance(value, kind) for value, kind in types):
        raise StoreError(f"{path} is no note of a sweep's cell")
    return cell


def sweep_id(arguments: Sequence[str]) -> str:
    """Eight hex digits that name the sweep of a command line: the same for the same cells, wherever they run."""
    asked = sorted(argument for argument in arguments if not argument.startswith(_SAME_CELLS))
    return hashlib.sha256("\0".join(asked).encode("utf-8", "surrogateescape")).hexdigest()[:8]
