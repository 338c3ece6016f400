"""Budgets: what they let through, how they end, and who shares them."""

from __future__ import annotations

import asyncio
import os
import random
import re
import sqlite3
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness import Command, Experiment, numbered, refusal, serving, shout
from runner.budget import Budget, shown
from runner.concurrency import Window
from runner.config import (
    BudgetConfig,
    DatasetConfig,
    DatasetKind,
    Dedupe,
    DeploymentConfig,
    LimitsConfig,
    PriceConfig,
    RetryConfig,
    RunnerConfig,
    ShardConfig,
    SimulatorConfig,
    SweepConfig,
    TaskConfig,
    TaskKind,
)
from runner.errors import (
    BudgetExhausted,
    ConfigError,
    ConnectError,
    RateLimitError,
    RequestError,
    RunStopped,
    StoreError,
    Timeout,
)
from runner.store import Store
from runner.types import Client, Generation, GenerationRequest, Request, Response, TokenPrice, TokenUsage
from virtual_time import now, virtual_time

PRICE = PriceConfig(prompt=1.0, completion=10.0)
LONGEST = 10_000


def priced(**settings: Any) -> RunnerConfig:
    """One deployment, whose answers have up to `LONGEST` tokens and cost up to $0.1."""
    deployment = DeploymentConfig(
        model="hosted_vllm/m", api_base="http://localhost:1/v1", price=PRICE, max_output_tokens=LONGEST
    )
    return RunnerConfig(**{"deployments": {"m": deployment}, **settings})


class Provider:
    """Answers of random lengths after random times; remembers what they cost."""

    def __init__(self, seed: int, *, answer: Callable[[random.Random], int] | None = None) -> None:
        self.costs: list[float] = []
        self.most_at_once = 0
        self._at_once = 0
        self._random = random.Random(seed)
        self._answer = answer or (lambda draw: min(LONGEST, int(draw.lognormvariate(5.5, 1.2)) + 1))

    async def send(self, request: Request) -> Response:
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        request.trace.on_the_wire = True
        try:
            await asyncio.sleep(self._random.expovariate(1.0))
        finally:
            self._at_once -= 1
        request.trace.on_the_wire = False
        length = self._answer(self._random)
        usage = TokenUsage(prompt_tokens=20, completion_tokens=length, total_tokens=20 + length)
        request.trace.price = TokenPrice(prompt=PRICE.prompt / 1e6, completion=PRICE.completion / 1e6)
        self.costs.append(request.trace.price.cost_usd(usage))
        return Response(output=Generation(text="hi"), model_id="m", request_id=None, usage=usage, headers={})

    async def aclose(self) -> None:
        pass


class Books:
    """A store in which nothing has been taken so far, or so much. The real one has a thread, and its time is real."""

    def __init__(self, **facts: float) -> None:
        unset = dict.fromkeys(("session", "usd", "tokens", "requests", "seconds"), 0.0)
        unknown = dict.fromkeys(("bounds_usd", "unknown", "without_bound", "largest_tokens", "largest_usd"), 0.0)
        self._facts = {**unset, **unknown, "session": 1, **facts}

    async def query(self, sql: str, parameters: Sequence[Any] = ()) -> AsyncIterator[Mapping[str, Any]]:
        if not parameters:
            yield self._facts
        elif requests := self._facts["requests"]:  # for the last answers, of which one may stand for all
            of_one = {name: self._facts[name] / requests for name in ("usd", "tokens")}
            counts = dict.fromkeys(("prompt_tokens", "completion_tokens", "cached_tokens"))
            spent = {"cost_usd": of_one["usd"], "total_tokens": of_one["tokens"]}
            yield {**counts, **spent, "deployment": "m", "shared": 0}


@asynccontextmanager
async def opened(budget: Budget, **facts: float) -> AsyncIterator[list[RunStopped]]:
    ends: list[RunStopped] = []
    books: Any = Books(**facts)
    async with budget.opened(books, end=ends.append):
        yield ends


