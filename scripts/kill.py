"""Kills a run again and again, lets it finish, and checks that nothing was lost, doubled or asked in vain.

    python scripts/kill.py --kills 50 --rows 5000 --seed 1
    python scripts/kill.py --kills 5 --rows 2000 --task embed --concurrency 8

Each session is ended with SIGKILL once the server has seen a random number of its requests, and followed by the same
command. The server's answers meet faults of every kind. Prints one JSON line; exits with 1 if a promise was broken:

- every row stands in results.jsonl once, in order, with its own answer;
- no row that results.sqlite held as answered at a kill is asked again;
- a kill costs no more answers than were in flight or waited for their commit;
- no prompt was asked more often than the run's books have entries for it;
- what the server charged lies within the bounds that the books give, after every kill and at the end.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trial.books import ROUNDING_USD, WAITING, read_books
from trial.server import Server
from trial.work import WORK

FAULTS = {
    **{"http_429": 0.02, "http_500": 0.02, "http_502": 0.01, "http_503": 0.01, "http_529": 0.01},
    **{"reset": 0.01, "hang": 0.005, "truncated": 0.01, "invalid_json": 0.01, "error_200": 0.01},
}
"""What the server of our own does to this share of the requests."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill a run again and again, and check what is left.")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--task", choices=list(WORK), default="generate")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--latency-s", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--server", help="URL of a simulator that nobody else uses; default: one of our own")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="runner-kill-") as folder, serving(options, Path(folder)) as server:
        found = Trial(Path(folder), server, options).run()
    print(json.dumps(found))
    return 1 if found["violations"] else 0


class Trial:
    """One dataset and one run folder, many sessions."""

    def __init__(self, folder: Path, server: Server, options: argparse.Namespace) -> None:
        self._folder = folder
        self._server = server
        self._kills = options.kills
        self._work = WORK[options.task]
        self._in_flight = options.concurrency * self._work.group
        self._random = random.Random(options.seed)
        self._prompts = [f"question {options.seed}-{number:06}.wav" for number in range(options.rows)]
        self._held: dict[str, int] = {}  # prompts with a stored answer: how often they had been asked by then
        self._lost: set[str] = set()  # prompts with an answer that was not stored
        self._costs: list[tuple[float, float, float]] = []  # in the books at least, charged, in the books at most
        self._violations: list[str] = []
        self._command = [
            *(sys.executable, "-m", "runner", "model=simulated/echo", f"api_base={server.url}"),
            *(*self._work.arguments, "name=kill", "tracker=none"),
            *(f"limits.concurrency={options.concurrency}", "retry.base_s=0.02"),
            "request.timeout=1",
        ]
        self._work.lay(folder, self._prompts)

    def run(self) -> dict[str, Any]:
        started = time.monotonic()
        held_at_kills: list[int] = []
        while (left := self._kills - len(held_at_kills)) and self._killed(left):
            self._check_books()
            held_at_kills.append(len(self._held))
        sessions = 0
        exit_code = 3
        while exit_code == 3 and sessions < 5:  # rows that met a fault at every attempt
            exit_code = self._session().wait()
            sessions += 1
        self._check_books()
        self._check_results(exit_code)
        asked = self._asked()
        return {
            "kills": len(held_at_kills),
            "rows": len(self._prompts),
            "answers_held_at_kills": held_at_kills,
            "requests": sum(count["asked"] for count in asked.values()),
            "answers_lost": len(self._lost),
            "finishing_sessions": sessions,
            "cost_usd": [round(cost, 6) for cost in self._costs[-1] if cost < math.inf],
            "seconds": round(time.monotonic() - started, 1),
            "violations": self._violations,
        }

    def _killed(self, kills_left: int) -> bool:
        """Begin a session and kill it. False: it came to its end before."""
        before = self._requests()
        share = (len(self._prompts) - len(self._held)) / (kills_left + 1) / self._work.group
        requests = self._random.randint(0, int(1.5 * share))
        session = self._session()
        if requests == 0:
            time.sleep(self._random.uniform(0, 1.5))  # while it starts
        while session.poll() is None and self._requests() - before < requests:
            time.sleep(0.005)
        time.sleep(self._random.uniform(0, 0.05))
        session.kill()
        return session.wait() < 0

    def _session(self) -> subprocess.Popen[bytes]:
        with (self._folder / "terminal.txt").open("ab") as terminal:
            return subprocess.Popen(self._command, cwd=self._folder, stdout=terminal, stderr=terminal)

    def _check_books(self) -> None:
        """Compare what the run has stored with what the server has seen."""
        asked = self._asked()
        booked: dict[str, int] = {}
        [path] = self._folder.glob("runs/kill/*/results.sqlite") or [Path()]
        books = read_books(path)
        charged = float(self._server.ledger()["cost_usd"])
        if self._work.bounded and books.without_bound:
            self._violations.append(f"{books.without_bound} attempts have no bound")
        at_most = books.at_most_usd if self._work.bounded else math.inf
        self._costs.append((books.at_least_usd, charged, at_most))
        if not books.at_least_usd - ROUNDING_USD <= charged <= at_most + ROUNDING_USD:
            self._violations.append(f"${charged} were charged, the books say {books.at_least_usd} to {at_most}")
        for _, content, prompt in books.rows:
            booked[prompt] = books.booked(content)
            if prompt in self._held and asked[prompt]["asked"] > self._held[prompt]:
                self._violations.append(f"{prompt} has an answer and was asked again")
            if books.answers.get(content):
                self._held.setdefault(prompt, asked[prompt]["asked"])
        for prompt, count in asked.items():
            if count["asked"] > booked.get(prompt, 0):
                self._violations.append(f"{prompt} was asked {count['asked']} times, booked {booked.get(prompt, 0)}")
        for prompt in self._held.keys() - booked.keys():
            self._violations.append(f"{prompt} had an answer and lost it")
        lost = {prompt for prompt, count in asked.items() if count["answered"]} - self._held.keys()
        if len(lost - self._lost) > self._in_flight + WAITING:
            self._violations.append(f"a kill cost {len(lost - self._lost)} answers")
        self._lost |= lost

    def _check_results(self, exit_code: int) -> None:
        if exit_code != 0:
            self._violations.append(f"the last session ended with {exit_code}")
        [path] = self._folder.glob("runs/kill/*/results.jsonl")
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if [row["_index"] for row in rows] != list(range(len(self._prompts))):
            self._violations.append("results.jsonl does not hold every row once, in order")
        for row in rows:
            if row["error"] or not self._work.is_answer(row, self._prompts[row["_index"]]):
                self._violations.append(f"row {row['_index']} has another row's answer, or none: {str(row)[:200]}")

    def _asked(self) -> dict[str, dict[str, int]]:
        """Counts by prompt, once the server has noticed that nobody waits for it any more."""
        self._server.idle()
        return defaultdict(lambda: {"asked": 0, "answered": 0}, self._server.get("/ledger/prompts"))

    def _requests(self) -> int:
        return int(self._server.ledger()["requests"])


@contextmanager
def serving(options: argparse.Namespace, folder: Path) -> Iterator[Server]:
    """The server that was named, or a new one."""
    settings = {f"faults.{name}": share for name, share in FAULTS.items()}
    server = Server("server", {"latency_s": options.latency_s, **settings}, log=folder / "server.txt")
    if options.server:
        server.url = options.server
        yield server
    else:
        with server.running():
            yield server


if __name__ == "__main__":
    sys.exit(main())
