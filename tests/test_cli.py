"""The product through its command: what a user types, sees and finds in the folder."""

from __future__ import annotations

import json
from typing import Any

from harness import Command, read_rows, read_summary, serving

ROW_KEYS = [
    "_index",
    "output_text",
    "output_parsed",
    "token_usage",
    "request_id",
    "model_id",
    "finish_reason",
    "tool_calls",
    "error",
    "metadata",
    "scores",
    "metrics",
]


async def test_a_jsonl_file_becomes_results_in_its_order(command: Command) -> None:
    rows: list[dict[str, Any]] = [{"id": index, "prompt": f"question {index}"} for index in range(60)]
    rows[1] = {"id": 1, "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]}
    rows[2] = {"id": 2, "responses_input": "what now?"}
    command.write_rows("rows.jsonl", rows)

    async with serving() as provider:
        done = await command(
            "model=hosted_vllm/m",
            f"api_base={provider.url}",
            "dataset=jsonl",
            "dataset.path=rows.jsonl",
            "limits.concurrency=64",
            "name=t",
            "tracker=none",
        )

    assert (done.exit_code, "Traceback" in done.err) == (0, False), done.err
    results = read_rows(command.run())
    assert [row["_index"] for row in results] == list(range(60))
    assert [row["metadata"] for row in results] == [{"id": index} for index in range(60)]
    assert [row["output_text"] for row in results] == [
        f"QUESTION {index}" if index not in (1, 2) else ["HI", "WHAT NOW?"][index - 1] for index in range(60)
    ]
    assert {json.dumps(asked.body["messages"]) for asked in provider.requests if asked.text == "hi"} == {
        json.dumps(rows[1]["messages"])
    }
    assert {asked.body["model"] for asked in provider.requests} == {"m"}
    assert len(provider.requests) == 60

    first = results[0]
    assert list(first) == ROW_KEYS
    metrics = first.pop("metrics")
    assert first == {
        "_index": 0,
        "output_text": "QUESTION 0",
        "output_parsed": None,
        "token_usage": {
            "prompt_tokens": 3,
            "completion_tokens": 2,
            "total_tokens": 5,
            "reasoning_tokens": None,
            "cached_tokens": None,
        },
        "request_id": "chat-1",
        "model_id": "m-1",
        "finish_reason": "stop",
        "tool_calls": [],
        "error": None,
        "metadata": {"id": 0},
        "scores": {},
    }
    assert set(metrics) == {
        "queue_wait_s",
        "service_time_s",
        "end_to_end_s",
        "deployment",
        "retries",
        "cost_usd",
        "ttft_s",
    }
    assert metrics["deployment"] == "hosted_vllm/m"
    assert 0 <= metrics["queue_wait_s"] <= metrics["end_to_end_s"]
    assert 0 < metrics["service_time_s"] <= metrics["end_to_end_s"] < 10

    summary = read_summary(command.run())
    measured = {key: summary.pop(key) for key in ("elapsed_s", "requests_per_s", "tokens_per_s")}
    quantiles = {key: summary.pop(key) for key in ("latency_s", "queue_wait_s")}
    assert all(value > 0 for value in measured.values())
    assert all(set(values) == {"p50", "p95", "p99"} for values in quantiles.values())
    assert summary == {
        "rows": 60,
        "succeeded": 60,
        "failed": 0,
        "reused": 0,
        "tokens": {"prompt": 180, "completion": 120, "total": 300, "cached": 0, "reasoning": 0},
        "cost_usd": None,
        "cost_usd_upper_bound": None,
        "attempts_of_unknown_cost": 60,
        "retries": 0,
        "errors": {},
        "scores": {},
        "stopped": None,
    }

    assert {path.name for path in command.run().iterdir()} == {
        ".hydra",
        ".lock",
        "metrics.jsonl",
        "results.jsonl",
        "results.sqlite",
        "runner.log",
        "status.json",
        "summary.json",
    }
    assert command.run().parent == command.folder / "runs" / "t"
    assert str(command.run() / "results.jsonl") in done.out
