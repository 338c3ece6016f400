"""Limits that several processes share: one contract for every place where they are kept, and how limiters use it."""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from redis_server import RedisServer
from runner.bucket import DAY_S, MINUTE_S, Limit
from runner.config import DeploymentConfig, LimitsConfig, Shared
from runner.errors import ConfigError, InsufficientQuotaError
from runner.limiter import RateLimiter
from runner.sharing import account_of, folder_of, open_shared
from runner.sharing.file import FileQuota
from runner.sharing.leases import Leases
from runner.sharing.ledger import LEASE_S, Heard, Order, Return, SharedQuota, Slice
from runner.sharing.redis import RedisQuota
from runner.types import TokenUsage

RPM = Limit(name="rpm", amount=1_200, window_s=MINUTE_S)
TPM = Limit(name="tpm", amount=100_000, window_s=MINUTE_S)
RPD = Limit(name="rpd", amount=5_000, window_s=DAY_S, burst=5_000)


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 50_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def redis_server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture
def clock() -> Clock:
    return Clock()


Open = Callable[..., SharedQuota]
"""Opens the same quota once more, as another process does."""


@pytest.fixture(params=["file", "redis"])
def connect(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock) -> Iterator[Open]:
    opened: list[SharedQuota] = []
    account = tmp_path.name

    def open_it(*limits: Limit) -> SharedQuota:
        if request.param == "file":
            opened.append(FileQuota(tmp_path / "limits.sqlite", limits or (RPM,), clock=clock))
        else:
            url = request.getfixturevalue("redis_server").url
            opened.append(RedisQuota(url, account, limits or (RPM,), clock=clock))
        return opened[-1]

    yield open_it
    for quota in opened:
        quota.close()


def order(holder: str, *need: float, want: Sequence[float] | None = None) -> Order:
    """Ask for ``need``; for nothing, where there is none."""
    return Order(holder=holder, need=need or None, want=need if want is None else want)


class Process:
    """A process under constant load of requests of one size, seen from the ledger."""

    def __init__(self, holder: str, shared: SharedQuota, clock: Clock, costs: Sequence[float] = (1.0,)) -> None:
        self.holder, self.shared, self.clock, self.costs = holder, shared, clock, costs
        self.slices: list[Slice] = []
        self.ask_at = 0.0

    def turn(self) -> None:
        """Draw, if it is time to."""
        if self.clock.now < self.ask_at:
            return
        got = self.shared.exchange(order(self.holder, *self.costs, want=[50 * cost for cost in self.costs]))
        self.ask_at = self.clock.now + max(got.ask_again_s, 0.01)
        if got.amounts is not None:
            self.slices.append(got)


def run(processes: Sequence[Process], seconds: float, choice: random.Random, step_s: float = 0.01) -> None:
    """Let the processes have their turns, in an order by chance."""
    clock = processes[0].clock
    until = clock.now + seconds
    while clock.now < until:
        for process in choice.sample(processes, len(processes)):
            process.turn()
        clock.now += step_s


def most_in_a_minute(processes: Sequence[Process], number: int = 0) -> float:
    """The most that is used in any minute, if each slice is used at the worst moment of its lease.

    The worst is: what is drawn first as late as it may be, what is drawn last at once.
    """
    drawn = sorted(
        (got.at, got.amounts[number]) for process in processes for got in process.slices if got.amounts is not None
    )
    most = total = 0.0
    first = 0
    for at, amount in drawn:
        total += amount
        while drawn[first][0] + LEASE_S <= at - MINUTE_S:
            total -= drawn[first][1]
            first += 1
        most = max(most, total)
    return most


def total(process: Process, number: int = 0) -> float:
    return sum(got.amounts[number] for got in process.slices if got.amounts is not None)


# The contract


def test_four_processes_use_the_limit_together_and_never_pass_it(connect: Open, clock: Clock) -> None:
    processes = [Process(f"p{n}", connect(), clock) for n in range(4)]
    run(processes, 180, random.Random(1), step_s=0.02)
    shares = [total(process) for process in processes]
    assert most_in_a_minute(processes) <= 1_200
    assert sum(shares) >= 0.97 * 3 * 1_200
    assert min(shares) >= 0.9 * max(shares)


