"""Runs the command for minutes or hours in a world where everything goes wrong, and checks what is left.

    python scripts/soak.py --minutes 60 --seed 1
    python scripts/soak.py --seed 1 --episode 7      # one of them again

An episode is one dataset and one run folder, asked in several sessions over several servers with limits. Each session
meets troubles: `TROUBLES` lists them. At last the world is mended, and the command has to finish. Beside the episodes,
`scripts/endure.py` keeps one client in one process at work. Says on stderr how it goes, prints one JSON line, and exits
with 1 if a promise was broken, which it names with its seed, its episode and its folder, which is kept:

- every row of the dataset as it is at the end stands in results.jsonl once, in order, with its own answer;
- what results.sqlite holds as answered is never lost, and never asked again;
- a session costs no more answers than were in flight, or waited for their commit where it was killed;
- nothing was asked more often than the run's books have entries for it;
- what the servers charged lies within the bounds that the books give, after every session;
- in no minute, and never at once, did the servers see more than the limits allow; budgets were kept;
- every session ended by itself, in a way that its troubles explain, without a traceback or a process left behind.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path
from typing import Any

from trial.books import ROUNDING_USD, WAITING, Books, read_books
from trial.server import Server
from trial.work import WORK
from trial.world import MANNERS, Gone, Redis, SmallDisk, jumping_clock, processes_marked

Json = dict[str, Any]
Process = subprocess.Popen[bytes]

PATIENCE_S = 240.0
"""How long a session may take: two minutes for limits, and some for all else."""

LINGER_S = 20.0
"""How long processes that a session started may outlive it."""

TRAVEL_S = 1.0
"""By how much one request may be longer under way than another on a busy machine."""

CEILING_USD, CEILING_TOKENS = 1e-4, 500
"""More than one row can take."""

RETRY_AFTER = ("-5", "0", "1.5", "soon", "1e-3", "Wed, 21 Oct 2015 07:28:00 GMT", "2015-10-21T07:28:00Z", "NaN", "")


def main() -> int:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--episode", type=int, help="only this one, and nothing beside it")
    parser.add_argument("--jobs", type=int, default=2, help="episodes at once (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=300, help="rows of an episode, about (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where broken episodes are kept; default: a temporary one")
    options = parser.parse_args()
    place = options.folder or Path(tempfile.mkdtemp(prefix="runner-soak-"))
    place.mkdir(parents=True, exist_ok=True)
    found = soak(options, place)
    if not found["violations"] and not options.folder:
        shutil.rmtree(place)
    print(json.dumps(found))
    return 1 if found["violations"] else 0


def soak(options: argparse.Namespace, place: Path) -> Json:
    began = time.monotonic()
    ends = began + 60 * options.minutes
    means = Means(redis=Redis.is_there(), disk=SmallDisk.is_possible())
    for missing in (name for name, there in vars(means).items() if not there):
        print(f"soak: no {missing} here, so it cannot go away", file=sys.stderr)
    alone = options.episode is not None
    endurance = None if alone else endure(options, place)
    numbers = iter([options.episode]) if alone else itertools.count()
    done: list[Found] = []
    violations: list[Json] = []

    def play() -> Iterator[Found]:
        """Episodes, one after the other, until the time is over."""
        while alone or time.monotonic() < ends:
            if (number := next(numbers, None)) is None:
                return
            yield Episode(number, options, place / f"episode-{number}", means).play()

    def work() -> None:
        for each in play():
            done.append(each)
            violations.extend({"seed": options.seed, "what": what, **each.where} for what in each.violations)
            print(f"soak: {each}", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(options.jobs) as pool:
        for worker in as_completed([pool.submit(work) for _ in range(1 if alone else options.jobs)]):
            worker.result()
    endured = None
    if endurance is not None:
        out, _ = endurance.communicate(timeout=120)
        endured = json.loads(out or "{}")
        violations += [{"seed": options.seed, "what": what} for what in endured.get("violations", ["it ended early"])]
    troubles = sum((each.troubles for each in done), Counter[str]())
    return {
        "seed": options.seed,
        "seconds": round(time.monotonic() - began, 1),
        "episodes": len(done),
        "sessions": sum(each.sessions for each in done),
        "troubles": dict(sorted(troubles.items())),
        "exit_codes": dict(sorted(sum((each.exit_codes for each in done), Counter[str]()).items())),
        "rows": sum(each.rows for each in done),
        "requests": sum(each.requests for each in done),
        "faults": sum(each.faults for each in done),
        "answers_lost": sum(each.lost for each in done),
        "most_of_a_limit": round(max((each.most_of_a_limit for each in done), default=0.0), 4),
        "cost_usd": [round(sum(each.cost_usd[n] for each in done), 6) for n in range(3)],
        "endurance": endured,
        "violations": violations,
    }


def endure(options: argparse.Namespace, place: Path) -> subprocess.Popen[bytes]:
    """One client in one process, for as long."""
    script = Path(__file__).with_name("endure.py")
    command = [sys.executable, str(script), f"--minutes={options.minutes}", f"--seed={options.seed}"]
    with (place / "endure.txt").open("wb") as log:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)


# What is found


@dataclass(kw_only=True)
class Means:
    """What this machine has to be taken away."""

    redis: bool
    disk: bool


@dataclass(kw_only=True)
class Found:
    """How an episode went."""

    number: int
    folder: Path
    story: list[str] = field(default_factory=list)
    sessions: int = 0
    troubles: Counter[str] = field(default_factory=Counter)
    exit_codes: Counter[str] = field(default_factory=Counter)
    rows: int = 0
    requests: int = 0
    faults: int = 0
    lost: int = 0  # answers that were given and not stored
    most_of_a_limit: float = 0.0
    cost_usd: Sequence[float] = (0.0, 0.0, 0.0)  # in the books at least, charged, in the books at most
    seconds: float = 0.0
    violations: list[str] = field(default_factory=list)

    @property
    def where(self) -> Json:
        return {"episode": self.number, "folder": str(self.folder)}

    def __str__(self) -> str:
        verdict = f"BROKEN: {'; '.join(self.violations)} ({self.folder})" if self.violations else "clean"
        return f"episode {self.number}, {self.seconds:.0f} s: {' | '.join(self.story)}: {verdict}"


# Episodes


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What an episode is about."""

    task: str
    rows: int
    replicas: int
    concurrency: int
    strategy: str
    hedge: bool
    dedupe: bool
    stream: bool
    rpm: int | None
    tpm: int | None
    shared: str
    disk: bool
    latency_s: float
    faults: Mapping[str, float]
    sessions: int

    @classmethod
    def drawn(cls, draw: random.Random, *, rows: int, means: Means) -> Plan:
        rows = draw.randint(rows // 2, rows * 3 // 2)
        task = draw.choices(list(WORK), [6, 2, 2])[0]
        requests = math.ceil(rows / WORK[task].group)
        limited = draw.choice(["", "rpm", "rpm", "tpm", "tight"])
        replicas = draw.randint(1, 3)
        return cls(
            task=task,
            rows=rows,
            replicas=replicas,
            concurrency=draw.choice([4, 8, 16, 32]),
            strategy=draw.choice(["simple-shuffle", "least-busy", "latency-based-routing", "usage-based-routing"]),
            hedge=replicas > 1 and draw.random() < 0.3,
            dedupe=draw.random() < 0.5,
            stream=task == "generate" and draw.random() < 0.3,
            # A tight limit lets out at once what it holds, and then nothing for the rest of the minute.
            rpm={"rpm": 4 * requests + 200, "tight": requests * 3 // 4 + 20}.get(limited),
            tpm=30 * rows + 2000 if limited == "tpm" else None,
            shared=draw.choice(["none", "file", *(["redis"] if means.redis else [])]) if limited else "none",
            disk=means.disk and draw.random() < 0.25,
            latency_s=draw.uniform(0.02, 0.15),
            faults=_faults(draw),
            sessions=draw.randint(2, 5),
        )


def _faults(draw: random.Random) -> Mapping[str, float]:
    """Some kinds of them, up to 30 % together."""
    kinds = [f"http_{status}" for status in (429, 500, 502, 503, 529)]
    kinds += ["reset", "hang", "slow", "truncated", "invalid_json", "error_200"]
    weights = {
        kind: draw.random() * (kind != "hang" or 0.2) for kind in draw.sample(kinds, draw.randint(2, len(kinds)))
    }
    total = draw.uniform(0, 0.3) / sum(weights.values())
    return {kind: round(weights.get(kind, 0.0) * total, 4) for kind in kinds}


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """When something befalls a session."""

    at_work: bool  # counted from its first request, not from its start
    after_s: float

    def later(self, seconds: float) -> Moment:
        return Moment(at_work=self.at_work, after_s=self.after_s + seconds)


class Session:
    """One invocation of the command, and what befalls it."""

    def __init__(self) -> None:
        self.arguments: list[str] = []
        self.environment: dict[str, str] = {}
        self.befalls: list[tuple[Moment, Callable[[Process], None]]] = []
        self.doubles: list[Process] = []  # the same command, once more
        self.exits = {0, 3}
        self.held_up_s = 0.0  # for how long requests may have been on their way
        self.may_lose = 0  # answers
        self.forgets = False  # the store does not know when its requests went out
        self.budget: tuple[str, float] | None = None
        self.afterwards = ExitStack()


class Episode:
    """One dataset and one run folder, many sessions, and troubles."""

    def __init__(self, number: int, options: argparse.Namespace, folder: Path, means: Means) -> None:
        self._draw = random.Random(f"{options.seed}-{number}")
        self._plan = Plan.drawn(self._draw, rows=options.rows, means=means)
        self._work = WORK[self._plan.task]
        self._folder = folder
        self._name = f"{options.seed}-{number}"
        self._numbers = itertools.count()
        self._prompts = [self._new() for _ in range(self._plan.rows)]
        self._gone: list[str] = []  # rows that were removed
        self._servers: list[Server] = []
        self._redis: Redis | None = None
        self._disk: SmallDisk | None = None
        self._contents: dict[str, bytes] = {}  # what the store knows a prompt by
        self._books = Books(answers={}, attempts={})
        self._asked: Mapping[str, Mapping[str, int]] = {}
        self._minutes: list[tuple[float, float]] = []  # since when limits count anew, and how loosely
        self._forgets = False  # the last session's store
        self._worked_s = 0.0
        self._found = Found(number=number, folder=folder)

    def play(self) -> Found:
        began = time.monotonic()
        try:
            with self._world():
                self._tell(self._described())
                for _ in range(self._plan.sessions):
                    self._play_session(self._drawn_troubles())
                self._play_session(())
                for server in self._servers:
                    server.set(faults=dict.fromkeys(self._plan.faults, 0.0))
                self._play_session((), last=True)
                self._check_results()
                self._check_limits()
                self._check_concurrency()
                self._count()
                if not self._found.violations:
                    shutil.rmtree(self._folder / "runs", ignore_errors=True)
        except Exception as error:  # of the trial itself: the others go on
            self._blame(f"the trial failed: {type(error).__name__}: {error}")
        self._found.seconds = time.monotonic() - began
        if not self._found.violations:
            shutil.rmtree(self._folder, ignore_errors=True)
        return self._found

    @contextmanager
    def _world(self) -> Iterator[None]:
        plan = self._plan
        self._folder.mkdir(parents=True)
        with ExitStack() as stack:
            for number in range(plan.replicas):
                settings = {
                    "latency_s": plan.latency_s,
                    "seed": 0 if plan.task == "embed" else number,
                }  # of vectors, too
                settings |= {f"faults.{kind}": share for kind, share in plan.faults.items()}
                server = Server(f"gpu-{number}", settings, log=self._folder / f"gpu-{number}.txt")
                stack.enter_context(server.running())
                self._servers.append(server)
            if plan.shared == "redis":
                self._redis = stack.enter_context(Redis().running())
            if plan.disk:
                self._disk = stack.enter_context(SmallDisk(self._folder / "runs", megabytes=24).mounted())
            fleet = {server.label: {"model": "simulated/echo", "api_base": server.url} for server in self._servers}
            (self._folder / "conf" / "deployments").mkdir(parents=True)
            (self._folder / "conf" / "deployments" / "fleet.yaml").write_text(json.dumps(fleet))  # which is YAML
            yield
            if self._found.violations and plan.disk:  # what is on that disk goes with it
                shutil.copytree(self._folder / "runs", self._folder / "kept")

    def _described(self) -> str:
        plan = self._plan
        limits = "".join(f" {name}={value}" for name in ("rpm", "tpm") if (value := getattr(plan, name)))
        how = "".join(f" {name}" for name in ("hedge", "dedupe", "stream", "disk") if getattr(plan, name))
        faults = f"{sum(plan.faults.values()):.0%} faults"
        return (
            f"{plan.task} {plan.rows} rows, {plan.replicas} servers, c={plan.concurrency}"
            f"{limits}{f' by {plan.shared}' if limits else ''}, {plan.strategy}{how}, {faults}"
        )

    def _drawn_troubles(self) -> Sequence[str]:
        possible = [
            name
            for name in TROUBLES
            if not (name == "redis" and self._redis is None) and not (name == "disk" and self._disk is None)
        ]
        chosen = self._draw.sample(possible, self._draw.choice([1, 1, 2, 2, 3, 4]))
        return [name for name in chosen if not (name in ("kill", "term") and "redis" in chosen)]

    # Sessions

    def _play_session(self, troubles: Sequence[str], *, last: bool = False) -> None:
        if self._found.sessions and not last:
            self._edit()
        self._work.lay(self._folder, self._prompts)
        session = Session()
        if last:
            session.exits = {0}
        for name in troubles:
            TROUBLES[name](self, session)
        with session.afterwards:
            exit_code, said = self._follow(session)
        self._found.sessions += 1
        self._found.troubles.update(troubles)
        self._found.exit_codes[str(exit_code)] += 1
        self._tell(f"{'+'.join(troubles) or 'calm'} → {exit_code}")
        if exit_code not in session.exits:
            self._blame(f"session {self._found.sessions} ended with {exit_code}, expected {sorted(session.exits)}")
        if "Traceback" in said:
            self._blame(f"session {self._found.sessions} showed a traceback")
        self._check_books(session, exit_code)

    def _follow(self, session: Session) -> tuple[int, str]:
        """Run the command to its end, with all that befalls it. Returns its exit code and what it said."""
        began = time.monotonic()
        if not self._minutes or (self._plan.shared == "none" and (session.forgets or self._forgets)):
            self._minutes.append((began, TRAVEL_S))
        self._forgets = session.forgets
        mark = f"SOAK_MARK={self._folder}/{self._found.sessions}/"
        variables = {**os.environ, "HOME": str(self._folder), "PYTHONFAULTHANDLER": "1", "COLUMNS": "120"}
        path = os.pathsep.join(filter(None, [session.environment.pop("PYTHONPATH", ""), os.environ.get("PYTHONPATH")]))
        variables |= {"PYTHONPATH": path, "SOAK_MARK": mark.removeprefix("SOAK_MARK="), **session.environment}
        terminal = self._folder / f"session-{self._found.sessions}.txt"
        with terminal.open("wb") as out:
            process = subprocess.Popen(
                self._command(session),
                cwd=self._folder,
                env=variables,
                stdout=out,
                stderr=out,
                stdin=subprocess.DEVNULL,
            )
            due = sorted(session.befalls, key=lambda each: each[0].after_s)
            at_work: float | None = None
            while any(each.poll() is None for each in (process, *session.doubles)):
                now = time.monotonic()
                if at_work is None and self._requests() > self._found.requests:
                    at_work = now
                if now - began > PATIENCE_S:
                    for each in (process, *session.doubles):
                        each.send_signal(signal.SIGABRT)  # which shows where it was
                        each.wait()
                    self._blame(f"session {self._found.sessions} did not end")
                for moment, befall in due:
                    since = at_work if moment.at_work else began
                    if since is not None and since + moment.after_s <= now:
                        due.remove((moment, befall))
                        befall(process)
                        break
                time.sleep(0.01 if at_work else 0.05)
        self._worked_s += time.monotonic() - began
        start, slack = self._minutes[-1]
        self._minutes[-1] = start, slack + session.held_up_s
        self._await_end_of_all(mark)
        return process.returncode, terminal.read_text(encoding="utf-8", errors="replace")

    def _command(self, session: Session) -> list[str]:
        plan = self._plan
        limits = {"rpm": plan.rpm, "tpm": plan.tpm}
        bursts = {"max_request_burst": plan.rpm} if plan.rpm and plan.rpm < plan.rows else {}
        settings = [f"limits.{name}={value}" for name, value in {**limits, **bursts}.items() if value]
        return [
            *(sys.executable, "-m", "runner", "name=soak", "deployments=fleet", *self._work.arguments, *settings),
            *(f"routing.strategy={plan.strategy}", f"routing.hedge={plan.hedge}", f"limits.shared={plan.shared}"),
            f"limits.concurrency={plan.concurrency}",
            *([f"limits.shared_folder={self._folder / 'limits'}"] if plan.shared == "file" else []),
            *([f"limits.redis_url='{self._redis.url}'"] if self._redis else []),
            *(f"dedupe={'always' if plan.dedupe else 'never'}", "retry.base_s=0.02", "request.timeout=1.5"),
            *(["request.stream=true"] if plan.stream else []),
            *([] if any(each.startswith("tracker=") for each in session.arguments) else ["tracker=none"]),
            *session.arguments,
        ]

    def _await_end_of_all(self, mark: str) -> None:
        """What the session started has to end with it, or soon after it was killed."""
        until = time.monotonic() + LINGER_S
        while left := processes_marked(mark):
            if time.monotonic() > until:
                self._blame(f"session {self._found.sessions} left processes behind: {left}")
                for each in left:
                    with suppress(OSError):
                        os.kill(each, signal.SIGKILL)
                return
            time.sleep(0.05)

    def _edit(self) -> None:
        """Rows are added, removed, brought back, repeated, and change places."""
        draw, rows = self._draw, self._prompts
        for change in draw.sample(["add", "remove", "return", "repeat", "shuffle"], draw.choice([0, 1, 2, 3, 4])):
            some = draw.randint(1, max(1, len(rows) // 10))
            match change:
                case "add":
                    for _ in range(3 * some):
                        rows.insert(draw.randint(0, len(rows)), self._new())
                case "remove":
                    for _ in range(some):
                        self._gone.append(rows.pop(draw.randrange(len(rows))))
                case "return":
                    rows += [self._gone.pop() for _ in range(min(some, len(self._gone)))]
                case "repeat":
                    rows += draw.sample(rows, some)
                case "shuffle":
                    draw.shuffle(rows)
        if self._plan.task == "transcribe":  # files in a folder
            rows[:] = sorted(set(rows))

    def _new(self) -> str:
        return f"question {self._name}-{next(self._numbers):06}.wav"

    # Troubles

    def _kill(self, session: Session) -> None:
        session.befalls.append((self._moment(), lambda process: process.kill()))
        session.exits.add(-signal.SIGKILL)
        session.may_lose += WAITING

    def _terminate(self, session: Session) -> None:
        session.befalls.append((self._moment(), lambda process: process.terminate()))
        session.exits |= {128 + signal.SIGTERM, -signal.SIGTERM}

    def _stop(self, session: Session) -> None:
        for_s = self._draw.uniform(0.2, 4)

        def stop(process: Process) -> None:
            process.send_signal(signal.SIGSTOP)
            time.sleep(for_s)
            process.send_signal(signal.SIGCONT)

        session.befalls.append((self._moment(), stop))
        session.held_up_s += for_s

    def _stop_server(self, session: Session) -> None:
        for_s, server = self._draw.uniform(0.2, 4), self._draw.choice(self._servers)

        def stop(process: Process) -> None:
            server.signal(signal.SIGSTOP)
            time.sleep(for_s)
            server.signal(signal.SIGCONT)

        session.befalls.append((self._moment(), stop))
        session.held_up_s += for_s
        session.may_lose += WAITING

    def _storm(self, session: Session) -> None:
        self._weather(session, self._servers, {"http_529": 1.0})

    def _blackout(self, session: Session) -> None:
        kind = self._draw.choice(["reset", "http_502", "truncated", "invalid_json", "hang"])
        self._weather(session, [self._draw.choice(self._servers)], {kind: 1.0})

    def _spike(self, session: Session) -> None:
        self._weather(session, self._servers, {"slow": 0.5})

    def _refuse(self, session: Session) -> None:
        """Half of the requests get a 429 with an odd hint."""
        soon = formatdate(time.time() + self._draw.uniform(1, 8), usegmt=True)
        for server in self._servers:
            server.set(retry_after=self._draw.choice([soon, *RETRY_AFTER]))
        self._weather(session, self._servers, {"http_429": 0.5})

    def _weather(self, session: Session, servers: Sequence[Server], faults: Mapping[str, float]) -> None:
        calm = dict(self._plan.faults)

        def change(to: Mapping[str, float]) -> None:
            for server in servers:
                server.set(faults=dict(to))

        begins = self._moment()
        session.befalls += [
            (begins, lambda process: change({**dict.fromkeys(calm, 0.0), **faults})),
            (begins.later(self._draw.uniform(0.3, 4)), lambda process: change(calm)),
        ]
        session.afterwards.callback(change, calm)

    def _jump(self, session: Session) -> None:
        """The wall clock is wrong, and jumps."""
        far = [-1e6, -4000, -70, -1.5, 1.5, 70, 4000, 1e6]
        session.forgets = True
        jumps = [(at, self._draw.choice(far)) for at in (0.0, self._draw.uniform(0, 3), self._draw.uniform(2, 9))]
        session.environment |= jumping_clock(self._folder / "clock", jumps)

    def _lose_wandb(self, session: Session) -> None:
        gone = session.afterwards.enter_context(Gone(self._draw.choice(MANNERS)).listening())
        session.environment |= {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": gone.url}
        session.arguments += ["tracker=wandb", "tracker.mode=online", "tracker.finish_timeout_s=4"]

    def _lose_redis(self, session: Session) -> None:
        redis = self._redis
        assert redis is not None
        for_s = self._draw.uniform(0.2, 4)

        def lose(process: Process) -> None:
            redis.kill()
            time.sleep(for_s)
            redis.start()

        session.befalls.append((self._moment(), lose))
        session.exits.add(2)
        session.afterwards.callback(self._forget)

    def _forget(self) -> None:
        """Redis knows nothing of what went out before; who was at work then does."""
        self._minutes.append((time.monotonic(), TRAVEL_S))

    def _fill_disk(self, session: Session) -> None:
        disk = self._disk
        assert disk is not None
        session.forgets = True
        begins = self._moment()
        session.befalls.append((begins, lambda process: disk.fill()))
        if self._draw.random() < 0.5:
            session.befalls.append((begins.later(self._draw.uniform(0.1, 3)), lambda process: disk.free()))
        session.afterwards.callback(disk.free)
        session.exits |= {2, 4}

    def _spend(self, session: Session) -> None:
        """There is a budget, for some of what is left."""
        kind = self._draw.choice(["usd", "tokens", "requests"]) if self._work.bounded else "requests"
        share = self._draw.uniform(0.05, 0.5)
        spent, each = {
            "usd": (self._books.at_most_usd, 6e-6),
            "tokens": (self._books.at_most_usd / 0.15e-6, 16.0),
            "requests": (float(self._requests()), 1 / self._work.group),
        }[kind]
        limit = max(spent + share * each * len(self._prompts), each)
        session.budget = kind, math.ceil(limit) if kind != "usd" else limit
        session.arguments.append(f"budget.{kind}={session.budget[1]}")
        session.exits.add(4)

    def _double(self, session: Session) -> None:
        """The same command is given a second time while it runs."""

        terminal = self._folder / f"double-{self._found.sessions}.txt"

        def give(process: Process) -> None:
            with terminal.open("wb") as out:
                command = self._command(session)
                double = subprocess.Popen(command, cwd=self._folder, stdout=out, stderr=out, stdin=subprocess.DEVNULL)
            session.doubles.append(double)

        def judge() -> None:
            for double in session.doubles:
                said = terminal.read_bytes()
                if double.returncode not in session.exits and b"in use by another process" not in said:
                    self._blame(f"the same command in the same folder ended with {double.returncode}")
                if b"Traceback" in said:
                    self._blame("the same command in the same folder showed a traceback")

        session.befalls.append((self._moment(), give))
        session.exits.add(2)  # where the second one was faster
        session.afterwards.callback(judge)

    def _moment(self) -> Moment:
        at_work = self._draw.random() < 0.8
        return Moment(at_work=at_work, after_s=min(self._draw.expovariate(0.5), 15.0))

    # Checks

    def _check_books(self, session: Session, exit_code: int) -> None:
        """Compare what the run has stored with what the servers have seen."""
        before, asked_before = self._books, self._asked
        requests_before = self._found.requests
        books = self._books = read_books(self._run_folder() / "results.sqlite")
        asked = self._asked = self._seen()
        if books.trouble:
            self._blame(f"the store is damaged: {books.trouble}")
        charged = sum(float(ledger["cost_usd"]) for ledger in self._ledgers())
        at_most = books.at_most_usd if self._work.bounded else math.inf
        if not books.at_least_usd - ROUNDING_USD <= charged <= at_most + ROUNDING_USD:
            self._blame(f"${charged} were charged, the books say {books.at_least_usd} to {at_most}")
        if books.without_bound and self._work.bounded:
            self._blame(f"{books.without_bound} attempts have no bound")
        if not 0 <= books.elapsed_s <= self._worked_s:
            self._blame(f"the books have {books.elapsed_s} s at work, it were {self._worked_s} s at most")
        self._contents |= {name: content for _, content, name in books.rows}
        wanted = Counter(self._prompts)
        for prompt, count in asked.items():
            content = self._contents.get(prompt, b"")
            if count["asked"] > books.booked(content):
                self._blame(f"{prompt} was asked {count['asked']} times, booked {books.booked(content)}")
            needed = min(1, wanted[prompt]) if self._plan.dedupe else wanted[prompt]
            again = count["asked"] - (asked_before[prompt]["asked"] if prompt in asked_before else 0)
            if again > 0 and before.answers.get(content, 0) >= needed:
                self._blame(f"{prompt} has {before.answers.get(content, 0)} answers and was asked again")
        for content, answers in before.answers.items():
            if books.answers.get(content, 0) < answers:
                self._blame(f"{content.hex()} had {answers} answers, now {books.answers.get(content, 0)}")
        lost = sum(
            max(0, count["answered"] - books.answers.get(self._contents.get(prompt, b""), 0))
            for prompt, count in asked.items()
        )
        may_lose = self._plan.concurrency * self._work.group * (2 if self._plan.hedge else 1) + session.may_lose
        if lost - self._found.lost > may_lose:
            self._blame(f"session {self._found.sessions} cost {lost - self._found.lost} answers")
        self._found.lost = lost
        self._found.requests = self._requests()
        if exit_code == -signal.SIGTERM and self._found.requests > requests_before and not books.is_closed:
            self._blame(f"session {self._found.sessions} had begun, and did not heed SIGTERM")
        self._check_budget(session, charged)

    def _check_budget(self, session: Session, charged_usd: float) -> None:
        if session.budget is None:
            return
        kind, limit = session.budget
        ledgers = self._ledgers()
        taken, tolerance = {
            "usd": (charged_usd, CEILING_USD * self._work.group),
            "tokens": (sum(sum(ledger["tokens"].values()) for ledger in ledgers), CEILING_TOKENS * self._work.group),
            "requests": (sum(ledger["requests"] for ledger in ledgers), 0),
        }[kind]
        if taken > limit + tolerance:
            self._blame(f"budget.{kind}={limit}, but {taken} were taken")

    def _check_results(self) -> None:
        folder = self._run_folder()
        rows = [json.loads(line) for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]
        if [row["_index"] for row in rows] != list(range(len(self._prompts))):
            self._blame(f"results.jsonl has {len(rows)} rows for {len(self._prompts)}, or not in order")
        for row, prompt in zip(rows, self._prompts, strict=False):
            if row["error"] or not self._work.is_answer(row, prompt):
                self._blame(f"row {row['_index']} has another row's answer, or none: {str(row)[:200]}")
        summary = json.loads((folder / "summary.json").read_bytes())
        charged = sum(float(ledger["cost_usd"]) for ledger in self._ledgers())
        at_least, at_most = summary["cost_usd"] or 0.0, summary["cost_usd_upper_bound"]
        if not at_least - ROUNDING_USD <= charged <= (math.inf if at_most is None else at_most) + ROUNDING_USD:
            self._blame(f"${charged} were charged, summary.json says {at_least} to {at_most}")
        if (summary["succeeded"], summary["failed"]) != (len(self._prompts), 0):
            self._blame(f"summary.json has {summary['succeeded']} rows of {len(self._prompts)}")

    def _check_limits(self) -> None:
        """In no minute may the servers together see more than the limits allow."""
        arrivals = sorted(
            arrival
            for server in self._servers
            for arrival in zip(*server.get("/ledger/arrivals").values(), strict=True)
        )
        ends = [*(start for start, _ in self._minutes[1:]), math.inf]
        for (start, slack), end in zip(self._minutes, ends, strict=True):
            window_s = max(1.0, 60.0 - slack)
            here = [(at, 1.0, tokens) for at, tokens in arrivals if start <= at < end]
            for place, (name, limit) in enumerate((("rpm", self._plan.rpm), ("tpm", self._plan.tpm)), start=1):
                if limit is None:
                    continue
                most = _most_in([(each[0], each[place]) for each in here], window_s)
                self._found.most_of_a_limit = max(self._found.most_of_a_limit, most / limit)
                if most > limit:
                    self._blame(f"{name}={limit}, but {most:g} came within {window_s:.1f} s")

    def _check_concurrency(self) -> None:
        """At once no server may see more; where requests time out or are killed, it may notice late that they ended."""
        late = {"kill", "term", "stop", "server-stop", "spike", "blackout", "double"} & self._found.troubles.keys()
        overlap = 4 if late or self._plan.faults["hang"] or self._plan.faults["slow"] or self._plan.hedge else 1
        for server in self._servers:
            if (peak := server.ledger()["in_flight_peak"]) > overlap * self._plan.concurrency:
                self._blame(f"limits.concurrency={self._plan.concurrency}, but {peak} came at once")

    def _count(self) -> None:
        ledgers = self._ledgers()
        found, books = self._found, self._books
        found.rows = len(self._prompts)
        found.faults = sum(sum(ledger["faults"].values()) for ledger in ledgers)
        charged = sum(float(ledger["cost_usd"]) for ledger in ledgers)
        found.cost_usd = books.at_least_usd, charged, books.at_most_usd

    def _seen(self) -> Mapping[str, Mapping[str, int]]:
        """How often each prompt was asked and answered, once the servers know that nobody waits for them."""
        seen: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for server in self._servers:
            server.idle()
            for prompt, count in server.get("/ledger/prompts").items():
                seen[prompt].update(count)
        return seen

    def _requests(self) -> int:
        return sum(int(ledger["requests"]) for ledger in self._ledgers())

    def _ledgers(self) -> list[Json]:
        return [server.ledger() for server in self._servers]

    def _run_folder(self) -> Path:
        folders = [*self._folder.glob("runs/soak/*/")] or [self._folder / "runs" / "none"]
        if len(folders) > 1:
            self._blame(f"there are {len(folders)} run folders")
        return folders[0]

    def _blame(self, what: str) -> None:
        if len(self._found.violations) < 10:
            self._found.violations.append(what)

    def _tell(self, what: str) -> None:
        self._found.story.append(what)


TROUBLES: Mapping[str, Callable[[Episode, Session], None]] = {
    "kill": Episode._kill,
    "term": Episode._terminate,
    "stop": Episode._stop,
    "server-stop": Episode._stop_server,
    "storm": Episode._storm,
    "blackout": Episode._blackout,
    "spike": Episode._spike,
    "retry-after": Episode._refuse,
    "clock": Episode._jump,
    "wandb": Episode._lose_wandb,
    "redis": Episode._lose_redis,
    "disk": Episode._fill_disk,
    "budget": Episode._spend,
    "double": Episode._double,
}


def _most_in(amounts: Sequence[tuple[float, float]], window_s: float) -> float:
    """The largest sum of amounts within a window, each given with its time, in order."""
    most = total = 0.0
    first = 0
    for at, amount in amounts:
        total += amount
        while amounts[first][0] <= at - window_s:
            total -= amounts[first][1]
            first += 1
        most = max(most, total)
    return most


if __name__ == "__main__":
    sys.exit(main())
