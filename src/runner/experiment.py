"""An experiment: a dataset, a prompt and a model in; stored, scored and logged results out."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from runner import figures
from runner.bucket import Bucket
from runner.budget import Budget, check_budget, price_hint, shown
from runner.checks import check, check_all, without_effect
from runner.concurrency import Window
from runner.config import RunnerConfig, replicas
from runner.database import RUN_DATABASE
from runner.earlier import sent_within
from runner.errors import (
    FINISHED,
    SOME_FAILED,
    STOPPED,
    BudgetExhausted,
    ConfigError,
    Interrupted,
    StoreError,
)
from runner.forecast import Forecast, forecast
from runner.limiter import limits_of
from runner.metrics import Meter
from runner.outcomes import count
from runner.progress import Progress, open_progress
from runner.results import replace_file, result_rows, summarize, write_jsonl
from runner.resume import resuming
from runner.run import GRACE_S, Run
from runner.signals import handled_signals
from runner.stack import Stack, stack_of
from runner.store import Store
from runner.sweep import Sweep
from runner.tracker import Ending, Tracker, tracking
from runner.transports import check_addresses
from runner.transports.prices import prices_for
from runner.tuner import Tuner
from runner.watchdog import Watchdog
from runner.workload import Workload

_REDRAW_S = 0.2
_WATCH_S = 1.0
_BEAT_S = 1.0

logger = logging.getLogger(__name__)


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
    if config.plan:
        raise ConfigError("plan=true belongs on the command line, where it keeps the run from beginning")
    check(config)
    workload = Workload(config)
    doubts = check_all(workload.check, lambda: check_budget(config))
    window = Window.of(config.limits)
    budget = Budget.of(config, folder)
    client = stack_of(config, window, tuner=Tuner.of(config.limits, window), budget=budget)
    meter = _meter(config, group_size=workload.task.group_size)
    async with (
        _opened(config, folder, client, meter, group_size=workload.task.group_size) as store,
        resuming(store, config, workload, folder=folder) as resumption,
    ):
        run = Run(
            config,
            workload,
            client=client,
            store=store,
            meter=meter,
            window=window,
            terms=resumption.terms,
            deployments=client.deployments if len(replicas(config)) > 1 else None,
            held_up_s=lambda: client.held_up_s,
        )
        settled = await run.settled()
        if run.total is None or settled < run.total:
            await check_addresses(replicas(config))
        judge_pilot = partial(_judge_pilot, run, store, config, budget, group_size=workload.task.group_size)
        notes = [*without_effect(config), *doubts, *resumption.notes, *_unpriced(config), *_pace(config)]
        if settled and not resumption.is_anew:
            failed = await run.left_alone()
            alone = f", and {failed:,} failures that are left alone" if failed else ""
            notes.insert(0, f"going on: {settled - failed:,} answers are there{alone}")
        async with tracking(config, folder, settings) as tracker:
            with handled_signals(run.on_signal):
                async with (
                    _beside(_stay_alive(store)),
                    _beside(_end_with_sweep(run, config)),
                    _shown(run, config, tracker, notes, is_resumed=settled > 0),
                ):
                    try:
                        async with budget.opened(store, end=run.stop) if budget else nullcontext():
                            await run.until_done(after_pilot=judge_pilot)
                    except Exception:  # a bug; what was paid for is shown all the same
                        await _conclude(run, store, config, folder)
                        raise
                report = await _conclude(run, store, config, folder)  # a signal finds what is written whole
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
    check_all(Workload(config).check, lambda: check_budget(config))
    stack_of(config, Window.of(config.limits), budget=Budget.of(config, Path()))


@asynccontextmanager
async def _shown(
    run: Run, config: RunnerConfig, tracker: Tracker, notes: Sequence[str], *, is_resumed: bool
) -> AsyncIterator[None]:
    """Keep progress and the tracker's time series up to date while the run is on."""
    progress = open_progress(config.name, is_resumed=is_resumed)
    for note in notes:
        progress.note(note)
    run.stop.listen(lambda: progress.note(_ending_note(run)))
    warnings = _Warnings(progress)
    logging.getLogger("runner").addHandler(warnings)
    ticker = asyncio.create_task(_tick(run, progress, tracker, config.tracker.log_every_s))
    try:
        yield
    finally:
        logging.getLogger("runner").removeHandler(warnings)
        ticker.cancel()
        await asyncio.wait([ticker])
        snapshot = run.snapshot()
        progress.update(snapshot)
        progress.close()
        tracker.log(snapshot.as_series())