async def ask_until_the_end(budget: Budget, provider: Provider, *, at_once: int = 500, **params: Any) -> None:
    """Ask, so many at once, until the budget says that it is used up."""
    client = budget.around("m", provider)

    async def work() -> None:
        while True:
            try:
                await client.send(GenerationRequest(input="How long is the coast?", params=params))
            except BudgetExhausted:
                return

    await asyncio.gather(*(work() for _ in range(at_once)))


class Pausing:
    """A client that waits for the end of a pause before it sends, and gives its slot back meanwhile."""

    def __init__(self, client: Client, window: Window) -> None:
        self._client = client
        self._window = window

    async def send(self, request: Request) -> Response:
        async with self._window.aside():
            await asyncio.sleep(1.0)
        return await self._client.send(request)

    async def aclose(self) -> None:
        await self._client.aclose()


# The promise


@pytest.mark.parametrize("seed", range(20))
def test_a_dollar_is_never_exceeded_by_more_than_one_request_and_is_used(tmp_path: Path, seed: int) -> None:
    """At 500 in flight, with answers whose size is not known before."""
    provider = Provider(seed)

    @virtual_time
    async def run() -> None:
        budget = Budget(priced(budget=BudgetConfig(usd=1.0)), tmp_path / "run")
        async with opened(budget):
            await ask_until_the_end(budget, provider)

    run()
    assert 0.95 <= sum(provider.costs) <= 1.0 + max(provider.costs)
    assert provider.most_at_once > 5
    assert len(provider.costs) > 100


@pytest.mark.parametrize("seed", range(5))
def test_two_that_share_a_dollar_keep_to_it_together(tmp_path: Path, seed: int) -> None:
    provider = Provider(seed)
    config = priced(budget=BudgetConfig(usd=1.0), sweep=SweepConfig(folder=str(tmp_path / "sweep")))

    @virtual_time
    async def run() -> None:
        first, second = (Budget(config, tmp_path / name) for name in ("first", "second"))
        async with opened(first), opened(second):
            await asyncio.gather(*(ask_until_the_end(budget, provider, at_once=250) for budget in (first, second)))

    run()
    assert 0.95 <= sum(provider.costs) <= 1.0 + max(provider.costs)


@virtual_time
async def test_with_a_bound_on_the_answers_a_budget_is_never_exceeded(tmp_path: Path) -> None:
    provider = Provider(0, answer=lambda draw: draw.randint(1, 50))
    budget = Budget(priced(budget=BudgetConfig(usd=0.5), request={"max_tokens": 50}), tmp_path / "run")
    async with opened(budget):
        await ask_until_the_end(budget, provider, at_once=1000, max_tokens=50)
    assert 0.495 <= sum(provider.costs) <= 0.5 + max(provider.costs)
    assert provider.most_at_once > 250


@pytest.mark.parametrize(
    ("limit", "sent"),
    [
        (BudgetConfig(usd=1e-4), 0),
        (BudgetConfig(usd=1.5e-4), 1),
        (BudgetConfig(tokens=100), 0),
        (BudgetConfig(tokens=130), 1),
    ],
)
@virtual_time
async def test_nothing_is_sent_where_a_prompt_alone_takes_more_than_the_budget(
    tmp_path: Path, limit: BudgetConfig, sent: int
) -> None:
    provider = Provider(0)
    request = GenerationRequest(input="How long is the coast? " * 20)  # some 115 tokens
    budget = Budget(priced(budget=limit), tmp_path / "run")
    async with opened(budget):
        client = budget.around("m", provider)
        *_, ended = await asyncio.gather(*(client.send(request) for _ in range(2)), return_exceptions=True)
    assert len(provider.costs) == sent
    assert isinstance(ended, BudgetExhausted)
    assert ("taken, and one request takes about" in str(ended)) is (sent == 0)


