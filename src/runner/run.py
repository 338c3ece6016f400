"""A run: one invocation of an experiment at work. Takes up what has no answer yet, asks it, saves what comes of it."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence, Set
from contextlib import aclosing, suppress
from dataclasses import replace
from functools import partial
from itertools import takewhile
from typing import Any, NamedTuple, Protocol, TypeAlias

from runner.advice import way_out
from runner.batch import Stop, run_batch
from runner.concurrency import SoftStart, Window
from runner.config import RunnerConfig, TaskKind, replicas
from runner.digests import Digests
from runner.errors import (
    BudgetExhausted,
    ConnectError,
    DatasetError,
    InsufficientQuotaError,
    Interrupted,
    ItemError,
    NoDeploymentError,
    RequestError,
    StoreError,
    SystemicError,
)
from runner.forecast import Left
from runner.identity import WorkloadHasher, dump_text
from runner.metrics import DeploymentSnapshot, Meter, Snapshot
from runner.outcomes import failure, success
from runner.response_format import ResponseFormat
from runner.results import CURRENT, WAS_THERE
from runner.retry import failed_attempt
from runner.scoring import Scorers
from runner.sharers import Sharers
from runner.signals import ECHO_S
from runner.store import Key, Known, Outcome, Store, Terms
from runner.task import Asking, Item, Settled
from runner.types import Attempt, Client, Request, Response, Trace
from runner.workload import ChunkSize, Reader

GRACE_S = 10.0
"""How long an interrupted run waits for the answers that are on their way, since they are paid for."""

_SUSPECTS = 4
"""Requests that must fail the same systemic way, with no success between, before the run gives up."""

_UNREACHED = 8
"""Requests that must find nobody at the address, with no success between, before the run gives up."""

Claimed: TypeAlias = tuple[Item, int]
"""An item and the ticket of its answer."""

logger = logging.getLogger(__name__)


class Asks(Protocol):
    """What a run asks: a `Workload`, or whatever else has items in an order and a way to ask for them."""

    scorers: Scorers

    @property
    def task(self) -> Asking: ...
    @property
    def response_format(self) -> ResponseFormat | None: ...
    def count(self) -> int | None: ...
    def items(self) -> Iterator[Item]: ...
    async def identified(self, items: Sequence[Item], digests: Digests) -> Sequence[Item]: ...


class Run:
    """One invocation of an experiment: takes up what has no answer yet, asks it, saves what comes of it."""

    def __init__(
        self,
        config: RunnerConfig,
        workload: Asks,
        *,
        client: Client,
        store: Store,
        meter: Meter,
        window: Window,
        terms: Terms | None = None,
        deployments: Callable[[], Mapping[str, DeploymentSnapshot]] | None = None,
        held_up_s: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.stop = Stop()
        self._length = 0  # of the dataset, as far as its rows were claimed
        self._config = config
        self._workload = workload
        self._client = client
        self._deployments = deployments
        self._held_up_s = held_up_s
        self._store = store
        self._meter = meter
        self._window = window
        self._terms = terms or Terms(retry_failed=config.retry_failed, scored=bool(workload.scorers))
        self._soft_start = SoftStart(window)
        self._digests = Digests(store, max_bytes=config.task.max_bytes)
        self._sharers = Sharers(meter)
        self._flights: dict[int, _Flight] = {}
        self._asked_first: set[int] = set()  # positions, in the pilot
        self._suspects: list[tuple[Sequence[Claimed], Trace, RequestError]] = []
        self._any_answer = False
        self._has_told_of_row = False  # that one cannot be asked
        self._interrupted_at: float | None = None
        self._batch: asyncio.Future[None] | None = None
        self._loop = asyncio.get_running_loop()
        self.total = workload.count()
        self.stop.listen(self._call_off)
        store.listen(lambda error: self.stop(SystemicError(str(error))))

    async def settled(self) -> int:
        """How many answers the store has that need not be asked for again; exact where they may be all."""
        sql = _SETTLED if self._config.retry_failed else "SELECT count(*) AS n FROM answers"
        [settled] = [row["n"] async for row in self._store.query(sql)]
        if self.total is not None and settled >= self.total:
            [settled] = [row["n"] async for row in self._store.query(_SETTLED_ROWS, (not self._config.retry_failed,))]
        return int(settled)

    async def left_alone(self) -> int:
        """How many failures the store has that need not be asked again."""
        if self._config.retry_failed:
            return 0
        [failed] = [row["n"] async for row in self._store.query(_FAILED)]
        return int(failed)

    async def left(self) -> Left | None:
        """The rows that have no answer yet; None: it is not known how many they are."""
        if self.total is None:
            return None
        [found] = [row async for row in self._store.query(_LEFT, (self._config.retry_failed,))]
        unread = max(0, self.total - found["seen"])
        return Left(
            asked=unread + found["tickets"],
            sharing=found["open"] - found["tickets"],
            is_most=self._terms.dedupe and unread > 0,
        )

    async def until_done(self, *, after_pilot: Callable[[], Awaitable[None]] | None = None) -> None:
        """Ask until there is nothing left, or `stop`, `end` or `interrupt` is called.

        Args:
            after_pilot: Awaited between the rows that are asked first, ``pilot`` of them, and the others.
        """
        try:
            await self._ask_all(after_pilot)
            if self._terms.dedupe:
                await self._see_sharing()
            if self.stop.reason is not None or self._sharers.count or not self._config.retry_failed:
                await self._take_stock()
        except (StoreError, DatasetError) as error:
            self.stop(SystemicError(str(error)))

    def interrupt(self, reason: Interrupted) -> None:
        """End early, and wait `GRACE_S` at most for the answers on their way, which are paid for."""
        self._interrupted_at = self._loop.time()
        self.stop(reason)
        if self._batch is not None:
            self._loop.call_later(GRACE_S, self._batch.cancel)

    def on_signal(self, signum: int) -> None:
        """Interrupt at the first signal; at a second one end the process, as what is stored is safe."""
        if self._interrupted_at is None:
            self.interrupt(Interrupted(signum))
        elif self._loop.time() - self._interrupted_at > ECHO_S:
            print("ended at once: what is in results.sqlite is kept, and the same command goes on", file=sys.stderr)
            os._exit(128 + signum)

    def snapshot(self, *, loop_lag_s: float | None = None) -> Snapshot:
        window = self._window
        return self._meter.snapshot(
            total=self.total,
            in_flight=sum(trace.on_the_wire for trace in self.in_flight()),
            window=window.limit,
            window_why=window.why,
            held_up_s=self._held_up_s(),
            loop_lag_s=loop_lag_s,
            deployments=self._deployments() if self._deployments else None,
        )

    def in_flight(self) -> Iterator[Trace]:
        """The traces of the requests that were begun and have not ended, those that wait for a limit included."""
        return (flight.trace for flight in self._flights.values())

    def _call_off(self) -> None:
        """End what only waits to be sent, for its turn or for another attempt."""
        for flight in self._flights.values():
            if not flight.trace.on_the_wire:
                flight.task.cancel()

    def _position(self, place: int) -> int:
        """The position in the whole dataset of the item that is the ``place``-th of this shard."""
        shard, samples = self._config.dataset.shard, self._config.samples
        return (place // samples * shard.count + shard.index) * samples + place % samples

    async def _ask_all(self, after_pilot: Callable[[], Awaitable[None]] | None) -> None:
        try:
            if self.total is not None:
                await self._store.truncate(self._position(self.total))
            if self._config.pilot:
                sample = {self._position(place) for place in _spread(self._config.pilot, self.total)}
                await self._ask_for(replace(self._terms, wanted=sample.__contains__), is_pilot=True)
                if self.stop.reason is None and after_pilot is not None:
                    await after_pilot()
                self._terms = replace(self._terms, wanted=lambda position: position not in self._asked_first)
            if self.stop.reason is None:
                await self._ask_for(self._terms)
        except asyncio.CancelledError:
            # Somebody may have cancelled this task itself, and not only what it waits for.
            if self._interrupted_at is None or _current_task(self._loop).cancelling():
                raise
        finally:
            self._soft_start.close()
            await self._keep_ledger()

    # Taking up

    async def _ask_for(self, terms: Terms, *, is_pilot: bool = False) -> None:
        chunks = self._claim(terms, is_pilot=is_pilot)
        self._batch = asyncio.ensure_future(run_batch(chunks, self._ask, window=self._window, stop=self.stop))
        await self._batch

    async def _claim(self, terms: Terms, *, is_pilot: bool) -> AsyncIterator[Sequence[Sequence[Claimed]]]:
        """Go through the dataset in chunks; hand on what has no answer, score what has an unscored one.

        What is handed on comes in the groups that share a request.
        """
        group_size = self._workload.task.group_size
        workload = WorkloadHasher()
        todo: list[Claimed] = []
        async with aclosing(self._known(terms)) as chunks:
            async for chunk, known in chunks:
                self._length = max(self._length, chunk[-1].position + 1)
                for item in chunk:
                    if item.position % self._config.samples == 0:
                        workload.add(item.fields, item.input)
                await self._score_known(chunk, known)
                asked = [
                    (item, fact.ticket)
                    for item, fact in zip(chunk, known, strict=True)
                    if not (fact.answered or fact.shared)
                ]
                todo += asked
                if terms.dedupe:
                    self._sharers.expect(ticket for _, ticket in asked)
                if is_pilot:
                    self._asked_first.update(item.position for item, _ in asked)
                else:
                    self._count_known(chunk, known, asked=len(asked), dedupe=terms.dedupe)
                whole = len(todo) - len(todo) % group_size
                yield [todo[start : start + group_size] for start in range(0, whole, group_size)]
                todo = todo[whole:]
        if todo:
            yield [todo]
        await self._store.truncate(self._length)
        await self._store.put_meta(workload.facts)

    async def _known(self, terms: Terms) -> AsyncGenerator[tuple[Sequence[Item], Sequence[Known]], None]:
        """The dataset's items in chunks, with what the store knows of them; those that have no answer are claimed."""
        reader = Reader(self._workload.items(), partial(self._workload.identified, digests=self._digests))
        size = ChunkSize()

        def next_size() -> int:
            slots = self._window.limit * self._workload.task.group_size
            return size.next(slots=slots, settled=self._meter.settled)

        ahead: Sequence[Item] | None = await reader.read(next_size())
        while unclaimed := ahead:
            ahead = None
            while unclaimed:
                claim = self._store.claim(unclaimed, terms, most=next_size())
                if ahead is None:  # while the store looks up what was read, in its thread, more is read
                    known, ahead = await asyncio.gather(claim, reader.read(ChunkSize.MOST))
                else:
                    known = await claim
                yield unclaimed[: len(known)], known
                unclaimed = unclaimed[len(known) :]
        if reader.error is not None:
            raise reader.error

    def _count_known(self, chunk: Sequence[Item], known: Sequence[Known], *, asked: int, dedupe: bool) -> None:
        """Count the rows that are not asked, save those of the pilot."""
        if self._asked_first:
            known = [fact for item, fact in zip(chunk, known, strict=True) if item.position not in self._asked_first]
        shared: Sequence[int] = ()
        if dedupe:
            is_new = self._store.is_new
            shared = [
                fact.ticket
                for fact in known
                if fact.shared or (fact.answered and not fact.copied and is_new(fact.ticket))
            ]
            self._sharers.join(shared)
        self._meter.reused(len(known) - asked - len(shared))

    async def _save(self, saved: Sequence[tuple[int, Outcome, str | None]]) -> None:
        await self._store.save_all(saved)
        self._sharers.settle(outcome.ticket for _, outcome, _ in saved)

    async def _score_known(self, chunk: Sequence[Item], known: Sequence[Known]) -> None:
        """Score the answers that are there and have none."""
        scores = [
            (item.position, self._score(item, fact.unscored_text))
            for item, fact in zip(chunk, known, strict=True)
            if fact.unscored_text is not None
        ]
        if scores:
            await self._store.put_scores(scores)

    async def _see_sharing(self) -> None:
        """Give rows that share an answer their own scores, where it is there; those of a run that is stopped soon.

        Where a budget has stopped it, rows that were not reached are looked at too, so that it is known which of them
        are to be paid for; not where files would have to be read for it.
        """
        task = self._config.task
        reads_files = task.kind is TaskKind.transcribe or task.image is not None
        is_spent = isinstance(self.stop.reason, BudgetExhausted) and self.total is not None and not reads_files
        if not (is_spent or (self._sharers.count and self._workload.scorers)):
            return
        await self._store.flush()
        terms = Terms(
            retry_failed=False, scored=bool(self._workload.scorers), dedupe=True, wanted=lambda position: False
        )
        items = self._workload.items()
        if not is_spent:
            items = takewhile(lambda item: item.position < self._length, items)
        reader = Reader(items, partial(self._workload.identified, digests=self._digests))
        ends_at = self._loop.time() + GRACE_S
        while chunk := await reader.read(ChunkSize.MOST):
            if self.stop.reason is not None and self._loop.time() > ends_at:
                return
            await self._score_known(chunk, await self._store.claim(chunk, terms))

    async def _take_stock(self) -> None:
        """Have the meter count what the store has, now that nothing more is asked."""
        await self._store.flush()
        [found] = [row async for row in self._store.query(_STOCK)]
        self._meter.stands_at(found["done"], reused=found["reused"], left_alone=found["left_alone"])

    # Asking

    async def _ask(self, group: Sequence[Claimed]) -> None:
        """Ask for the items that share a request, and save what comes of each."""
        usable = [claimed for claimed in group if claimed[0].error is None]
        for claimed in group if len(usable) < len(group) else ():
            if (error := claimed[0].error) is not None:
                if not self._has_told_of_row:
                    logger.warning("a row that cannot be asked: %s", error)
                    self._has_told_of_row = True
                await self._fail([claimed], Trace(), error)
        if not usable:
            return
        line = _Line(
            usable,
            samples=self._config.samples,
            loop=self._loop,
            client=self._client,
            flights=self._flights,
            stop=self.stop,
            settle=self._settle,
            note=self._note_attempt,
        )
        try:
            await self._workload.task.ask_for([item for item, _ in usable], line)
        except BudgetExhausted as reason:  # these rows have no outcome: they are left for later
            if self.stop.reason is None:
                self.stop(reason)

    async def _settle(self, asked: Sequence[Claimed], settled: Settled) -> None:
        if settled.trace.retries:
            self._meter.retried()
        if isinstance(settled.result, ItemError):
            await self._failed(asked, settled.trace, settled.result)
        else:
            await self._answered(asked, settled.trace, settled.result)

    async def _answered(self, asked: Sequence[Claimed], trace: Trace, responses: Sequence[Response]) -> None:
        self._any_answer = True
        self._soft_start.open()
        saved: list[tuple[int, Outcome, str | None]] = []
        layout = self._workload.response_format
        for place, (claimed, response) in enumerate(zip(asked, responses, strict=True)):
            outcome = success(_key(claimed), trace, response, response_format=layout, shared=place > 0)
            scores = self._score(claimed[0], outcome.output_text or "") if self._workload.scorers else None
            saved.append((claimed[0].position, outcome, scores))
        await self._save(saved)
        if self._suspects and self.stop.reason is None:
            await self._clear_suspects()

    async def _failed(self, asked: Sequence[Claimed], trace: Trace, error: ItemError) -> None:
        """Save the failure, unless it is one that every request will meet: then the rows are not to blame."""
        patience = None
        if isinstance(error, RequestError):
            patience = _UNREACHED if isinstance(error, ConnectError) else _SUSPECTS if error.systemic else None
            if isinstance(error, NoDeploymentError) or (
                isinstance(error, InsufficientQuotaError) and len(replicas(self._config)) == 1
            ):
                patience = 1  # it says itself that it is everybody's
        if patience is None or not isinstance(error, RequestError):
            await self._fail(asked, trace, error)
            return
        self._suspects.append((asked, trace, error))
        if len(self._suspects) >= patience and self.stop.reason is None:
            self._give_up(trace, error)

    async def _fail(self, asked: Sequence[Claimed], trace: Trace, error: ItemError) -> None:
        await self._save(
            [
                (claimed[0].position, failure(_key(claimed), trace, error, shared=place > 0), None)
                for place, claimed in enumerate(asked)
            ]
        )

    def _give_up(self, trace: Trace, error: RequestError) -> None:
        advice = way_out(error, trace.deployment, self._config)
        where = " on one row after the other" if len(self._suspects) > 1 else ""
        self.stop(SystemicError(f"{type(error).__name__}{where}: {str(error).rstrip('.')}. {advice}."))

    async def _clear_suspects(self) -> None:
        """Rows are answered: what looked systemic was the suspects' own failure."""
        suspects, self._suspects = self._suspects, []
        for asked, trace, error in suspects:
            await self._fail(asked, trace, error)

    async def _note_attempt(self, keys: Sequence[Key], attempt: Attempt) -> None:
        """Enter one that failed, and that another follows, now or when the run goes on."""
        if attempt.number > 1:
            self._meter.retried()
        await self._store.note_attempts(keys, attempt)

    async def _keep_ledger(self) -> None:
        """Enter what ended without an outcome: cancelled requests, and failures that were not the row's."""
        if self._suspects and self.stop.reason is None and not self._any_answer:
            self._give_up(*self._suspects[0][1:])
        with suppress(StoreError):
            if self.stop.reason is None:
                await self._clear_suspects()
            await self._store.flush()
            flights = [flight for flight in self._flights.values() if flight.trace.on_the_wire]
            await self._store.note_lost(flight.keys for flight in flights)
            for asked, trace, error in self._suspects:
                await self._store.note_attempts([_key(claimed) for claimed in asked], failed_attempt(trace, error))

    def _score(self, item: Item, output_text: str) -> str:
        scores = self._workload.scorers(output_text, item.fields)
        self._meter.scored(scores)
        return dump_text(scores)


