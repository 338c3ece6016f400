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
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from statistics import median
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


# The speed


def speed(arguments: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Rows per second of one process and of two, by what holds them up: the server's latency, or the processors."""
    for name, server, usual in (("waiting for the server", SLOW, 2_000), ("as fast as it goes", AT_ONCE, 40_000)):
        rows = arguments.rows or usual
        write_rows(folder, rows)
        with serving(folder, server) as (url, server_id):
            measured = [[measure(folder, url, server_id, n) for n in (1, 2)] for _ in range(arguments.repeats)]
        one, two = ({key: median(each[key] for each in of) for key in of[0]} for of in zip(*measured, strict=True))
        yield {
            "name": name,
            "rows": rows,
            "rows_per_s": [round(one["rate"]), round(two["rate"])],
            "ratio": round(median(after["rate"] / before["rate"] for before, after in measured), 2),
            "cores": os.cpu_count(),
            "cores_of_the_clients": [round(one["client"], 2), round(two["client"], 2)],
            "cores_of_the_server": [round(one["server"], 2), round(two["server"], 2)],
        }


def measure(folder: Path, url: str, server: int, processes: int) -> dict[str, float]:
    """One sharded run: rows per second at work, and how many cores it and the server kept busy meanwhile."""
    shutil.rmtree(folder / "runs", ignore_errors=True)
    command = ["-m", "name=parts", "dataset=jsonl", "dataset.path=rows.jsonl", "limits.concurrency=64"]
    command += [f"api_base={url}", "model=openai_like/simulated", f"hydra.launcher.n_jobs={processes}"]
    clients, servers = cpu_of_children(), cpu_of(server)
    run(folder, [*command, *shards_of(processes, "joblib")])
    clients, servers = cpu_of_children() - clients, cpu_of(server) - servers
    summary = json.loads((find_sweep(folder).folder / "summary.json").read_bytes())
    took_s = summary["elapsed_s"]
    return {"rate": summary["succeeded"] / took_s, "client": clients / took_s, "server": servers / took_s}


def cpu_of_children() -> float:
    """Seconds of processor time of what was started here and has ended, with all that it started."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def cpu_of(pid: int) -> float:
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


SLOW = ("-m", "runner.simulator", "--port=0", "--latency-s=1", "--latency-spread=0")
AT_ONCE = (str(Path(__file__).with_name("benchmark.py")), "server")
"""Servers: one that is waited for, and one that takes next to no processor time from its clients."""


@contextmanager
def serving(folder: Path, server: Sequence[str] = SLOW) -> Iterator[tuple[str, int]]:
    """A server in a process of its own: its address and its process."""
    command = [sys.executable, *server]
    process = subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().rpartition(" ")[2].strip(), process.pid
    finally:
        process.kill()
        process.wait()


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


if __name__ == "__main__":
    main()