def test_a_process_that_is_killed_leaves_its_share_to_the_others(connect: Open, clock: Clock) -> None:
    processes = [Process(f"p{n}", connect(), clock) for n in range(4)]
    run(processes, 70, random.Random(1), step_s=0.02)
    rest = processes[1:]
    before = sum(map(total, rest))
    run(rest, 120, random.Random(2), step_s=0.02)
    assert sum(map(total, rest)) - before >= 0.95 * 2 * 1_200
    assert most_in_a_minute(processes) <= 1_200


def test_a_process_that_dies_at_the_head_of_the_line_holds_it_up_for_a_moment_only(connect: Open, clock: Clock) -> None:
    dead, alive = connect(), connect()
    assert alive.exchange(order("alive", 24, want=[24])).amounts
    assert dead.exchange(order("dead", 24)).amounts is None  # it has a ticket now
    began = clock.now
    while alive.exchange(order("alive", 1)).amounts is None:
        clock.now += 0.05
    assert clock.now - began <= 1.2


def test_a_large_request_is_not_starved_by_small_ones_elsewhere(connect: Open, clock: Clock) -> None:
    small = [Process(f"s{n}", connect(RPM, TPM), clock, (1.0, 100.0)) for n in range(3)]
    run(small, 30, random.Random(1))
    large = Process("large", connect(RPM, TPM), clock, (1.0, 40_000.0))
    began = clock.now
    while not large.slices:
        run([*small, large], 0.1, random.Random(2))
        assert clock.now - began < 60
    assert most_in_a_minute([*small, large], 1) <= 100_000


def test_a_slice_holds_no_more_than_is_needed(connect: Open) -> None:
    got = connect(RPM, TPM).exchange(order("p", 1, 10, want=[2, 120]))
    assert got.amounts == [2, 120]


def test_what_is_given_back_is_there_for_others(connect: Open, clock: Clock) -> None:
    first, second = connect(), connect()
    got = first.exchange(order("first", 24))
    assert second.exchange(order("second", 20)).amounts is None
    first.exchange(Order(holder="first", returns=[Return(got.at, [24.0], False)]))
    assert second.exchange(order("second", 20)).amounts == [20]


def test_a_debt_is_waited_for(connect: Open, clock: Clock) -> None:
    shared = connect(TPM)
    got = shared.exchange(order("p", 1_000))
    shared.exchange(Order(holder="p", returns=[Return(got.at, [-99_000.0], True)]))
    waiting = shared.exchange(order("p", 1_000))
    assert waiting.amounts is None
    assert waiting.wait_s == pytest.approx(MINUTE_S, rel=0.05)


def test_what_comes_back_after_its_window_is_too_late_to_be_used(connect: Open, clock: Clock) -> None:
    shared = connect(replace(RPM, burst=1_200))
    got = shared.exchange(order("p", 1_200))
    clock.now += 70
    assert shared.exchange(order("p", 1_200)).amounts == [1_200]
    shared.exchange(Order(holder="p", returns=[Return(got.at, [1_200.0], False)]))
    assert shared.exchange(order("p", 1)).amounts is None


def test_a_pause_is_everyones(connect: Open, clock: Clock) -> None:
    first, second = connect(), connect()
    first.exchange(Order(holder="first", pause_s=30.0, reason="slow down"))
    got = second.exchange(order("second", 1))
    assert (got.amounts, got.reason) == (None, "slow down")
    assert got.paused_s == got.ask_again_s == pytest.approx(30, abs=0.01)
    clock.now += 30.01
    got = second.exchange(order("second", 1))
    assert (got.amounts, got.paused_s, got.reason) == ([1], 0, "")


def test_what_headers_say_is_everyones(connect: Open, clock: Clock) -> None:
    first, second = connect(), connect()
    got = first.exchange(order("first", 10))
    said = Heard(number=0, remaining=5, reset_s=60, charged=got.charged[0], at=got.at)
    first.exchange(Order(holder="first", heard=[said]))
    clock.now += 2
    assert second.exchange(order("second", 6)).amounts is None
    second.exchange(order("second"))
    assert first.exchange(order("first", 5)).amounts == [5]


def test_older_headers_are_ignored(connect: Open, clock: Clock) -> None:
    shared = connect()
    old = shared.exchange(order("p", 10))
    clock.now += 2
    new = shared.exchange(order("p", 10))
    shared.exchange(Order(holder="p", heard=[Heard(0, 1_180, None, new.charged[0], new.at)]))
    shared.exchange(Order(holder="p", heard=[Heard(0, 0, None, old.charged[0], old.at)]))
    assert shared.exchange(order("p", 10)).amounts == [10]


