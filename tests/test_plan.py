"""Plans: what would be sent and why, and what it takes."""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness import Asked, Command, Json, numbered, read_rows, refusal, serving, shout, version_1
from runner.budget import shown
from runner.config import (
    BudgetConfig,
    DatasetConfig,
    DatasetKind,
    Dedupe,
    DeploymentConfig,
    LimitsConfig,
    PriceConfig,
    Resume,
    RunnerConfig,
    SimulatorConfig,
    TaskConfig,
    TaskKind,
    TrackerConfig,
    TrackerKind,
)
from runner.errors import ConfigError, StoreError
from runner.experiment import run_experiment
from runner.forecast import total_of
from runner.plan import Plan, make_plan, together


def configured(tmp_path: Path, rows: list[Json], **settings: Any) -> RunnerConfig:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    dataset = DatasetConfig(kind=DatasetKind.jsonl, path=str(path))
    tracker = TrackerConfig(kind=TrackerKind.none)
    return RunnerConfig(**{"model": "simulated/m", "dataset": dataset, "tracker": tracker, **settings})


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


async def test_rows_are_planned_with_their_reasons_and_nothing_is_touched(tmp_path: Path) -> None:
    def answer(asked: Asked) -> Any:
        return refusal(400, "bad") if asked.text == "row 3" else shout(asked)

    run = tmp_path / "run"
    async with serving(answer) as provider:
        config = configured(tmp_path, numbered(6), api_base=provider.url)
        await run_experiment(config, run)
        before = files(run)
        rows = [*numbered(4), {"prompt": "changed"}, *numbered(8)[5:], {"nothing": 1}]
        plan = await make_plan(configured(tmp_path, rows, api_base=provider.url), run)
        kept = await make_plan(configured(tmp_path, rows, api_base=provider.url, retry_failed=False), run)
        anew = await make_plan(configured(tmp_path, rows, api_base=provider.url, resume=Resume.fresh), run)
    assert plan.send == {"failed earlier": 1, "changed": 1, "new": 2}
    assert plan.keep == {"answered": 4, "cannot be asked": 1}
    assert kept.keep == {"answered": 4, "failed earlier": 1, "cannot be asked": 1}
    assert plan.notes[-1].startswith("a row that cannot be asked: rows.jsonl:9: ")
    assert anew.send["asked anew"] == 4
    assert files(run) == before
    assert len(provider.requests) == 6


async def test_without_a_run_every_row_is_new_and_no_folder_is_made(tmp_path: Path) -> None:
    plan = await make_plan(configured(tmp_path, numbered(5)), tmp_path / "run")
    assert (plan.send, plan.keep, plan.basis) == ({"new": 5}, {}, 0)
    assert "a guess" in str(plan)
    assert not (tmp_path / "run").exists()


async def test_rows_that_were_put_between_others_are_new_and_not_changed(tmp_path: Path) -> None:
    quick = SimulatorConfig(latency_s=0.001)
    await run_experiment(configured(tmp_path, numbered(20), simulator=quick), tmp_path / "run")
    rows = [{"prompt": "first"}, *numbered(10), {"prompt": "between"}, *numbered(20)[10:19], {"prompt": "last"}]
    plan = await make_plan(configured(tmp_path, rows, simulator=quick), tmp_path / "run")
    assert (plan.send, plan.keep) == ({"new": 3}, {"answered": 19})


@pytest.mark.parametrize("change", [{"resume": Resume.fresh}, {"rows": [{"prompt": f"other {n}"} for n in range(20)]}])
async def test_answers_to_rows_that_are_gone_tell_what_answers_are_like(tmp_path: Path, change: dict[str, Any]) -> None:
    quick = SimulatorConfig(latency_s=0.001)
    await run_experiment(configured(tmp_path, numbered(20), simulator=quick), tmp_path / "run")
    rows = change.pop("rows", numbered(20))
    plan = await make_plan(configured(tmp_path, rows, simulator=quick, **change), tmp_path / "run")
    assert (plan.basis, plan.like) == (20, str(tmp_path / "run"))
    assert plan.seconds is not None
    assert plan.completion_tokens.low <= 20 * 24 <= plan.completion_tokens.high * 4


async def test_answers_that_were_cut_off_are_planned_as_such(tmp_path: Path) -> None:
    rows = numbered(4)
    short = configured(tmp_path, rows, request={"max_tokens": 2}, simulator=SimulatorConfig(latency_s=0.001))
    await run_experiment(short, tmp_path / "run")
    longer = replace(short, request={"max_tokens": 50}, retry_truncated=True)
    plan = await make_plan(longer, tmp_path / "run")
    assert plan.send == {"truncated": 4}


