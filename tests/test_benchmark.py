"""The benchmark script: what it prints, never how fast anything was."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from runner.config import STRATEGIES

ROOT = Path(__file__).parents[1]


def benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "scripts/benchmark.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def lines_of(ended: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert ended.returncode == 0, ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines()]


def test_each_contender_gets_a_line_and_the_last_line_compares_them() -> None:
    *contenders, last = lines_of(benchmark("--requests", "60", "--concurrency", "4", "--repeats", "1"))

    assert [line["name"] for line in contenders] == ["wire", "raw", "plain", "generate_batch", "experiment"]
    for line in contenders:
        assert set(line) == {"name", "requests_per_s", "cpu_ms_per_request", "peak_rss_mb", "runs"}
        [run] = line["runs"]
        assert run["requests"] == 60
        assert line["peak_rss_mb"] == run["peak_rss_mb"] > 1
        assert line["requests_per_s"] is None or line["requests_per_s"] > 0
    assert {"wall_s", "startup_s", "requests_per_s_by_summary"} <= set(contenders[-1]["runs"][0])
    assert set(last) == {"ratios", "cpu_ratios"}
    assert {"wire/raw", "generate_batch/raw", "generate_batch/plain"} <= set(last["ratios"])
    assert {"wire/raw", "generate_batch/raw", "experiment/raw"} <= set(last["cpu_ratios"])


def test_the_rate_limiter_is_measured_alone() -> None:
    [line] = lines_of(benchmark("limits", "--requests", "300"))

    assert line["name"] == "limits"
    assert line["requests_per_s"] > 0


def test_only_the_named_contenders_run_as_often_as_asked() -> None:
    [line, last] = lines_of(benchmark("throughput", "--only", "raw", "--rows", "8", "--repeats", "2"))

    assert line["name"] == "raw"
    assert len(line["runs"]) == 2
    assert last == {"ratios": {}, "cpu_ratios": {}}


def test_embeddings_are_compared_with_their_own_twin() -> None:
    *contenders, last = lines_of(
        benchmark("--only", "raw_embeddings", "embed_batch", "--rows", "70", "--concurrency", "2", "--repeats", "1")
    )

    assert [line["name"] for line in contenders] == ["raw_embeddings", "embed_batch"]
    assert set(last["ratios"]) == {"embed_batch/raw_embeddings"}


def test_requests_that_fail_are_not_measured() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}/v1"
        ended = benchmark("--server", url, "--only", "raw", "--requests", "4", "--repeats", "1")

    assert ended.returncode != 0
    assert ended.stdout == ""
    assert "refused" in ended.stderr.lower() or "cannot connect" in ended.stderr.lower()


def test_auto_is_held_against_the_best_fixed_window() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", _SHORT_AUTO],
        cwd=ROOT / "scripts",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    [line] = lines_of(ended)
    assert {"case", "best_fixed", "auto", "auto/best_fixed", "last_window"} <= set(line)
    assert line["best_fixed"]["window"] in (2, 3)
    assert line["auto"]["tokens_per_s"] > 0
    assert len(line["then"]) == 1


_SHORT_AUTO = """
import auto
auto.WARM_UP_S = auto.FIXED_S = auto.AUTO_FROM_S = auto.FOLLOWED_S = 0.5
auto.AUTO_S = 1.5
change = (1.5, {"slots": 4}, (4,))
auto.CASES = {"short": auto.Case(server={"slots": 2, "latency_s": 0.02}, fixed=(2, 3), changes=(change,))}
auto.main([])
"""


def test_the_start_is_measured() -> None:
    [shown, asked] = lines_of(benchmark("start", "--repeats", "1"))

    assert shown["name"] == "help"
    assert shown["cpu_s"] > 0
    assert asked["name"] == "first_request"
    assert asked["after_s"] > 0


def test_routing_has_a_line_for_each_strategy() -> None:
    lines = lines_of(benchmark("routing", "--replicas", "3", "--requests", "20", "--repeats", "1"))

    assert [line["strategy"] for line in lines] == list(STRATEGIES)
    assert all(line["replicas"] == 3 and isinstance(line["added_us"], float) for line in lines)


def test_a_contender_that_needs_another_interpreter_asks_for_it() -> None:
    ended = benchmark("--only", "infermesh_cli")

    assert ended.returncode != 0
    assert "--infermesh" in ended.stderr