@asynccontextmanager
async def _beside(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Have ``work`` go on while the block does."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def _stay_alive(store: Store) -> None:
    """Have the store know when the session was alive last: what a kill finds in flight was sent before."""
    with suppress(StoreError):  # what follows finds out as well
        while True:
            await asyncio.sleep(_BEAT_S)
            await store.note_alive()


async def _end_with_sweep(run: Run, config: RunnerConfig) -> None:
    """End the run when its sweep is ended, perhaps on another host."""
    if not config.sweep.folder:
        return
    sweep = Sweep(Path(config.sweep.folder))
    while (signum := sweep.stopped_by) is None:  # noqa: ASYNC110 (it is another process that says so)
        await asyncio.sleep(_WATCH_S)
    if run.stop.reason is None:
        run.interrupt(Interrupted(signum))


class _Warnings(logging.Handler):
    """Shows them (a long pause, shared limits out of reach) to the person who watches, beside the log."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(logging.WARNING)
        self._progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        self._progress.note(record.getMessage())


async def _tick(run: Run, progress: Progress, tracker: Tracker, log_every_s: float) -> None:
    logged = time.monotonic()
    watchdog = Watchdog()
    while True:
        await watchdog.rest(_REDRAW_S)
        snapshot = run.snapshot(loop_lag_s=watchdog.lag_s)
        progress.update(snapshot)
        for note in watchdog.notes(snapshot, run.in_flight()):
            logger.warning(note)
        if time.monotonic() - logged >= log_every_s:
            logged = time.monotonic()
            tracker.log(snapshot.as_series())


def _ending_note(run: Run) -> str:
    if isinstance(run.stop.reason, Interrupted):
        return f"{run.stop.reason}: waiting {GRACE_S:g} s at most for what is in flight; again to end at once"
    return "stopping: waiting for what is in flight"


def _unpriced(config: RunnerConfig) -> Iterator[str]:
    """Deployments whose cost nobody will know."""
    deployments = replicas(config)
    for label, price in prices_for(config).items():
        if price is None:
            where = f"deployments.{label if config.deployments else 'LABEL'}"
            yield f"no price is known for {deployments[label].model}, so its cost is not counted: {price_hint(where)}"


def _pace(config: RunnerConfig) -> Iterator[str]:
    """What a limit of requests lets out, as a short run is faster than it for its burst."""
    for limit in limits_of(config.limits):
        if limit.name == "rpm":
            bucket = Bucket(limit)
            burst, rate = math.floor(bucket.burst), figures.short(bucket.rate)
            yield f"limits.rpm={figures.plain(limit.amount)}: {burst} at once, then {rate} requests a second"


def _meter(config: RunnerConfig, *, group_size: int) -> Meter:
    """A meter that knows how fast the limits let it go on; it counts rows, of which ``group_size`` share a request."""
    rates = {limit.name: Bucket(limit).rate for limit in limits_of(config.limits)}
    return Meter(
        most_requests_per_s=rates.get("rpm", math.inf) * group_size, most_tokens_per_s=rates.get("tpm", math.inf)
    )


async def _judge_pilot(run: Run, store: Store, config: RunnerConfig, budget: Budget | None, *, group_size: int) -> None:
    """Say what the rest will take, and stop where the budget has no room for it."""
    await store.flush()
    rest = await _rest(run, store, config)
    if rest is None:
        logger.warning("the pilot is done; how many rows are left is not known")
        return
    logger.warning("the pilot is done: %s", rest)
    forecasts = {"usd": rest.usd, "tokens": rest.tokens}
    needed: dict[str, float] = {name: each.high for name, each in forecasts.items() if each is not None}
    needed["requests"] = math.ceil(rest.left.asked / group_size)
    for name, room in budget.left().items() if budget is not None else ():
        amount = needed.get(name, 0.0)
        if amount > room:
            said = f"the budget has room for {shown(name, room)} more, and the rest may take {shown(name, amount)}"
            run.stop(BudgetExhausted(said))


async def _rest(run: Run, store: Store, config: RunnerConfig) -> Forecast | None:
    """What is left to do and what it takes, where it is known."""
    left = await run.left()
    return None if left is None else await forecast(store, left, prices_for(config))


async def _conclude(run: Run, store: Store, config: RunnerConfig, folder: Path) -> Report:
    """Write the projections and say how it ended."""
    reason = run.stop.reason
    last = run.snapshot()
    try:
        await store.flush()
        await write_jsonl(result_rows(store), folder / "results.jsonl")
        summary = await summarize(store)
        summary |= {"stopped": reason.reason if reason else None, "why": str(reason) if reason else None}
        summary["concurrency"] = {"window": last.window, "why": last.window_why or None}
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
    if isinstance(reason, BudgetExhausted) and (rest := await _rest(run, store, config)) is not None:
        message = f"{reason}. {rest}"
    return Report(exit_code=exit_code, summary=summary, message=message)


async def _first_failure(store: Store) -> str | None:
    """A failed row as an example, since a number alone tells nobody what to do."""
    async for row in result_rows(store, failed=True, limit=1):
        error = row["error"]
        return f"{error['type']}, for example in row {row['_index']}: {error['message']}"
    return None


@asynccontextmanager
async def _opened(
    config: RunnerConfig, folder: Path, client: Stack, meter: Meter, *, group_size: int
) -> AsyncIterator[Store]:
    """The run's store, whose outcomes ``meter`` counts, with what it says was sent counted by the limits of ``client``.

    Closes both.
    """
    store = await Store.open(folder / RUN_DATABASE, on_commit=lambda outcomes: count(meter, outcomes))
    try:
        if client.memory_s:
            tokens = config.limits.default_output_tokens
            sent = await sent_within(store, client.memory_s, group_size=group_size, default_output_tokens=tokens)
            client.recall(sent)
        yield store
    finally:
        await client.aclose()
        with suppress(StoreError):  # what was to be kept is flushed by now, or its failure is told
            await store.aclose()
