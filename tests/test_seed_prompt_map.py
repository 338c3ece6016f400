"""The examples in llm-batch-runner's description, their import line changed, against a simulated OpenRouter."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ENVIRONMENT_FILE = """
MODEL=openai/gpt-4o-mini
OPENROUTER_API_KEY=sk-or-...
"""

FIRST = """
import asyncio
from runner import prompt_map

prompts = [
    "Summarize: The quick brown fox jumps over the lazy dog.",
    "Give me 3 bullet points on why the sky appears blue.",
    "Rewrite this in pirate speak: Hello, friend!",
]

async def main():
    results = await prompt_map(prompts, concurrency=16, teardown=True)
    for row in results:
        print(row)

asyncio.run(main())
"""

EXPORT = """
from runner import export_jsonl, DB_URL_DEFAULT
import asyncio

asyncio.run(export_jsonl(DB_URL_DEFAULT, out="results.jsonl"))
"""

OTHERS = """
import asyncio
import json
from runner import prompt_map

prompts = ["one", "two", "one"]

async def main():
    results = await prompt_map(
        prompts,
        model_name="openai/gpt-4o-mini",
        openrouter_api_key="sk-or-...",
    )
    assert [row["status"] for row in results] == ["done"] * 3
    assert results[0]["result"] == results[2]["result"] != ""

    async def echo_worker(p: str) -> str:
        return p.upper()

    results = await prompt_map(prompts, worker=echo_worker)
    assert [row["result"] for row in results] == ["ONE", "TWO", "ONE"]

    from pydantic import BaseModel

    class Bullets(BaseModel):
        points: list[str]

    results = await prompt_map(
        prompts,
        model_name="openai/gpt-4o-mini",
        openrouter_api_key="sk-or-...",
        response_model=Bullets,
    )
    # each row["result"] is a JSON string for Bullets
    for row in results:
        assert row["status"] == "done", row
        Bullets.model_validate_json(row["result"])

    results_orig = await prompt_map(prompts, output_shape="original")  # default
    results_unique = await prompt_map(prompts, output_shape="unique")
    assert (len(results_orig), len(results_unique)) == (3, 2)

    results = await prompt_map(
        prompts,
        # Ensure your provider/model is set, e.g. via .env:
        # MODEL=google/gemini-flash-2.5-latest
        concurrency=128,  # adjust based on observed latency
        rpm_limit=3900,  # slight headroom under 4000
        teardown=True,
    )
    assert len(results) == 3

asyncio.run(main())
"""


@pytest.fixture
def openrouter() -> Iterator[str]:
    command = [sys.executable, "-m", "runner.simulator", "--port", "0", "--latency-s", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield server.stdout.readline().split()[-1]
        server.terminate()


def test_every_example_runs(tmp_path: Path, openrouter: str) -> None:
    (tmp_path / ".env").write_text(ENVIRONMENT_FILE)
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OPENROUTER_API_BASE": openrouter,
    }

    def run(example: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", example],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    printed = run(FIRST)
    cache = tmp_path / ".llm_batch_cache"
    rows = [ast.literal_eval(line) for line in printed.splitlines() if line.startswith("{")]
    assert [row["status"] for row in rows] == ["done"] * 3
    assert not (cache / "runs.db").exists(), "the progress database is removed"
    assert (cache / "runs-results.db").exists(), "the results database is not"

    run(EXPORT)
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert lines == [{key: row[key] for key in ("idx", "prompt", "result")} for row in rows]

    run(OTHERS)
