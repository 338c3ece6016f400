"""An experiment: a dataset, a prompt and a model in; stored, scored and logged results out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from runner.checks import check
from runner.concurrency import Window
from runner.config import Resume, RunnerConfig, replicas
from runner.errors import (
    FINISHED,
    SOME_FAILED,
    STOPPED,
    ConfigError,
    Interrupted,
    StoreError,
)
from runner.metrics import Meter
from runner.outcomes import count
from runner.progress import Progress, open_progress
from runner.results import replace_file, result_rows, summarize, write_jsonl
from runner.run import GRACE_S, Run
from runner.stack import Stack, open_stack
from runner.store import Store
from runner.tracker import Ending, Tracker, open_tracker
from runner.transports import check_addresses
from runner.types import Client
from runner.workload import Workload

_REDRAW_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """How an experiment ended."""

    exit_code: int
    summary: Mapping[str, Any]  # the content of summary.json
    message: str | None = None  # why it stopped


async def run_experiment(config: RunnerConfig, folder: Path, *, settings: Mapping[str, Any] | None = None) -> Report:
    """Run ``config`` in ``folder``, or go on with the run that is there.

    What is settled is in ``folder/results.sqlite`` at any moment; ``results.jsonl`` and ``summary.json`` are written
    at the end, however it comes.

    Args:
        settings: The composed configuration as plain data, for the tracker, which removes secrets from it.

    Raises:
        ConfigError: The configuration or the dataset cannot be used. Nothing was sent.
        StoreError: The run's database cannot be opened.
    """
    check(config)
    workload = Workload(config)
    workload.check()
    window = Window(config.limits.concurrency)
    client = _open_client(config, window)
    meter = Meter()
    store = await Store.open(folder / "results.sqlite", on_commit=lambda outcomes: count(meter, outcomes))
    async with _closing(client, store):
        await _prepare(store, config, workload)
        run = Run(config, workload, client=client, store=store, meter=meter, window=window)
        settled = await run.settled()
        if run.total is None or settled < run.total:
            await check_addresses(replicas(config))
        tracker = open_tracker(
            config.tracker,
            folder=folder,
            name=config.name,
            run_id=f"{config.name}-{folder.name}",
            settings=settings or {},
        )
        async with _shown(run, config, tracker, settled):
            try:
                await run.until_done()
            except Exception:  # a bug; what was paid for is shown all the same
                await _conclude(run, store, folder)
                raise
        report = await _conclude(run, store, folder)
        samples = [row async for row in result_rows(store, limit=config.tracker.table_rows)] if report.summary else []
    await tracker.finish(
        Ending(
            summary=report.summary,
            samples=orjson.loads(orjson.dumps(samples)),
            artifacts=[folder / "results.jsonl", folder / "summary.json"],
            exit_code=report.exit_code,
        )
    )
    return report


def check_experiment(config: RunnerConfig) -> None:
    """See whether `run_experiment` can begin, without a folder, a connection or a request.

    Raises:
        ConfigError: It cannot.
    """
    check(config)
    Workload(config).check()
    _open_client(config, Window(config.limits.concurrency))


def _open_client(config: RunnerConfig, window: Window) -> Stack:
    return open_stack(
        replicas(config),
        limits=config.limits,
        retry=config.retry,
        routing=config.routing,
        simulator=config.simulator,
        window=window,
        timeout_s=config.request.get("timeout"),
    )


async def _prepare(store: Store, config: RunnerConfig, workload: Workload) -> None:
    """Check that the run may go on as ``resume`` says, and write down what it is."""
    meta = await store.meta()
    if config.resume is Resume.require and "scorers" not in meta:
        raise ConfigError(f"resume=require, but {store.path.parent} holds no earlier run: use resume=auto")
    if meta.get("samples", str(workload.samples)) != str(workload.samples):
        await store.truncate(0)  # positions mean other rows now; answers are found again by what they answer
    if meta.get("scorers", workload.scorers.fingerprint) != workload.scorers.fingerprint:
        await store.forget_scores()
    await store.put_meta({"samples": str(workload.samples), "scorers": workload.scorers.fingerprint})


@asynccontextmanager
async def _shown(run: Run, config: RunnerConfig, tracker: Tracker, settled: int) -> AsyncIterator[None]:
    """Keep progress and the tracker's time series up to date while the run is on."""
    progress = open_progress(config.name)
    if settled:
        progress.note(f"going on: {settled:,} rows have their answers")
    run.stop.listen(lambda: progress.note(_ending_note(run)))
    run.listen(progress.note)
    ticker = asyncio.create_task(_tick(run, progress, tracker, config.tracker.log_every_s))
    try:
        yield
    finally:
        ticker.cancel()
        await asyncio.wait([ticker])
        snapshot = run.snapshot()
        progress.update(snapshot)
        progress.close()
        tracker.log(snapshot.as_series())


async def _tick(run: Run, progress: Progress, tracker: Tracker, log_every_s: float) -> None:
    logged = time.monotonic()
    while True:
        await asyncio.sleep(_REDRAW_S)
        snapshot = run.snapshot()
        progress.update(snapshot)
        if time.monotonic() - logged >= log_every_s:
            logged = time.monotonic()
            tracker.log(snapshot.as_series())


def _ending_note(run: Run) -> str:
    if isinstance(run.stop.reason, Interrupted):
        return f"{run.stop.reason}: waiting {GRACE_S:g} s at most for what is in flight; again to end at once"
    return "stopping: waiting for what is in flight"


async def _conclude(run: Run, store: Store, folder: Path) -> Report:
    """Write the projections and say how it ended."""
    reason = run.stop.reason
    reused = run.snapshot().reused
    try:
        await store.flush()
        await write_jsonl(store, folder / "results.jsonl")
        summary = await summarize(store)
        summary |= {"reused": reused, "stopped": reason.reason if reason else None}
        if reason is not None and run.total is not None:
            summary["rows"] = run.total
        replace_file(folder / "summary.json", orjson.dumps(summary, option=orjson.OPT_INDENT_2))
    except (StoreError, OSError) as error:
        return Report(exit_code=STOPPED, summary={}, message=str(reason or error))
    if isinstance(reason, Interrupted):
        exit_code = 128 + reason.signum
    elif reason is not None:
        exit_code = STOPPED
    else:
        exit_code = SOME_FAILED if summary["failed"] else FINISHED
    message = str(reason) if reason else await _first_failure(store)
    return Report(exit_code=exit_code, summary=summary, message=message)


async def _first_failure(store: Store) -> str | None:
    """A failed row as an example, since a number alone tells nobody what to do."""
    async for row in result_rows(store, failed=True, limit=1):
        error = row["error"]
        return f"{error['type']}, for example in row {row['_index']}: {error['message']}"
    return None


@asynccontextmanager
async def _closing(client: Client, store: Store) -> AsyncIterator[None]:
    try:
        yield
    finally:
        await client.aclose()
        with suppress(StoreError):  # what was to be kept is flushed by now, or its failure is told
            await store.aclose()
