"""The plan: what a run would send and why, what that costs, how long it takes. Sends nothing and leaves no trace.

Rows are taken up in a copy of the run's database, by the very code that a run takes them up with.
"""

from __future__ import annotations

import asyncio
import math
import sqlite3
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import islice
from operator import or_
from pathlib import Path
from typing import Any, TypeAlias

from runner import figures
from runner.answers import TRUNCATED, WAS_SENT
from runner.bucket import Bucket
from runner.budget import check_budget, shown, taken_so_far
from runner.checks import check, check_all, without_effect
from runner.config import RunnerConfig, TaskKind, replicas
from runner.database import RUN_DATABASE
from runner.digests import Digests
from runner.errors import ItemError, StoreError
from runner.estimate import Estimate, Estimator
from runner.forecast import SAMPLE, ZERO, Interval, total_of
from runner.limiter import limits_of
from runner.purse import NOTHING, Amounts
from runner.resume import resuming
from runner.reuse import PATIENCE_S, latest_runs, run_name
from runner.store import Known, Store
from runner.task import Item
from runner.transports.prices import longest_answer_of, price_for
from runner.types import OUTPUT_LIMITS, EmbeddingRequest, GenerationRequest, TokenPrice, TokenUsage
from runner.workload import Workload

_CHUNK = 1000

_UNLEARNT = 2.0
"""By how much a prompt's tokens may differ from what its length says, before any answer told."""

_UNBOUNDED = 16
"""Times `limits.default_output_tokens` that an answer may be long, where nothing says so."""

_OWN_TIME = Interval(expected=4e-4, low=1e-4, high=1e-3)
"""Seconds that a request takes of this program's own."""

_UNUSED = 1.1
"""How many times the time that a limit takes at least it may take in the end."""


Answered: TypeAlias = tuple[str, bytes]
"""The run that asked, and the hash of what it asked: an answer, whichever runs took it over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run would do."""

    send: Mapping[str, int]  # rows by why they are sent
    keep: Mapping[str, int]  # rows by why they are not
    prompt_tokens: Interval
    completion_tokens: Interval
    usd: Interval | None  # None: a price is unknown
    seconds: Interval | None  # None: there is nothing to go by
    evidence: Counter[Answered] = field(default_factory=Counter)  # that the forecast follows; none: it is a guess
    guessed: int = 0  # rows that are sent and that it knows no answers for
    like: str | None = None  # the run, this one or another, whose answers to other rows are gone by
    budget: Mapping[str, float] = field(default_factory=dict)  # limits by their names; cells with the same share one
    taken: Amounts = NOTHING  # of the budget, earlier
    taken_by: str = ""  # whom, where it is not the run alone
    notes: Sequence[str] = ()  # what may not be meant, why it does not go on as it might, a row that cannot be asked

    @property
    def basis(self) -> int:
        """How many answers the forecast follows."""
        return self.evidence.total()

    @property
    def tokens(self) -> Interval:
        return self.prompt_tokens + self.completion_tokens

    def __str__(self) -> str:
        lines = [_counts("send", self.send), _counts("keep", self.keep), *(f"  note    {each}" for each in self.notes)]
        if not sum(self.send.values()):
            return "\n".join(lines)
        cost = self.usd.shown("usd") if self.usd else "unknown: no price is known, see deployments.LABEL.price"
        time = self.seconds.shown("seconds") if self.seconds else "unknown: nothing was answered yet"
        lines += [
            f"  tokens  {self.tokens.shown('tokens')}",
            f"  prompt  {self.prompt_tokens.shown('tokens')}",
            f"  answer  {self.completion_tokens.shown('tokens')}",
            f"  cost    {cost}",
            f"  time    {time}",
            f"  by      {self._by()}",
            *(f"  budget  {each}" for each in self._beyond()),
        ]
        return "\n".join(lines)

    def _beyond(self) -> Iterator[str]:
        """The limits of the budget that have no room for all that is sent, or perhaps none."""
        for name, needed in (("usd", self.usd), ("tokens", self.tokens), ("seconds", self.seconds)):
            limit, taken = self.budget.get(name, math.inf), getattr(self.taken, name)
            if needed is None or taken + needed.high <= limit:
                continue
            earlier = f", {shown(name, taken)} of it taken{self.taken_by}," if taken else ""
            ends = "stops" if taken + needed.low > limit else "may stop"
            yield f"budget.{name}={figures.plain(limit)}{earlier} {ends} it before the end"

    def _by(self) -> str:
        if self.like is not None:
            return f"{self.basis:,} answers of {self.like}; pilot=100 asks a few rows first"
        if self.basis:
            guessed = f", and a guess for {self.guessed:,} rows: pilot=100 asks a few first" if self.guessed else ""
            return f"{self.basis:,} answers{guessed}"
        guess = "a guess: no answer yet, so max_tokens or limits.default_output_tokens for each"
        return f"{guess}; pilot=100 asks a few rows first"