@pytest.mark.parametrize(
    ("taken", "said"), [(0.0, "=1 has room for 10"), (0.2, "=1, $0.2000 of it taken by now, has room for 8")]
)
def test_requests_that_wait_for_room_are_told_of_with_what_one_may_take(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, taken: float, said: str
) -> None:
    @virtual_time
    async def run() -> None:
        budget = Budget(priced(budget=BudgetConfig(usd=1.0)), tmp_path / "run")
        async with opened(budget, usd=taken):
            await ask_until_the_end(budget, Provider(0), at_once=50)

    run()
    [warning] = [record.getMessage() for record in caplog.records if "at once" in record.getMessage()]
    assert (
        f"budget.usd{said} requests at most at once, as each may take $0.1003 ($0.1000 for the longest answer, "
        in warning
    )
    assert warning.endswith(": a larger budget, or a smaller request.max_tokens, makes it more")


def test_shorter_answers_are_no_advice_where_the_prompts_are_what_takes_the_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    @virtual_time
    async def run() -> None:
        budget = Budget(priced(budget=BudgetConfig(usd=0.01), request={"max_tokens": 1}), tmp_path / "run")
        async with opened(budget):
            await ask_until_the_end(budget, Provider(0, answer=lambda draw: 1), at_once=50, max_tokens=1)

    run()
    [warning] = [record.getMessage() for record in caplog.records if "at once" in record.getMessage()]
    assert warning.endswith(": a larger budget makes it more")


@virtual_time
async def test_what_has_no_bound_is_sent_one_at_a_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    provider = Provider(0)
    budget = Budget(priced(budget=BudgetConfig(usd=0.05)), tmp_path / "run")
    picture: Any = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://x/a.png"}}]}]
    async with opened(budget):
        client = budget.around("m", provider)
        await asyncio.gather(
            *(client.send(GenerationRequest(input=picture)) for _ in range(100)), return_exceptions=True
        )
    assert provider.most_at_once == 1
    assert 0.04 <= sum(provider.costs) <= 0.05 + max(provider.costs)
    assert "requests go one at a time, as what one may take has no bound" in caplog.text


@virtual_time
async def test_requests_and_tokens_are_counted_too(tmp_path: Path) -> None:
    provider = Provider(0)
    budget = Budget(priced(budget=BudgetConfig(requests=100)), tmp_path / "run")
    async with opened(budget):
        await ask_until_the_end(budget, provider)
    assert len(provider.costs) == 100

    provider = Provider(0, answer=lambda draw: 80)
    budget = Budget(priced(budget=BudgetConfig(tokens=50_000), request={"max_tokens": 80}), tmp_path / "other")
    async with opened(budget):
        await ask_until_the_end(budget, provider)
    assert len(provider.costs) == 500


@virtual_time
async def test_time_ends_a_run_whose_requests_wait(tmp_path: Path) -> None:
    budget = Budget(priced(budget=BudgetConfig(seconds=60)), tmp_path / "run")
    async with opened(budget, seconds=20) as ends:
        await asyncio.sleep(100)
        assert [str(end) for end in ends] == ["budget.seconds=60: 60.0 s taken, the budget is used up"]
        with pytest.raises(BudgetExhausted):
            await budget.around("m", Provider(0)).send(GenerationRequest(input="hi"))
    assert now() == pytest.approx(100)


# What failures take


class Failing:
    def __init__(self, error: Exception) -> None:
        self._error = error

    async def send(self, request: Request) -> Response:
        raise self._error

    async def aclose(self) -> None:
        pass


@pytest.mark.parametrize(
    ("error", "requests", "usd"),
    [
        (ConnectError("nobody listens"), 0, 0.0),
        (RateLimitError("slow down"), 1, 0.0),
        (Timeout("too late"), 1, 0.1),
    ],
)
def test_a_failure_takes_what_it_can_have_cost(tmp_path: Path, error: RequestError, requests: int, usd: float) -> None:
    @virtual_time
    async def run() -> None:
        budget = Budget(priced(budget=BudgetConfig(usd=1.0, requests=10)), tmp_path)
        async with opened(budget):
            with pytest.raises(RequestError):
                await budget.around("m", Failing(error)).send(GenerationRequest(input="hi"))
            left = budget.left()
        assert left["requests"] == 10 - requests
        assert left["usd"] == pytest.approx(1.0 - usd, abs=0.005)

    run()


