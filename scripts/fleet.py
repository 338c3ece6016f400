"""Trials of routing: the real command against simulators in processes of their own, which are killed, stopped and hit.

    python scripts/fleet.py slots      # servers of 8, 8 and 2 slots: is all of their throughput used?
    python scripts/fleet.py chaos      # one killed with -9, one stopped, one answering 500 to everything
    python scripts/fleet.py prefixes   # 50 shared prefixes over 4 servers: does each stay at one?
    python scripts/fleet.py hedge      # 2 % of the answers take 20 times as long: is the tail cut?
    python scripts/fleet.py storm      # 529 to everything for a minute: what does it cost?

Each prints a JSON line with its figures, and exits with 1 if one of them breaks a promise, which it names.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from trial.server import Json, Server


def main() -> int:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trial", choices=TRIALS)
    parser.add_argument("--rows", type=int, help="default: the trial's own")
    parser.add_argument("--seconds", type=float, help="how long an outage lasts; default: the trial's own")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="runner-fleet-") as folder, ExitStack() as servers:
        trial = Trial(Path(folder), servers, options)
        found = TRIALS[options.trial](trial)
    print(json.dumps({"trial": options.trial, **found, "broken": trial.broken}))
    return 1 if trial.broken else 0


# Trials


def slots(trial: Trial) -> Json:
    """Unequal servers are used to the full, and weights are kept."""
    rows = trial.rows(2_500)
    latency_s, sizes = 0.2, {"a": 8, "b": 8, "c": 2}
    best = sum(sizes.values()) / latency_s
    for label, size in sizes.items():
        trial.serve(label, slots=size, latency_s=latency_s, latency_spread=0)
    found: Json = {"rows": rows, "best_per_s": best}
    limits = {label: {"limits": {"concurrency": size}} for label, size in sizes.items()}
    for strategy, settings in (("least-busy", {}), ("usage-based-routing", limits)):
        run = trial.run(strategy, rows=rows, concurrency=54, strategy=strategy, deployments=settings)
        found[strategy] = round(run.middle_rate / best, 3)
        trial.promise(found[strategy] >= 0.95, f"{strategy} reaches {found[strategy]:.1%} of the servers' throughput")
    weights = {label: {"weight": weight} for label, weight in (("a", 4), ("b", 4), ("c", 1))}
    run = trial.run("shuffle", rows=rows, concurrency=54, strategy="simple-shuffle", deployments=weights)
    shares = run.shares()
    found["simple-shuffle"] = {label: round(share, 3) for label, share in shares.items()}
    for label, wanted in (("a", 4 / 9), ("b", 4 / 9), ("c", 1 / 9)):
        trial.promise(abs(shares[label] - wanted) <= 0.03, f"simple-shuffle gives {label} {shares[label]:.1%}")
    return found


def chaos(trial: Trial) -> Json:
    """Servers die, hang and fail in the middle of a run; no row does."""
    rows, outage_s = trial.rows(10_000), trial.seconds(20.0)
    count, size, latency_s, begins_s = 6, 8, 0.25, 5.0
    servers = [
        trial.serve(f"gpu-{index}", slots=size, latency_s=latency_s, latency_spread=0.1) for index in range(count)
    ]
    killed, stopped, failing = servers[:3]
    back: dict[str, float | None] = {}

    def strike() -> None:
        killed.kill()
        stopped.signal(signal.SIGSTOP)
        failing.set(faults={"http_500": 1.0})

    def heal() -> None:
        killed.start()
        stopped.signal(signal.SIGCONT)
        failing.set(faults={"http_500": 0.0})

    run = trial.run(
        "chaos",
        rows=rows,
        concurrency=2 * count * size,
        strategy="least-busy",
        events=[(begins_s, strike), (begins_s + outage_s, heal)],
        watch=lambda since: _note_returns(back, [killed, stopped, failing], since - begins_s - outage_s),
    )
    per_s = size / latency_s
    ideal_s = _ideal_s(rows, [(begins_s, count * per_s), (outage_s, (count - 3) * per_s)], count * per_s)
    found = {
        "rows": rows,
        "failed": run.summary["failed"],
        "exit_code": run.exit_code,
        "wall_s": round(run.wall_s, 1),
        "ideal_s": round(ideal_s, 1),
        "ratio": round(run.wall_s / ideal_s, 3),
        "back_after_s": {label: after and round(after, 1) for label, after in back.items()},
        "retries": run.summary["retries"],
    }
    trial.promise(run.exit_code == 0 and run.summary["succeeded"] == rows, f"{run.summary['failed']} rows failed")
    trial.promise(found["ratio"] <= 1.3, f"it took {found['ratio']} times what the remaining slots allow")
    for server in (killed, stopped, failing):
        after = back.get(server.label)
        trial.promise(after is not None and after <= 10, f"{server.label} was back in service after {after} s")
    return found


def prefixes(trial: Trial) -> Json:
    """What begins alike goes to one server."""
    rows, count, shared = trial.rows(4_000), 4, 50
    for index in range(count):
        trial.serve(f"gpu-{index}", latency_s=0.05, slots=16)
    words = random.Random(trial.seed)
    systems = [" ".join(f"{words.getrandbits(32):08x}" for _ in range(120)) for _ in range(shared)]
    asked = [words.randrange(shared) for _ in range(rows)]

    def row(number: int) -> Json:
        chat = [
            {"role": "system", "content": systems[asked[number]]},
            {"role": "user", "content": f"Question {trial.seed}-{number}?"},
        ]
        return {"messages": chat}

    found: Json = {"rows": rows}
    for strategy in ("simple-shuffle", "prefix-affinity"):
        for server in trial.servers.values():
            server.post("/ledger/reset")
        run = trial.run(strategy, rows=rows, concurrency=48, strategy=strategy, row=row)
        homes: dict[int, Counter[str]] = defaultdict(Counter)
        for number, label in enumerate(run.deployments()):
            homes[asked[number]][label] += 1
        hits = [server.ledger()["prefixes"] for server in trial.servers.values()]
        found[strategy] = {
            "hits": round(sum(each["hits"] for each in hits) / rows, 4),
            "misses": sum(each["misses"] for each in hits),
            "least_at_home": round(min(max(labels.values()) / sum(labels.values()) for labels in homes.values()), 3),
            "most_load": round(max(run.shares().values()) * count, 3),
        }
    affinity = found["prefix-affinity"]
    trial.promise(affinity["least_at_home"] >= 0.9, f"a prefix has {affinity['least_at_home']:.0%} at one server")
    trial.promise(affinity["most_load"] <= 1.3, f"a server has {affinity['most_load']} times the mean load")
    return found


def hedge(trial: Trial) -> Json:
    """Stragglers are asked a second time elsewhere."""
    rows = trial.rows(6_000)
    for index in range(4):
        server = trial.serve(f"gpu-{index}", latency_s=0.1, seed=trial.seed + index)
        server.set(faults={"slow": 0.02}, slow_factor=20.0)
    found: Json = {"rows": rows}
    for name, hedged in (("without", False), ("with", True)):
        for server in trial.servers.values():
            server.post("/ledger/reset")
        run = trial.run(name, rows=rows, concurrency=24, strategy="least-busy", settings=[f"routing.hedge={hedged}"])
        times = sorted(row["metrics"]["end_to_end_s"] for row in run.results())
        requests = sum(server.ledger()["requests"] for server in trial.servers.values())
        found[name] = {"p99_s": round(times[int(0.99 * rows)], 3), "requests_per_row": round(requests / rows, 4)}
    cut = found["without"]["p99_s"] / found["with"]["p99_s"]
    found["cut"] = round(cut, 2)
    trial.promise(cut >= 3, f"hedging cuts the p99 by {cut:.1f}")
    more = found["with"]["requests_per_row"] / found["without"]["requests_per_row"] - 1
    trial.promise(more <= 0.05, f"hedging costs {more:.1%} more requests")
    return found


def storm(trial: Trial) -> Json:
    """A provider is overloaded for a while."""
    rows, storm_s, begins_s = trial.rows(1_000), trial.seconds(60.0), 2.0
    server = trial.serve("only", latency_s=0.2)
    recovered: dict[str, float | None] = {}
    run = trial.run(
        "storm",
        rows=rows,
        concurrency=32,
        events=[
            (begins_s, lambda: server.set(faults={"http_529": 1.0})),
            (begins_s + storm_s, lambda: server.set(faults={"http_529": 0.0})),
        ],
        watch=lambda since: _note_returns(recovered, [server], since - begins_s - storm_s, answers=1),
    )
    requests = server.ledger()["requests"]
    after = recovered.get("only")
    found = {
        "rows": rows,
        "failed": run.summary["failed"],
        "requests_per_row": round(requests / rows, 4),
        "recovered_after_s": after and round(after, 2),
        "wall_s": round(run.wall_s, 1),
    }
    trial.promise(run.exit_code == 0 and run.summary["succeeded"] == rows, f"{run.summary['failed']} rows failed")
    trial.promise(requests / rows < 1.2, f"it took {requests / rows:.3f} requests per row")
    trial.promise(after is not None and after <= 5, f"the first answer came {after} s after the storm")
    return found


TRIALS: Mapping[str, Callable[[Trial], Json]] = {
    "slots": slots,
    "chaos": chaos,
    "prefixes": prefixes,
    "hedge": hedge,
    "storm": storm,
}


def _note_returns(back: dict[str, float | None], servers: Sequence[Server], since_s: float, answers: int = 20) -> None:
    """Note when a server has answered so many requests that came after its recovery, ``since_s`` seconds ago."""
    if since_s < 0:
        return
    for server in servers:
        if server.label not in back:
            back[server.label] = None
            server.answered_before = server.ledger()["by_status"].get("200", 0)
        elif back[server.label] is None:
            ledger = server.ledger()
            if ledger["by_status"].get("200", 0) - server.answered_before >= answers:
                back[server.label] = since_s


def _ideal_s(rows: float, phases: Sequence[tuple[float, float]], last_per_s: float) -> float:
    """Seconds that ``rows`` take at the rates of phases (seconds, rows per second), and at the last one after them."""
    spent_s = 0.0
    for lasts_s, per_s in phases:
        if rows <= lasts_s * per_s:
            return spent_s + rows / per_s
        rows -= lasts_s * per_s
        spent_s += lasts_s
    return spent_s + rows / last_per_s


# The command, and the servers


class Trial:
    """Servers, and runs of the command over them."""

    def __init__(self, folder: Path, stack: ExitStack, options: argparse.Namespace) -> None:
        self.seed: int = options.seed
        self.servers: dict[str, Server] = {}
        self.broken: list[str] = []
        self._folder = folder
        self._stack = stack
        self._options = options

    def rows(self, default: int) -> int:
        return self._options.rows or default

    def seconds(self, default: float) -> float:
        return default if self._options.seconds is None else float(self._options.seconds)

    def promise(self, is_kept: bool, otherwise: str) -> None:
        if not is_kept:
            self.broken.append(otherwise)

    def serve(self, label: str, **settings: float) -> Server:
        server = self.servers[label] = Server(label, settings, log=self._folder / f"{label}.txt")
        self._stack.enter_context(server.running())
        return server

    def run(
        self,
        name: str,
        *,
        rows: int,
        concurrency: int,
        strategy: str = "simple-shuffle",
        deployments: Mapping[str, Json] | None = None,
        settings: Sequence[str] = (),
        row: Callable[[int], Json] | None = None,
        events: Sequence[tuple[float, Callable[[], None]]] = (),
        watch: Callable[[float], None] = lambda since: None,
    ) -> Run:
        """Run the command over all servers.

        Args:
            deployments: Settings of the deployments, by label.
            events: What to do so many seconds after the first answer.
            watch: Called now and then with the seconds since the first answer.
        """
        path = self._folder / f"{name}.jsonl"
        make = row or (lambda number: {"prompt": f"question {self.seed}-{name}-{number}"})
        path.write_text("".join(f"{json.dumps(make(number))}\n" for number in range(rows)), encoding="utf-8")
        fleet = {
            label: {"model": "hosted_vllm/simulated", "api_base": server.url, **(deployments or {}).get(label, {})}
            for label, server in self.servers.items()
        }
        conf = self._folder / "conf" / "deployments" / f"{name}.yaml"
        conf.parent.mkdir(parents=True, exist_ok=True)
        conf.write_text(json.dumps(fleet), encoding="utf-8")  # which is YAML
        command = [
            *(sys.executable, "-m", "runner", f"name={name}", f"deployments={name}", f"routing.strategy={strategy}"),
            *("dataset=jsonl", f"dataset.path={path}", f"limits.concurrency={concurrency}", "tracker=none", *settings),
        ]
        with (self._folder / f"{name}.txt").open("wb") as terminal:
            process = subprocess.Popen(command, cwd=self._folder, stdout=terminal, stderr=subprocess.STDOUT)
            self._follow(process, events, watch)
        [folder] = self._folder.glob(f"runs/{name}/*/")
        return Run(folder, exit_code=process.returncode)

    def _follow(
        self,
        process: subprocess.Popen[bytes],
        events: Sequence[tuple[float, Callable[[], None]]],
        watch: Callable[[float], None],
    ) -> None:
        """Watch it to its end, and do what is due."""
        due = list(events)
        began: float | None = None
        while process.poll() is None:
            time.sleep(0.05)
            if began is None:
                if any(server.ledger()["answered"] for server in self.servers.values()):
                    began = time.monotonic()
                continue
            since = time.monotonic() - began
            while due and since >= due[0][0]:
                due.pop(0)[1]()
            watch(since)


class Run:
    """A run of the command that has ended."""

    def __init__(self, folder: Path, *, exit_code: int) -> None:
        self.exit_code = exit_code
        self.summary: Json = json.loads((folder / "summary.json").read_bytes())
        self._folder = folder
        with closing(sqlite3.connect(folder / "results.sqlite")) as database:
            self._settled_at = [at for (at,) in database.execute("SELECT settled_at FROM answers ORDER BY settled_at")]

    @property
    def wall_s(self) -> float:
        """From the first answer to the last."""
        wall_s: float = self._settled_at[-1] - self._settled_at[0]
        return wall_s

    @property
    def middle_rate(self) -> float:
        """Answers per second between the first tenth of them and the last."""
        count = len(self._settled_at)
        first, last = int(0.1 * count), int(0.9 * count)
        span_s: float = self._settled_at[last] - self._settled_at[first]
        return (last - first) / span_s

    def results(self) -> list[Json]:
        lines = (self._folder / "results.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def deployments(self) -> list[str]:
        """Which one answered, by row."""
        return [row["metrics"]["deployment"] for row in self.results()]

    def shares(self) -> dict[str, float]:
        return {label: each["share"] for label, each in self.summary["deployments"].items()}


if __name__ == "__main__":
    sys.exit(main())
