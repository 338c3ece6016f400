"""How runs go on: what is asked again, what is shared, and what is taken over from where."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from harness import Asked, Experiment, numbered, read_rows, refusal, serving, shout
from runner.config import Dedupe, LimitsConfig, Resume, ScorerConfig, SimulatorConfig
from runner.errors import ConfigError


def asked_for(requests: list[Asked]) -> Counter[str]:
    return Counter(asked.text for asked in requests)


def priced(tmp_path: Path, url: str, **settings: Any) -> Experiment:
    """An experiment with a model that has a price."""
    return Experiment(tmp_path, **{"model": "simulated/m", "api_base": url, **settings})


# Rows that ask the same


@pytest.mark.parametrize(("rows_later", "asked_later"), [(["same", "other"], 0), (["same", "other", "same"], 1)])
async def test_an_answer_serves_whichever_row_asks_for_it(
    tmp_path: Path, rows_later: list[str], asked_later: int
) -> None:
    """The first one failed, the second was answered; then one of them is gone, or both are there."""
    failed: list[Asked] = []

    def answer(asked: Asked) -> Any:
        if asked.text == "same" and not failed:
            failed.append(asked)
            return refusal(400, "bad")
        return shout(asked)

    prompts = ["same", *(f"row {n}" for n in range(2000)), "same"]
    async with serving(answer) as provider:
        experiment = Experiment(tmp_path, api_base=provider.url, limits=LimitsConfig(concurrency=1))
        scorers = {"exact": ScorerConfig(target="prompt")}
        first = await experiment([{"prompt": each} for each in prompts], dedupe=Dedupe.never, scorers=scorers)
        provider.requests.clear()
        rest = [f"row {n}" for n in range(2000)]
        later = [*rows_later[:1], *rest, *rows_later[1:]]
        report = await experiment([{"prompt": each} for each in later], dedupe=Dedupe.never, scorers=scorers)

    assert first.summary["failed"] == 1
    assert asked_for(provider.requests)["same"] == asked_later
    assert (report.exit_code, report.summary["succeeded"]) == (0, len(later))
    assert report.summary["scores"]["exact"]["n"] == len(later)
    assert [row["output_text"] for row in read_rows(tmp_path / "run")] == [each.upper() for each in later]


# resume=fresh and resume=require


async def test_a_fresh_run_asks_everything_anew_and_keeps_what_was_paid_in_its_books(tmp_path: Path) -> None:
    async with serving() as provider:
        experiment = priced(tmp_path, provider.url)
        first = await experiment(numbered(5), scorers={"exact": ScorerConfig(target="prompt")})
        fresh = await experiment(resume=Resume.fresh, scorers={"exact": ScorerConfig(target="prompt")})
        after = await experiment(scorers={"exact": ScorerConfig(target="prompt")})

    assert asked_for(provider.requests) == {f"row {n}": 2 for n in range(5)}
    assert (fresh.exit_code, fresh.summary["reused"], fresh.summary["rows"]) == (0, 0, 5)
    assert fresh.summary["cost_usd"] == pytest.approx(2 * first.summary["cost_usd"])
    assert fresh.summary["cost_usd_upper_bound"] == fresh.summary["cost_usd"]
    assert fresh.summary["scores"] == first.summary["scores"]
    assert after.summary["reused"] == 5


async def test_a_fresh_run_without_an_earlier_one_is_a_first_one(tmp_path: Path) -> None:
    async with serving() as provider:
        report = await Experiment(tmp_path, api_base=provider.url)(numbered(2), resume=Resume.fresh)
    assert (report.exit_code, len(provider.requests)) == (0, 2)


async def test_a_run_that_must_go_on_and_cannot_is_a_configuration_error(tmp_path: Path) -> None:
    async with serving() as provider:
        experiment = Experiment(tmp_path, api_base=provider.url, resume=Resume.require)
        with pytest.raises(ConfigError, match=r"resume=require, but .*run holds no earlier run"):
            await experiment(numbered(2))
        await experiment(resume=Resume.auto)
        report = await experiment()
    assert (report.summary["reused"], len(provider.requests)) == (2, 2)


# retry_truncated


def cut(asked: Asked) -> web.Response:
    """An answer as long as its question, in words, as far as ``max_tokens`` lets it be."""
    words = asked.text.split()
    limit = asked.body.get("max_tokens", 99)
    answer = " ".join(words[:limit]).upper()
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": answer},
        "finish_reason": "stop" if len(words) <= limit else "length",
    }
    count = min(limit, len(words))
    usage = {"prompt_tokens": len(words), "completion_tokens": count, "total_tokens": len(words) + count}
    return web.json_response({"id": "1", "model": "m", "choices": [choice], "usage": usage})


LONG_AND_SHORT = [
    {"prompt": "one"},
    {"prompt": "one two three"},
    {"prompt": "one two"},
    {"prompt": "one two three four"},
]


async def test_after_the_limit_was_raised_only_what_was_cut_off_is_asked_again(tmp_path: Path) -> None:
    async with serving(cut) as provider:
        experiment = priced(tmp_path, provider.url)
        first = await experiment(LONG_AND_SHORT, request={"max_tokens": 2})
        raised = await experiment(request={"max_tokens": 3}, retry_truncated=True)
        again = await experiment(request={"max_tokens": 3}, retry_truncated=True)
        plain = await experiment(request={"max_tokens": 3})
        unlimited = await experiment(retry_truncated=True)

    assert [asked.text for asked in provider.requests[4:]].count("one two three four") == 2
    assert len(provider.requests) == 4 + 2 + 1
    assert (raised.summary["reused"], raised.summary["taken_over"]) == (2, 2)
    assert (again.summary["reused"], plain.summary["reused"]) == (4, 4)
    assert raised.summary["cost_usd"] > first.summary["cost_usd"]
    assert plain.summary["cost_usd"] == raised.summary["cost_usd"]
    assert unlimited.summary["reused"] == 3
    assert experiment.texts() == ["ONE", "ONE TWO THREE", "ONE TWO", "ONE TWO THREE FOUR"]
    assert [row["finish_reason"] for row in read_rows(experiment.folder)] == ["stop"] * 4


async def test_without_being_told_another_limit_asks_everything_and_the_old_answers_are_kept(tmp_path: Path) -> None:
    async with serving(cut) as provider:
        experiment = Experiment(tmp_path, api_base=provider.url)
        await experiment(LONG_AND_SHORT, request={"max_tokens": 2})
        await experiment(request={"max_tokens": 1})
        back = await experiment(request={"max_tokens": 2})

    assert len(provider.requests) == 8
    assert back.summary["reused"] == 4
    assert experiment.texts() == ["ONE", "ONE TWO", "ONE TWO", "ONE TWO"]


async def test_an_answer_is_not_kept_under_a_limit_that_has_no_room_for_it(tmp_path: Path) -> None:
    async with serving(cut) as provider:
        experiment = Experiment(tmp_path, api_base=provider.url)
        await experiment(LONG_AND_SHORT, request={"max_tokens": 3})
        await experiment(request={"max_tokens": 2}, retry_truncated=True)

    assert asked_for(provider.requests[4:]) == {"one two three": 1, "one two three four": 1}
    assert experiment.texts() == ["ONE", "ONE TWO", "ONE TWO", "ONE TWO"]


async def test_a_choice_that_was_cut_off_is_asked_again_with_the_others(tmp_path: Path) -> None:
    def two(asked: Asked) -> web.Response:
        endings = ("stop", "length") if asked.body["max_tokens"] == 2 else ("stop", "stop")
        choices = [
            {"index": n, "message": {"role": "assistant", "content": "x"}, "finish_reason": ending}
            for n, ending in enumerate(endings)
        ]
        return web.json_response({"id": "1", "model": "m", "choices": choices, "usage": None})

    async with serving(two) as provider:
        experiment = Experiment(tmp_path, api_base=provider.url)
        await experiment(numbered(1), request={"max_tokens": 2, "n": 2})
        await experiment(request={"max_tokens": 4, "n": 2}, retry_truncated=True)
    assert len(provider.requests) == 2


async def test_with_another_temperature_too_nothing_is_kept(tmp_path: Path) -> None:
    async with serving(cut) as provider:
        experiment = Experiment(tmp_path, api_base=provider.url)
        await experiment(LONG_AND_SHORT, request={"max_tokens": 2, "temperature": 0.1})
        await experiment(request={"max_tokens": 3, "temperature": 0.2}, retry_truncated=True)
    assert len(provider.requests) == 8


# dedupe


TWINS = [{"prompt": text, "target": target} for text, target in ("ax", "by", "az", "ax", "by")]


@pytest.mark.parametrize(
    ("settings", "requests"),
    [
        ({"request": {"temperature": 0}}, 2),
        ({"request": {"temperature": 0.7}}, 5),
        ({}, 5),
        ({"dedupe": Dedupe.always}, 2),
        ({"dedupe": Dedupe.never, "request": {"temperature": 0}}, 5),
        ({"request": {"temperature": 0}, "samples": 2}, 4),
    ],
)
async def test_rows_that_ask_the_same_are_asked_once_where_nothing_is_sampled(
    tmp_path: Path, settings: dict[str, Any], requests: int
) -> None:
    async with serving() as provider:
        experiment = Experiment(tmp_path, api_base=provider.url, **settings)
        report = await experiment(TWINS)
        again = await experiment()

    rows = 5 * settings.get("samples", 1)
    assert len(provider.requests) == requests
    assert report.summary["deduplicated"] == again.summary["deduplicated"] == rows - requests
    assert (report.summary["rows"], report.summary["succeeded"], report.summary["reused"]) == (rows, rows, 0)
    assert again.summary["reused"] == rows
    rows_of_first = [row for row in read_rows(experiment.folder) if not row.get("_sample")]
    assert [row["output_text"] for row in rows_of_first] == list("ABAAB")


async def test_a_row_that_shares_an_answer_names_the_first_and_costs_nothing_more(tmp_path: Path) -> None:
    async with serving() as provider:
        experiment = priced(tmp_path, provider.url, dedupe=Dedupe.always)
        report = await experiment(TWINS)

    rows = read_rows(experiment.folder)
    assert [row.get("deduplicated_from") for row in rows] == [None, None, 0, 0, 1]
    assert report.summary["cost_usd"] > 0
    assert sum(row["metrics"]["cost_usd"] for row in rows) == pytest.approx(report.summary["cost_usd"])


@pytest.mark.parametrize("concurrency", [1, 8])
async def test_rows_that_share_an_answer_have_scores_of_their_own(tmp_path: Path, concurrency: int) -> None:
    rows = [{"prompt": "a", "target": target} for target in ("a", "b", "A", "c")]
    async with serving() as provider:
        experiment = Experiment(tmp_path, api_base=provider.url, limits=LimitsConfig(concurrency=concurrency))
        report = await experiment(rows, dedupe=Dedupe.always, scorers={"exact": ScorerConfig()})

    assert len(provider.requests) == 1
    assert [row["scores"]["exact"] for row in read_rows(experiment.folder)] == [1.0, 0.0, 1.0, 0.0]
    assert report.summary["scores"] == {"exact": {"mean": 0.5, "n": 4}}


@pytest.mark.parametrize("concurrency", [1, 8])
async def test_rows_that_share_a_request_that_fails_fail_together_and_are_asked_once_more(
    tmp_path: Path, concurrency: int
) -> None:
    healthy = False

    def answer(asked: Asked) -> web.Response:
        return shout(asked) if healthy else refusal(400, "bad")

    async with serving(answer) as provider:
        experiment = Experiment(
            tmp_path, api_base=provider.url, dedupe=Dedupe.always, limits=LimitsConfig(concurrency=concurrency)
        )
        first = await experiment([{"prompt": "a"}] * 300 + [{"prompt": "b"}] * 300)
        healthy = True
        second = await experiment()

    assert (first.summary["failed"], second.summary["failed"]) == (600, 0)
    assert len(provider.requests) == 4


async def test_an_answer_that_was_asked_for_is_not_reused_by_the_rows_that_share_it(tmp_path: Path) -> None:
    rows = [{"prompt": f"row {n % 5}"} for n in range(600)]
    async with serving() as provider:
        experiment = Experiment(
            tmp_path, api_base=provider.url, dedupe=Dedupe.always, limits=LimitsConfig(concurrency=1)
        )
        first = await experiment(rows)
        again = await experiment([*rows, {"prompt": "new"}])
    assert (first.summary["reused"], first.summary["deduplicated"]) == (0, 595)
    assert (again.summary["reused"], again.summary["deduplicated"]) == (600, 595)


async def test_turning_sharing_on_and_off_keeps_the_answers(tmp_path: Path) -> None:
    async with serving() as provider:
        experiment = Experiment(tmp_path, api_base=provider.url)
        await experiment(TWINS, dedupe=Dedupe.always)
        apart = await experiment(dedupe=Dedupe.never)
        together = await experiment(dedupe=Dedupe.always)

    assert len(provider.requests) == 2 + 3
    assert (apart.summary["reused"], together.summary["reused"]) == (2, 5)
    assert experiment.texts() == list("ABAAB")


# reuse


def cell(tmp_path: Path, name: str, url: str, **settings: Any) -> Experiment:
    """A run among others below ``tmp_path / "runs"``."""
    (tmp_path / "runs" / name).mkdir(parents=True, exist_ok=True)
    return priced(tmp_path / "runs" / name, url, runs_dir=str(tmp_path / "runs"), **settings)


async def test_another_runs_answers_to_the_same_are_taken_over_at_no_cost(tmp_path: Path) -> None:
    async with serving() as provider:
        first = await cell(tmp_path, "first", provider.url)(numbered(5))
        second = cell(tmp_path, "second", provider.url, reuse=True)
        report = await second([*numbered(7), {"prompt": "row 3"}])
        again = await second()
        plain = await cell(tmp_path, "plain", provider.url)(numbered(5))

    assert asked_for(provider.requests) == {
        **{f"row {n}": 2 for n in (0, 1, 2, 4)},
        "row 3": 3,  # its second occurrence is not the first one's twin: answers are sampled
        "row 5": 1,
        "row 6": 1,
    }
    assert (report.summary["reused"], report.summary["taken_over"]) == (5, 5)
    assert (again.summary["reused"], again.summary["taken_over"]) == (8, 5)
    assert report.summary["cost_usd"] == pytest.approx(first.summary["cost_usd"] * 3 / 5)
    assert plain.summary["taken_over"] == 0
    rows = read_rows(second.folder)
    assert [row["output_text"] for row in rows] == [*(f"ROW {n}" for n in range(7)), "ROW 3"]
    assert [row.get("reused_from") for row in rows] == ["first/run"] * 5 + [None] * 3
    assert [row["metrics"]["cost_usd"] for row in rows[:5]] == [0.0] * 5


@pytest.mark.parametrize(
    "change",
    [
        {"model": "simulated/other"},
        {"request": {"temperature": 0.5}},
        {"request": {"max_tokens": 7}},
        {"system": "Be brief."},
        {"simulator": SimulatorConfig(seed=1)},
    ],
)
async def test_nothing_is_taken_over_that_was_asked_otherwise(tmp_path: Path, change: dict[str, Any]) -> None:
    async with serving() as provider:
        await cell(tmp_path, "first", provider.url)(numbered(3))
        report = await cell(tmp_path, "second", provider.url, reuse=True, **change)(numbered(3))
    assert (len(provider.requests), report.summary["taken_over"]) == (6, 0)


async def test_failures_are_not_taken_over_and_answers_replace_them(tmp_path: Path) -> None:
    async with serving(lambda asked: refusal(400, "bad")) as provider:
        await cell(tmp_path, "failed", provider.url)(numbered(3))
        taker = cell(tmp_path, "taker", provider.url, reuse=True)
        failed = await taker(numbered(3))
        provider.answer = shout
        await cell(tmp_path, "good", provider.url)(numbered(3))
        report = await taker()

    assert failed.summary["failed"] == 3
    assert (report.exit_code, report.summary["taken_over"]) == (0, 3)
    assert len(provider.requests) == 9


async def test_answers_that_are_taken_over_are_scored(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "target": "a"}, {"prompt": "b", "target": "x"}]
    async with serving() as provider:
        await cell(tmp_path, "first", provider.url)(rows)
        report = await cell(tmp_path, "second", provider.url, reuse=True, scorers={"exact": ScorerConfig()})(rows)
    assert len(provider.requests) == 2
    assert report.summary["scores"] == {"exact": {"mean": 0.5, "n": 2}}


def make_foreign(path: Path) -> None:
    path.unlink()
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE diary (entry TEXT)")


def make_older(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA user_version = 1")


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda path: path.write_bytes(b"Dear diary, nothing happened today.\n" * 50), "damaged or no database"),
        (make_foreign, "is no results database of runner"),
        (make_older, "has schema version 1"),
        (lambda path: path.write_bytes(path.read_bytes()[:9000]), "damaged"),
    ],
)
async def test_a_run_that_cannot_be_looked_into_is_left_out_with_a_note(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], harm: Callable[[Path], Any], said: str
) -> None:
    async with serving() as provider:
        bad = cell(tmp_path, "bad", provider.url)
        await bad(numbered(3))
        harm(bad.folder / "results.sqlite")
        before = (bad.folder / "results.sqlite").read_bytes()
        await cell(tmp_path, "good", provider.url)(numbered(2))
        report = await cell(tmp_path, "taker", provider.url, reuse=True)(numbered(3))

    assert (report.exit_code, report.summary["taken_over"]) == (0, 2)
    assert (bad.folder / "results.sqlite").read_bytes() == before
    note = next(line for line in capfd.readouterr().err.splitlines() if "nothing is taken over" in line)
    assert str(bad.folder) in note
    assert said in note


async def test_a_run_that_is_at_work_can_be_looked_into_and_a_locked_one_is_left_out(tmp_path: Path) -> None:
    async with serving() as provider:
        first = cell(tmp_path, "first", provider.url)
        await first(numbered(3))
        with closing(sqlite3.connect(first.folder / "results.sqlite", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            report = await cell(tmp_path, "second", provider.url, reuse=True)(numbered(3))
            other.execute("ROLLBACK")
            other.execute("PRAGMA locking_mode = EXCLUSIVE")
            other.execute("BEGIN EXCLUSIVE")
            shut = await cell(tmp_path, "third", provider.url, reuse=True)(numbered(4))
    assert report.summary["taken_over"] == 3
    assert shut.summary["taken_over"] == 3  # by way of the second run