@virtual_time
async def test_a_request_that_is_cancelled_on_the_wire_counts_and_one_that_waits_does_not(tmp_path: Path) -> None:
    budget = Budget(priced(budget=BudgetConfig(usd=0.15)), tmp_path)
    async with opened(budget):
        client = budget.around("m", Provider(0, answer=lambda draw: 10))
        tasks = [asyncio.create_task(client.send(GenerationRequest(input="hi"))) for _ in range(10)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert budget.left()["usd"] == pytest.approx(0.0, abs=0.05)


# Over sessions and processes


@virtual_time
async def test_what_earlier_sessions_took_counts(tmp_path: Path) -> None:
    provider = Provider(0, answer=lambda draw: 100)
    budget = Budget(priced(budget=BudgetConfig(usd=1.0), request={"max_tokens": 100}), tmp_path)
    async with opened(budget, usd=0.6, bounds_usd=0.3):
        await ask_until_the_end(budget, provider, max_tokens=100)
    assert 0.095 <= sum(provider.costs) <= 0.1 + max(provider.costs)


@virtual_time
async def test_a_later_session_sends_nothing_that_earlier_answers_say_there_is_no_room_for(tmp_path: Path) -> None:
    provider = Provider(0)
    budget = Budget(priced(budget=BudgetConfig(usd=1.0)), tmp_path)
    async with opened(budget, usd=0.995, requests=100):
        await ask_until_the_end(budget, provider)
    assert provider.costs == []


@virtual_time
async def test_runs_that_are_moved_take_their_budget_with_them(tmp_path: Path) -> None:
    config = priced(budget=BudgetConfig(requests=10))
    async with opened(Budget(config, tmp_path / "here")) as _:
        pass
    budget = Budget(config, tmp_path / "here")
    async with opened(budget, session=2, requests=4):
        assert budget.left() == {"requests": 6}
    (tmp_path / "here").rename(tmp_path / "there")
    moved = Budget(config, tmp_path / "there")
    async with opened(moved, session=3, requests=4):
        assert moved.left() == {"requests": 6}


@virtual_time
async def test_after_a_kill_what_was_in_flight_counts_and_not_all_that_was_taken_up(tmp_path: Path) -> None:
    config = priced(budget=BudgetConfig(usd=10.0))
    killed = Budget(config, tmp_path)
    async with opened(killed):
        held = [asyncio.create_task(killed.around("m", Provider(0)).send(GenerationRequest(input="hi"))) for _ in "12"]
        await asyncio.sleep(0)
        after = Budget(config, tmp_path)
        async with opened(after, session=2, bounds_usd=9.0):
            assert after.left()["usd"] == pytest.approx(9.8, abs=0.02)
        unbudgeted = Budget(config, tmp_path)
        async with opened(unbudgeted, session=4, bounds_usd=9.0):
            assert unbudgeted.left()["usd"] == pytest.approx(1.0, abs=0.02)
        await asyncio.gather(*held)


@virtual_time
async def test_what_a_dead_cell_reserved_is_not_waited_for_and_stays_taken(tmp_path: Path) -> None:
    config = priced(budget=BudgetConfig(usd=0.15), sweep=SweepConfig(folder=str(tmp_path / "sweep")))
    dead = Budget(config, tmp_path / "dead")
    async with opened(dead):
        task = asyncio.create_task(dead.around("m", Provider(0)).send(GenerationRequest(input="hi")))
        await asyncio.sleep(0)
        with closing(sqlite3.connect(tmp_path / "sweep" / "budget.sqlite")) as database, database:
            database.execute("CREATE TABLE frozen AS SELECT * FROM holders")
        await task
    with closing(sqlite3.connect(tmp_path / "sweep" / "budget.sqlite")) as database, database:
        database.execute("INSERT OR REPLACE INTO holders SELECT * FROM frozen")

    provider = Provider(0, answer=lambda draw: 100)
    budget = Budget(config, tmp_path / "alive")
    async with opened(budget):
        await ask_until_the_end(budget, provider, at_once=5)
        assert 25 <= now() <= 120
    assert 0.04 <= sum(provider.costs) <= 0.05


@virtual_time
async def test_a_budget_that_is_swept_over_is_each_cells_own(tmp_path: Path) -> None:
    sweep = SweepConfig(folder=str(tmp_path / "sweep"), over=["budget.requests"])
    for name in ("first", "second"):
        provider = Provider(0)
        budget = Budget(priced(budget=BudgetConfig(requests=10), sweep=sweep), tmp_path / name)
        async with opened(budget):
            await ask_until_the_end(budget, provider, at_once=20)
        assert len(provider.costs) == 10


# What cannot be kept is refused


@virtual_time
async def test_a_request_in_a_pause_does_not_wait_for_those_who_wait_for_its_part_of_the_budget(tmp_path: Path) -> None:
    window = Window(1)
    budget = Budget(priced(budget=BudgetConfig(requests=1)), tmp_path / "run")
    client = budget.around("m", Pausing(Provider(0), window))

    async def work() -> str:
        async with window:
            try:
                await client.send(GenerationRequest(input="How long is the coast?"))
            except BudgetExhausted:
                return "refused"
            return "answered"

    async with opened(budget), asyncio.timeout(600):
        assert list(await asyncio.gather(work(), work())) == ["answered", "refused"]


def test_an_unknown_price_is_an_error_that_says_how_to_set_it(tmp_path: Path) -> None:
    config = RunnerConfig(model="hosted_vllm/m", budget=BudgetConfig(usd=1.0), request={"max_tokens": 5})
    with pytest.raises(ConfigError, match=r"none is known for hosted_vllm/m: set deployments.LABEL.price.prompt=…"):
        Budget(config, tmp_path)


def test_answers_that_may_have_any_length_are_an_error_that_says_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"budget.tokens must know how long .*: set request.max_tokens=…"):
        Budget(RunnerConfig(model="hosted_vllm/m", budget=BudgetConfig(tokens=1000)), tmp_path)


