"""Measures how soon a large run that is almost done asks its first request, and what memory it needs until then.

    python scripts/million.py --rows 1000000 --open 1000 --repeats 3

Makes a dataset and the store of a run that has answered all rows but the last ones, which is the worst place for them:
everything before is read and compared first. Then starts the command against a server that notes the first request.
Prints one JSON line with the medians; exits with 1 where they exceed what is promised.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

from runner.config import DatasetConfig, DatasetKind, RunnerConfig
from runner.identity import run_id
from runner.store import Store
from runner.task import Item
from runner.workload import Workload

PROMISED_S = 15.0
PROMISED_MIB = 200.0

PROMPT = "Answer in one sentence: {{ question }}"
ANSWER = "A sentence of an ordinary length, as most models write it when they are asked for one."
IN_FLIGHT = 64
"""Answers settle out of order by so many places."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the resume of a large run that is almost done.")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--open", type=int, default=1_000, help="rows without an answer")
    parser.add_argument("--spread", action="store_true", help="let them lie anywhere, and not at the end")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="keep the run here, and use it if it is there already")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="runner-million-") as temporary:
        folder = options.folder or Path(temporary)
        if not (folder / "rows.jsonl").exists():
            make_run(folder, options)
        found = [resume(folder) for _ in range(options.repeats)]
    medians = {name: round(statistics.median(each[name] for each in found), 2) for name in found[0]}
    print(json.dumps({"rows": options.rows, "open": options.open, **medians}))
    return 1 if medians["first_request_s"] > PROMISED_S or medians["peak_mib"] > PROMISED_MIB else 0


def make_run(folder: Path, options: argparse.Namespace) -> None:
    """Lay down the dataset and a store that has answers to most of it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for number in range(options.rows):
            question = f"which of the {number} answers is the right one, and why is it not the one before?"
            file.write(json.dumps({"id": number, "question": question, "target": str(number % 7)}) + "\n")
    config = RunnerConfig(
        model="openai_like/echo",
        dataset=DatasetConfig(kind=DatasetKind.jsonl, path=str(folder / "rows.jsonl")),
        prompt=PROMPT,
    )
    path = folder / "runs" / "million" / run_id(config) / "results.sqlite"
    workload = Workload(config)
    asyncio.run(lay(path, workload))
    chance = random.Random(0)
    last = options.rows - options.open
    unanswered = set(chance.sample(range(options.rows), options.open) if options.spread else range(last, options.rows))
    with closing(sqlite3.connect(path)) as database, database:
        items = workload.items()
        while chunk := list(islice(items, IN_FLIGHT)):
            rows = [(item.position, item.content, item.position + 1, item.metadata) for item in chunk]
            database.executemany(_ROW, rows)
            chance.shuffle(chunk)
            database.executemany(_ANSWER, answers(chunk, unanswered))


async def lay(path: Path, workload: Workload) -> None:
    async with await Store.open(path) as store:
        await store.put_meta({"samples": str(workload.samples), "scorers": workload.scorers.fingerprint})


def answers(chunk: list[Item], unanswered: set[int]) -> Iterator[tuple[Any, ...]]:
    for item in chunk:
        if item.position not in unanswered:
            answered_at = 1_700_000_000.0 + item.position / 100
            yield item.position + 1, item.content, answered_at, f"{ANSWER} {item.position}", f"r-{item.position}"


_ROW = "INSERT INTO rows (position, content, ticket, metadata, asked_at, session) VALUES (?, ?, ?, ?, 1.7e9, 1)"

_ANSWER = """
    INSERT INTO answers (
        ticket, content, settled_at, output_text, request_id, finish_reason, model_id, prompt_tokens,
        completion_tokens, total_tokens, deployment, retries, queue_wait_s, service_time_s, end_to_end_s
    )
    VALUES (?, ?, ?, ?, ?, 'stop', 'echo', 25, 20, 45, 'openai_like/echo', 0, 0.001, 0.25, 0.251)
"""


def resume(folder: Path) -> dict[str, float]:
    """Start the command, and stop it when its first request comes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/v1"
        command = [
            *(sys.executable, "-m", "runner", "model=openai_like/echo", f"api_base={url}", "name=million"),
            *("dataset=jsonl", f"dataset.path={folder / 'rows.jsonl'}", f"prompt='{PROMPT}'", "tracker=none"),
        ]
        started = time.monotonic()
        with subprocess.Popen(command, cwd=folder, stderr=subprocess.DEVNULL) as process:
            try:
                await_request(server, process)
                waited_s = time.monotonic() - started
                status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
                stat = Path(f"/proc/{process.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
            finally:
                process.kill()
                process.wait()
    runs = list(folder.glob("runs/million/*"))
    if len(runs) != 1:
        raise SystemExit(f"the command began a run of its own instead of going on: {runs}")
    [peak_kib] = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
    cpu_s = (int(stat[11]) + int(stat[12])) / 100  # clock ticks, user and system
    return {"first_request_s": waited_s, "cpu_s": cpu_s, "peak_mib": int(peak_kib) / 1024}


def await_request(server: socket.socket, process: subprocess.Popen[bytes]) -> None:
    """Wait for a connection over which something comes: one that is opened and closed only looks who is there."""
    server.settimeout(1.0)
    while process.poll() is None:
        try:
            connection, _ = server.accept()
        except TimeoutError:
            continue
        with connection:
            if connection.recv(1):
                return
    raise SystemExit(f"the command ended with {process.returncode} and asked nothing")


if __name__ == "__main__":
    sys.exit(main())
