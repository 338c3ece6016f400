from __future__ import annotations

import asyncio
import json
import stat
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest

from harness import key_of, save
from runner.identity import dump_json, dump_text
from runner.results import replace_file, result_rows, summarize, write_jsonl
from runner.store import Claim, Outcome, Store, Terms
from runner.types import Attempt


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    async with await Store.open(tmp_path / "results.sqlite") as store:
        yield store


def content(position: int) -> bytes:
    return b"%016d" % position


async def settle(store: Store, position: int, *, metadata: Any = None, scores: Any = None, **columns: Any) -> None:
    """Enter a row and what came of it."""
    text = dump_text(metadata or {})
    await store.claim([Claim(position=position, content=content(position), metadata=text)], Terms(retry_failed=False))
    await save(
        store,
        position,
        Outcome(ticket=0, content=content(position), settled_at=1.0, **columns),
        None if scores is None else dump_json(scores).decode(),
    )
    await store.flush()


def failed(error: str = "Timeout", **columns: Any) -> dict[str, Any]:
    return {"error_type": error, "error_message": "slow", **columns}


async def rows(store: Store, **options: Any) -> list[dict[str, Any]]:
    """The result rows as they are in the file."""
    read: list[dict[str, Any]] = json.loads(orjson.dumps([row async for row in result_rows(store, **options)]))
    return read


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# Deployments


async def test_the_summary_says_what_each_deployment_did(store: Store) -> None:
    for position in range(10):
        retries = int(position < 3)
        await settle(
            store, position, output_text="x", deployment="east", service_time_s=1.0 + position, retries=retries
        )
    await settle(store, 10, output_text="x", deployment="west", service_time_s=5.0)
    await settle(store, 11, **failed(deployment="west", service_time_s=99.0))
    lost = Attempt(
        number=1,
        deployment="north",
        started_at=0.0,
        service_time_s=1.0,
        error="Timeout",
        message="",
        status=None,
        cost_usd=None,
    )
    await store.note_attempts([await key_of(store, 0)], lost)
    await store.note_attempts([await key_of(store, 1)], lost)
    await store.note_attempts([await key_of(store, 2)], replace(lost, error="RateLimit"))

    deployments = (await summarize(store))["deployments"]

    assert deployments == {
        "east": {
            "answered": 10,
            "failed": 0,
            "share": pytest.approx(10 / 11),
            "latency_s": {"p50": pytest.approx(5.5, abs=0.6), "p95": pytest.approx(9.6, abs=0.7)},
            "retries": 0,
            "retries_by_error": {},
        },
        "north": {
            "answered": 0,
            "failed": 0,
            "share": 0,
            "latency_s": {"p50": None, "p95": None},
            "retries": 3,
            "retries_by_error": {"Timeout": 2, "RateLimit": 1},
        },
        "west": {
            "answered": 1,
            "failed": 1,
            "share": pytest.approx(1 / 11),
            "latency_s": {"p50": 5.0, "p95": 5.0},
            "retries": 0,
            "retries_by_error": {},
        },
    }


# Rows


async def test_an_answered_row_has_everything_that_is_known_of_it(store: Store) -> None:
    await settle(
        store,
        0,
        metadata={"id": "x", "n": 1.5},
        scores={"exact": 1.0},
        output_text="Grüße",
        details='{"reasoning":"because","tool_calls":[{"id":"1","name":"f","arguments":null}],"output_parsed":[1]}',
        finish_reason="stop",
        request_id="req-1",
        model_id="m-2",
        prompt_tokens=1,
        completion_tokens=2,
        total_tokens=3,
        cached_tokens=0,
        deployment="east",
        retries=1,
        queue_wait_s=0.5,
        service_time_s=1.5,
        end_to_end_s=2.5,
        ttft_s=0.25,
        cost_usd=0.001,
    )
    assert await rows(store) == [
        {
            "_index": 0,
            "output_text": "Grüße",
            "output_parsed": [1],
            "token_usage": {
                "prompt_tokens": 1,
                "completion_tokens": 2,
                "total_tokens": 3,
                "reasoning_tokens": None,
                "cached_tokens": 0,
            },
            "request_id": "req-1",
            "model_id": "m-2",
            "finish_reason": "stop",
            "tool_calls": [{"id": "1", "name": "f", "arguments": None}],
            "reasoning": "because",
            "error": None,
            "metadata": {"id": "x", "n": 1.5},
            "scores": {"exact": 1.0},
            "metrics": {
                "queue_wait_s": 0.5,
                "service_time_s": 1.5,
                "end_to_end_s": 2.5,
                "deployment": "east",
                "retries": 1,
                "cost_usd": 0.001,
                "ttft_s": 0.25,
            },
        }
    ]


