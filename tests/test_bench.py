"""Benchmarks as they are run: what is asked, what is kept, what is measured again."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from harness import Asked, Command, Json, read_summary, refusal, serving, shout
from runner.bench import run_bench
from runner.bench.questions import marked
from runner.bench.sweeps import compare_benchmarks, gather
from runner.config import (
    BenchConfig,
    CacheMode,
    DatasetConfig,
    DatasetKind,
    Resume,
    RetryConfig,
    RunnerConfig,
    SimulatorConfig,
    SloConfig,
    SweepConfig,
    TaskConfig,
    TaskKind,
    TrackerConfig,
    TrackerKind,
)
from runner.errors import ConfigError
from runner.experiment import Report
from runner.sweep import Cell

MARK = re.compile(r"^\[[0-9a-f]{8}-\d+\] ")


def configured(**changes: Any) -> RunnerConfig:
    settings: dict[str, Any] = {
        "task": TaskConfig(kind=TaskKind.bench),
        "prompt": "Say hello.",
        "bench": BenchConfig(levels=[1, 2, 4], requests=12, warmup=1),
        "simulator": SimulatorConfig(latency_s=0.002),
        "retry": RetryConfig(max_retries=0),
        "tracker": TrackerConfig(kind=TrackerKind.none),
    }
    return RunnerConfig(**{**settings, **changes})


def rows_file(folder: Path, rows: list[Json]) -> DatasetConfig:
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return DatasetConfig(kind=DatasetKind.jsonl, path=str(path))


def levels_of(report: Report) -> dict[float, Json]:
    return {level["level"]: level for level in report.summary["bench"]["levels"]}


async def test_each_level_is_measured_and_the_files_say_so(tmp_path: Path) -> None:
    report = await run_bench(configured(), tmp_path)

    assert report.exit_code == 0
    assert [level["requests"] for level in levels_of(report).values()] == [12, 12, 12]
    assert read_summary(tmp_path) == json.loads(json.dumps(dict(report.summary)))
    bench = json.loads((tmp_path / "bench.json").read_text())
    assert bench["recommendation"] == report.summary["bench"]["recommendation"]
    assert len(list((tmp_path / "measurements").glob("*.jsonl"))) == 3
    assert report.summary["rows"] == report.summary["succeeded"] == 36
    assert report.summary["tokens"]["completion"] > 0
    assert report.summary["cost_usd"] > 0


async def test_the_last_line_of_the_progress_counts_every_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await run_bench(configured(), tmp_path)

    assert "36/36 (100%)" in capsys.readouterr().err.splitlines()[-1]


async def test_no_prompt_is_asked_twice(tmp_path: Path) -> None:
    dataset = rows_file(tmp_path, [{"q": f"row {number}"} for number in range(5)])
    async with serving() as provider:
        config = configured(model="openai_like/m", api_base=provider.url, dataset=dataset, prompt="{{ q }}")
        await run_bench(config, tmp_path / "run")
    texts = [asked.text for asked in provider.requests]

    assert len(set(texts)) == len(texts)
    assert all(MARK.match(text) for text in texts)
    assert {MARK.sub("", text) for text in texts} == {f"row {number}" for number in range(5)}


async def test_the_same_prompts_are_asked_at_every_level_where_that_is_declared(tmp_path: Path) -> None:
    async with serving() as provider:
        bench = BenchConfig(levels=[1, 2], requests=5, cache=CacheMode.same)
        await run_bench(configured(model="openai_like/m", api_base=provider.url, bench=bench), tmp_path)

    assert {asked.text for asked in provider.requests} == {"Say hello."}


@pytest.mark.parametrize(
    ("asked", "changed"),
    [
        ("hello", "[m] hello"),
        ([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hello"}], 1),
        ([{"role": "user", "content": [{"type": "image_url"}, {"type": "text", "text": "hello"}]}], 0),
        ({"input": "hello", "instructions": "Be kind."}, "input"),
    ],
)
def test_a_mark_stands_before_the_user_s_first_text(asked: Any, changed: Any) -> None:
    before = json.dumps(asked)
    after = marked(asked, "[m]")

    assert json.dumps(asked) == before  # the row's own is left alone
    assert json.dumps(after) == before.replace("hello", "[m] hello")


async def test_a_streamed_answer_has_its_first_token_and_the_time_between_tokens(tmp_path: Path) -> None:
    simulator = SimulatorConfig(ttft_s=0.02, itl_s=0.005, output_tokens=10)
    bench = BenchConfig(levels=[4], requests=80)
    report = await run_bench(
        configured(model="simulated/m", simulator=simulator, request={"stream": True}, bench=bench), tmp_path
    )
    [level] = levels_of(report).values()

    assert level["ttft_s"]["p50"]["value"] >= 0.02
    assert 0.003 <= level["itl_s"]["p50"]["value"] <= level["latency_s"]["p50"]["value"] / 9
    assert level["tokens_per_s"]["completion"] == pytest.approx(10 * level["requests_per_s"]["value"], rel=0.3)
    assert level["tokens_per_s_per_user"] > 0


async def test_embeddings_are_measured_by_the_request(tmp_path: Path) -> None:
    dataset = rows_file(tmp_path, [{"text": f"row {number}"} for number in range(20)])
    config = configured(
        task=TaskConfig(kind=TaskKind.bench, micro_batch_size=8),
        bench=BenchConfig(task=TaskKind.embed, levels=[2], requests=10, warmup=1),
        dataset=dataset,
        prompt="{{ text }}",
        model="simulated/embedding",
    )
    report = await run_bench(config, tmp_path / "run")
    [level] = levels_of(report).values()

    assert (level["requests"], level["failed"]) == (10, 0)
    assert level["tokens"]["prompt"] > 10 * 8


async def test_failures_are_measured_and_told(tmp_path: Path) -> None:
    def answer(asked: Asked) -> Any:
        number = int(asked.text.split("-")[1].split("]")[0])
        return refusal(500, "oops") if number % 3 == 0 else shout(asked)

    async with serving(answer) as provider:
        config = configured(model="openai_like/m", api_base=provider.url)
        report = await run_bench(config, tmp_path)

    assert report.exit_code == 3
    assert report.summary["errors"]["InternalServerError"] == pytest.approx(12, abs=3)
    assert report.summary["bench"]["recommendation"]["level"] is None


async def test_rows_that_cannot_be_asked_are_passed_over(tmp_path: Path) -> None:
    dataset = rows_file(tmp_path, [{"q": "good"}, {"other": 1}])
    report = await run_bench(configured(dataset=dataset, prompt="{{ q }}"), tmp_path / "run")

    assert report.summary["failed"] == 0


async def test_a_wrong_key_ends_it_with_the_way_out(tmp_path: Path) -> None:
    async with serving(lambda asked: refusal(401, "invalid_api_key")) as provider:
        config = configured(model="openai_like/m", api_base=provider.url)
        report = await run_bench(config, tmp_path)

    assert report.exit_code == 4
    assert "AuthenticationError on one request after the other" in (report.message or "")
    assert "OPENAI_LIKE_API_KEY" in (report.message or "")
    assert len(provider.requests) <= 10
    assert report.summary["stopped"] == "systemic-error"


# Going on


async def test_what_is_complete_is_not_measured_again(tmp_path: Path) -> None:
    async with serving() as provider:
        config = configured(model="openai_like/m", api_base=provider.url)
        first = await run_bench(config, tmp_path)
        asked = len(provider.requests)
        again = await run_bench(config, tmp_path)
        assert len(provider.requests) == asked
        assert again.summary == first.summary

        (tmp_path / "measurements" / "level-2-1.jsonl").unlink()
        await run_bench(config, tmp_path)
        assert asked < len(provider.requests) < 1.6 * asked

        fresh = configured(model="openai_like/m", api_base=provider.url, resume=Resume.fresh)
        before = len(provider.requests)
        await run_bench(fresh, tmp_path)
        assert len(provider.requests) >= before + 36


async def test_measurements_of_another_configuration_or_torn_files_are_not_taken_over(tmp_path: Path) -> None:
    await run_bench(configured(), tmp_path)
    torn = tmp_path / "measurements" / "level-4-1.jsonl"
    torn.write_bytes(torn.read_bytes()[:-40])
    async with serving() as provider:
        await run_bench(configured(), tmp_path)
        await run_bench(configured(model="openai_like/m", api_base=provider.url), tmp_path)

    assert json.loads(torn.read_text().splitlines()[-1])["span"]["level"] == 4
    assert len(provider.requests) >= 36


async def test_require_wants_an_earlier_measurement(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="resume=require"):
        await run_bench(configured(resume=Resume.require), tmp_path)


async def test_a_signal_ends_it_and_keeps_the_levels_that_are_complete(tmp_path: Path) -> None:
    signals = iter([signal.SIGTERM])

    def answer(asked: Asked) -> Any:
        if len(provider.requests) >= 20:
            for signum in signals:  # one
                os.kill(os.getpid(), signum)
        return 0.01

    async with serving(answer) as provider:
        config = configured(model="openai_like/m", api_base=provider.url)
        report = await run_bench(config, tmp_path)
        assert (report.exit_code, report.summary["stopped"]) == (143, "interrupted")
        assert sorted(levels_of(report)) == [1]
        again = await run_bench(config, tmp_path)

    assert sorted(levels_of(again)) == [1, 2, 4]


async def test_an_adaptive_ladder_goes_on_where_it_was(tmp_path: Path) -> None:
    bench = BenchConfig(levels="auto", max_level=4, requests=12, warmup=1, repeats=2)
    async with serving() as provider:
        config = configured(model="openai_like/m", api_base=provider.url, bench=bench)
        first = await run_bench(config, tmp_path)
        asked = len(provider.requests)
        again = await run_bench(config, tmp_path)

    assert len(provider.requests) == asked
    assert sorted(levels_of(first)) == sorted(levels_of(again))
    assert all(level["repeats"] == 2 for level in levels_of(first).values())


async def test_an_adaptive_ladder_is_not_lengthened_by_its_repeats(tmp_path: Path) -> None:
    """The first time, level 2 fails; the second time it does not, and half of its requests may."""
    marks: list[str] = []

    def answer(asked: Asked) -> Any:
        mark = asked.text.split("-")[0]
        if mark not in marks:
            marks.append(mark)
        return refusal(400, "no") if marks.index(mark) == 1 else 0.05

    bench = BenchConfig(levels="auto", requests=12, warmup=1, repeats=2, slo=SloConfig(error_rate=0.5))
    async with serving(answer) as provider:
        config = configured(model="openai_like/m", api_base=provider.url, bench=bench)
        await run_bench(config, tmp_path)
        asked = len(provider.requests)
        report = await run_bench(config, tmp_path)

    assert len(provider.requests) == asked
    assert sorted(levels_of(report)) == [1, 2]


@pytest.mark.parametrize("moment", ["within a level", "between levels"])
async def test_a_killed_benchmark_measures_only_what_is_missing(command: Command, moment: str) -> None:
    def answer(asked: Asked) -> Any:
        return 0.02

    async with serving(answer) as provider:
        arguments = (
            "task=bench",
            "prompt=hello",
            "model=openai_like/m",
            f"api_base={provider.url}",
            "bench.levels=[1,2,4]",
            "bench.requests=20",
            "tracker=none",
        )
        async with command.running(*arguments) as process:
            await _until(lambda: len(list(command.folder.glob("runs/*/*/measurements/level-1-1.jsonl"))) == 1)
            if moment == "within a level":
                begun = len(provider.requests)
                await _until(lambda: len(provider.requests) > begun + 10)
            process.kill()
            await process.communicate()
        measured = (command.run() / "measurements" / "level-1-1.jsonl").read_bytes()
        finished = await command(*arguments)

    assert finished.exit_code == 0, finished.err
    assert (command.run() / "measurements" / "level-1-1.jsonl").read_bytes() == measured
    assert [line.split()[0] for line in finished.out.splitlines()[:3]] == ["c=1", "c=2", "c=4"]
    assert "recommended_max_parallel_requests=" in finished.out
    assert not list(command.run().glob("measurements/.*.partial"))


async def _until(condition: Callable[[], bool]) -> None:
    for _ in range(3000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise TimeoutError


# Sweeps


async def test_cells_of_one_level_become_one_table(command: Command) -> None:
    cells = ("-m", "+experiment=concurrency", "limits.concurrency=1,2,4", "bench.requests=20", "tracker=none")
    done = await command(*cells, "simulator.latency_s=0.02")
    [sweep] = command.folder.glob("runs/concurrency/sweep-*")
    gathered = json.loads((sweep / "bench.json").read_text())
    first = {path: path.stat().st_mtime_ns for path in command.folder.glob("runs/*/*/measurements/*")}
    again = await command(*cells, "simulator.latency_s=0.02")

    assert done.exit_code == 0, done.err
    assert [level["level"] for level in gathered[""]["levels"]] == [1, 2, 4]
    end = done.out.partition("\ncell ")[2]
    assert re.findall(r"^c=(\d+)", end, re.M) == ["1", "2", "4"]
    assert "recommended_max_parallel_requests=" in end
    assert again.exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in first} == first


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
async def test_a_parallel_launcher_makes_the_same_table(command: Command, launcher: str) -> None:
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.removesuffix('_local')}_launcher")
    done = await command(
        *("-m", "+experiment=concurrency", f"hydra/launcher={launcher}", "limits.concurrency=1,2,4"),
        *("bench.requests=20", "simulator.latency_s=0.02", "tracker=none"),
    )

    assert done.exit_code == 0, done.err
    end = done.out.partition("\ncell ")[2]
    assert re.findall(r"^c=(\d+)", end, re.M) == ["1", "2", "4"]
    assert "recommended_max_parallel_requests=" in end


@pytest.mark.parametrize("launcher", ["basic", "joblib"])
async def test_a_killed_sweep_measures_only_what_is_missing(command: Command, launcher: str) -> None:
    if launcher == "joblib":
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    async with serving(lambda asked: 0.02) as provider:
        arguments = (
            *("-m", "+experiment=concurrency", f"hydra/launcher={launcher}", "limits.concurrency=1,2,4"),
            *("model=openai_like/m", f"api_base={provider.url}", "bench.requests=20", "tracker=none"),
        )
        async with command.running(*arguments) as process:
            await _until(lambda: _measurements(command) != {})
            begun = len(provider.requests)
            await _until(lambda: len(provider.requests) > begun + 10)
            process.kill()
            await process.wait()
        measured = _measurements(command)
        finished = await command(*arguments)

    assert finished.exit_code == 0, finished.err
    assert "in use" not in finished.err
    assert measured.items() < _measurements(command).items()
    assert re.findall(r"^c=(\d+)", finished.out.partition("\ncell ")[2], re.M) == ["1", "2", "4"]


def _measurements(command: Command) -> dict[Path, int]:
    """What has been measured, and when."""
    return {path: path.stat().st_mtime_ns for path in command.folder.glob("runs/*/*/measurements/level-*.jsonl")}


async def test_cells_that_run_at_once_take_turns(tmp_path: Path) -> None:
    cells: list[str] = []

    def answer(asked: Asked) -> Any:
        cells.append(asked.text.split("-")[0])
        return 0.01

    async with serving(answer) as provider:
        bench = BenchConfig(levels=[3], requests=20)
        sweep = SweepConfig(folder=str(tmp_path / "sweep"))
        config = configured(model="openai_like/m", api_base=provider.url, bench=bench, sweep=sweep)
        await asyncio.gather(*(run_bench(config, tmp_path / name) for name in ("a", "b", "c")))

    assert [cell for cell, _ in groupby(cells)] == list(dict.fromkeys(cells))
    assert len(set(cells)) == 3


async def test_prompts_are_compared_over_the_same_rows_and_other_rows_are_refused(tmp_path: Path) -> None:
    async def cell(number: int, text: str, prompt: str | None) -> Cell:
        folder = tmp_path / str(number)
        folder.mkdir()
        dataset = rows_file(folder, [{"prompt": f"{text} {row}"} for row in range(4)])
        bench = BenchConfig(levels=[2], requests=20)
        report = await run_bench(configured(dataset=dataset, prompt=prompt, bench=bench), folder)
        return Cell(number=number, name=f"cell={number}", folder=str(folder), summary=report.summary)

    cells = [await cell(0, "one", None), await cell(1, "one", "Say: {{ prompt }}"), await cell(2, "two", None)]
    prompts, rows = compare_benchmarks(gather(cells))

    assert prompts.refusal is None
    assert not prompts.same_prompts
    assert {each.figure for each in prompts.differences} >= {"latency_s", "prompt_tokens"}
    assert "their workloads differ" in (rows.refusal or "")


async def test_models_are_compared_level_by_level(command: Command) -> None:
    command.write_rows("none.jsonl", [{"question": "never asked anywhere", "answer": "x"}])
    done = await command(
        "-m",
        "+experiment=bench_fleet",
        "model=simulated/echo,simulated/long",
        "bench.levels=[2,4]",
        "bench.requests=20",
        "simulator.latency_s=0.01",
        "simulator.answers=none.jsonl",
        "tracker=none",
    )

    assert done.exit_code == 0, done.err
    assert "first   model=simulated/echo at 2\nsecond  model=simulated/long at 2\n" in done.out
    assert "first   model=simulated/echo at 4\nsecond  model=simulated/long at 4\n" in done.out
    assert re.search(r"^mean completion tokens .* (higher|lower)$", done.out, re.M)