def test_requests_need_neither_price_nor_length(tmp_path: Path) -> None:
    Budget(RunnerConfig(model="hosted_vllm/m", budget=BudgetConfig(requests=3, seconds=5)), tmp_path)


@virtual_time
async def test_a_file_that_is_no_purse_is_an_error_of_the_store(tmp_path: Path) -> None:
    (tmp_path / "budget.sqlite").write_bytes(os.urandom(4096))
    with pytest.raises(StoreError, match=r"budget\.sqlite cannot be used"):
        async with opened(Budget(priced(budget=BudgetConfig(requests=1)), tmp_path)):
            pass


# Experiments


def experiment(tmp_path: Path, url: str, **settings: Any) -> Experiment:
    return Experiment(tmp_path, **{"model": "simulated/m", "api_base": url, "request": {"max_tokens": 16}, **settings})


async def test_a_run_stops_cleanly_and_says_what_is_left(tmp_path: Path) -> None:
    async with serving() as provider:
        run = experiment(tmp_path, provider.url)
        first = await run(numbered(30), budget=BudgetConfig(requests=10))
        again = await run(budget=BudgetConfig(requests=10))
        more = await run(budget=BudgetConfig(requests=30))
    assert (first.exit_code, first.summary["stopped"], first.summary["succeeded"]) == (4, "budget", 10)
    assert first.message is not None
    assert "20 rows are left: $0.0000" in first.message
    assert (again.exit_code, again.summary["succeeded"]) == (4, 10)
    assert (more.exit_code, more.summary["succeeded"], len(provider.requests)) == (0, 30, 30)


async def test_what_is_left_is_forecast_at_the_price_of_now(tmp_path: Path) -> None:
    budget = BudgetConfig(requests=10)
    dearer = SimulatorConfig(usd_per_million_prompt_tokens=1e6, usd_per_million_completion_tokens=0)
    async with serving() as provider:
        run = experiment(tmp_path, provider.url, budget=budget)
        await run(numbered(30))
        report = await run(simulator=dearer)
    assert report.message is not None
    assert report.message.endswith(
        "20 rows are left: $60.00 ($60.00 to $60.00) and 100 tokens (100 tokens to 100 tokens)"
    )


