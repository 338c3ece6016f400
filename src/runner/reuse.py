"""Reuse: answers that are there already, in other runs or under another limit on their length: they cost nothing."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from runner.claims import Elsewhere
from runner.database import RUN_DATABASE
from runner.errors import StoreError
from runner.store import Outcome, Store
from runner.task import Item
from runner.workload import Workload

_MOST_RUNS = 64
"""Runs that are looked into at most, the latest ones."""

PATIENCE_S = 0.2
"""How long to wait for a run that another program has to itself."""


class OtherRuns:
    """Answers of other runs to the very same request: endpoint, model, input, parameters, schema and sample.

    Args:
        stores: Runs by name, the latest first.
        notes: Why others cannot be looked into.
    """

    def __init__(self, stores: Mapping[str, Store], notes: Sequence[str] = ()) -> None:
        self.notes = list(notes)
        self._stores = dict(stores)

    @classmethod
    @asynccontextmanager
    async def open(cls, runs_dir: Path, *, own: Path, asks: str) -> AsyncIterator[OtherRuns]:
        """Open the runs below ``runs_dir`` that ever asked with what ``asks`` stands for, save the one at ``own``.

        Those that are in use, damaged or foreign are left out with a note.
        """
        async with AsyncExitStack() as stack:
            stores: dict[str, Store] = {}
            notes: list[str] = []
            for path in latest_runs(runs_dir, "*/*", own=own):
                try:
                    store = await Store.open_readonly(path, patience_s=PATIENCE_S)
                    stack.push_async_callback(store.aclose)
                    if asks in json.loads((await store.meta()).get("asks", "{}")):
                        stores[run_name(path.parent)] = store
                except (StoreError, ValueError) as error:
                    notes.append(f"nothing is taken over from there: {error}")
                if len(stores) == _MOST_RUNS:
                    break
            yield cls(stores, notes)

    async def find(self, asked: Sequence[Item]) -> list[Outcome | None]:
        """An answer to each of ``asked``, or None. None is handed out twice."""
        found: list[Outcome | None] = [None] * len(asked)
        for name, store in list(self._stores.items()):
            missing = [n for n, answer in enumerate(found) if answer is None]
            try:
                answers = await store.take([asked[n].content for n in missing])
            except StoreError as error:
                self.notes.append(f"nothing more is taken over from there: {error}")
                del self._stores[name]
                continue
            for n, answer in zip(missing, answers, strict=True):
                found[n] = None if answer is None else _taken_over(answer, name)
        return found


def latest_runs(folder: Path, runs: str, *, own: Path) -> list[Path]:
    """The databases of the ``runs`` (a pattern) in ``folder`` save ``own``, those that were written last first."""
    found: list[tuple[float, Path]] = []
    for path in folder.glob(f"{runs}/{RUN_DATABASE}"):
        with suppress(OSError):
            if not (own.exists() and path.samefile(own)):
                found.append((path.stat().st_mtime, path))
    return [path for _, path in sorted(found, reverse=True)]


class OtherLimits:
    """Answers that this run got under other limits on their length, and would get again under its own.

    An answer that came to its own end is the same under every limit that leaves it room. One that was cut off is not.

    Args:
        limits: What was asked under, by the hash that stands for it; the latest last.
        now: The limits that hold now.
        name: What the run is called.
    """

    def __init__(
        self,
        store: Store,
        workload: Workload,
        limits: Mapping[str, Mapping[str, Any]],
        now: Mapping[str, Any],
        *,
        name: str,
    ) -> None:
        self._name = name
        self._store = store
        self._workload = workload
        self._limit = _most(now)
        hashers = [(workload.hasher(each), _most(each), asks) for asks, each in reversed(list(limits.items()))]
        self._others = [(hasher, limit) for hasher, limit, asks in hashers if hasher.common == asks]

    async def find(self, asked: Sequence[Item]) -> list[Outcome | None]:
        """An answer to each of ``asked``, or None. None is handed out twice."""
        found: list[Outcome | None] = [None] * len(asked)
        for hasher, limit in self._others:
            missing = [n for n, answer in enumerate(found) if answer is None]
            answers = await self._store.take([self._workload.content(asked[n], hasher) for n in missing])
            for n, answer in zip(missing, answers, strict=True):
                if answer is not None and not answer.is_truncated and self._has_room(answer, limit):
                    found[n] = _taken_over(answer, self._name)
        return found

    def _has_room(self, answer: Outcome, limit: int | None) -> bool:
        if self._limit is None or (limit is not None and limit <= self._limit):
            return True
        return answer.completion_tokens is not None and answer.completion_tokens <= self._limit


def run_name(folder: Path) -> str:
    """What a run is called among those of a project: its name and its id."""
    return "/".join(folder.absolute().parts[-2:])


def first_of(finders: Sequence[Elsewhere]) -> Elsewhere:
    """Looks into one place after the other."""

    async def find(asked: Sequence[Any]) -> list[Outcome | None]:
        found: list[Outcome | None] = [None] * len(asked)
        for finder in finders:
            missing = [n for n, answer in enumerate(found) if answer is None]
            answers = await finder([asked[n] for n in missing]) if missing else ()
            for n, answer in zip(missing, answers, strict=True):
                found[n] = answer
        return found

    return find


def _taken_over(answer: Outcome, source: str) -> Outcome:
    """``answer`` as one of this run, which neither asked nor paid."""
    return answer._replace(
        settled_at=time.time(),
        retries=0,
        cost_usd=0.0,
        cost_bound_usd=None,
        reused_from=answer.reused_from or source,
    )


def _most(limits: Mapping[str, Any]) -> int | None:
    return max((int(value) for value in limits.values()), default=None)
