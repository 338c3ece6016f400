"""The tracker, the overview and the report against a stand-in of W&B's API in a process of its own."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import Command, read_summary
from runner.charts import Bar, Bars, Lines, Series
from runner.config import TrackerConfig, TrackerMode
from runner.report.__main__ import main as report
from runner.tracker import Ending, Identity, Table, Tracker, open_tracker
from wandb_offline import everything_below, offline_runs
from wandb_server import KEY, StandIn, State, wandb_server

pytestmark = pytest.mark.usefixtures("no_wandb_account")

LINES = Lines(title="Throughput", note="", x="level", y="rps", series=[Series(name="a", points=[(1, 2.0), (2, 4.0)])])
BARS = Bars(title="Cost", note="", x="US dollars", values=[Bar(name="a", value=0.5, text="$0.50")])


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    with wandb_server() as stand_in:
        for name, value in stand_in.environment.items():
            monkeypatch.setenv(name, value)
        yield stand_in


def track(folder: Path, **config: object) -> Tracker:
    folder.mkdir(exist_ok=True)
    return open_tracker(
        TrackerConfig(tags=["t"], **config),  # type: ignore[arg-type]
        folder=folder,
        identity=Identity(run_id="cell-1", name="cell model=a", group="sweep-1", job_type="cell"),
        settings={"model": "m", "api_key": "sk-a-key-of-a-provider"},
    )


def ending(rows: int) -> Ending:
    table = Table(columns=["cell", "model"], rows=[[0, "a"], [1, "b"]])
    return Ending(summary={"rows": rows}, tables={"cells": table}, charts=[LINES, BARS], exit_code=3)


def contents(state: State, part: str) -> str:
    """The one file that has ``part`` in its place."""
    [content] = [content for place, content in state.files.items() if part in place]
    return content


async def test_a_run_is_logged_online_and_one_that_is_resumed_goes_on_in_it(tmp_path: Path, server: StandIn) -> None:
    for rows in (5, 8):
        results = tmp_path / "run" / "results.jsonl"
        tracker = track(tmp_path / "run")
        results.write_text(f'{{"rows": {rows}}}\n')
        tracker.log({"elapsed_s": 1.0, "done": rows})
        whole = ending(rows)
        await tracker.finish(Ending(summary=whole.summary, artifacts=[results], exit_code=rows - 5))

    state = server.state()
    [(run_id, run)] = state.runs.items()
    assert (run_id, run.name, run.group, run.job_type, run.tags) == ("cell-1", "cell model=a", "sweep-1", "cell", ["t"])
    assert (run.config["model"]["value"], run.config["api_key"]["value"]) == ("m", "***")
    assert [(point["_step"], point["ts/done"]) for point in run.history if "ts/done" in point] == [(0, 5), (1, 8)]
    assert (run.summary["rows"], run.exit_code, run.resumed) == (8, 3, 1)
    assert state.artifacts["results-cell-1"] == ["results.jsonl"]
    assert json.loads(contents(state, "results-cell-1/results.jsonl")) == {"rows": 8}
    assert state.unknown == []
    assert KEY.encode() not in everything_below(tmp_path / "run")


async def test_what_was_kept_offline_is_synced_whole(tmp_path: Path, server: StandIn) -> None:
    tracker = track(tmp_path / "run", mode=TrackerMode.offline)
    tracker.log({"elapsed_s": 1.0, "done": 5})
    await tracker.finish(ending(5))
    [kept] = (tmp_path / "run" / "wandb").glob("offline-run-*")
    synced = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "wandb", "sync", str(kept)],
        timeout=60,
        capture_output=True,
        text=True,
    )

    state = server.state()
    assert synced.returncode == 0, synced.stderr
    run = state.runs["cell-1"]
    assert (run.group, run.job_type, run.exit_code, run.summary["rows"]) == ("sweep-1", "cell", 3, 5)
    assert {"cells", "charts/Throughput_table", "charts/Cost_table"} <= run.summary.keys()
    assert json.loads(contents(state, "media/table/cells"))["data"] == [[0, "a"], [1, "b"]]
    assert json.loads(contents(state, "media/table/charts/Throughput"))["data"] == [[1, "a", 2.0], [2, "a", 4.0]]
    assert state.unknown == []


async def test_a_server_that_dies_in_mid_run_costs_a_run_nothing_but_the_tracking(
    command: Command, server: StandIn
) -> None:
    command.write_rows("rows.jsonl", [{"prompt": f"n{number}"} for number in range(60)])
    arguments = ("dataset=jsonl", "dataset.path=rows.jsonl", "simulator.latency_s=0.2", "limits.concurrency=4")
    options = ("tracker=wandb", "tracker.log_every_s=0.1", "tracker.finish_timeout_s=2")
    async with command.running(*arguments, *options, **server.environment, PYTHONWARNINGS="") as process:
        await asyncio.to_thread(server.wait_for_run)
        server.process.kill()
        _, err = await process.communicate()

    assert process.returncode == 0, err
    assert read_summary(command.run())["succeeded"] == 60
    assert "W&B did not end within 2 s and is left behind" in (command.run() / "runner.log").read_text()
    assert b"Traceback" not in err


async def test_a_sweep_waits_once_for_a_server_that_does_not_answer(command: Command, server: StandIn) -> None:
    server.pause()
    done = await command(
        *("-m", "prompt=hi", "model=simulated/a,simulated/b", "tracker.finish_timeout_s=3"),
        **server.environment,
        PYTHONWARNINGS="",
    )

    assert done.exit_code == 0, done.err
    first, second = (
        (run / "runner.log").read_text() for run in sorted(command.runs(), key=lambda run: run.stat().st_mtime)
    )
    assert "W&B" in first
    assert "could not be reached a moment ago" in second
    [sweep] = command.folder.glob("runs/default/sweep-*")
    assert len(offline_runs(sweep)) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Pydantic's, when the extra is imported
def test_a_report_of_a_sweep_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], server: StandIn
) -> None:
    pytest.importorskip("wandb_workspaces", reason="the extra is not installed: pip install -e '.[report]'")
    from runner.cli import main

    monkeypatch.chdir(tmp_path)
    main(["-m", "prompt=hi", "request.temperature=0,1", "tracker=none"])
    [sweep] = tmp_path.glob("runs/default/sweep-*")

    assert report([str(sweep), "--wandb", "--title", "Two temperatures"]) == 0

    [saved] = server.state().reports
    assert (saved["displayName"], saved["projectName"], saved["entityName"]) == (
        "Two temperatures",
        "runner",
        "somebody",
    )
    assert sweep.name in saved["spec"]
    assert "request.temperature=1" in saved["spec"]
    assert server.state().unknown == []
    assert f"{server.url}/somebody/runner/reports/Two-temperatures--" in capsys.readouterr().out
    assert not (tmp_path / "report.wandb.json").exists()