async def make_plan(config: RunnerConfig, folder: Path) -> Plan:
    """What a run of ``config`` in ``folder`` would do, whether there is one already or not.

    Raises:
        ConfigError: The configuration or the dataset cannot be used.
        StoreError: The run's database cannot be read.
    """
    check(config)
    workload = Workload(config)
    doubts = check_all(workload.check, lambda: check_budget(config))
    draft = _Draft(config, run_name(folder))
    async with _copied(folder) as (store, is_new):
        usual = await _answered(config, folder, store)  # before resume=fresh gives it up
        async with resuming(store, config, workload, folder=folder) as resumption:
            terms = replace(resumption.terms, cost_bound=None)
            looks_back = not is_new or config.reuse
            digests = Digests(store, max_bytes=config.task.max_bytes)
            items = workload.items()
            while taken := list(islice(items, _CHUNK)):
                chunk = await workload.identified(taken, digests)
                known = await store.claim(chunk, terms)
                places = chunk[0].position, chunk[-1].position
                facts = {row["position"]: row async for row in store.query(_FACTS, places)} if looks_back else {}
                for item, fact in zip(chunk, known, strict=True):
                    draft.add(item, fact, facts.get(item.position))
            if looks_back:
                draft.inserted(*[row["n"] async for row in store.query(_INSERTED)])
            spent = await taken_so_far(store)
    plan = draft.finish(usual or await _usual(config, folder))
    return replace(plan, taken=spent, notes=[*without_effect(config), *doubts, *resumption.notes, *plan.notes])


def together(plans: Sequence[Plan]) -> Plan:
    """Several plans in one, their runs one after the other. An answer that several follow is evidence once."""
    costs = [plan.usd for plan in plans if plan.usd is not None]
    times = [plan.seconds for plan in plans if plan.seconds is not None]
    return Plan(
        send=sum((Counter(plan.send) for plan in plans), Counter()),
        keep=sum((Counter(plan.keep) for plan in plans), Counter()),
        prompt_tokens=sum((plan.prompt_tokens for plan in plans), ZERO),
        completion_tokens=sum((plan.completion_tokens for plan in plans), ZERO),
        usd=sum(costs, ZERO) if len(costs) == len(plans) else None,
        seconds=sum(times, ZERO) if len(times) == len(plans) else None,
        evidence=reduce(or_, (plan.evidence for plan in plans if sum(plan.send.values())), Counter()),
        guessed=sum(plan.guessed for plan in plans),
        budget=plans[0].budget if all(plan.budget == plans[0].budget for plan in plans) else {},
        taken=sum((plan.taken for plan in plans), NOTHING),
        taken_by=" by these runs",
    )