async def test_a_failed_row_has_the_same_shape_and_its_error(store: Store) -> None:
    await settle(store, 0, output_text="fine")
    await settle(store, 1, error_type="RateLimitError", error_message="slow down", error_status=429)
    answered, failed_row = await rows(store)
    assert answered.keys() == failed_row.keys()
    assert failed_row["error"] == {"type": "RateLimitError", "message": "slow down", "status": 429}
    assert (failed_row["output_text"], failed_row["token_usage"], failed_row["tool_calls"]) == (None, None, [])
    assert (failed_row["metadata"], failed_row["scores"]) == ({}, {})


async def test_rows_come_in_the_datasets_order_however_they_were_settled(store: Store) -> None:
    for position in range(5):
        await store.claim([Claim(position=position, content=content(position), metadata=None)], Terms())
    for position in (3, 0, 4, 1):
        await save(store, position, Outcome(ticket=0, content=content(position), settled_at=1.0))
    await store.flush()
    assert [row["_index"] for row in await rows(store)] == [0, 1, 3, 4]


async def test_repeats_of_a_row_are_numbered(store: Store) -> None:
    await store.put_meta({"samples": "3"})
    for position in range(6):
        await settle(store, position)
    assert [(row["_index"], row["_sample"]) for row in await rows(store)] == [
        (0, 0),
        (0, 1),
        (0, 2),
        (1, 0),
        (1, 1),
        (1, 2),
    ]


async def test_a_row_that_is_asked_once_has_no_number_of_the_repeat(store: Store) -> None:
    await settle(store, 0)
    assert "_sample" not in (await rows(store))[0]


async def test_no_more_rows_are_read_than_wanted(store: Store) -> None:
    for position in range(5):
        await settle(store, position)
    assert [row["_index"] for row in await rows(store, limit=2)] == [0, 1]
    assert await rows(store, limit=0) == []


# The file


async def test_the_file_has_a_line_for_each_settled_row(store: Store, tmp_path: Path) -> None:
    for position in range(3):
        await settle(store, position, output_text=f"line\nbreak {position}")
    path = tmp_path / "results.jsonl"
    assert await write_jsonl(result_rows(store), path) == 3
    assert lines(path) == await rows(store)
    assert path.read_bytes().endswith(b"}\n")