async def test_a_plan_says_why_answers_that_are_there_would_be_paid_for_again(tmp_path: Path) -> None:
    rows = numbered(40)
    config = configured(
        tmp_path,
        rows,
        request={"max_tokens": 8},
        simulator=SimulatorConfig(latency_s=0.001),
        limits=LimitsConfig(concurrency=1),
        budget=BudgetConfig(requests=4),
    )
    assert (await run_experiment(config, tmp_path / "run")).summary["succeeded"] == 4
    plan = await make_plan(replace(config, request={"max_tokens": 4}, budget=BudgetConfig()), tmp_path / "run")
    assert plan.send == {"changed": 4, "new": 36}
    told = "request.max_tokens=4 instead of request.max_tokens=8: the 4 answers that are there do not serve"
    assert told in str(plan)


async def test_rows_that_share_an_answer_are_planned_once(tmp_path: Path) -> None:
    rows = [{"prompt": "the same"}] * 5
    plan = await make_plan(configured(tmp_path, rows, dedupe=Dedupe.always), tmp_path / "run")
    assert (plan.send, plan.keep) == ({"new": 1}, {"sharing the answer of another row": 4})


async def test_an_answer_that_rows_share_is_evidence_once(tmp_path: Path) -> None:
    quick = SimulatorConfig(latency_s=0.001)
    rows = [{"prompt": "the same"}] * 5
    await run_experiment(configured(tmp_path, rows, dedupe=Dedupe.always, simulator=quick), tmp_path / "run")
    plan = await make_plan(
        configured(tmp_path, [*rows, *numbered(3)], dedupe=Dedupe.always, simulator=quick), tmp_path / "run"
    )
    assert (plan.send, plan.keep, plan.basis) == ({"new": 3}, {"answered": 5}, 1)


async def test_answers_of_other_runs_are_planned_to_be_taken_over(tmp_path: Path) -> None:
    quick = SimulatorConfig(latency_s=0.001)
    config = configured(tmp_path, numbered(3), runs_dir=str(tmp_path / "runs"), simulator=quick)
    await run_experiment(config, tmp_path / "runs" / "one" / "a")
    plan = await make_plan(replace(config, reuse=True), tmp_path / "runs" / "one" / "b")
    assert (plan.send, plan.keep) == ({}, {"taken over from elsewhere": 3})


async def test_a_plan_of_a_run_that_must_go_on_and_cannot_names_its_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{tmp_path / 'run'} holds no earlier run"):
        await make_plan(configured(tmp_path, numbered(1), resume=Resume.require), tmp_path / "run")


async def test_a_run_that_was_killed_is_planned(tmp_path: Path, command: Command) -> None:
    command.write_rows("rows.jsonl", numbered(200))
    arguments = ["dataset=jsonl", "dataset.path=rows.jsonl", "name=t", "tracker=none", "limits.concurrency=4"]
    async with command.running(*arguments) as process:
        while not any(path.stat().st_size > 50_000 for path in command.folder.glob("runs/*/*/results.sqlite-wal")):
            assert process.returncode is None
            await asyncio.sleep(0.02)
    done = await command(*arguments, "plan=true")
    assert (done.exit_code, "interrupted earlier" in done.out) == (0, True), done.out + done.err


async def test_a_run_of_an_earlier_version_is_planned_and_left_as_it_is(tmp_path: Path) -> None:
    version_1(tmp_path / "run" / "results.sqlite")
    before = files(tmp_path / "run")
    plan = await make_plan(configured(tmp_path, numbered(7)), tmp_path / "run")
    assert plan.send == {"changed": 5, "new": 2}
    assert files(tmp_path / "run") == before


async def test_a_damaged_run_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.sqlite").write_bytes(random.Random(0).randbytes(5000))
    with pytest.raises(StoreError, match="cannot be read"):
        await make_plan(configured(tmp_path, numbered(2)), tmp_path / "run")


async def test_what_cannot_be_run_cannot_be_planned(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="samples"):
        await make_plan(configured(tmp_path, numbered(2), samples=0), tmp_path / "run")


# What it takes


async def test_a_price_that_is_not_known_is_said(tmp_path: Path) -> None:
    config = configured(tmp_path, numbered(3), model="hosted_vllm/m", request={"max_tokens": 10})
    plan = await make_plan(config, tmp_path / "run")
    assert plan.usd is None
    assert "no price is known" in str(plan)

    own = DeploymentConfig(model="hosted_vllm/m", price=PriceConfig(prompt=1e6, completion=0.0))
    priced = await make_plan(replace(config, deployments={"m": own}), tmp_path / "run")
    assert priced.usd is not None
    assert priced.usd.expected == pytest.approx(3 * len("row 1") / 4)


