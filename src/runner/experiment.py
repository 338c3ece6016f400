"""An experiment: a dataset, a prompt and a model in; stored, scored and logged results out."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import orjson

from runner.batch import Stop, run_batch
from runner.checks import check
from runner.concurrency import SoftStart, Window
from runner.config import DeploymentConfig, Resume, RunnerConfig, replicas
from runner.errors import (
    FINISHED,
    SOME_FAILED,
    STOPPED,
    AuthenticationError,
    ConfigError,
    ConnectError,
    DatasetError,
    InsufficientQuotaError,
    Interrupted,
    ItemError,
    NotFoundError,
    PermissionDeniedError,
    RequestError,
    RowError,
    StoreError,
    SystemicError,
)
from runner.identity import dump_text
from runner.metrics import Meter, Snapshot
from runner.outcomes import count, failure, success
from runner.progress import Progress, open_progress
from runner.results import replace_file, result_rows, summarize, write_jsonl
from runner.retry import failed_attempt
from runner.signals import handled_signals
from runner.stack import open_stack
from runner.store import Claim, Store
from runner.tracker import Ending, Tracker, open_tracker
from runner.transports import DIRECT, check_addresses
from runner.types import Client, Response, Trace
from runner.workload import ClaimSize, Item, Workload

GRACE_S = 10.0
"""How long an interrupted run waits for the answers that are on their way, since they are paid for."""

_ECHO_S = 0.3
"""A second signal that follows so closely is the first one, forwarded by a wrapper such as ``timeout``."""

_REDRAW_S = 0.2
_SUSPECTS = 4
"""Rows that must fail the same systemic way, with no success between, before the run gives up."""

_UNREACHED = 8
"""Rows that must find nobody at the address, with no success between, before the run gives up."""

Claimed: TypeAlias = tuple[Item, int]
"""An item and its occurrence."""


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


class Run:
    """One invocation of an experiment: takes up what has no answer yet, asks it, saves what comes of it."""

    def __init__(
        self, config: RunnerConfig, workload: Workload, *, client: Client, store: Store, meter: Meter, window: Window
    ) -> None:
        self.stop = Stop()
        self._config = config
        self._workload = workload
        self._client = client
        self._store = store
        self._meter = meter
        self._window = window
        self._soft_start = SoftStart(window)
        self._in_flight: dict[tuple[bytes, int], tuple[asyncio.Task[None], Trace]] = {}
        self._suspects: list[tuple[Claimed, Trace, RequestError]] = []
        self._any_answer = False
        self._interrupted_at: float | None = None
        self.total = workload.count()

    async def settled(self) -> int:
        """How many rows the store has that need not be asked again, by the dataset as it was last time."""
        [settled] = [row["n"] async for row in self._store.query(_SETTLED, (not self._config.retry_failed,))]
        return int(settled)

    async def until_done(self) -> None:
        """Ask until there is nothing left, or `stop` is called; SIGINT and SIGTERM call it."""
        batch = asyncio.ensure_future(run_batch(self._claim(), self._ask, window=self._window, stop=self.stop))
        with handled_signals(lambda signum: self._interrupt(signum, batch)):
            try:
                await batch
            except asyncio.CancelledError:
                if self._interrupted_at is None or _is_cancelled():
                    raise
            except (StoreError, DatasetError) as error:
                self.stop(SystemicError(str(error)))
            finally:
                self._soft_start.close()
                await self._keep_ledger()

    def snapshot(self) -> Snapshot:
        return self._meter.snapshot(total=self.total, in_flight=self._window.active, window=self._window.limit)

    # Taking up

    async def _claim(self) -> AsyncIterator[Sequence[Claimed]]:
        """Go through the dataset in chunks; hand on what has no answer, score what has an unscored one."""
        items = self._workload.items()
        size = ClaimSize(self._config.limits.concurrency)
        length = 0
        while chunk := list(islice(items, size.next())):
            length = chunk[-1].position + 1
            claims = [Claim(position=item.position, content=item.content, metadata=item.metadata) for item in chunk]
            known = await self._store.claim(
                claims, retry_failed=self._config.retry_failed, scored=bool(self._workload.scorers)
            )
            todo: list[Claimed] = []
            scores: list[tuple[int, str]] = []
            for item, fact in zip(chunk, known, strict=True):
                if not fact.answered:
                    todo.append((item, fact.occurrence))
                elif fact.unscored_text is not None:
                    scores.append((item.position, self._score(item, fact.unscored_text)))
            if scores:
                await self._store.put_scores(scores)
            self._meter.reused(len(chunk) - len(todo))
            yield todo
        await self._store.truncate(length)

    # Asking

    async def _ask(self, claimed: Claimed) -> None:
        item, occurrence = claimed
        key = (item.content, occurrence)
        try:
            request = self._workload.request(item, lambda attempt: self._store.note_attempt(key, attempt))
        except RowError as error:
            await self._store.save(item.position, failure(key, Trace(), error))
            return
        task = asyncio.current_task()
        assert task is not None
        self._in_flight[key] = task, request.trace  # a request that is cancelled stays in it
        try:
            response = await self._client.send(request)
        except RequestError as error:
            del self._in_flight[key]
            await self._failed(claimed, request.trace, error)
        except ItemError as error:
            del self._in_flight[key]
            await self._store.save(item.position, failure(key, request.trace, error))
        else:
            del self._in_flight[key]
            await self._answered(claimed, request.trace, response)

    async def _answered(self, claimed: Claimed, trace: Trace, response: Response) -> None:
        item, occurrence = claimed
        self._any_answer = True
        self._soft_start.open()
        if self._suspects:
            await self._clear_suspects()
        outcome = success((item.content, occurrence), trace, response)
        scores = self._score(item, outcome.output_text or "") if self._workload.scorers else None
        await self._store.save(item.position, outcome, scores)

    async def _failed(self, claimed: Claimed, trace: Trace, error: RequestError) -> None:
        """Save the failure, unless it is one that every row will meet: then the row is not to blame."""
        patience = _UNREACHED if isinstance(error, ConnectError) else _SUSPECTS if error.systemic else None
        if patience is None:
            item, occurrence = claimed
            await self._store.save(item.position, failure((item.content, occurrence), trace, error))
            return
        self._suspects.append((claimed, trace, error))
        if len(self._suspects) >= patience and self.stop.reason is None:
            self._give_up(trace, error)

    def _give_up(self, trace: Trace, error: RequestError) -> None:
        way_out = _way_out(error, replicas(self._config).get(trace.deployment))
        self.stop(
            SystemicError(f"{type(error).__name__} on one row after the other: {str(error).rstrip('.')}. {way_out}.")
        )

    async def _clear_suspects(self) -> None:
        """Rows are answered: what looked systemic was the suspects' own failure."""
        suspects, self._suspects = self._suspects, []
        for (item, occurrence), trace, error in suspects:
            await self._store.save(item.position, failure((item.content, occurrence), trace, error))

    async def _keep_ledger(self) -> None:
        """Enter what ended without an outcome: cancelled requests, and failures that were not the row's."""
        if self._suspects and self.stop.reason is None and not self._any_answer:
            self._give_up(*self._suspects[0][1:])
        with suppress(StoreError):
            if self.stop.reason is None:
                await self._clear_suspects()
            await self._store.flush()
            await self._store.note_lost(key for key, (_, trace) in self._in_flight.items() if trace.on_the_wire)
            for (item, occurrence), trace, error in self._suspects:
                await self._store.note_attempt((item.content, occurrence), failed_attempt(trace, error))

    def _score(self, item: Item, output_text: str) -> str:
        scores = self._workload.scorers(output_text, item.fields)
        self._meter.scored(scores)
        return dump_text(scores)

    # Ending early

    def _interrupt(self, signum: int, batch: asyncio.Future[None]) -> None:
        """Let what is on the wire come in; at a second signal end the process, as what is stored is safe."""
        loop = asyncio.get_running_loop()
        if self._interrupted_at is None:
            self._interrupted_at = loop.time()
            self.stop(Interrupted(signum))
            for task, trace in self._in_flight.values():
                if not trace.on_the_wire:
                    task.cancel()
            loop.call_later(GRACE_S, batch.cancel)
        elif loop.time() - self._interrupted_at > _ECHO_S:
            print("ended at once: what is in results.sqlite is kept, and the same command goes on", file=sys.stderr)
            os._exit(128 + signum)