class _Flight(NamedTuple):
    """A request under way, and whom it asks for."""

    task: asyncio.Task[Any]
    trace: Trace
    keys: Sequence[Key]


class _Line:
    """A group's way to the client. What goes wrong on it is entered for every item that was asked for.

    A flight begins with its trace and ends where it is settled: one that is cancelled stays in the books.
    """

    def __init__(
        self,
        group: Sequence[Claimed],
        *,
        samples: int,
        loop: asyncio.AbstractEventLoop,
        client: Client,
        flights: dict[int, _Flight],
        stop: Stop,
        settle: Callable[[Sequence[Claimed], Settled], Awaitable[None]],
        note: Callable[[Sequence[Key], Attempt], Awaitable[None]],
    ) -> None:
        self._group = group
        self._samples = samples
        self._loop = loop
        self._client = client
        self._flights = flights
        self._stop = stop
        self._settle = settle
        self._note = note

    def trace(self, places: Sequence[int]) -> Trace:
        first, _ = self._group[places[0]]
        trace = Trace(row=first.position // self._samples)
        flight = _Flight(_current_task(self._loop), trace, [_key(self._group[place]) for place in places])
        trace.on_failure = lambda attempt: self._note_attempt(flight, attempt)
        self._flights[id(trace)] = flight
        return trace

    async def send(self, request: Request) -> Response:
        return await self._client.send(request)

    async def settle(self, settled: Settled) -> None:
        self._land(settled.trace)
        await self._settle([self._group[place] for place in settled.places], settled)

    async def note_split(self, places: Sequence[int], trace: Trace, error: ItemError) -> None:
        flight = self._flights[id(trace)]
        self._land(trace)
        if isinstance(error, RequestError):
            await self._note(flight.keys, failed_attempt(trace, error))
        await self._end_if_stopped(flight)

    def _land(self, trace: Trace) -> None:
        """End a flight, and the way from its trace back to itself, which would wait for the garbage collector."""
        trace.on_failure = None
        self._flights.pop(id(trace), None)

    async def _note_attempt(self, flight: _Flight, attempt: Attempt) -> None:
        await self._note(flight.keys, attempt)
        if not flight.trace.on_the_wire:  # as it is where it is asked a second time meanwhile
            await self._end_if_stopped(flight)

    async def _end_if_stopped(self, flight: _Flight) -> None:
        """Once the run is stopped, what was on its way has come, and nothing more is sent."""
        if self._stop.reason is not None:
            flight.task.cancel()
            await asyncio.sleep(0)  # where the cancellation takes effect, not halfway into the next request


_SETTLED = """
    SELECT (SELECT count(*) FROM answers) - (SELECT count(*) FROM answers WHERE error_type IS NOT NULL) AS n
"""

_FAILED = "SELECT count(*) AS n FROM answers WHERE error_type IS NOT NULL"

# Rows that were read, and those of them that have no outcome, with the tickets that these share.
_LEFT = """
    SELECT
        (SELECT count(*) FROM rows) AS seen,
        count(*) AS open,
        count(DISTINCT rows.ticket) AS tickets
    FROM rows
    LEFT JOIN answers USING (ticket)
    WHERE answers.ticket IS NULL OR (answers.error_type IS NOT NULL AND ?)
"""

_SETTLED_ROWS = """
    SELECT count(*) AS n
    FROM rows
    JOIN answers USING (ticket)
    WHERE answers.error_type IS NULL OR ?
"""

_STOCK = f"""
    SELECT
        count(*) AS done,
        count(*) FILTER (WHERE error_type IS NULL AND {WAS_THERE}) AS reused,
        count(*) FILTER (WHERE error_type IS NOT NULL AND {WAS_THERE}) AS left_alone
    {CURRENT}
"""


def _spread(size: int, total: int | None) -> Set[int]:
    """So many positions: one at random in each of as many equal parts of the dataset; of an unknown one, the first."""
    if total is None or total <= size:
        return frozenset(range(size))
    draw = random.Random(total)
    return {draw.randrange(part * total // size, (part + 1) * total // size) for part in range(size)}


def _key(claimed: Claimed) -> Key:
    item, ticket = claimed
    return item.content, ticket


def _current_task(loop: asyncio.AbstractEventLoop) -> asyncio.Task[Any]:
    """The running task of the running loop. Given the loop, this takes no system call."""
    task = asyncio.current_task(loop)
    assert task is not None
    return task
