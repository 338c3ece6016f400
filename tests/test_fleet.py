"""The trials of routing, in short: that rows are answered, never how fast."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from harness import SOURCES

ROOT = Path(__file__).parents[1]


def trial(*arguments: str) -> dict[str, Any]:
    ended = subprocess.run(
        [sys.executable, "scripts/fleet.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(SOURCES)},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert ended.stdout, ended.stderr
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


def test_no_row_fails_while_servers_are_killed_stopped_and_hit() -> None:
    found = trial("chaos", "--rows", "1500", "--seconds", "4")

    assert (found["exit_code"], found["failed"], found["rows"]) == (0, 0, 1500)
    assert set(found["back_after_s"]) <= {"gpu-0", "gpu-1", "gpu-2"}


def test_no_row_fails_in_a_storm() -> None:
    found = trial("storm", "--rows", "400", "--seconds", "3")

    assert found["failed"] == 0
    assert 1 <= found["requests_per_row"] < 1.5


def test_prefixes_hit_caches_more_often_where_they_have_a_home() -> None:
    found = trial("prefixes", "--rows", "400")

    assert found["prefix-affinity"]["misses"] < found["simple-shuffle"]["misses"]
