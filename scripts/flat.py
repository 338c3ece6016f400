"""Measures whether a long run stays as fast and as small as it begins, in one process.

    python scripts/flat.py                      # a million rows: about six minutes
    python scripts/flat.py --rows 100000

Runs the command over ten thousand rows, then over all of them, against a stub that answers at once. Prints one JSON
line: the peak of either run's memory and their ratio; the rates of the first and the last tenth of the rows, and their
ratio; the size of the store and of the results, in all and per million rows. Exits with 1 where memory or time grows by
more than is promised.
"""

from __future__ import annotations

import argparse
import json
import sqlite3
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

from benchmark import Job, experiment, server_at

PROMISED_MEMORY = 1.2
PROMISED_SLOWDOWN = 0.95

SMALL_ROWS = 10_000


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure whether a long run stays as fast and as small as it begins.")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--concurrency", type=int, default=64, help="requests in flight; default: 64")
    options = parser.parse_args()
    with server_at(None) as server:
        small = measure(Job(server=server, requests=SMALL_ROWS, concurrency=options.concurrency))
        large = measure(Job(server=server, requests=options.rows, concurrency=options.concurrency))
    memory = round(large["peak_rss_mb"] / small["peak_rss_mb"], 3)
    slowdown = round(large["last_rows_per_s"] / large["first_rows_per_s"], 3)
    print(json.dumps({**large, "small_peak_rss_mb": small["peak_rss_mb"], "memory": memory, "last/first": slowdown}))
    return 1 if memory > PROMISED_MEMORY or slowdown < PROMISED_SLOWDOWN else 0


def measure(job: Job) -> dict[str, Any]:
    """One run of the command, and what it left behind."""
    with tempfile.TemporaryDirectory(prefix="runner-flat-") as temporary:
        folder = Path(temporary, "run")
        ended, _ = experiment(job, folder)
        [store] = folder.glob("runs/benchmark/*/results.sqlite")
        first, last = rates(store, job.requests // 10)
        sizes = {"store": store.stat().st_size, "results": store.with_name("results.jsonl").stat().st_size}
    return {
        "rows": job.requests,
        "rows_per_s": round(job.requests / ended.wall_s, 1),
        "cpu_ms_per_row": round(1000 * ended.cpu_s / job.requests, 4),
        "peak_rss_mb": round(ended.peak_rss_mb, 1),
        "first_rows_per_s": first,
        "last_rows_per_s": last,
        **{f"{name}_mb": round(size / 1e6, 1) for name, size in sizes.items()},
        **{f"{name}_mb_per_million": round(size / job.requests, 1) for name, size in sizes.items()},
    }


def rates(store: Path, part: int) -> tuple[float, float]:
    """Rows per second among the first ``part`` answers, and among the last."""
    with closing(sqlite3.connect(f"{store.as_uri()}?mode=ro", uri=True)) as database:
        ends = [database.execute(_SPAN.format(order), (part,)).fetchone() for order in ("ASC", "DESC")]
    first, last = (round(part / (until - since), 1) for since, until in ends)
    return first, last


_SPAN = """
    SELECT min(settled_at), max(settled_at)
    FROM (SELECT settled_at FROM answers ORDER BY ticket {} LIMIT ?)
"""


if __name__ == "__main__":
    sys.exit(main())