async def test_what_a_request_takes_is_expected_at_the_price_of_now(tmp_path: Path) -> None:
    dear = SimulatorConfig(usd_per_million_prompt_tokens=0, usd_per_million_completion_tokens=1e5)
    cheap = SimulatorConfig(usd_per_million_prompt_tokens=0, usd_per_million_completion_tokens=1e4)
    async with serving() as provider:
        run = experiment(tmp_path, provider.url, limits=LimitsConfig(concurrency=1))
        first = await run(numbered(30), simulator=dear, budget=BudgetConfig(requests=10))
        usd = first.summary["cost_usd"]
        report = await run(simulator=cheap, budget=BudgetConfig(usd=1.05 * usd))
        dearer = await run(simulator=dear, budget=BudgetConfig(usd=1.06 * usd))
    assert (report.exit_code, report.summary["succeeded"]) == (4, 15)
    assert (dearer.exit_code, dearer.summary["succeeded"]) == (4, 15)


async def test_retries_count_against_the_budget(tmp_path: Path) -> None:
    async with serving(lambda asked: refusal(429, "rate_limit")) as provider:
        run = experiment(tmp_path, provider.url, retry=RetryConfig(max_retries=50, base_s=0.001, cap_s=0.001))
        report = await run(numbered(1), budget=BudgetConfig(requests=2))
    assert (report.exit_code, len(provider.requests)) == (4, 2)


async def test_a_run_that_was_asked_without_a_budget_counts_for_one(tmp_path: Path) -> None:
    async with serving() as provider:
        run = experiment(tmp_path, provider.url)
        await run(numbered(6))
        report = await run(numbered(20), budget=BudgetConfig(requests=8))
    assert (report.exit_code, len(provider.requests)) == (4, 8)


async def test_the_time_of_a_run_is_up(tmp_path: Path) -> None:
    async with serving(lambda asked: 0.3) as provider:
        run = experiment(tmp_path, provider.url, limits=LimitsConfig(concurrency=1))
        report = await run(numbered(50), budget=BudgetConfig(seconds=0.5))
    assert (report.exit_code, report.summary["stopped"]) == (4, "budget")
    assert 1 <= report.summary["succeeded"] < 10


