"""Experiments in process: what is asked, what is kept, and what happens when it goes wrong."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import re
import signal
from collections import Counter
from pathlib import Path

import pytest
from aiohttp import ClientSession, web

from harness import Asked, Experiment, numbered, read_rows, read_summary, refusal, serving, shout
from runner.config import (
    DatasetConfig,
    DatasetKind,
    Dedupe,
    LimitsConfig,
    Resume,
    RetryConfig,
    ScorerConfig,
    SimulatorConfig,
    TrackerConfig,
    TrackerKind,
)
from runner.simulator import Simulator
from runner.types import Endpoint, Trace

KEY = "OPENAI_LIKE_API_KEY"


async def test_templates_are_filled_from_a_csv(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('name,note\nAda,"a, b"\nBo,\n', encoding="utf-8")
    async with serving() as provider:
        experiment = Experiment(tmp_path, api_base=provider.url)
        report = await experiment(
            dataset=DatasetConfig(kind=DatasetKind.csv, path=str(tmp_path / "rows.csv")),
            prompt="Greet {{ name }} ({{ note }})",
            system="You know {{ name }}.",
            request={"temperature": 0, "timeout": 30},
        )

    assert report.exit_code == 0
    assert experiment.texts() == ["GREET ADA (A, B)", "GREET BO ()"]
    assert [row["metadata"] for row in read_rows(experiment.folder)] == [
        {"name": "Ada", "note": "a, b"},
        {"name": "Bo", "note": ""},
    ]
    bodies = sorted((asked.body for asked in provider.requests), key=str)
    assert bodies[0] == {
        "model": "m",
        "messages": [
            {"role": "system", "content": "You know Ada."},
            {"role": "user", "content": "Greet Ada (a, b)"},
        ],
        "temperature": 0,
    }


async def test_an_answered_request_leaves_nothing_to_the_garbage_collector(tmp_path: Path) -> None:
    def traces() -> int:
        return sum(isinstance(each, Trace) for each in gc.get_objects())

    gc.collect()
    before = traces()
    gc.disable()
    try:
        async with serving() as provider:
            await Experiment(tmp_path, api_base=provider.url)(numbered(50))
        assert traces() - before < 5
    finally:
        gc.enable()


async def test_each_sample_is_asked_and_stands_beside_its_row(tmp_path: Path) -> None:
    async with serving() as provider:
        experiment = Experiment(tmp_path, api_base=provider.url, samples=3)
        await experiment(numbered(4))

    results = read_rows(experiment.folder)
    assert [(row["_index"], row["_sample"]) for row in results] == [
        (row, sample) for row in range(4) for sample in range(3)
    ]
    assert Counter(asked.text for asked in provider.requests) == {f"row {index}": 3 for index in range(4)}
    assert read_summary(experiment.folder)["rows"] == 12


@pytest.mark.parametrize(
    ("endpoint", "path", "field"),
    [
        (Endpoint.chat_completion, "/v1/chat/completions", "messages"),
        (Endpoint.text_completion, "/v1/completions", "prompt"),
        (Endpoint.responses, "/v1/responses", "input"),
    ],
)
async def test_each_endpoint_is_spoken(tmp_path: Path, endpoint: Endpoint, path: str, field: str) -> None:
    async with serving() as provider:
        experiment = Experiment(tmp_path, api_base=provider.url, endpoint=endpoint)
        report = await experiment(numbered(2))

    assert report.exit_code == 0
    assert experiment.texts() == ["ROW 0", "ROW 1"]
    assert {(asked.path, field in asked.body) for asked in provider.requests} == {(path, True)}
    assert read_summary(experiment.folder)["tokens"]["total"] == 10


# Failures that every row meets


async def test_a_wrong_key_ends_the_run_after_a_handful_of_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY, "wrong-key-1234")
    async with Simulator(SimulatorConfig(latency_s=0.05, api_key="right-key-1234")) as simulator:
        experiment = Experiment(tmp_path, api_base=simulator.url, limits=LimitsConfig(concurrency=32))
        stopped = await experiment(numbered(500))
        requests = await asked_of(simulator)

        monkeypatch.setenv(KEY, "right-key-1234")
        finished = await experiment()
        ledger = await asked_of(simulator)

    assert stopped.exit_code == 4
    assert stopped.summary["stopped"] == "systemic-error"
    assert requests <= 12
    assert "AuthenticationError" in str(stopped.message)
    assert KEY in str(stopped.message)
    assert finished.exit_code == 0
    assert ledger == requests + 500
    assert len(read_rows(experiment.folder)) == 500


async def test_once_a_wrong_key_has_ended_the_run_what_waits_for_its_turn_is_not_sent(tmp_path: Path) -> None:
    async with serving(lambda asked: refusal(401, "invalid_api_key")) as provider:
        limits = LimitsConfig(concurrency=32, rpm=60, max_request_burst=5)
        async with asyncio.timeout(5):
            stopped = await Experiment(tmp_path, api_base=provider.url, limits=limits)(numbered(100))

    assert stopped.exit_code == 4
    assert len(provider.requests) <= 6


async def test_a_key_that_is_revoked_in_mid_run_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "right-key-1234")
    left = 40

    def answer(asked: Asked) -> web.Response:
        nonlocal left
        left -= 1
        return shout(asked) if left >= 0 else refusal(401, "invalid_api_key", "revoked")

    async with serving(answer) as provider:
        experiment = Experiment(tmp_path, api_base=provider.url, limits=LimitsConfig(concurrency=8))
        stopped = await experiment(numbered(200))
        requests = len(provider.requests)

        left = 1000
        finished = await experiment()

    assert stopped.exit_code == 4
    assert stopped.summary["succeeded"] == 40
    assert stopped.summary["failed"] == 0
    assert requests <= 40 + 12
    assert finished.exit_code == 0
    assert len(provider.requests) == requests + 160


async def test_an_account_without_money_ends_the_run(tmp_path: Path) -> None:
    async with serving(lambda asked: refusal(429, "insufficient_quota", "You exceeded your quota")) as provider:
        stopped = await Experiment(tmp_path, api_base=provider.url)(numbered(300))

    assert stopped.exit_code == 4
    assert "balance" in str(stopped.message)
    assert len(provider.requests) <= 12


async def test_a_long_pause_is_shown_to_the_person_who_watches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(asked: Asked) -> web.Response:
        refused = refusal(429, "rate_limit_exceeded", "Slow down")
        refused.headers["retry-after"] = "7200"
        return refused

    async with serving(answer) as provider:
        await Experiment(tmp_path, api_base=provider.url)(numbered(5))

    assert "no request goes out for 7200 s" in capsys.readouterr().err


async def test_a_days_quota_that_is_used_up_ends_the_run_and_says_when_it_can_go_on(tmp_path: Path) -> None:
    left = 20

    def answer(asked: Asked) -> web.Response:
        nonlocal left
        left -= 1
        if left >= 0:
            return shout(asked)
        refused = refusal(429, "rate_limit_exceeded", "Limit of requests per day")
        refused.headers["retry-after"] = "7200"
        return refused

    async with serving(answer) as provider:
        experiment = Experiment(tmp_path, api_base=provider.url, limits=LimitsConfig(concurrency=4))
        stopped = await experiment(numbered(100))
        left = 1_000
        finished = await experiment()

    assert stopped.exit_code == 4
    assert re.search(
        r"Limit of requests per day; requests can go on at \d{4}-\d\d-\d\d \d\d:\d\d", str(stopped.message)
    )
    assert (stopped.summary["succeeded"], stopped.summary["failed"]) == (20, 0)
    assert finished.exit_code == 0
    assert len(provider.requests) <= 100 + 4


@pytest.mark.parametrize("refused", [0, 5, 9])
async def test_a_refusal_among_good_answers_fails_that_row_only(tmp_path: Path, refused: int) -> None:
    def answer(asked: Asked) -> web.Response:
        return refusal(401, "invalid_api_key") if asked.text == f"row {refused}" else shout(asked)

    async with serving(answer) as provider:
        experiment = Experiment(tmp_path, api_base=provider.url, limits=LimitsConfig(concurrency=1))
        report = await experiment(numbered(10))

    assert report.exit_code == 3
    results = read_rows(experiment.folder)
    assert [row["_index"] for row in results if row["error"]] == [refused]
    assert results[refused]["error"] == {"type": "AuthenticationError", "message": "HTTP 401: no", "status": 401}
    assert report.summary["errors"] == {"AuthenticationError": 1}


async def test_a_request_that_fails_after_an_interrupt_is_entered_and_not_sent_again(tmp_path: Path) -> None:
    def answer(asked: Asked) -> web.Response:
        os.kill(os.getpid(), signal.SIGINT)
        return refusal(500, "broken")

    async with serving(answer) as provider:
        experiment = Experiment(tmp_path, api_base=provider.url, limits=LimitsConfig(concurrency=1))
        async with asyncio.timeout(5):
            interrupted = await experiment(numbered(2))

    assert interrupted.exit_code == 130
    assert len(provider.requests) == 1
    assert interrupted.summary["attempts_of_unknown_cost"] == 1
    assert interrupted.summary["failed"] == 0


async def test_a_hanging_request_holds_an_interrupted_run_no_longer_than_the_grace_period(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runner.run.GRACE_S", 0.2)
    async with serving() as provider:
        hanging = Experiment(tmp_path, api_base=provider.url)

        def answer(asked: Asked) -> web.Response | float:
            if asked.text == "row 2":
                os.kill(os.getpid(), signal.SIGTERM)
            return 600.0 if asked.text == "row 1" else shout(asked)

        provider.answer = answer
        async with asyncio.timeout(10):
            interrupted = await hanging(numbered(3))
        provider.answer = shout
        finished = await hanging()

    assert interrupted.exit_code == 143
    assert interrupted.summary["succeeded"] == 2
    assert interrupted.summary["attempts_of_unknown_cost"] == 3  # the third may have been charged; none has a price
    assert finished.exit_code == 0
    assert [asked.text for asked in provider.requests].count("row 1") == 2
    assert len(provider.requests) == 4


# Going on


async def test_a_finished_run_asks_nothing_again(tmp_path: Path) -> None:
    async with serving() as provider:
        experiment = Experiment(tmp_path, api_base=provider.url)
        await experiment(numbered(20))
        before = (experiment.folder / "results.jsonl").read_bytes()
        again = await experiment(limits=LimitsConfig(concurrency=3), retry=RetryConfig(max_retries=1))
    finished = await experiment()  # nobody listens any more

    assert (again.exit_code, again.summary["reused"]) == (0, 20)
    assert (finished.exit_code, finished.summary["reused"]) == (0, 20)
    assert len(provider.requests) == 20
    assert (experiment.folder / "results.jsonl").read_bytes() == before


@pytest.mark.parametrize("retry_failed", [True, False])
async def test_failed_rows_are_asked_again_unless_told_otherwise(tmp_path: Path, retry_failed: bool) -> None:
    healthy = False

    def answer(asked: Asked) -> web.Response:
        return refusal(400, "bad") if asked.text in ("row 3", "row 5") and not healthy else shout(asked)

    async with serving(answer) as provider:
        experiment = Experiment(tmp_path, api_base=provider.url, retry_failed=retry_failed)
        first = await experiment(numbered(8))
        healthy = True
        second = await experiment()

    assert (first.exit_code, first.summary["failed"]) == (3, 2)
    assert len(provider.requests) == (10 if retry_failed else 8)
    assert second.exit_code == (0 if retry_failed else 3)
    assert second.summary["failed"] == (0 if retry_failed else 2)
    assert second.summary["reused"] == 6


async def test_rows_may_be_added_moved_and_removed_between_runs(tmp_path: Path) -> None:
    rows = numbered(6)
    async with serving() as provider:
        experiment = Experiment(tmp_path, api_base=provider.url)
        await experiment(rows)
        more = [{"prompt": "new"}, *reversed(rows), {"prompt": "row 2"}]
        await experiment(more)
        longer = experiment.texts()
        await experiment(rows[:2])

    assert longer == ["NEW", "ROW 5", "ROW 4", "ROW 3", "ROW 2", "ROW 1", "ROW 0", "ROW 2"]
    assert experiment.texts() == ["ROW 0", "ROW 1"]
    assert read_summary(experiment.folder)["rows"] == 2
    assert Counter(asked.text for asked in provider.requests) == {
        **{f"row {index}": 1 for index in range(6)},
        "row 2": 2,
        "new": 1,
    }


async def test_changed_scorers_score_the_stored_answers(tmp_path: Path) -> None:
    rows = [{"prompt": "yes", "target": "yes"}, {"prompt": "no", "target": "maybe"}]
    async with serving() as provider:
        experiment = Experiment(tmp_path, api_base=provider.url)
        unscored = await experiment(rows)
        scored = await experiment(scorers={"exact": ScorerConfig(kind="exact_match")})
        other = await experiment(scorers={"strict": ScorerConfig(kind="exact_match", ignore_case=False)})

    assert unscored.summary["scores"] == {}
    assert scored.summary["scores"] == {"exact": {"mean": 0.5, "n": 2}}
    assert other.summary["scores"] == {"strict": {"mean": 0.0, "n": 2}}
    assert [row["scores"] for row in read_rows(experiment.folder)] == [{"strict": 0.0}, {"strict": 0.0}]
    assert len(provider.requests) == 2


async def asked_of(simulator: Simulator) -> int:
    """Requests that the simulator has counted."""
    async with ClientSession() as session, session.get(simulator.url.removesuffix("/v1") + "/ledger") as response:
        return int((await response.json())["requests"])


async def test_another_number_of_samples_keeps_the_answers_and_their_places(tmp_path: Path) -> None:
    async with serving() as provider:
        experiment = Experiment(tmp_path, api_base=provider.url)
        await experiment(numbered(5))
        more = await experiment(samples=3)
        fewer = await experiment(samples=1)

    assert (more.summary["rows"], more.summary["reused"]) == (15, 5)
    assert (fewer.summary["rows"], fewer.summary["reused"]) == (5, 5)
    assert len(provider.requests) == 15
    assert [row["_index"] for row in read_rows(experiment.folder)] == [0, 1, 2, 3, 4]
    assert experiment.texts() == [f"ROW {index}" for index in range(5)]


async def test_rows_that_were_not_sent_when_a_signal_came_cost_nothing(tmp_path: Path) -> None:
    def answer(asked: Asked) -> web.Response:
        os.kill(os.getpid(), signal.SIGINT)
        return shout(asked)

    async with serving(answer) as provider:
        experiment = Experiment(tmp_path, api_base=provider.url, limits=LimitsConfig(concurrency=8, rpm=1))
        async with asyncio.timeout(5):
            report = await experiment(numbered(50))

    assert report.exit_code == 130
    assert len(provider.requests) == 1
    assert (report.summary["rows"], report.summary["succeeded"]) == (50, 1)
    assert report.summary["attempts_of_unknown_cost"] == 1  # the answer itself: no price is known


async def test_rows_that_share_an_answer_have_their_scores_when_the_run_is_stopped(tmp_path: Path) -> None:
    def answer(asked: Asked) -> web.Response:
        if asked.text == "row 2":
            os.kill(os.getpid(), signal.SIGINT)
        return shout(asked)

    rows = [{"prompt": f"row {n // 10}", "label": f"ROW {n % 2}"} for n in range(40)]
    async with serving(answer) as provider:
        experiment = Experiment(
            tmp_path,
            api_base=provider.url,
            dedupe=Dedupe.always,
            scorers={"right": ScorerConfig(kind="exact_match", target="label", ignore_case=False)},
            limits=LimitsConfig(concurrency=1),
        )
        report = await experiment(rows)

    assert report.exit_code == 130
    answered = [row for row in read_rows(experiment.folder) if row["output_text"]]
    assert len(answered) == report.summary["succeeded"] == report.summary["scores"]["right"]["n"]
    assert [row["scores"]["right"] for row in answered] == [
        float(row["output_text"] == row["metadata"]["label"]) for row in answered
    ]
    assert len(answered) >= 20


async def test_a_run_that_goes_on_counts_what_its_earlier_sessions_sent_against_its_limits(tmp_path: Path) -> None:
    async with serving() as provider:
        experiment = Experiment(tmp_path, api_base=provider.url, limits=LimitsConfig(concurrency=4, rpd=10))
        first = await experiment(numbered(7))
        more = await experiment(numbered(20))
        again = await experiment(numbered(20))

    assert [first.exit_code, more.exit_code, again.exit_code] == [0, 4, 4]
    assert len(provider.requests) == 10
    assert more.summary["succeeded"] == again.summary["succeeded"] == 10
    assert "limits.rpd=10 is used up; requests can go on at " in str(again.message)


async def test_what_answers_cost_that_no_row_has_any_more_is_told_apart(tmp_path: Path) -> None:
    priced = SimulatorConfig(latency_s=0.0, usd_per_million_prompt_tokens=1e6, usd_per_million_completion_tokens=0.0)
    experiment = Experiment(tmp_path, model="simulated/m", simulator=priced)
    first = await experiment(numbered(10))
    edited = await experiment([*numbered(5), *({"prompt": f"changed {n}"} for n in range(5))])
    anew = await experiment(resume=Resume.fresh)

    assert first.summary["cost_usd_former"] == 0
    assert edited.summary["cost_usd_former"] == pytest.approx(first.summary["cost_usd"] / 2)
    assert anew.summary["cost_usd_former"] == pytest.approx(edited.summary["cost_usd"])


async def test_a_limit_of_requests_says_what_it_lets_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment = Experiment(tmp_path, model="simulated/m", simulator=SimulatorConfig(latency_s=0.0))
    await experiment(numbered(3), limits=LimitsConfig(rpm=300))
    assert "limits.rpm=300: 6 at once, then 5.0 requests a second\n" in capsys.readouterr().err


async def test_a_run_that_begins_anew_still_counts_what_it_sent(tmp_path: Path) -> None:
    async with serving() as provider:
        experiment = Experiment(tmp_path, api_base=provider.url, limits=LimitsConfig(concurrency=4, rpd=10))
        first = await experiment(numbered(7))
        anew = await experiment(numbered(7), resume=Resume.fresh)

    assert [first.exit_code, anew.exit_code] == [0, 4]
    assert len(provider.requests) == 10


async def test_a_row_nested_beyond_measure_fails_alone(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": f"row {index}"}) for index in range(3)]
    lines[1] = '{"prompt": "deep", "x": ' + "[" * 900 + "]" * 900 + "}"
    rows.write_text("\n".join(lines), encoding="utf-8")
    async with serving() as provider:
        experiment = Experiment(tmp_path, api_base=provider.url)
        report = await experiment(dataset=DatasetConfig(kind=DatasetKind.jsonl, path=str(rows)))

    assert report.exit_code in (0, 3)
    assert [row["_index"] for row in read_rows(experiment.folder)] == [0, 1, 2]
    assert experiment.texts()[0] == "ROW 0"
    assert experiment.texts()[2] == "ROW 2"


async def test_what_was_spent_is_not_forgotten_when_the_dataset_shrinks(tmp_path: Path) -> None:
    experiment = Experiment(tmp_path, model="simulated/echo", simulator=SimulatorConfig(latency_s=0.001))
    whole = await experiment(numbered(20))
    part = await experiment(numbered(2))

    assert part.summary["rows"] == 2
    assert part.summary["cost_usd"] == pytest.approx(whole.summary["cost_usd"])


# How many at once, and how long


async def test_the_window_that_is_found_is_in_the_log_the_series_and_the_summary(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    simulated = SimulatorConfig(latency_s=0.05, slots=16)
    experiment = Experiment(
        tmp_path,
        model="simulated/echo",
        simulator=simulated,
        limits=LimitsConfig(concurrency="auto"),
        tracker=TrackerConfig(kind=TrackerKind.none, log_every_s=0.1),
    )
    with caplog.at_level(logging.INFO, logger="runner.tuner"):
        report = await experiment(numbered(400))

    assert report.exit_code == 0
    concurrency = report.summary["concurrency"]
    assert 4 < concurrency["window"] < 400
    assert any(record.getMessage().endswith(f": {concurrency['why']}") for record in caplog.records)
    series = [json.loads(line) for line in (experiment.folder / "metrics.jsonl").read_text().splitlines()]
    windows = [point["ts/window"] for point in series if "ts/window" in point]
    assert len(set(windows)) > 1
    assert any("ts/loop_lag_s" in point for point in series)


async def test_a_wrong_key_meets_a_handful_of_requests_on_auto_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY, "wrong-key-1234")
    async with Simulator(SimulatorConfig(latency_s=0.05, api_key="right-key-1234")) as simulator:
        experiment = Experiment(tmp_path, api_base=simulator.url, limits=LimitsConfig(concurrency="auto"))
        stopped = await experiment(numbered(500))
        requests = await asked_of(simulator)

    assert stopped.exit_code == 4
    assert requests <= 12


async def test_a_request_that_hangs_is_named_by_its_row_and_ends_at_the_default_timeout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("runner.transports.DEFAULT_TIMEOUT_S", 1.5)
    monkeypatch.setattr("runner.watchdog.SLOW_S", 0.5)
    async with serving(lambda asked: 60.0 if asked.text == "row 7" else shout(asked)) as provider:
        experiment = Experiment(tmp_path, api_base=provider.url, retry=RetryConfig(max_retries=0))
        report = await experiment(numbered(100))

    assert report.exit_code == 3
    assert report.summary["errors"] == {"Timeout": 1}
    named = [record.getMessage() for record in caplog.records if "has been waiting" in record.getMessage()]
    assert len(named) == 1
    assert named[0].startswith("row 7 has been waiting for openai_like/m for ")


@pytest.mark.parametrize(("field", "spelt"), [("text", "{{ text }}"), ("the text", '{{ row["the text"] }}')])
async def test_a_prompt_that_names_no_field_is_noted_and_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], field: str, spelt: str
) -> None:
    async with serving() as provider:
        experiment = Experiment(tmp_path, api_base=provider.url)
        report = await experiment([{"id": 1, field: "one"}, {"id": 2, field: "two"}], prompt="Classify the ticket.")

    assert report.exit_code == 0
    told = f"the first 2 rows ask the very same: does prompt name a field of theirs, as in {spelt}?"
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("text", ['"Classify: {{ text }}', '"Classify {{ row["text"] }}'])
async def test_a_quote_that_nothing_closes_is_noted_and_sent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    async with serving() as provider:
        report = await Experiment(tmp_path, api_base=provider.url)([{"text": "one"}], prompt=text)

    assert report.exit_code == 0
    assert 'prompt begins with a quote that nothing closes, and is sent with it: "Classify' in capsys.readouterr().err