async def test_limits_say_how_long_it_takes(tmp_path: Path) -> None:
    config = configured(tmp_path, numbered(30), limits=LimitsConfig(rpm=10))
    plan = await make_plan(config, tmp_path / "run")
    assert plan.seconds is not None
    assert plan.seconds.expected == plan.seconds.low == 174  # the first one goes out at once
    assert 174 * 1.05 < plan.seconds.high < 174 * 1.2


async def test_a_run_without_answers_follows_another_of_its_name_and_deployment(tmp_path: Path) -> None:
    """Which is what a changed prompt, another temperature or another dataset begins with."""
    quick = SimulatorConfig(latency_s=0.001, output_tokens=40)
    config = configured(tmp_path, numbered(50), model="simulated/m", simulator=quick)
    report = await run_experiment(config, tmp_path / "a")
    other = configured(tmp_path, numbered(50), model="simulated/m", simulator=quick, request={"temperature": 1})
    plan = await make_plan(other, tmp_path / "b")
    assert (plan.send, plan.basis, plan.like) == ({"new": 50}, 50, str(tmp_path / "a"))
    assert plan.tokens.expected == pytest.approx(report.summary["tokens"]["total"], rel=0.1)
    assert "by      50 answers of " in str(plan)

    short = await make_plan(replace(other, request={"max_tokens": 3}), tmp_path / "b")
    assert short.completion_tokens.expected == 150
    another = await make_plan(replace(other, model="simulated/another"), tmp_path / "b")
    assert (another.basis, another.like) == (0, None)


async def test_a_guess_is_what_answers_usually_take_and_never_above_what_they_may(tmp_path: Path) -> None:
    limits = LimitsConfig(default_output_tokens=100)
    config = configured(tmp_path, numbered(10), limits=limits)
    for max_tokens, expected in [(None, 1000.0), (1, 10.0), (100, 632.0), (10_000, 1000.0)]:
        request = {} if max_tokens is None else {"max_tokens": max_tokens}
        plan = await make_plan(replace(config, request=request), tmp_path / "run")
        assert plan.completion_tokens.expected == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("kind", [TaskKind.embed, TaskKind.generate])
async def test_after_a_few_answers_the_forecast_is_near_and_its_interval_holds(tmp_path: Path, kind: TaskKind) -> None:
    """In 19 of 20 seeds, over rows of very different lengths."""
    held = 0
    for seed in range(20):
        folder = tmp_path / str(seed)
        folder.mkdir()
        draw = random.Random(seed)
        words = [draw.choice(("tree", "river ", "a", "mountains, ")) * draw.randint(2, 300) for _ in range(300)]
        rows: list[Json] = [{"prompt": f"{n} {text}"} for n, text in enumerate(words)]
        config = configured(
            folder,
            rows,
            model="simulated/echo" if seed % 2 else "simulated/m",
            task=TaskConfig(kind=kind, micro_batch_size=4),
            simulator=SimulatorConfig(seed=seed, latency_s=0.0),
        )
        sample = sorted(draw.sample(range(300), 60))
        first = configured(folder, [rows[n] for n in sample], **_asked(config))
        await run_experiment(first, folder / "run")
        paid = sum(row["metrics"]["cost_usd"] for row in read_rows(folder / "run"))

        plan = await make_plan(configured(folder, rows, **_asked(config)), folder / "run")
        report = await run_experiment(configured(folder, rows, **_asked(config)), folder / "run")
        tokens = report.summary["tokens"]["total"] - sum(_tokens(rows, sample, folder))
        assert plan.usd is not None
        assert plan.basis == 60
        assert plan.tokens.expected == pytest.approx(tokens, rel=0.1)
        held += plan.usd.low <= report.summary["cost_usd"] - paid <= plan.usd.high
    assert held >= 19


def _asked(config: RunnerConfig) -> dict[str, Any]:
    return {"model": config.model, "task": config.task, "simulator": config.simulator}


def _tokens(rows: list[Json], sample: list[int], folder: Path) -> list[int]:
    results = read_rows(folder / "run")
    return [results[n]["token_usage"]["total_tokens"] for n in sample]


def test_a_forecast_is_proportional_to_what_was_expected_of_each_row() -> None:
    forecast = total_of(10, [2.0, 4.0, 6.0], [1.0, 2.0, 3.0], guessed=50.0)
    assert (forecast.expected, forecast.low, forecast.high) == (100.0, 100.0, 100.0)