async def test_a_pilot_asks_rows_from_everywhere_and_goes_on(tmp_path: Path) -> None:
    async with serving() as provider:
        report = await experiment(tmp_path, provider.url)(numbered(100), pilot=10)
    first = sorted(int(asked.text.removeprefix("row ")) for asked in provider.requests[:10])
    assert [position // 10 for position in first] == list(range(10))
    assert len(provider.requests) == report.summary["succeeded"] == 100
    assert report.summary["reused"] == 0


async def test_texts_that_shared_a_request_count_as_one_when_a_run_goes_on(tmp_path: Path) -> None:
    async with serving() as provider:
        task = TaskConfig(kind=TaskKind.embed, micro_batch_size=10)
        run = experiment(tmp_path, provider.url, task=task, budget=BudgetConfig(requests=7))
        first = await run(numbered(60))
        more = await run(numbered(90))
    assert (first.exit_code, more.exit_code) == (0, 4)
    assert more.summary["succeeded"] == 70
    assert more.message is not None
    assert "budget.requests=7: 7 requests taken" in more.message
    assert "20 rows are left" in more.message


async def test_a_pilot_asks_rows_that_share_an_answer_once_and_counts_them_so(tmp_path: Path) -> None:
    rows = [{"prompt": f"row {n % 40}"} for n in range(1000)]
    async with serving() as provider:
        run = experiment(tmp_path, provider.url, dedupe=Dedupe.always)
        stopped = await run(rows, pilot=20, budget=BudgetConfig(requests=30))
        asked = {request.text for request in provider.requests}
        assert 10 < len(asked) == len(provider.requests) <= 20
        assert stopped.message is not None
        assert f"{40 - len(asked)} rows are left" in stopped.message
        finished = await run(pilot=20, budget=BudgetConfig(requests=40))
    assert (stopped.exit_code, finished.exit_code, len(provider.requests)) == (4, 0, 40)
    assert finished.summary["succeeded"] == 1000


async def test_a_run_that_goes_on_expects_of_a_request_what_the_last_ones_took(tmp_path: Path) -> None:
    dear = SimulatorConfig(latency_s=0.0, usd_per_million_prompt_tokens=1e5, usd_per_million_completion_tokens=0)
    cheap = replace(dear, usd_per_million_prompt_tokens=1.0)
    run = Experiment(tmp_path, model="simulated/m", request={"max_tokens": 16}, limits=LimitsConfig(concurrency=1))
    await run(numbered(200), simulator=cheap)
    stopped = await run(numbered(300), simulator=dear, budget=BudgetConfig(usd=4.1))
    again = await run(numbered(300), simulator=dear, budget=BudgetConfig(usd=4.1))

    assert (stopped.exit_code, again.exit_code) == (4, 4)
    assert 210 < stopped.summary["succeeded"] == again.summary["succeeded"]


async def test_where_rows_share_answers_what_is_left_is_what_is_to_be_asked_and_a_plan_says_the_same(
    tmp_path: Path,
) -> None:
    rows = [{"prompt": f"row {n // 5}"} for n in range(1000)] + [{"prompt": "row 0"}] * 7
    async with serving() as provider:
        run = experiment(tmp_path, provider.url, dedupe=Dedupe.always)
        stopped = await run(rows, budget=BudgetConfig(requests=10), limits=LimitsConfig(concurrency=4))
        plan = await run.plan(rows)

    summary = stopped.summary
    assert (stopped.exit_code, summary["succeeded"], summary["deduplicated"]) == (4, 57, 47)
    assert stopped.message is not None
    assert "190 rows are left to ask, whose answers 760 more share" in stopped.message
    assert summary["rows"] - summary["succeeded"] == 190 + 760
    assert (plan.send, plan.keep) == ({"new": 190}, {"answered": 57, "sharing the answer of another row": 760})


async def test_the_last_line_of_progress_counts_what_the_summary_does(tmp_path: Path, command: Command) -> None:
    command.write_rows("rows.jsonl", [{"prompt": f"row {n // 5}"} for n in range(200)] + [{"prompt": "row 0"}] * 7)
    arguments = ["dataset=jsonl", "dataset.path=rows.jsonl", "name=t", "tracker=none", "dedupe=always"]
    stopped = await command(*arguments, "budget.requests=10")
    again = await command(*arguments, "budget.requests=15")

    for done, rows in ((stopped, 57), (again, 82)):
        assert done.exit_code == 4
        counts = [int(count) for count in re.findall(r" (\d+)/207 ", done.err)]
        assert counts[-1] == rows == max(counts)
        assert re.search(rf"succeeded +{rows}\n", done.out)
        assert re.search(rf"left to ask +{207 - rows}\n", done.out)


async def test_the_last_line_of_progress_tells_shared_answers_from_those_that_were_there(command: Command) -> None:
    command.write_rows("rows.jsonl", [{"prompt": f"row {n % 100}"} for n in range(600)])
    arguments = ["dataset=jsonl", "dataset.path=rows.jsonl", "name=t", "tracker=none", "dedupe=always"]
    stopped = await command(*arguments, "budget.requests=50")
    done = await command(*arguments)

    last = [[line for line in each.err.splitlines() if "rows/s" in line][-1] for each in (stopped, done)]
    assert "300/600 (50%)  failed 0  deduplicated 250 " in last[0]
    assert "600/600 (100%)  failed 0  reused 300  deduplicated 250 " in last[1]
    assert re.search(r"reused +300\ndeduplicated +500\n", done.out)


async def test_where_there_is_no_time_to_read_on_what_is_left_is_said_to_be_no_more_than_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runner.run.GRACE_S", -1.0)
    rows = [{"prompt": f"row {n // 5}"} for n in range(1000)]
    async with serving() as provider:
        run = experiment(tmp_path, provider.url, dedupe=Dedupe.always)
        stopped = await run(rows, budget=BudgetConfig(requests=10), limits=LimitsConfig(concurrency=4))

    assert stopped.message is not None
    assert re.search(r"at most \d+ rows are left", stopped.message)


async def test_answers_to_rows_that_are_gone_make_a_pilots_rest_no_smaller(tmp_path: Path) -> None:
    async with serving() as provider:
        run = experiment(tmp_path, provider.url)
        await run(numbered(80))
        rows = [{"prompt": f"another {n}"} for n in range(100)]
        report = await run(rows, pilot=10, budget=BudgetConfig(requests=120))
    assert (report.exit_code, len(provider.requests)) == (4, 90)
    assert report.message is not None
    assert "90 rows are left" in report.message


async def test_rows_that_are_gone_are_so_in_a_run_that_ends_before_their_place(tmp_path: Path) -> None:
    async with serving(lambda asked: refusal(400, "bad") if asked.text == "row 0" else shout(asked)) as provider:
        run = experiment(tmp_path, provider.url, limits=LimitsConfig(concurrency=1))
        await run(numbered(40))
        report = await run(numbered(10), budget=BudgetConfig(requests=40))
    assert (report.exit_code, report.summary["rows"], report.summary["succeeded"]) == (4, 10, 9)


async def test_the_pilot_of_a_shard_asks_rows_of_its_own(tmp_path: Path) -> None:
    shard = DatasetConfig(
        kind=DatasetKind.jsonl, path=str(tmp_path / "rows.jsonl"), shard=ShardConfig(index=1, count=4)
    )
    async with serving() as provider:
        await experiment(tmp_path, provider.url)(numbered(80), pilot=5, dataset=shard, samples=2)
    first = sorted(int(asked.text.removeprefix("row ")) for asked in provider.requests[:5])
    assert [position // 16 for position in first] == list(range(5))
    assert all(position % 4 == 1 for position in first)


async def test_a_pilot_stops_a_run_that_the_budget_has_no_room_for(tmp_path: Path) -> None:
    async with serving() as provider:
        run = experiment(tmp_path, provider.url)
        report = await run(numbered(1000), pilot=10, budget=BudgetConfig(usd=0.0005))
    assert (report.exit_code, report.summary["stopped"], len(provider.requests)) == (4, "budget", 10)
    assert report.message is not None
    assert "990 rows are left" in report.message


async def test_rows_that_fail_in_the_pilot_are_not_asked_twice(tmp_path: Path) -> None:
    async with serving(lambda asked: refusal(400, "bad") if asked.text == "row 1" else shout(asked)) as provider:
        report = await experiment(tmp_path, provider.url)(numbered(4), pilot=4)
    assert (report.exit_code, report.summary["failed"], len(provider.requests)) == (3, 1, 4)


async def test_cells_of_a_multirun_share_a_budget_over_processes(command: Command) -> None:
    command.write_rows("rows.jsonl", numbered(40))
    done = await command(
        "-m",
        "hydra/launcher=joblib",
        "hydra.launcher.n_jobs=2",
        "dataset=jsonl",
        "dataset.path=rows.jsonl",
        "name=t",
        "tracker=none",
        "request.max_tokens=8",
        "request.temperature=0,1",
        "budget.requests=50",
        "simulator.latency_s=0.01",
    )
    assert done.exit_code == 1, done.err
    assert "by all cells of the sweep" in done.err
    assert "With a larger budget, the same command goes on" in done.err
    paid = 0
    for folder in command.runs():
        async with await Store.open_readonly(folder / "results.sqlite") as store:
            [row] = [row async for row in store.query("SELECT count(*) AS n FROM answers")]
            paid += row["n"]
    assert paid == 50


def test_an_amount_below_a_hundredth_of_a_cent_is_not_shown_as_nothing() -> None:
    assert shown("usd", 0.00002) == "$0.000020"
    assert shown("usd", 0.0) == "$0.0000"
