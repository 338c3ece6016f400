"""A run: one invocation of an experiment at work. Takes up what has no answer yet, asks it, saves what comes of it."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from itertools import islice
from typing import TypeAlias

from runner.batch import Stop, run_batch
from runner.concurrency import SoftStart, Window
from runner.config import DeploymentConfig, RunnerConfig, replicas
from runner.errors import (
    AuthenticationError,
    ConnectError,
    DatasetError,
    InsufficientQuotaError,
    Interrupted,
    ItemError,
    NoDeploymentError,
    NotFoundError,
    PermissionDeniedError,
    RequestError,
    RowError,
    StoreError,
    SystemicError,
)
from runner.identity import dump_text
from runner.metrics import Meter, Snapshot
from runner.outcomes import failure, success
from runner.retry import failed_attempt
from runner.signals import handled_signals
from runner.stack import Stack
from runner.store import Claim, Store
from runner.transports import DIRECT
from runner.types import Response, Trace
from runner.workload import ClaimSize, Item, Workload

GRACE_S = 10.0
"""How long an interrupted run waits for the answers that are on their way, since they are paid for."""

_ECHO_S = 0.3
"""A second signal that follows so closely is the first one, forwarded by a wrapper such as ``timeout``."""

_SUSPECTS = 4
"""Rows that must fail the same systemic way, with no success between, before the run gives up."""

_UNREACHED = 8
"""Rows that must find nobody at the address, with no success between, before the run gives up."""

Claimed: TypeAlias = tuple[Item, int]
"""An item and its occurrence."""


class Run:
    """One invocation of an experiment: takes up what has no answer yet, asks it, saves what comes of it."""

    def __init__(
        self, config: RunnerConfig, workload: Workload, *, client: Stack, store: Store, meter: Meter, window: Window
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
        several = len(replicas(self._config)) > 1
        return self._meter.snapshot(
            total=self.total,
            in_flight=self._window.active,
            window=self._window.limit,
            deployments=self._client.deployments() if several else None,
        )

    def listen(self, listener: Callable[[str], None]) -> None:
        """Have ``listener`` told what somebody who watches the run should know."""
        self._client.listen(listener)

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
        if isinstance(error, NoDeploymentError):
            patience = 1  # the router has waited long enough
        if patience is None:
            item, occurrence = claimed
            await self._store.save(item.position, failure((item.content, occurrence), trace, error))
            return
        self._suspects.append((claimed, trace, error))
        if len(self._suspects) >= patience and self.stop.reason is None:
            self._give_up(trace, error)

    def _give_up(self, trace: Trace, error: RequestError) -> None:
        way_out = _way_out(error, replicas(self._config).get(trace.deployment))
        text = str(error).rstrip(".")
        if not isinstance(error, NoDeploymentError):
            text = f"{type(error).__name__} on one row after the other: {text}"
        self.stop(SystemicError(f"{text}. {way_out}."))

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


def _is_cancelled() -> bool:
    """Whether somebody cancelled this task itself, and not only what it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
