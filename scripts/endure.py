"""Keeps one client in one process at work for minutes or hours, and checks that nothing in it grows.

    python scripts/endure.py --minutes 10 --seed 1

Batches of every kind are asked of a server that fails in every way; some are cancelled halfway, and clients come and go
beside the one that stays. After each round the process counts its open files, threads, tasks, objects and memory, and
the files and memory of the server. Prints one JSON line; exits with 1 if something grew from the first third of the
rounds to the last by more than `ALLOWANCE`, or a batch did not give one outcome for each input.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runner import BatchResult, LMClient
from runner.errors import RequestError
from trial.server import Server

FAULTS = {
    **{"http_429": 0.03, "http_500": 0.03, "http_502": 0.02, "http_503": 0.02, "http_529": 0.02, "reset": 0.02},
    **{"hang": 0.005, "slow": 0.02, "truncated": 0.02, "invalid_json": 0.02, "error_200": 0.02},
}

ALLOWANCE = {"files": 8, "threads": 2, "tasks": 2, "objects": 20_000, "mb": 12, "server_files": 8, "server_mb": 12}
"""By how much each may be more: pools breathe, and memory is given back in pieces."""

WARM_UP = 3
"""Rounds that do not count: imports, pools, and what is compiled when it is first used."""

CONCURRENCY = 32
PAUSE_S = 0.5
"""Between rounds, to leave the machine to others."""


def main() -> int:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="runner-endure-") as folder:
        settings = {"latency_s": 0.02, **{f"faults.{kind}": share for kind, share in FAULTS.items()}}
        server = Server("endure", settings, log=Path(folder, "server.txt"))
        with server.running():
            found = asyncio.run(Endurance(server, seed=options.seed).run(60 * options.minutes))
    print(json.dumps(found))
    return 1 if found["violations"] else 0


class Endurance:
    """Rounds of work, and what is counted after each."""

    def __init__(self, server: Server, *, seed: int) -> None:
        self._server = server
        self._draw = random.Random(seed)
        self._counts: list[Mapping[str, float]] = []
        self._violations: list[str] = []
        self._asked = self._failed = 0

    async def run(self, seconds: float) -> dict[str, Any]:
        ends = time.monotonic() + seconds
        async with self._client() as client:
            while time.monotonic() < ends:
                await self._round(client)
                await asyncio.sleep(PAUSE_S)
                self._counts.append(await self._count())
        counted = self._counts[WARM_UP:]
        grown = self._grown(counted)
        return {
            "rounds": len(self._counts),
            "asked": self._asked,
            "failed": self._failed,
            "first": counted[0] if counted else None,
            "last": counted[-1] if counted else None,
            "grown": grown,
            "violations": [*self._violations, *(f"{name} grew by {by:g}" for name, by in grown.items())],
        }

    async def _round(self, client: LMClient) -> None:
        """A batch of each kind, one that is called off, and a client of its own."""
        name = f"{len(self._counts)}-{self._draw.random()}"
        texts = [f"question {name}-{number} {'x' * self._draw.randint(1, 400)}" for number in range(40)]
        self._note(texts, await client.agenerate_batch(texts, max_tokens=200))
        self._note(texts, await client.aembed_batch(texts, micro_batch_size=8))
        try:
            async with asyncio.timeout(self._draw.uniform(0.0, 0.1)):
                await client.agenerate_batch([f"cancelled {text}" for text in texts])
        except TimeoutError:
            pass
        async with self._client() as brief:
            self._note(texts[:8], await brief.agenerate_batch(texts[:8], stream=True))
            try:
                await brief.atranscribe(name.encode())
            except RequestError:
                self._failed += 1

    def _client(self) -> LMClient:
        return LMClient(
            model="simulated/echo",
            api_base=self._server.url,
            max_parallel_requests=CONCURRENCY,
            rpm=1_000_000,
            timeout=1.0,
        )

    def _note(self, texts: Sequence[str], batch: BatchResult[Any]) -> None:
        outcomes = [
            (result is None) != (error is None) for result, error in zip(batch.results, batch.errors, strict=True)
        ]
        if outcomes != [True] * len(texts):
            self._violations.append(f"{len(texts)} inputs have {sum(outcomes)} outcomes")
        self._asked += len(texts)
        self._failed += sum(error is not None for error in batch.errors)

    async def _count(self) -> Mapping[str, float]:
        await asyncio.to_thread(self._server.post, "/ledger/reset")
        gc.collect()
        own, its = Path("/proc/self"), Path(f"/proc/{self._server.pid}")
        return {
            "files": _files(own),
            "threads": threading.active_count(),
            "tasks": len(asyncio.all_tasks()),
            "objects": len(gc.get_objects()),
            "mb": _mb(own),
            "server_files": _files(its),
            "server_mb": _mb(its),
        }

    def _grown(self, counted: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """What the last third of the rounds never came down to of what the first third reached."""
        third = len(counted) // 3
        if not third:
            return {}
        grown = {
            name: min(each[name] for each in counted[-third:]) - max(each[name] for each in counted[:third])
            for name in ALLOWANCE
        }
        return {name: by for name, by in grown.items() if by > ALLOWANCE[name]}


def _files(process: Path) -> int:
    return len([*process.glob("fd/*")])


def _mb(process: Path) -> float:
    """Resident memory; 0 where the system does not tell (not Linux)."""
    try:
        status = (process / "status").read_text(encoding="utf-8")
    except OSError:
        return 0.0
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmRSS:"))


if __name__ == "__main__":
    sys.exit(main())