_SETTLED = """
    SELECT count(*) AS n
    FROM rows
    JOIN answers ON answers.content = rows.content AND answers.occurrence = rows.occurrence
    WHERE answers.error_type IS NULL OR ?
"""


def _open_client(config: RunnerConfig, window: Window) -> Client:
    return open_stack(
        replicas(config),
        limits=config.limits,
        retry=config.retry,
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


def _way_out(error: RequestError, deployment: DeploymentConfig | None) -> str:
    """What to do about an error that every row meets."""
    match error:
        case AuthenticationError() | PermissionDeniedError() if deployment is not None:
            provider = DIRECT.get(deployment.model.partition("/")[0])
            variable = deployment.api_key_env or (provider.key_env if provider else "the provider's variable")
            return f"Check the key in {variable}"
        case NotFoundError() if deployment is not None:
            base = deployment.api_base
            hint = "" if base is None or base.rstrip("/").endswith("/v1") else f"; perhaps {base.rstrip('/')}/v1"
            return f"Check model={deployment.model} and api_base{hint}"
        case InsufficientQuotaError():
            return "Check the account's balance and limits"
    return "Check the server"


@asynccontextmanager
async def _shown(run: Run, config: RunnerConfig, tracker: Tracker, settled: int) -> AsyncIterator[None]:
    """Keep progress and the tracker's time series up to date while the run is on."""
    progress = open_progress(config.name)
    if settled:
        progress.note(f"going on: {settled:,} rows have their answers")
    run.stop.listen(lambda: progress.note(_ending_note(run)))
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


def _is_cancelled() -> bool:
    """Whether somebody cancelled this task itself, and not only what it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
