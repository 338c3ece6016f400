"""The soak, in short."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from harness import SOURCES

ROOT = Path(__file__).parents[1]


def soak(folder: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    ended = subprocess.run(
        [sys.executable, "scripts/soak.py", "--folder", str(folder), *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(SOURCES)},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert ended.stdout, ended.stderr
    return ended.returncode, json.loads(ended.stdout)


def test_a_bad_world_costs_neither_rows_nor_promises(tmp_path: Path) -> None:
    exit_code, found = soak(tmp_path, "--seed", "6", "--minutes", "0.05", "--jobs", "1", "--rows", "60")

    assert found["violations"] == []
    assert exit_code == 0
    assert found["episodes"] >= 1
    assert found["troubles"]
    assert found["endurance"]["asked"] > 0