def test_minute_and_day_are_kept_together(connect: Open, clock: Clock) -> None:
    processes = [Process(f"p{n}", connect(RPM, RPD), clock, (1.0, 1.0)) for n in range(2)]
    run(processes, 400, random.Random(1), step_s=0.05)
    assert sum(total(process, 1) for process in processes) == pytest.approx(5_000, abs=2)
    for process in processes:
        assert process.shared.exchange(order(process.holder, 1, 2)).wait_s > 80_000


def test_processes_with_other_limits_keep_to_those_they_share(connect: Open) -> None:
    both, one = connect(RPM, TPM), connect(RPM)
    assert both.exchange(order("both", 24, 100)).amounts == [24, 100]
    assert one.exchange(order("one", 20)).amounts is None
    one.exchange(order("one"))
    got = both.exchange(Order(holder="both"))
    assert got.charged == [24, 100]


def test_a_ledger_that_forgot_what_a_process_knows_gives_nothing_for_a_minute(connect: Open, clock: Clock) -> None:
    shared = connect(RPM, RPD)
    known = Order(holder="p", version=700, seen=[600.0, 3_000.0])
    got = shared.exchange(known)
    assert got.lost
    assert got.version > 700
    assert got.charged == [1_200, 3_000]
    assert not shared.exchange(replace(known, version=got.version)).lost
    clock.now += 50
    assert shared.exchange(order("p", 1, 1)).amounts is None
    shared.exchange(order("p"))
    clock.now += 15
    assert shared.exchange(order("p", 1, 1)).amounts == [1, 1]


def test_every_place_does_the_same(tmp_path: Path, redis_server: RedisServer, clock: Clock) -> None:
    """One is Python, the other one Lua."""
    limits = (RPM, TPM, RPD)
    file = FileQuota(tmp_path / "limits.sqlite", limits, clock=clock)
    redis = RedisQuota(redis_server.url, "same", limits, clock=clock)
    choice = random.Random(7)
    drawn: list[Slice] = []
    slices = 0
    for _ in range(1_500):
        clock.now = round(clock.now + choice.choice([0.0, 0.001, 0.02, 0.3, 4.0]), 3)
        said = Order(holder=choice.choice("abc"), version=choice.choice([0, 1]), seen=[0, 0, 0])
        if choice.random() < 0.6:
            need = [1.0, choice.choice([0.0, 10.0, 900.0, 30_000.0]), 1.0]
            said = replace(said, need=need, want=[10 * cost for cost in need])
        if drawn and choice.random() < 0.4:
            back = drawn.pop(choice.randrange(len(drawn)))
            assert back.amounts is not None
            share = choice.choice([-2.0, 0.5, 1.0])
            returned = Return(back.at, [share * amount for amount in back.amounts], choice.random() < 0.5)
            said = replace(said, returns=[returned])
        if drawn and choice.random() < 0.3:
            number, got = choice.randrange(3), drawn[-1]
            heard = Heard(number, choice.choice([0, 500, 1e6]), choice.choice([None, 20]), got.charged[number], got.at)
            said = replace(said, heard=[heard])
        if choice.random() < 0.02:
            said = replace(said, pause_s=2.0, reason="slow down")
        one, other = file.exchange(said), redis.exchange(said)
        assert (one.amounts is None) is (other.amounts is None)
        assert one.amounts is None or one.amounts == pytest.approx(other.amounts)
        assert one.charged == pytest.approx(other.charged)
        assert (one.wait_s, one.paused_s) == pytest.approx((other.wait_s, other.paused_s), rel=1e-6, abs=1e-6)
        assert (one.reason, one.version, one.lost) == (other.reason, other.version, other.lost)
        if one.amounts is not None:
            drawn.append(one)
            slices += 1
    assert slices > 100
    file.close()
    redis.close()


# In a file


def test_a_network_file_system_is_refused(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"1 0 0:1 / / rw - ext4 /dev/sda rw\n2 1 0:2 / {tmp_path} rw shared:1 - nfs4 server:/home rw\n")
    with pytest.raises(ConfigError, match=r"network file system \(nfs4\).*limits\.shared=redis"):
        FileQuota(tmp_path / "limits.sqlite", (RPM,), mounts=mounts)
    mounts.write_text(f"1 0 0:1 / / rw - nfs4 server:/ rw\n2 1 0:2 / {tmp_path} rw - ext4 /dev/sda rw\n")
    FileQuota(tmp_path / "limits.sqlite", (RPM,), mounts=mounts)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"limits\.shared_folder=.*file"):
        FileQuota(tmp_path / "file" / "limits.sqlite", (RPM,))


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    path = tmp_path / "limits.sqlite"
    path.write_text("what is this?\n" * 100)
    with pytest.raises(OSError, match=str(path)):
        FileQuota(path, (RPM,)).exchange(Order(holder="p"))


