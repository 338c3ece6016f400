"""The budget: where a run stops, or all cells of a sweep together. Reserved before a request, settled after."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from runner import figures
from runner.answers import WAS_SENT
from runner.ceiling import TEMPLATE_TOKENS, Ceiling
from runner.concurrency import keeps_slot
from runner.config import DeploymentConfig, RunnerConfig, TaskKind, replicas
from runner.errors import (
    BudgetExhausted,
    ConfigError,
    ConnectError,
    RequestError,
    RunStopped,
    StoreError,
    SystemicError,
)
from runner.precedents import precedents
from runner.purse import NOTHING, Amounts, Purse, Refusal, Reservation
from runner.sharing.file import NETWORK_FILE_SYSTEMS, file_system_of
from runner.store import Store
from runner.transports.prices import longest_answer_of, price_for, prices_for
from runner.types import OUTPUT_LIMITS, Client, EmbeddingRequest, GenerationRequest, Request, Response

_POLL_S = 0.2
"""How often a process looks what the others did."""

_REMEMBERED = 100
"""Answers whose mean is expected of a request that has no bound with room for it."""

_LOOKED_AT = 10
"""Answers of earlier sessions whose mean, at the prices of now, is expected of the first request."""

logger = logging.getLogger(__name__)


class Budget:
    """What a run may take: US dollars, tokens, requests and seconds at work, those of its earlier sessions included.

    The cells of a multirun share one budget, unless it is swept over. Where there is room for the largest answer that
    each request in flight can get, they run side by side; towards the end there is room for fewer and fewer, and at
    last for one at a time, which may turn out larger than what is left. So a budget is used to its end, and never
    exceeded by more than one request exceeds what is expected of it.

    Args:
        config: The limits, and what bounds the requests.
        folder: The run's.

    Raises:
        ConfigError: A price is unknown, or how long an answer may be.
    """

    def __init__(self, config: RunnerConfig, folder: Path) -> None:
        limits = _limits(config)
        self._deployments = replicas(config)
        check_budget(config)
        self._config = config
        is_shared = config.sweep.folder and not any(key.startswith("budget.") for key in config.sweep.over)
        place = Path(str(config.sweep.folder)) if is_shared else folder
        self.is_shared = bool(is_shared)
        holder = os.path.relpath(folder, place)  # the same wherever the runs are moved to
        self._purse = Purse(place / "budget.sqlite", holder=holder, limits=limits)
        self._turn = asyncio.Lock()
        self._changed = asyncio.Event()
        self._recent: deque[Amounts] = deque(maxlen=_REMEMBERED)
        self._ended: BudgetExhausted | None = None
        self._is_warned = False
        self._ceilings: list[Ceiling] = []

    @classmethod
    def of(cls, config: RunnerConfig, folder: Path) -> Budget | None:
        """The budget that ``config`` sets, if it sets one."""
        return cls(config, folder) if any(limit is not None for limit in vars(config.budget).values()) else None

    def around(self, label: str, client: Client) -> Client:
        """``client``, which answers for the deployment ``label``, kept to this budget."""
        alone = replace(self._config, deployments={label: self._deployments[label]})
        self._ceilings.append(Ceiling(alone))
        return Budgeted(client, self, ceiling=self._ceilings[-1])

    @asynccontextmanager
    async def opened(self, store: Store, *, end: Callable[[RunStopped], None]) -> AsyncIterator[None]:
        """Count what ``store`` says was taken already, and keep the time: ``end`` is called when it is over."""
        facts, known = await _facts(store)
        unknown = Amounts(
            usd=facts["bounds_usd"] + facts["without_bound"] * facts["largest_usd"],
            tokens=facts["unknown"] * facts["largest_tokens"],
        )
        if self.is_shared and file_system_of(self._purse.path.parent) in NETWORK_FILE_SYSTEMS:
            logger.warning("the budget is shared on a network file system: cells on several hosts may exceed it")
        last = await precedents(store, prices_for(self._config), most=_LOOKED_AT)
        if requests := sum(each.is_counted for each in last):
            usd, tokens = sum(each.usd or 0.0 for each in last), sum(each.tokens or 0.0 for each in last)
            self._recent.append(Amounts(usd=usd, tokens=tokens, requests=requests).of_one())
        self._purse.open(facts["session"], known=known, most=known + unknown)
        clock = asyncio.create_task(self._keep_time(end))
        try:
            yield
        finally:
            clock.cancel()
            await asyncio.wait([clock])
            with suppress(StoreError):  # what could not be given back stays reserved until the run goes on
                self._purse.flush()
            self._purse.close()

    def left(self) -> Mapping[str, float]:
        """What is neither taken nor reserved, by the names of the limits."""
        taken = self._purse.taken
        return {name: max(0.0, limit - getattr(taken, name)) for name, limit in self._purse.limits.items()}

    async def reserve(self, most: Amounts, *, prompt: Amounts = NOTHING) -> Reservation:
        """Room for a request that takes ``most`` at most, first come first served.

        Args:
            prompt: What it takes without an answer, about: what is expected of it before there are answers.

        Raises:
            BudgetExhausted: There is none, and nothing more comes back.
        """
        async with self._turn:
            while self._ended is None:
                self._changed.clear()
                match self._purse.reserve(most, expected := self._expected(most, prompt)):
                    case Reservation() as reservation:
                        return reservation
                    case Refusal.used_up:
                        self._ended = self._exhausted(most, expected)
                    case Refusal.not_now:
                        self._warn(most)
                        await self._change()
            raise self._ended

    def settle(self, reservation: Reservation, taken: Amounts, *, is_answer: bool = False) -> None:
        """A request took so much; answers teach what to expect."""
        if is_answer:
            self._recent.append(taken)
        self._purse.settle(reservation, taken)
        self._changed.set()

    def _expected(self, most: Amounts, prompt: Amounts) -> Amounts:
        """What a request takes, by the last ones; before the first, what its prompt does."""
        known = self._recent or [prompt]
        usd = sum(each.usd for each in known) / len(known)
        tokens = sum(each.tokens for each in known) / len(known)
        return Amounts(usd=min(usd, most.usd), tokens=min(tokens, most.tokens), requests=most.requests)

    async def _change(self) -> None:
        """Until something was settled here, or may have been elsewhere."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_POLL_S):
                await self._changed.wait()

    async def _keep_time(self, end: Callable[[RunStopped], None]) -> None:
        before = time.monotonic()
        while self._ended is None:
            await asyncio.sleep(min(_POLL_S, max(0.01, self.left().get("seconds", _POLL_S))))
            now = time.monotonic()
            self._purse.spend(Amounts(seconds=now - before))
            before = now
            try:
                self._purse.flush()
            except StoreError as error:
                end(SystemicError(str(error)))
                return
            if self._purse.late:
                self._ended = self._exhausted(NOTHING, NOTHING)
                self._changed.set()
                end(self._ended)

    def _exhausted(self, most: Amounts, expected: Amounts) -> BudgetExhausted:
        taken = self._purse.taken
        name = (taken + most).beyond(self._purse.limits) or next(iter(self._purse.limits))
        limit, spent, of_next = self._purse.limits[name], getattr(taken, name), getattr(most, name)
        so_far = f"budget.{name}={figures.plain(limit)}: {shown(name, spent)} taken{self._taken_by}"
        if not of_next or spent >= limit:
            return BudgetExhausted(f"{so_far}, the budget is used up")
        if (least := getattr(expected, name)) > limit:
            return BudgetExhausted(f"{so_far}, and one request takes about {shown(name, least)}, if not more")
        return BudgetExhausted(f"{so_far}, what is left has no room for another request")

    @property
    def _taken_by(self) -> str:
        return " by all cells of the sweep" if self.is_shared else ""

    def _warn(self, most: Amounts) -> None:
        """Say once that requests wait for each other, and why."""
        held, taken = self._purse.held, self._purse.taken
        if self._is_warned or not held.requests:
            return
        name = (taken + most).beyond(self._purse.limits)
        if name not in ("usd", "tokens") or getattr(taken - held, name) > self._purse.limits[name] / 2:
            return  # towards the end it is as it should be
        self._is_warned = True
        limit, spent, size = self._purse.limits[name], getattr(taken - held, name), getattr(most, name)
        given = figures.plain(limit)
        if math.isinf(size):
            logger.warning("budget.%s=%s: requests go one at a time, as what one may take has no bound", name, given)
            return
        answer = max(ceiling.of_answer()[name] for ceiling in self._ceilings)
        parts = (
            f"{shown(name, answer)} for the longest answer, the rest for its prompt, a token a byte and"
            f" {TEMPLATE_TOKENS} around it"
        )
        logger.warning(
            "budget.%s=%s%s has room for %s at once, as each may take %s (%s): a larger budget%s makes it more",
            name,
            given,
            f", {shown(name, spent)} of it taken by now{self._taken_by}," if spent else "",
            f"{1 + room:,.0f} requests at most" if (room := (limit - spent) // size) else "one request",
            shown(name, size),
            parts,
            ", or a smaller request.max_tokens," if 2 * answer > size else "",
        )


class Budgeted:
    """A `Client` that sends what the budget has room for. It stands around one deployment, and sees each attempt.

    A request that holds a part of the budget `keeps_slot`: if it stepped aside, others would take the slot, wait for
    what it holds, and never give the slot back.

    Args:
        client: What sends, and notes the price and whether a request is on the wire in its trace.
        budget: What is shared by everyone who sends.
        ceiling: The most that a request here can take.
    """

    def __init__(self, client: Client, budget: Budget, *, ceiling: Ceiling) -> None:
        self._client = client
        self._budget = budget
        self._ceiling = ceiling

    async def send(self, request: Request) -> Response:
        queued = time.perf_counter()
        reservation = await self._budget.reserve(self._most(request), prompt=self._of_prompt(request))
        request.trace.queue_wait_s += time.perf_counter() - queued
        kept = keeps_slot.set(True)  # those who wait for what it holds may have all the others
        try:
            response = await self._client.send(request)
        except BaseException as error:
            self._budget.settle(reservation, _taken_in_vain(request, error, reservation))
            raise
        finally:
            keeps_slot.reset(kept)
        self._budget.settle(reservation, _taken_by(request, response, reservation), is_answer=True)
        return response

    async def aclose(self) -> None:
        await self._client.aclose()

    def _most(self, request: Request) -> Amounts:
        asked = _asked(request)
        usd, tokens = self._ceiling.usd(asked), self._ceiling.tokens(asked)
        return Amounts(usd=math.inf if usd is None else usd, tokens=math.inf if tokens is None else tokens, requests=1)

    def _of_prompt(self, request: Request) -> Amounts:
        return Amounts(**self._ceiling.of_prompt(_asked(request)))


def _asked(request: Request) -> Any:
    match request:
        case GenerationRequest(input=asked):
            return asked
        case EmbeddingRequest(texts=texts):
            return list(texts)
    return request  # of a recording nothing is known


def _taken_by(request: Request, response: Response, reservation: Reservation) -> Amounts:
    """What an answer took; what the provider did not count is taken to be the most that it can be."""
    most, usage = reservation.held + reservation.excess, response.usage
    usd = request.trace.cost_usd(usage)
    tokens = most.tokens if usage is None else max(usage.total_tokens, usage.prompt_tokens + usage.completion_tokens)
    return Amounts(usd=most.usd if usd is None else usd, tokens=tokens, requests=1)


def _taken_in_vain(request: Request, error: BaseException, reservation: Reservation) -> Amounts:
    if isinstance(error, ConnectError):
        return NOTHING
    if isinstance(error, RequestError) and error.billing == "free":
        return Amounts(requests=1)
    if isinstance(error, RequestError) or request.trace.on_the_wire:
        return reservation.held + reservation.excess
    return NOTHING


def check_budget(config: RunnerConfig) -> None:
    """See whether what a request takes of the budget can be known beforehand.

    Raises:
        ConfigError: A price is unknown, or how long an answer may be.
    """
    if faults := list(_faults(config)):
        raise ConfigError(*faults)


def _faults(config: RunnerConfig) -> Iterator[str]:
    limits = _limits(config)
    for label, deployment in replicas(config).items():
        where = f"deployments.{label if config.deployments else 'LABEL'}"
        if "usd" in limits and price_for(deployment, config.simulator) is None:
            yield f"budget.usd needs a price, and none is known for {deployment.model}: {price_hint(where)}"
        bounded = {"usd", "tokens"} & limits.keys()
        if bounded and config.task.kind is TaskKind.generate and not _is_bounded(config, deployment):
            yield (
                f"budget.{min(bounded, key=list(limits).index)} must know how long an answer can be:"
                f" set request.max_tokens=…, or {where}.max_output_tokens=… to what {deployment.model} can write"
            )


async def taken_so_far(store: Store) -> Amounts:
    """What a run has taken of its budget for certain, by what is stored of it."""
    _, known = await _facts(store)
    return known


async def _facts(store: Store) -> tuple[Any, Amounts]:
    [facts] = [row async for row in store.query(_TAKEN)]
    known = Amounts(usd=facts["usd"], tokens=facts["tokens"], requests=facts["requests"], seconds=facts["seconds"])
    return facts, known


def _limits(config: RunnerConfig) -> dict[str, float]:
    return {name: float(limit) for name, limit in vars(config.budget).items() if limit is not None}


def _is_bounded(config: RunnerConfig, deployment: DeploymentConfig) -> bool:
    params = {**(deployment.extra_kwargs or {}), **config.request}
    params |= params.get("extra_body") or {}
    return any(params.get(key) is not None for key in OUTPUT_LIMITS) or longest_answer_of(deployment) is not None


def price_hint(where: str) -> str:
    """How to say what the deployment at the path ``where`` costs."""
    return f"set {where}.price.prompt=… and {where}.price.completion=…, in US$ per million tokens"


def shown(name: str, amount: float) -> str:
    """An amount for people."""
    match name:
        case "usd" if 0 < amount < 0.0001:
            return figures.dollars(amount)
        case "usd":
            return f"${amount:.4f}" if amount < 10 else f"${amount:,.2f}"
        case "seconds":
            return f"{amount:,.1f} s"
    return f"{amount:,.0f} {name}"


_TAKEN = f"""
    WITH attempt (tokens, cost_usd, bound_usd, shared) AS (
        SELECT total_tokens, cost_usd, cost_bound_usd, shared
        FROM answers
        WHERE reused_from IS NULL AND (error_type IS NULL OR deployment IS NOT NULL) AND {WAS_SENT}
        UNION ALL
        SELECT NULL, cost_usd, cost_bound_usd, shared FROM attempts WHERE {WAS_SENT}
    )
    SELECT
        (SELECT max(id) FROM sessions) AS session,
        (SELECT total(last_seen - started_at) FROM sessions) AS seconds,
        count(*) FILTER (WHERE NOT shared) AS requests,
        total(tokens) AS tokens,
        total(cost_usd) AS usd,
        total(bound_usd) FILTER (WHERE cost_usd IS NULL) AS bounds_usd,
        count(*) FILTER (WHERE cost_usd IS NULL) AS unknown,
        count(*) FILTER (WHERE cost_usd IS NULL AND bound_usd IS NULL) AS without_bound,
        ifnull(max(tokens), 0) AS largest_tokens,
        ifnull(max(cost_usd), 0.0) AS largest_usd
    FROM attempt
"""