class _Draft:
    """A plan in the making, row by row."""

    def __init__(self, config: RunnerConfig, name: str) -> None:
        self._config = config
        self._name = name
        self._deployments = list(replicas(config).values())
        limits = config.limits
        self._estimator = Estimator.of(
            limits.token_estimates,
            model=self._deployments[0].model,
            default_output_tokens=limits.default_output_tokens,
        )
        self._send: Counter[str] = Counter()
        self._keep: Counter[str] = Counter()
        self._unusable: ItemError | None = None  # of the first row that cannot be asked
        self._guessed = _Guessed()
        self._answers: list[_Answer] = []
        self._evidence: Counter[Answered] = Counter()
        self._counted: set[int] = set()  # ids of these: rows that share an answer are no evidence of their own

    def add(self, item: Item, known: Known, fact: Any) -> None:
        if known.shared:
            self._keep["sharing the answer of another row"] += 1
        elif known.answered:
            self._keep[_why_kept(fact)] += 1
            is_new = fact["ticket"] not in self._counted
            if is_new and len(self._answers) < SAMPLE and fact["total_tokens"] is not None:
                self._counted.add(fact["ticket"])
                self._evidence[fact["reused_from"] or self._name, fact["content"]] += 1
                self._answers.append(_Answer.of(fact, self._estimate(item)))
        elif item.error is not None:
            self._keep["cannot be asked"] += 1
            self._unusable = self._unusable or item.error
        else:
            self._send[_why_sent(fact, item, truncated=self._config.retry_truncated)] += 1
            estimate = self._estimate(item)
            self._guessed.rows += 1
            self._guessed.prompt_tokens += estimate.prompt_tokens
            self._guessed.completion_tokens += estimate.completion_tokens

    def inserted(self, rows: int) -> None:
        """So many rows that differ from what stood in their places are new: what stood there has only moved."""
        rows = min(rows, self._send["changed"])
        self._send += Counter(new=rows)
        self._send -= Counter(changed=rows)

    def finish(self, usual: _Usual) -> Plan:
        if self._answers:
            usual = _Usual(service_times_s=[each.service_time_s for each in self._answers])
            prompts, completions = self._tokens()
        else:
            prompts, completions = self._guessed_tokens(usual)
        return Plan(
            send=self._send,
            keep=self._keep,
            prompt_tokens=prompts,
            completion_tokens=completions,
            usd=self._usd(prompts, completions),
            seconds=self._seconds(prompts + completions, usual),
            evidence=(evidence := self._evidence or usual.evidence),
            guessed=0 if evidence else self._guessed.rows,
            like=usual.run,
            notes=[f"a row that cannot be asked: {self._unusable}"] if self._unusable else [],
            budget={name: limit for name, limit in vars(self._config.budget).items() if limit is not None},
        )

    def _estimate(self, item: Item) -> Estimate:
        """What the row takes, as far as its length says."""
        asked = item.input["asked"] if self._config.task.image else item.input
        match self._config.task.kind:
            case TaskKind.transcribe:
                return Estimate()
            case TaskKind.embed:
                return self._estimator.estimate(EmbeddingRequest(texts=[asked]))
        return self._estimator.estimate(GenerationRequest(input=asked, params=self._config.request))

    def _tokens(self) -> tuple[Interval, Interval]:
        """Of prompts and of answers, by those that were answered."""
        rows, answers = self._guessed.rows, self._answers
        prompts = total_of(
            rows,
            [each.usage.prompt_tokens for each in answers],
            [each.guess for each in answers],
            guessed=self._guessed.prompt_tokens,
        )
        return prompts, total_of(rows, [each.usage.completion_tokens for each in answers])

    def _guessed_tokens(self, usual: _Usual) -> tuple[Interval, Interval]:
        """Of prompts by their lengths; of answers by those of another run, or by what may be asked for."""
        rows, prompt = self._guessed.rows, self._guessed.prompt_tokens
        prompts = Interval(expected=prompt, low=prompt / _UNLEARNT, high=(prompt + 16 * rows) * _UNLEARNT)
        most = self._guessed.completion_tokens
        is_limited = any(self._config.request.get(key) for key in OUTPUT_LIMITS)
        if usual.completion_tokens:
            longest = most / max(rows, 1) if is_limited else math.inf
            alike = total_of(rows, [min(each, longest) for each in usual.completion_tokens])
            return prompts, replace(alike, low=alike.low / _UNLEARNT, high=alike.high * _UNLEARNT)
        if not is_limited:
            bounds = [longest_answer_of(each) for each in self._deployments]
            known = [each for each in bounds if each is not None]
            high = float(max(known) * rows) if len(known) == len(bounds) else most * _UNBOUNDED
            return prompts, Interval(expected=most, low=min(most, float(rows)), high=max(most, high))
        usually = float(self._config.limits.default_output_tokens * rows)
        expected = -math.expm1(-most / usually) * usually if rows else 0.0  # exponentially distributed, and cut off
        return prompts, Interval(expected=expected, low=min(most, float(rows)), high=most)

    def _usd(self, prompts: Interval, completions: Interval) -> Interval | None:
        known = [price_for(each, self._config.simulator) for each in self._deployments]
        prices = [each for each in known if each is not None]
        if len(prices) < len(known):
            return None
        usual = _mean(prices)
        if not self._answers:
            cost = prompts * usual.prompt + completions * usual.completion
        else:
            completion = sum(each.usage.completion_tokens for each in self._answers) / len(self._answers)
            of_answer = completion * usual.completion
            cost = total_of(
                self._guessed.rows,
                [usual.cost_usd(each.usage) for each in self._answers],
                [each.guess * usual.prompt + of_answer for each in self._answers],
                guessed=self._guessed.prompt_tokens * usual.prompt + self._guessed.rows * of_answer,
            )
        shares = [
            theirs / own
            for each in prices
            for theirs, own in ((each.prompt, usual.prompt), (each.completion, usual.completion))
            if own
        ]
        return Interval(  # all of it may go to the cheapest, or to the dearest
            expected=cost.expected, low=cost.low * min(shares, default=1.0), high=cost.high * max(shares, default=1.0)
        )

    def _seconds(self, tokens: Interval, usual: _Usual) -> Interval | None:
        """By the slots and by the limits, whichever holds it up more; at most by one after the other.

        The last answer comes after all that. A limit is not used to the full, as processes are late and servers slow.
        """
        limits, rows = self._config.limits, self._guessed.rows
        group = self._config.task.micro_batch_size if self._config.task.kind is TaskKind.embed else 1
        requests = math.ceil(rows / group)
        amounts = {"rpm": Interval(expected=requests, low=requests, high=requests), "tpm": tokens}
        buckets = [Bucket(limit) for limit in limits_of(limits) if limit.name in amounts]
        lasting = [amounts[each.name].beyond(each.burst) * (1 / each.rate) for each in buckets]
        lasting = [replace(each, high=each.high * _UNUSED) for each in lasting]
        if usual.service_times_s and isinstance(limits.concurrency, int):
            lasting.append(total_of(rows, usual.service_times_s) * (1 / (limits.concurrency * group)))
        if not rows:
            return ZERO
        if not lasting:
            return None
        lasting.append(_OWN_TIME * rows)
        return Interval(
            expected=max(each.expected for each in lasting),
            low=max(each.low for each in lasting),
            high=sum(each.high for each in lasting) + max(usual.service_times_s, default=0.0),
        )