def test_an_interval_holds_nearly_always() -> None:
    held = 0
    for seed in range(200):
        draw = random.Random(seed)
        forecast = total_of(500, [draw.lognormvariate(0, 1) for _ in range(100)])
        held += forecast.low <= sum(draw.lognormvariate(0, 1) for _ in range(500)) <= forecast.high
    assert held >= 190


def test_a_single_answer_says_little() -> None:
    forecast = total_of(10, [1.0])
    assert (forecast.low, forecast.expected) == (0.0, 10.0)
    assert forecast.high > 30


# The command


async def test_the_command_explains_and_leaves_no_trace(command: Command) -> None:
    command.write_rows("rows.jsonl", numbered(7))
    done = await command("dataset=jsonl", "dataset.path=rows.jsonl", "name=t", "plan=true", "request.max_tokens=8")
    assert (done.exit_code, done.err) == (0, "")
    assert "send    7 rows: 7 new" in done.out
    assert "Nothing was sent" in done.out
    assert not (command.folder / "runs").exists()


async def test_the_plan_finds_the_run_that_the_command_would_go_on_with(command: Command) -> None:
    command.write_rows("rows.jsonl", numbered(3))
    cells = ["-m", "dataset=jsonl", "dataset.path=rows.jsonl", "name=t", "tracker=none", "request.temperature=0,1"]
    assert (await command(*cells)).exit_code == 0
    done = await command(*cells, "plan=true")
    assert done.out.count("keep    3 rows: 3 answered") == 2
    assert "2 runs together\n  send    0 rows\n  keep    6 rows: 6 answered" in done.out


async def test_the_plan_has_the_cells_that_a_configuration_sweeps_over(command: Command) -> None:
    command.write_rows("rows.jsonl", numbered(3))
    experiment = command.folder / "conf" / "experiment" / "grid.yaml"
    experiment.parent.mkdir(parents=True)
    experiment.write_text(
        "# @package _global_\n"
        "defaults: [{override /dataset: jsonl}]\n"
        "dataset: {path: rows.jsonl}\n"
        "name: grid\n"
        "hydra: {sweeper: {params: {+request.temperature: '0,1', simulator.accuracy: '0.5,1'}}}\n"
    )
    cells = ["-m", "+experiment=grid", "tracker=none", "simulator.latency_s=0.001", "simulator.accuracy=0.9"]
    planned = await command(*cells, "plan=true")
    assert "request.temperature=1 simulator.accuracy=0.9\n  send    3 rows: 3 new" in planned.out
    assert "2 runs together\n  send    6 rows: 6 new" in planned.out
    assert (await command(*cells)).exit_code == 0
    again = await command(*cells, "plan=true")
    assert "2 runs together\n  send    0 rows\n  keep    6 rows: 6 answered" in again.out


async def test_options_of_a_group_can_be_swept_over_by_a_pattern(command: Command) -> None:
    done = await command("-m", "limits=glob(*)", "prompt=hi", "plan=true")
    assert (done.exit_code, done.err) == (0, "")
    assert "limits=auto" in done.out
    assert "2 runs together" in done.out


@pytest.mark.parametrize("sweep", [[], ["-m", "request.temperature=0,1"]], ids=["one", "several"])
async def test_a_plan_is_of_what_is_left_out_too(command: Command, sweep: list[str]) -> None:
    """The folder of a run that has a scorer is another one than that of a run that has none."""
    command.write_rows("rows.jsonl", numbered(3))
    rows = ["dataset=jsonl", "dataset.path=rows.jsonl", "tracker=none", "simulator.latency_s=0"]
    scored = [*rows, "scorers.right.kind=contains", "scorers.right.target=nowhere"]
    assert (await command(*scored, "plan=true")).exit_code == 2

    done = await command(*scored, "~scorers.right", *sweep)
    assert done.exit_code == 0, done.err
    planned = await command(*scored, "~scorers.right", *sweep, "plan=true")
    assert planned.exit_code == 0, planned.err
    assert planned.out.count("  keep    3 rows: 3 answered") == max(1, len(sweep))


async def test_a_plan_of_what_cannot_be_composed_is_a_complaint(command: Command) -> None:
    done = await command("modle=x", "plan=true")
    assert (done.exit_code, "model" in done.err, "Traceback" in done.err) == (2, True, False)


async def test_plans_of_several_runs_add_up(tmp_path: Path) -> None:
    plan = await make_plan(configured(tmp_path, numbered(3)), tmp_path / "run")
    both = together([plan, plan])
    assert (both.send, both.tokens.expected) == ({"new": 6}, 2 * plan.tokens.expected)


