"""Measures how long the results of a large run take to be exported, and in what memory.

    python scripts/export.py --rows 1000000 --repeats 3

Makes the store of a run that has answered all its rows, and starts ``python -m runner.export`` for each form. Prints
one JSON line a form, with the medians; exits with 1 where one takes longer than is promised.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from runner.export import FORMATS
from runner.store import Store

PROMISED_S = 60.0

ANSWER = "A sentence of an ordinary length, as most models write it when they are asked for one. "


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the export of a large run.")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    options = parser.parse_args()
    slowest = 0.0
    with tempfile.TemporaryDirectory(prefix="runner-export-") as folder:
        store = Path(folder, "results.sqlite")
        asyncio.run(lay(store))
        fill(store, options.rows)
        for form in options.formats:
            found = [export(store, form) for _ in range(options.repeats)]
            medians = {name: round(statistics.median(each[name] for each in found), 2) for name in found[0]}
            print(json.dumps({"form": form, "rows": options.rows, **medians}), flush=True)
            slowest = max(slowest, medians["elapsed_s"])
    return 1 if slowest > PROMISED_S else 0


async def lay(store: Path) -> None:
    await (await Store.open(store)).aclose()


def fill(store: Path, rows: int) -> None:
    """Enter the rows and their answers."""
    with closing(sqlite3.connect(store)) as database, database:
        insert(database, "rows", ({"position": n, **key(n), "metadata": f'{{"id":{n}}}'} for n in range(rows)))
        insert(database, "answers", (answer(n) for n in range(rows)))


def insert(database: sqlite3.Connection, table: str, records: Iterator[dict[str, Any]]) -> None:
    first = next(records)
    sql = f"INSERT INTO {table} ({', '.join(first)}) VALUES ({', '.join(f':{name}' for name in first)})"
    database.execute(sql, first)
    database.executemany(sql, records)


def key(number: int) -> dict[str, Any]:
    return {"ticket": number + 1, "content": b"%016d" % number}


def answer(number: int) -> dict[str, Any]:
    return {
        **key(number),
        "settled_at": 1.0,
        "output_text": f"{number} {2 * ANSWER}",
        "finish_reason": "stop",
        "request_id": f"request-{number}",
        "model_id": "model",
        "prompt_tokens": 100,
        "completion_tokens": 40,
        "total_tokens": 140,
        "deployment": "openai/model",
        "retries": 0,
        "queue_wait_s": 0.001,
        "service_time_s": 1.25,
        "end_to_end_s": 1.251,
        "cost_usd": 0.0001,
    }


def export(store: Path, form: str) -> dict[str, float]:
    """Seconds of wall time and of CPU, and the peak of memory in MiB."""
    command = [sys.executable, "-m", "runner.export", str(store), "--format", form]
    started = time.perf_counter()
    process = subprocess.Popen([*command, "--output", str(store.with_name(f"rows.{form}"))], stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    elapsed_s = time.perf_counter() - started
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"the export to {form} failed")
    process.returncode = 0
    return {
        "elapsed_s": elapsed_s,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_mib": usage.ru_maxrss / 1024,
    }


if __name__ == "__main__":
    sys.exit(main())