def test_after_a_restart_of_the_host_the_ledger_begins_again(tmp_path: Path, clock: Clock) -> None:
    shared = FileQuota(tmp_path / "limits.sqlite", (replace(RPM, burst=1_200),), clock=clock)
    shared.exchange(order("p", 1_200))
    clock.now = 10.0
    assert shared.exchange(order("p", 1_200)).amounts == [1_200]
    shared.close()


# In Redis


def test_a_server_that_is_not_there_is_named() -> None:
    with pytest.raises(OSError, match=r"Redis at /nowhere/socket does not answer"):
        RedisQuota("unix:///nowhere/socket", "a", (RPM,)).exchange(Order(holder="p"))


def test_a_place_that_cannot_be_reached_is_said_before_the_first_request(tmp_path: Path) -> None:
    deployments = {"a": DeploymentConfig(model="simulated/echo")}
    limits = LimitsConfig(rpm=60, shared=Shared.redis, redis_url="unix:///nowhere/socket")
    with pytest.raises(ConfigError, match=r"limits\.shared=redis: Redis at /nowhere/socket does not answer"):
        open_shared(limits, deployments)
    limits = LimitsConfig(rpm=60, shared=Shared.file, shared_folder=str(tmp_path))
    (tmp_path / f"{account_of(deployments)}.sqlite").write_text("what is this?\n" * 100)
    with pytest.raises(ConfigError, match=r"limits\.shared=file: .*delete it"):
        open_shared(limits, deployments)


def test_a_url_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"limits\.redis_url=localhost"):
        RedisQuota("localhost", "a", (RPM,))


def test_the_servers_time_counts(redis_server: RedisServer) -> None:
    shared = RedisQuota(redis_server.url, "time", (RPM,))
    assert shared.exchange(order("p", 1)).at == pytest.approx(time.time(), abs=1)
    shared.close()


def test_nothing_of_a_crashed_job_stays_for_good(redis_server: RedisServer) -> None:
    import redis

    shared = RedisQuota(redis_server.url, "forgotten", (RPM,))
    shared.exchange(order("p", 1))
    client = redis.Redis.from_url(redis_server.url)
    assert 60 < client.ttl("runner:limits:forgotten") <= 121
    client.close()
    shared.close()


# Which quota it is


def test_the_account_is_named_without_its_key() -> None:
    def name(**changes: str) -> str:
        fields = {"model": "openai/gpt-4.1-mini", "api_key": "sk-secret", **changes}
        return account_of({"any label": DeploymentConfig(**fields)})  # type: ignore[arg-type]

    assert name() == name()
    assert len({name(), name(api_key="sk-other"), name(model="openai/gpt-4.1"), name(api_base="http://h/v1")}) == 4
    assert "secret" not in name()


def test_the_files_are_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    limits = LimitsConfig(rpm=60, shared=Shared.file)
    assert folder_of(limits) == tmp_path / "runner" / "limits"
    limits.shared_folder = "/elsewhere"
    assert folder_of(limits) == Path("/elsewhere")


def test_a_shared_quota_is_opened_as_the_configuration_says(tmp_path: Path, redis_server: RedisServer) -> None:
    deployments = {"a": DeploymentConfig(model="simulated/echo")}
    assert open_shared(LimitsConfig(rpm=60), deployments) is None
    assert open_shared(LimitsConfig(rpm=60, shared=Shared.file, shared_folder=str(tmp_path)), deployments)
    assert open_shared(LimitsConfig(rpm=60, shared=Shared.redis, redis_url=redis_server.url), deployments)


# Limiters that share


@pytest.fixture(params=["file", "redis"])
def limiter(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., RateLimiter]:
    """Makes limiters that share, as those of several processes do."""

    def make(**limits: float) -> RateLimiter:
        config = LimitsConfig(**limits)  # type: ignore[arg-type]
        config.shared = Shared(request.param)
        config.shared_folder = str(tmp_path)
        if request.param == "redis":
            config.redis_url = request.getfixturevalue("redis_server").url
        deployments = {"a": DeploymentConfig(model="simulated/echo", api_key=tmp_path.name)}
        return RateLimiter.of(config, quota=open_shared(config, deployments))

    return make