async def test_an_answer_that_several_plans_follow_is_evidence_once(tmp_path: Path) -> None:
    quick = SimulatorConfig(latency_s=0.001)
    shared = {"model": "simulated/m", "runs_dir": str(tmp_path / "runs"), "simulator": quick}
    folder = tmp_path / "runs" / "one"
    await run_experiment(configured(tmp_path, numbered(9), **shared), folder / "a")
    longer = configured(tmp_path, numbered(12), **shared)
    own = await make_plan(longer, folder / "a")
    like = [await make_plan(replace(longer, system=system), folder / system) for system in ("b", "c")]
    taking_over = [await make_plan(replace(longer, reuse=True), folder / name) for name in ("d", "e")]
    plans = [own, *like, *taking_over]
    assert [plan.basis for plan in plans] == [9] * 5
    assert together(plans).basis == 9

    await run_experiment(configured(tmp_path, numbered(5), **shared), folder / "f")
    assert together([*plans, await make_plan(configured(tmp_path, numbered(6), **shared), folder / "f")]).basis == 14


async def test_answers_that_nothing_is_sent_beside_are_no_evidence_for_what_other_plans_guess(tmp_path: Path) -> None:
    config = configured(tmp_path, numbered(4), simulator=SimulatorConfig(latency_s=0.001))
    await run_experiment(config, tmp_path / "one" / "a")
    answered = await make_plan(config, tmp_path / "one" / "a")
    guessed = await make_plan(config, tmp_path / "other" / "a")
    half = await make_plan(configured(tmp_path, numbered(6)), tmp_path / "one" / "a")
    assert "by      a guess: no answer yet" in str(together([answered, guessed]))
    assert "by      4 answers, and a guess for 4 rows: " in str(together([half, guessed]))
    assert "by      4 answers\n" in f"{together([half, answered])}\n"


async def test_a_plan_refuses_what_the_run_refuses_and_notes_what_it_notes(command: Command) -> None:
    command.write_rows("rows.jsonl", numbered(3))
    rows = ("dataset=jsonl", "dataset.path=rows.jsonl", "tracker=none")
    local = ("deployments.local.model=hosted_vllm/m", "deployments.local.api_base=http://localhost:1/v1")

    unpriced = await command(*rows, *local, "budget.usd=2", "plan=true")
    assert (unpriced.exit_code, unpriced.out) == (2, "")
    assert "budget.usd needs a price" in unpriced.err

    noted = await command(*rows, *local, "model=openai/other", "prompt='{prompt}'", "plan=true")
    assert noted.exit_code == 0, noted.err
    assert "note    model=openai/other has no effect beside deployments (local)" in noted.out
    assert "{{ prompt }}" in noted.out


async def test_a_budget_that_has_no_room_for_the_rest_is_told(tmp_path: Path) -> None:
    quick: dict[str, Any] = {"simulator": SimulatorConfig(latency_s=0.001), "request": {"max_tokens": 100}}

    async def plan(rows: int, **budget: Any) -> Plan:
        config = configured(tmp_path, numbered(rows), budget=BudgetConfig(**budget), **quick)
        return await make_plan(config, tmp_path / "run")

    await run_experiment(configured(tmp_path, numbered(20), **quick), tmp_path / "run")
    ample, short = await plan(40), await plan(40, usd=0.0001, tokens=1_000_000)
    assert ample.usd is not None
    tight = await plan(40, usd=ample.taken.usd + ample.usd.high - 1e-9)
    assert "budget" not in str(ample)
    assert f"budget.usd=0.0001, {shown('usd', ample.taken.usd)} of it taken, stops it before the end" in str(short)
    both = f"budget.usd=0.0001, {shown('usd', 2 * ample.taken.usd)} of it taken by these runs, stops it"
    assert both in str(together([short, short]))
    assert "may stop it" in str(tight) or ample.usd.low == ample.usd.high
    assert "budget.tokens" not in str(short)
    assert "budget" not in str(await plan(20, usd=0.0001))


async def test_cells_that_share_a_budget_are_planned_against_it_together(tmp_path: Path) -> None:
    free = await make_plan(configured(tmp_path, numbered(3), request={"max_tokens": 8}), tmp_path / "run")
    assert free.usd is not None
    enough = BudgetConfig(usd=1.5 * free.usd.high)
    one = await make_plan(configured(tmp_path, numbered(3), request={"max_tokens": 8}, budget=enough), tmp_path / "run")
    assert "budget" not in str(one)
    assert "budget.usd=" in str(together([one, one]))
    assert "budget" not in str(together([one, free]))