@dataclass(slots=True)
class _Guessed:
    """What the rows to send take by their lengths."""

    rows: int = 0
    prompt_tokens: float = 0.0
    completion_tokens: float = 0.0  # at most, or by default


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """What an answered row took."""

    guess: float  # prompt tokens by its length
    usage: TokenUsage
    service_time_s: float

    @classmethod
    def of(cls, fact: Any, estimate: Estimate) -> _Answer:
        usage = TokenUsage(
            prompt_tokens=fact["prompt_tokens"] or 0,
            completion_tokens=fact["completion_tokens"] or 0,
            cached_tokens=fact["cached_tokens"],
        )
        return cls(guess=estimate.prompt_tokens, usage=usage, service_time_s=fact["service_time_s"])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Usual:
    """What answers took elsewhere."""

    run: str | None = None
    evidence: Counter[Answered] = field(default_factory=Counter)
    completion_tokens: Sequence[int] = ()
    service_times_s: Sequence[float] = ()


async def _usual(config: RunnerConfig, folder: Path) -> _Usual:
    """What the same deployments answered in the latest other run of the same name; nothing if none can be read."""
    for path in latest_runs(folder.parent, "*", own=folder / RUN_DATABASE):
        with suppress(StoreError):
            async with await Store.open_readonly(path, patience_s=PATIENCE_S) as store:
                if usual := await _answered(config, path.parent, store):
                    return usual
    return _Usual()


async def _answered(config: RunnerConfig, run: Path, store: Store) -> _Usual | None:
    """What the deployments of ``config`` answered in ``run``, whatever they were asked; None: nothing."""
    if (await store.meta()).get("task") != config.task.kind.value:
        return None
    sql = _USUAL.format(marks=", ".join("?" * len(replicas(config))))
    answers = [row async for row in store.query(sql, (*replicas(config), SAMPLE))]
    return (
        _Usual(
            run=str(run),
            evidence=Counter((run_name(run), row["content"]) for row in answers),
            completion_tokens=[row["completion_tokens"] or 0 for row in answers],
            service_times_s=[row["service_time_s"] for row in answers],
        )
        if answers
        else None
    )


