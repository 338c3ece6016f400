"""Shards: whether they come to the same as the whole, and how much faster they are.

    python scripts/shards.py same --by joblib            # 8 shards against one run, row for row
    python scripts/shards.py same --by ray --kill 2      # two shards are killed in mid-run, and the command is repeated
    python scripts/shards.py same --by submitit_local
    python scripts/shards.py speed                       # two processes against one, and what limits them

Prints a JSON line for each measurement.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from runner.database import RUN_DATABASE
from runner.sweep import Cell, Sweep

TIMES = ("queue_wait_s", "service_time_s", "end_to_end_s", "ttft_s", "retries")
"""What two runs of the same rows differ in, beside the ids of their requests."""


def main() -> None:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["same", "speed"])
    parser.add_argument("--by", choices=["joblib", "ray", "submitit_local"], default="joblib")
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--rows", type=int, default=None)
    parser.add_argument("--kill", type=int, default=0, help="shards that are killed in mid-run (same)")
    parser.add_argument("--repeats", type=int, default=3, help="of each measurement (speed)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="shards-") as name:
        folder = Path(name)
        measure = same if arguments.what == "same" else speed
        for line in measure(arguments, folder):
            print(json.dumps(line), flush=True)


# The same rows


def same(arguments: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """One run and a sharded one over the same rows, with failures on the way."""
    rows = arguments.rows or 4_000
    write_rows(folder, rows)
    settings = [
        "dataset=jsonl",
        "dataset.path=rows.jsonl",
        "simulator.latency_s=0.05",
        "simulator.faults.http_500=0.02",
    ]
    run(folder, ["name=whole", *settings])
    command = ["-m", "name=parts", *settings, *shards_of(arguments.shards, arguments.by), "limits.concurrency=16"]
    killed: list[int] = []
    if arguments.kill:
        with started(folder, command) as process:
            sweep = find_sweep(folder)
            while len(killed) < arguments.kill and process.poll() is None:
                killed += kill_some(sweep, arguments.kill - len(killed))
                time.sleep(0.05)
            first_exit = process.wait()
    began = time.monotonic()
    last_exit = run(folder, command)
    took_s = time.monotonic() - began
    sweep = find_sweep(folder)
    whole = comparable(next(folder.glob("runs/whole/*/results.jsonl")))
    parts = comparable(sweep.folder / "results.jsonl")
    yield {
        "name": f"{arguments.shards} shards by {arguments.by}",
        "rows": rows,
        "killed": len(killed),
        "exit_codes": [first_exit, last_exit] if arguments.kill else [last_exit],
        "same": whole == parts,
        "perhaps_asked_twice": sum(lost(cell) for cell in sweep.cells()),
        "last_go_s": round(took_s, 1),
    }


def write_rows(folder: Path, count: int) -> None:
    with (folder / "rows.jsonl").open("w") as file:
        for n in range(count):
            file.write(json.dumps({"id": n, "prompt": f"Tell me about the number {n}."}) + "\n")


def shards_of(count: int, launcher: str) -> list[str]:
    return [f"hydra/launcher={launcher}", f"dataset.shard.index=range(0,{count})", f"dataset.shard.count={count}"]


def find_sweep(folder: Path) -> Sweep:
    while not (found := list(folder.glob("runs/parts/sweep-*"))):
        time.sleep(0.05)
    return Sweep(found[0])


def kill_some(sweep: Sweep, most: int) -> list[int]:
    """Kill so many processes that are in the middle of their shard."""
    killed: list[int] = []
    for cell in sweep.cells():
        if len(killed) < most and cell.exit_code is None and answers_of(cell) > 50:
            pid = int(Path(cell.folder, ".lock").read_text().removeprefix("pid "))
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
    return killed


def answers_of(cell: Cell) -> int:
    return count_in(cell, "SELECT count(*) FROM answers")


def lost(cell: Cell) -> int:
    """Rows that had been taken up when their process died, and may have been sent."""
    return count_in(cell, "SELECT count(*) FROM attempts WHERE error_type = 'Lost'")


def count_in(cell: Cell, sql: str) -> int:
    path = Path(cell.folder, RUN_DATABASE)
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
            return int(database.execute(sql).fetchone()[0])
    except sqlite3.OperationalError:  # it has just begun
        return 0


def comparable(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        del row["request_id"]
        for name in TIMES:
            del row["metrics"][name]
    return rows


# The command


@contextmanager
def started(folder: Path, arguments: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "runner", *arguments, "tracker=none"]
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def run(folder: Path, arguments: list[str]) -> int:
    with started(folder, arguments) as process:
        exit_code = process.wait()
    if exit_code:
        print((folder / "log").read_text()[-2_000:], file=sys.stderr)
    return exit_code


def speed(arguments: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    yield {}


if __name__ == "__main__":
    main()