async def test_a_store_without_results_makes_an_empty_file(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    assert await write_jsonl(result_rows(store), path) == 0
    assert path.read_bytes() == b""


async def test_the_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text("the old results\n")
    store = await Store.open(tmp_path / "results.sqlite")
    await settle(store, 0)
    reader = await Store.open_readonly(tmp_path / "results.sqlite")
    await reader.aclose()
    with pytest.raises(RuntimeError, match="shutdown"):
        await write_jsonl(result_rows(reader), path)
    assert path.read_text() == "the old results\n"
    await write_jsonl(result_rows(store), path)
    assert len(lines(path)) == 1
    await store.aclose()
    assert {each.name for each in tmp_path.iterdir()} <= {"results.jsonl", "results.sqlite", ".lock"}


async def test_the_file_can_be_written_while_another_connection_writes(store: Store, tmp_path: Path) -> None:
    rows_there = 1_500  # more than a chunk of the projection
    for first in range(0, rows_there, 250):
        await store.claim(
            [Claim(position=n, content=content(n), metadata="{}") for n in range(first, first + 250)],
            Terms(),
        )
    for n in range(rows_there):
        await save(store, n, Outcome(ticket=0, content=content(n), settled_at=1.0))
    await store.flush()
    stopped = False

    async def keep_writing() -> int:
        n = rows_there
        while not stopped:
            await settle(store, n, output_text="later")
            n += 1
        return n - rows_there

    writing = asyncio.create_task(keep_writing())
    async with await Store.open_readonly(store.path) as reader:
        written = [await write_jsonl(result_rows(reader), tmp_path / f"{n}.jsonl") for n in range(3)]
    stopped = True
    assert await writing > 0
    assert written == sorted(written)
    assert written[0] >= rows_there
    for n, count in enumerate(written):
        assert [row["_index"] for row in lines(tmp_path / f"{n}.jsonl")] == list(range(count))


def test_a_small_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    replace_file(path, b"{}")
    replace_file(path, b'{"rows": 1}')
    assert path.read_bytes() == b'{"rows": 1}'
    assert list(tmp_path.iterdir()) == [path]


def nested(depth: int) -> Any:
    value: Any = "bottom"
    for _ in range(depth):
        value = [value]
    return value


ODD_VALUES: dict[str, Any] = {
    "an integer beyond 64 bits": 2**80,
    "a negative one": -(2**80),
    "deep nesting": nested(250),
    "null": None,
    "floats": [1e308, 5e-324],
}


async def test_half_a_surrogate_pair_is_no_text_and_becomes_a_question_mark(store: Store, tmp_path: Path) -> None:
    await settle(store, 0, metadata={"odd": "x\ud83dy", "\udc00": 1})
    path = tmp_path / "results.jsonl"
    await write_jsonl(result_rows(store), path)
    assert lines(path)[0]["metadata"] == {"odd": "x?y", "?": 1}


@pytest.mark.parametrize("value", list(ODD_VALUES.values()), ids=list(ODD_VALUES))
async def test_odd_values_in_a_rows_fields_survive_to_the_file(store: Store, tmp_path: Path, value: Any) -> None:
    await settle(store, 0, metadata={"odd": value, "plain": 1})
    await settle(store, 1)
    path = tmp_path / "results.jsonl"
    assert await write_jsonl(result_rows(store), path) == 2
    assert lines(path)[0]["metadata"] == {"odd": value, "plain": 1}


@pytest.mark.parametrize("value", list(ODD_VALUES.values()), ids=list(ODD_VALUES))
async def test_odd_values_in_an_answer_survive_to_the_file(store: Store, tmp_path: Path, value: Any) -> None:
    details = {"output_parsed": value, "choices": [value], "tool_calls": [{"id": "1", "name": "f", "arguments": value}]}
    await settle(store, 0, details=dump_json(details).decode())
    path = tmp_path / "results.jsonl"
    assert await write_jsonl(result_rows(store), path) == 1
    [row] = lines(path)
    assert {name: row[name] for name in details} == details


# The summary


async def test_a_store_without_rows_has_a_summary(store: Store) -> None:
    summary = await summarize(store)
    assert summary["elapsed_s"] == 0
    assert summary == {
        "rows": 0,
        "succeeded": 0,
        "failed": 0,
        "reused": 0,
        "tokens": {"prompt": 0, "completion": 0, "total": 0, "cached": 0, "reasoning": 0},
        "cost_usd": 0.0,
        "cost_usd_upper_bound": 0.0,
        "cost_usd_former": 0.0,
        "attempts_of_unknown_cost": 0,
        "attempts_without_bound": 0,
        "deduplicated": 0,
        "taken_over": 0,
        "sessions": 0,
        "elapsed_s": 0,
        "requests_per_s": None,
        "rows_per_s": None,
        "tokens_per_s": None,
        "latency_s": {"p50": None, "p95": None, "p99": None},
        "queue_wait_s": {"p50": None, "p95": None, "p99": None},
        "retries": 0,
        "truncated": 0,
        "unparsed": 0,
        "errors": {},
        "deployments": {},
        "scores": {},
    }


async def test_rows_are_counted_by_what_came_of_them(store: Store) -> None:
    await settle(store, 0)
    await settle(store, 1)
    await settle(store, 2, **failed("Timeout"))
    await settle(store, 3, **failed("RowError"))
    await settle(store, 4, **failed("RowError"))
    await store.claim([Claim(position=5, content=content(5), metadata=None)], Terms(retry_failed=False))
    summary = await summarize(store)
    assert (summary["rows"], summary["succeeded"], summary["failed"]) == (6, 2, 3)
    assert list(summary["errors"].items()) == [("RowError", 2), ("Timeout", 1)]


async def test_retries_are_counted_whether_the_row_has_come_to_its_end_or_not(store: Store) -> None:
    await settle(store, 0, output_text="x", deployment="east", retries=1)
    await settle(store, 1, **failed("RateLimit", deployment="east", retries=1))
    await store.claim([Claim(position=2, content=content(2), metadata="{}")], Terms(retry_failed=False))
    for position, number in ((0, 1), (1, 1), (2, 1), (2, 2), (2, 3)):
        await store.note_attempts([await key_of(store, position)], attempt(cost_usd=0.0, number=number))
    await store.note_lost([[await key_of(store, 2)]])
    await store.flush()
    summary = await summarize(store)
    assert summary["retries"] == 4
    assert summary["deployments"]["east"]["retries_by_error"] == {"Timeout": 4}


async def test_an_answer_that_was_given_up_is_no_retry(store: Store) -> None:
    await settle(store, 0, output_text="x", deployment="east")
    await settle(store, 1, **failed("Timeout", deployment="east"))
    await store.start_over()
    for position in range(2):
        await settle(store, position, output_text="x", deployment="east")
    assert (await summarize(store))["retries"] == 0


async def test_a_row_that_failed_and_is_asked_anew_was_retried_as_often_as_before(store: Store) -> None:
    await settle(store, 0, **failed("RateLimit", deployment="east", retries=2))
    for number in (1, 2):
        await store.note_attempts([await key_of(store, 0)], attempt(cost_usd=0.0, number=number))
    await store.flush()
    before = (await summarize(store))["retries"]

    await store.start_over()
    await settle(store, 0, output_text="x", deployment="east")
    assert before == (await summarize(store))["retries"] == 2


async def test_a_failure_is_no_retry_before_it_is_followed_by_another_attempt(store: Store) -> None:
    await settle(store, 0, output_text="x", deployment="east")
    samples = [Claim(position=position, content=content(9), metadata="{}") for position in (1, 2)]
    await store.claim(samples, Terms(retry_failed=False))
    keys = [await key_of(store, position) for position in (1, 2)]

    for key in keys:
        await store.note_attempts([key], attempt(cost_usd=0.0))
    await store.flush()
    assert (await summarize(store))["retries"] == 0

    await store.note_attempts(keys[:1], attempt(cost_usd=0.0, number=2))
    await store.flush()
    assert (await summarize(store))["retries"] == 1


async def test_answers_that_were_cut_off_are_counted_whichever_choice_it_was(store: Store) -> None:
    choices = {"choices": [{"text": "a", "finish_reason": "stop"}, {"text": "b", "finish_reason": "length"}]}
    quoted = {"reasoning": 'a server may say {"finish_reason":"length"}'}
    await settle(store, 0, finish_reason="length")
    await settle(store, 1, finish_reason="stop", details=orjson.dumps(choices).decode())
    await settle(store, 2, finish_reason="stop", details=orjson.dumps(quoted).decode())
    await settle(store, 3, finish_reason="stop")
    await settle(store, 4, **failed("Timeout"))
    assert (await summarize(store))["truncated"] == 2


async def test_tokens_add_up(store: Store) -> None:
    await settle(store, 0, prompt_tokens=10, completion_tokens=5, total_tokens=15, cached_tokens=4)
    await settle(store, 1, prompt_tokens=1, completion_tokens=2, total_tokens=3, reasoning_tokens=1)
    await settle(store, 2)
    assert (await summarize(store))["tokens"] == {
        "prompt": 11,
        "completion": 7,
        "total": 18,
        "cached": 4,
        "reasoning": 1,
    }


async def test_latency_is_that_of_answered_requests_by_nearest_rank(store: Store) -> None:
    for n in range(1, 102):
        await settle(store, n - 1, service_time_s=float(n), queue_wait_s=n / 10)
    await settle(store, 101, **failed(service_time_s=9_999.0, queue_wait_s=9_999.0))
    summary = await summarize(store)
    assert summary["latency_s"] == {"p50": 51.0, "p95": 96.0, "p99": 100.0}
    assert summary["queue_wait_s"] == {"p50": 5.1, "p95": 9.6, "p99": 10.0}


async def test_one_answer_is_every_quantile(store: Store) -> None:
    await settle(store, 0, service_time_s=0.5)
    assert (await summarize(store))["latency_s"] == {"p50": 0.5, "p95": 0.5, "p99": 0.5}


async def test_rates_are_over_the_time_of_all_sessions(tmp_path: Path) -> None:
    path = tmp_path / "results.sqlite"
    longest_s = 0.0
    for position in range(2):
        began = time.time()
        async with await Store.open(path) as store:
            await asyncio.sleep(0.03)
            await settle(store, position, total_tokens=50)
        longest_s += time.time() - began
        await asyncio.sleep(0.05)
    async with await Store.open_readonly(path) as store:
        summary = await summarize(store)
    assert 0.06 <= summary["elapsed_s"] <= longest_s
    assert summary["requests_per_s"] == pytest.approx(2 / summary["elapsed_s"])
    assert summary["tokens_per_s"] == pytest.approx(100 / summary["elapsed_s"])


async def test_rates_begin_where_everything_was_asked_anew(tmp_path: Path) -> None:
    path = tmp_path / "results.sqlite"
    async with await Store.open(path) as store:
        await asyncio.sleep(0.03)
        await settle(store, 0)
    began = time.time()
    for position in range(2):
        async with await Store.open(path) as store:
            if position == 0:
                await store.start_over()
            await settle(store, position)
    longest_s = time.time() - began
    async with await Store.open_readonly(path) as store:
        summary = await summarize(store)
    assert summary["sessions"] == 2
    assert 0 < summary["elapsed_s"] <= longest_s
    assert summary["requests_per_s"] == pytest.approx(2 / summary["elapsed_s"])


async def test_a_clock_that_is_set_back_does_not_make_a_session_shorter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.sqlite"
    async with await Store.open(path) as store:
        monkeypatch.setattr(time, "time", lambda real=time.time: real() - 3600)
        await settle(store, 0)
        summary = await summarize(store)
    assert 0 <= summary["elapsed_s"] < 60


# Money


async def test_costs_of_answers_and_failed_attempts_add_up(store: Store) -> None:
    await settle(store, 0, cost_usd=0.25)
    await settle(store, 1, cost_usd=0.5)
    await settle(store, 2, **failed("BadRequestError", cost_usd=0.0))
    await store.note_attempts([await key_of(store, 0)], attempt(cost_usd=0.125))
    summary = await summarize(store)
    assert summary["cost_usd"] == summary["cost_usd_upper_bound"] == 0.875
    assert summary["attempts_of_unknown_cost"] == 0


async def test_each_attempt_of_unknown_cost_is_bounded_by_what_it_can_have_cost(store: Store) -> None:
    bounds = Terms(cost_bound=lambda claim: 2.0**claim.position)
    await store.claim([Claim(position=n, content=content(n), metadata=None) for n in range(4)], bounds)
    await store.note_attempts([await key_of(store, 0)], attempt(cost_usd=None))
    await store.note_attempts([await key_of(store, 0)], attempt(cost_usd=0.0))
    await store.note_lost([[await key_of(store, 1)]])
    await save(store, 0, Outcome(ticket=0, content=content(0), settled_at=1.0, cost_usd=0.25))
    await save(store, 2, Outcome(ticket=0, content=content(2), settled_at=1.0, **failed("Timeout")))
    await store.flush()
    summary = await summarize(store)
    assert (summary["cost_usd"], summary["attempts_of_unknown_cost"]) == (0.25, 3)
    assert summary["cost_usd_upper_bound"] == 0.25 + 1.0 + 2.0 + 4.0
    assert summary["attempts_without_bound"] == 0


async def test_where_one_attempt_has_no_bound_there_is_none(store: Store) -> None:
    await store.claim([Claim(position=0, content=content(0), metadata=None)], Terms())
    await store.note_attempts([await key_of(store, 0)], attempt(cost_usd=None))
    await save(store, 0, Outcome(ticket=0, content=content(0), settled_at=1.0, cost_usd=0.25))
    await store.flush()
    summary = await summarize(store)
    assert (summary["cost_usd"], summary["cost_usd_upper_bound"]) == (0.25, None)
    assert (summary["attempts_of_unknown_cost"], summary["attempts_without_bound"]) == (1, 1)


async def test_answers_of_other_runs_count_for_the_dataset_and_not_for_speed_and_cost(store: Store) -> None:
    await settle(store, 0, cost_usd=0.25, total_tokens=10, service_time_s=1.0)
    await settle(store, 1, cost_usd=0.0, total_tokens=20, service_time_s=50.0, reused_from="other/run")
    summary = await summarize(store)
    assert (summary["succeeded"], summary["taken_over"]) == (2, 1)
    assert (summary["cost_usd"], summary["tokens"]["total"]) == (0.25, 30)
    assert summary["latency_s"]["p99"] == 1.0
    assert summary["requests_per_s"] == pytest.approx(1 / summary["elapsed_s"])
    assert [row.get("reused_from") for row in await rows(store)] == [None, "other/run"]


async def test_an_answer_that_rows_share_counts_once(store: Store) -> None:
    await store.put_meta({"dedupe": "true"})
    same = [Claim(position=n, content=content(0), metadata=None) for n in range(3)]
    await store.claim(same, Terms(dedupe=True))
    await save(store, 0, Outcome(ticket=0, content=content(0), settled_at=1.0, total_tokens=5))
    await store.flush()
    summary = await summarize(store)
    assert (summary["rows"], summary["succeeded"], summary["deduplicated"]) == (3, 3, 2)
    assert summary["rows_per_s"] == pytest.approx(3 * summary["requests_per_s"])
    assert summary["tokens"]["total"] == 5


async def test_the_files_can_be_read_by_their_owner_only(store: Store, tmp_path: Path) -> None:
    await settle(store, 0)
    await write_jsonl(result_rows(store), tmp_path / "results.jsonl")
    replace_file(tmp_path / "summary.json", b"{}")
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("results.jsonl", "summary.json")] == [0o600] * 2