def _why_kept(fact: Any) -> str:
    if fact["error_type"] is not None:
        return "failed earlier"
    taken_over = fact["reused_from"] is not None and fact["content"] != fact["before"]
    return "taken over from elsewhere" if taken_over else "answered"


def _why_sent(fact: Any, item: Item, *, truncated: bool) -> str:
    if fact is None or fact["before"] is None:
        return "new"
    if fact["before"] == item.content:
        if fact["before_error"] is not None:
            return "failed earlier"
        if fact["before_settled"]:
            return "asked anew"
        return "interrupted earlier" if fact["before_sent"] else "new"
    if truncated and fact["before_truncated"]:
        return "truncated"
    return "changed" if fact["before_settled"] or fact["before_sent"] else "new"


def _counts(verb: str, reasons: Mapping[str, int]) -> str:
    total = sum(reasons.values())
    why = ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.items(), key=lambda each: -each[1]))
    return f"  {verb}    {total:,} rows{f': {why}' if why else ''}"


def _mean(prices: Sequence[TokenPrice]) -> TokenPrice:
    return TokenPrice(
        prompt=sum(each.prompt for each in prices) / len(prices),
        completion=sum(each.completion for each in prices) / len(prices),
        cached=sum(each.prompt if each.cached is None else each.cached for each in prices) / len(prices),
    )


@asynccontextmanager
async def _copied(folder: Path) -> AsyncIterator[tuple[Store, bool]]:
    """A copy of the run's database to plan in, and whether there was none."""
    source = folder / RUN_DATABASE
    with tempfile.TemporaryDirectory(prefix="runner-plan-") as name:
        copy = Path(name) / RUN_DATABASE
        is_new = not source.is_file()
        try:
            if not is_new:
                await asyncio.to_thread(_copy, source, copy)
            await (await Store.open(copy)).aclose()  # lays its tables, or brings them up to date
            await asyncio.to_thread(_note_before, copy)
        except sqlite3.Error as error:
            raise StoreError(f"{source} cannot be read ({error})") from None
        async with await Store.open(copy) as store:
            yield store, is_new


def _copy(source: Path, copy: Path) -> None:
    """Copy a database that may be at work. The source stays as it is."""
    at_work = source.with_name(f"{source.name}-wal").exists()
    uri = f"{source.absolute().as_uri()}?{'mode=ro' if at_work else 'immutable=1'}"
    with closing(sqlite3.connect(uri, uri=True)) as database, closing(sqlite3.connect(copy)) as target:
        database.backup(target)


def _note_before(copy: Path) -> None:
    """Add a table of what was known ``before``."""
    with closing(sqlite3.connect(copy)) as database:
        database.executescript(_BEFORE)


_BEFORE = f"""
    CREATE TABLE before (
        position INTEGER PRIMARY KEY, content BLOB, sent INTEGER, settled INTEGER, error_type TEXT, truncated INTEGER
    );
    INSERT INTO before
    SELECT
        rows.position, rows.content, rows.content IN (SELECT content FROM attempts WHERE {WAS_SENT}),
        answers.ticket IS NOT NULL, answers.error_type, {TRUNCATED}
    FROM rows
    LEFT JOIN answers USING (ticket);
"""

_FACTS = """
    SELECT
        rows.position, rows.content, before.content AS before,
        before.sent AS before_sent, before.settled AS before_settled, before.error_type AS before_error,
        before.truncated AS before_truncated,
        answers.ticket, answers.error_type, answers.reused_from, answers.prompt_tokens, answers.completion_tokens,
        answers.total_tokens, answers.cached_tokens, answers.service_time_s
    FROM rows
    LEFT JOIN before ON before.position = rows.position
    LEFT JOIN answers USING (ticket)
    WHERE rows.position BETWEEN ? AND ?
"""

_INSERTED = """
    SELECT count(*) AS n
    FROM rows
    JOIN before ON before.position = rows.position AND before.content != rows.content
    WHERE rows.session = (SELECT max(id) FROM sessions)
        AND (before.settled OR before.sent)
        AND before.content IN (SELECT content FROM rows)
"""

_USUAL = """
    SELECT content, completion_tokens, service_time_s
    FROM answers
    WHERE error_type IS NULL AND reused_from IS NULL AND total_tokens IS NOT NULL AND deployment IN ({marks})
    ORDER BY ticket DESC
    LIMIT ?
"""
