"""Resume: how a run goes on with what its store holds, and where it finds answers that it need not ask for."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.claims import Elsewhere
from runner.config import Dedupe, Resume, RunnerConfig
from runner.database import RUN_DATABASE
from runner.errors import ConfigError
from runner.identity import answers_alike, output_limits
from runner.reuse import OtherLimits, OtherRuns, first_of, run_name
from runner.store import Store, Terms
from runner.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumption:
    """How a run goes on."""

    terms: Terms  # on which it takes up rows
    notes: Sequence[str]  # what its user should know
    is_anew: bool  # the answers that are there do not serve, being given under another limit on their length


@asynccontextmanager
async def resuming(
    store: Store, config: RunnerConfig, workload: Workload, *, folder: Path
) -> AsyncIterator[Resumption]:
    """Bring ``store`` in line with the configuration, write down what the run is, and look where answers may be.

    Args:
        folder: The run's, also where ``store`` is a copy.

    Raises:
        ConfigError: ``resume=require``, and there is no earlier run.
    """
    meta = await store.meta()
    if config.resume is Resume.require and "scorers" not in meta:
        raise ConfigError(f"resume=require, but {folder} holds no earlier run: use resume=auto")
    if config.resume is Resume.fresh:
        await store.start_over()
    dedupe = config.dedupe is Dedupe.always or (config.dedupe is Dedupe.auto and answers_alike(config))
    facts = {
        "samples": str(workload.samples),
        "scorers": workload.scorers.fingerprint,
        "dedupe": json.dumps(dedupe),
        "task": config.task.kind.value,
        "whole_rows": json.dumps(config.prompt is not None and config.task.image is None),  # are the metadata
    }
    before = {**facts, "dedupe": json.dumps(False), **meta}
    if any(before[name] != facts[name] for name in ("samples", "dedupe")):
        await store.truncate(0)  # the places of rows mean others now; answers are found again by what they answer
    if before["scorers"] != facts["scorers"]:
        await store.forget_scores()
    asked: dict[str, Any] = json.loads(meta.get("asks", "{}"))
    earlier = {asks: limits for asks, limits in asked.items() if asks != workload.asks}
    now = output_limits(config)
    unseen = {"rows": "", "inputs": ""}  # what the dataset holds now is known when all of it has been seen
    await store.put_meta({**facts, **unseen, "asks": json.dumps({**earlier, workload.asks: now})})

    notes: list[str] = []
    finders: list[Elsewhere] = []
    unfit = 0  # answers, given under another limit on their length
    if earlier and workload.asks not in asked and not config.retry_truncated:
        [unfit] = [row["n"] async for row in store.query("SELECT count(*) AS n FROM answers")]
    async with AsyncExitStack() as stack:
        if config.retry_truncated:
            finders.append(OtherLimits(store, workload, earlier, now, name=run_name(folder)).find)
        elif unfit:
            notes.append(_changed_limits(list(earlier.values())[-1], now, unfit))
        if config.reuse:
            place = Path(config.runs_dir)
            others = await stack.enter_async_context(
                OtherRuns.open(place, own=folder / RUN_DATABASE, asks=workload.asks)
            )
            finders.append(others.find)
            notes += others.notes
        terms = Terms(
            retry_failed=config.retry_failed,
            scored=bool(workload.scorers),
            dedupe=dedupe,
            cost_bound=workload.cost_bound,
            elsewhere=first_of(finders) if finders else None,
        )
        yield Resumption(terms=terms, notes=notes, is_anew=unfit > 0)


def _changed_limits(before: Mapping[str, Any], now: Mapping[str, Any], answers: int) -> str:
    return (
        f"{_shown(now)} instead of {_shown(before)}: the {answers:,} answers that are there do not serve, and every row"
        " is asked and paid for anew. With retry_truncated=true all serve that were not cut off"
    )


def _shown(limits: Mapping[str, Any]) -> str:
    return " ".join(f"request.{key}={value}" for key, value in limits.items()) or "no limit on an answer's length"