async def test_a_file_that_cannot_be_written_leaves_the_old_one_and_nothing_beside_it(tmp_path: Path) -> None:
    replace_file(tmp_path / "summary.json", b"old")
    with pytest.raises(TypeError):
        replace_file(tmp_path / "summary.json", None)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
    assert (tmp_path / "summary.json").read_bytes() == b"old"


async def test_without_a_price_the_cost_is_unknown_and_not_nothing(store: Store) -> None:
    await settle(store, 0, total_tokens=5)
    await settle(store, 1, **failed("BadRequestError", cost_usd=0.0))
    summary = await summarize(store)
    assert (summary["cost_usd"], summary["cost_usd_upper_bound"]) == (None, None)


async def test_a_run_that_only_failed_for_free_cost_nothing(store: Store) -> None:
    await settle(store, 0, **failed("BadRequestError", cost_usd=0.0))
    assert (await summarize(store))["cost_usd"] == 0.0


def attempt(*, cost_usd: float | None, number: int = 1) -> Attempt:
    return Attempt(
        number=number,
        deployment="east",
        started_at=1.0,
        service_time_s=0.5,
        error="Timeout",
        message="slow",
        status=None,
        cost_usd=cost_usd,
    )


async def test_answers_of_rows_that_left_the_dataset_do_not_count(store: Store) -> None:
    await settle(store, 0, output_text="kept", cost_usd=0.5, scores={"exact": 1})
    await settle(store, 1, output_text="gone", cost_usd=0.5, scores={"exact": 0})
    await store.truncate(1)
    summary = await summarize(store)
    assert (summary["rows"], summary["succeeded"]) == (1, 1)
    assert summary["scores"] == {"exact": {"mean": 1.0, "n": 1}}
    assert [row["output_text"] for row in await rows(store)] == ["kept"]


# Scores


async def test_scores_are_averaged_by_scorer_over_the_rows_that_have_them(store: Store) -> None:
    await settle(store, 0, scores={"exact": 1, "words": 10})
    await settle(store, 1, scores={"exact": 0})
    await settle(store, 2, scores={"exact": True, "words": None})
    await settle(store, 3)
    await settle(store, 4, **failed())
    assert (await summarize(store))["scores"] == {
        "exact": {"mean": pytest.approx(2 / 3), "n": 3},
        "words": {"mean": 10.0, "n": 1},
    }


async def test_a_summary_is_json(store: Store) -> None:
    await settle(store, 0, scores={"exact": 1}, service_time_s=0.5, cost_usd=0.1)
    assert json.loads(orjson.dumps(await summarize(store)))["rows"] == 1