async def granted_in(limiter: RateLimiter, seconds: float) -> int:
    """How many requests are granted under constant load."""
    granted = 0

    async def load() -> None:
        nonlocal granted
        while True:
            (await limiter.acquire(10)).settle(TokenUsage(prompt_tokens=10))
            granted += 1

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.gather(*(load() for _ in range(8))), seconds)
    return granted


async def test_limiters_share_what_one_would_get(limiter: Callable[..., RateLimiter]) -> None:
    limits = {"rpm": 6_000.0, "max_request_burst": 40.0}
    granted = await asyncio.gather(*(granted_in(limiter(**limits), 2.0) for _ in range(3)))
    assert 100 <= sum(granted) <= 40 + 200
    assert min(granted) >= 0.5 * max(granted)


async def test_an_idle_limiter_gives_back_what_it_drew(limiter: Callable[..., RateLimiter]) -> None:
    limits = {"rpm": 60.0, "max_request_burst": 10.0}
    idle, busy = limiter(**limits), limiter(**limits)
    handles = [await idle.acquire() for _ in range(10)]
    for handle in handles:
        handle.refund()
    await asyncio.sleep(0.5)
    async with asyncio.timeout(5):
        for _ in range(10):
            await busy.acquire()


async def test_what_is_settled_is_there_for_the_others(limiter: Callable[..., RateLimiter]) -> None:
    limits = {"tpm": 6_000.0, "max_token_burst": 6_000.0}
    one, other = limiter(**limits), limiter(**limits)
    handle = await one.acquire(5_900)
    handle.settle(TokenUsage(prompt_tokens=100))
    async with asyncio.timeout(5):
        await other.acquire(5_000)


async def test_a_pause_reaches_those_who_draw(limiter: Callable[..., RateLimiter]) -> None:
    limits = {"rpm": 6_000.0}
    one, other = limiter(**limits), limiter(**limits)
    await other.acquire()
    one.pause(1.5, "slow down")
    await asyncio.sleep(0.5)
    began = time.monotonic()
    await other.acquire()
    assert time.monotonic() - began > 0.5


async def test_a_day_that_is_used_up_tries_ones_patience(limiter: Callable[..., RateLimiter]) -> None:
    one, other = limiter(rpd=3.0), limiter(rpd=3.0)
    for _ in range(3):
        await one.acquire()
    async with asyncio.timeout(10):
        with pytest.raises(InsufficientQuotaError, match=r"limits\.rpd=3 is used up"):
            await other.acquire(patience_s=3_600)


async def test_a_cancelled_request_leaves_nothing_behind(limiter: Callable[..., RateLimiter]) -> None:
    limits = {"rpm": 60.0, "max_request_burst": 1.0}
    one, other = limiter(**limits), limiter(**limits)
    await one.acquire()
    waiting = asyncio.create_task(one.acquire())
    await asyncio.sleep(0.2)
    waiting.cancel()
    async with asyncio.timeout(5):
        await other.acquire()


async def test_the_thread_ends_when_there_is_nothing_to_draw(limiter: Callable[..., RateLimiter]) -> None:
    one = limiter(rpm=6_000.0)
    await one.acquire()
    for _ in range(100):
        if "runner-limits" not in {thread.name for thread in threading.enumerate()}:
            break
        await asyncio.sleep(0.05)
    else:
        pytest.fail("it is still there")
    async with asyncio.timeout(5):
        await one.acquire()


async def test_a_redis_that_stops_and_starts_again_loses_no_request(caplog: pytest.LogCaptureFixture) -> None:
    with RedisServer() as server:
        limiter = RateLimiter(6_000, quota=Leases(RedisQuota(server.url, "a", (replace(RPM, amount=6_000),))))
        await limiter.acquire()
        server.stop()
        with caplog.at_level(logging.WARNING):
            waiting = [asyncio.create_task(limiter.acquire()) for _ in range(3)]
            await asyncio.sleep(1)
            assert not any(task.done() for task in waiting)
            assert "does not answer" in limiter.pause_reason
            server.start()
            async with asyncio.timeout(10):
                while limiter.pause_reason:  # noqa: ASYNC110 - another thread clears it
                    await asyncio.sleep(0.05)
        assert "no request goes out meanwhile: Redis at" in caplog.text
        assert "the last minute's count as used up" in caplog.text
        assert not any(task.done() for task in waiting)  # a minute's quota may be used up, for all that is known
        for task in waiting:
            task.cancel()
