from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from harness import Command
from runner.cli import main
from runner.config import RunnerConfig, SweepConfig, TrackerConfig
from runner.overview import cell_table, track_sweep
from runner.report import RunFacts
from runner.sweep import Cell, Sweep
from runner.tracker import FAILED, tracking
from wandb_fake import FakeWandb
from wandb_offline import everything_below, offline_runs

pytestmark = pytest.mark.usefixtures("no_wandb_account")

CANARY = "sk-canary-5f1d0c9ab7e2"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_sweep_is_a_group_of_runs_with_an_overview_of_them(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", CANARY)
    exit_code = main(
        [
            *("-m", "prompt=hi", "name=models", "model=simulated/a,nonsense,simulated/b", "samples=3"),
            *(f"request.user='I am {CANARY}'", "tracker.tags=[first]", "simulator.latency_s=0.01"),
        ]
    )

    [sweep] = here.glob("runs/models/sweep-*")
    [overview] = offline_runs(sweep)
    cells = [run for folder in Command(here).runs() for run in offline_runs(folder)]
    group = f"models-{sweep.name}"
    assert exit_code == 1
    assert {(run.name, run.group, run.job_type, run.exit_code) for run in cells} == {
        ("models model=simulated/a", group, "cell", 0),
        ("models model=simulated/b", group, "cell", 0),
    }
    assert {run.config["model"] for run in cells} == {"simulated/a", "simulated/b"}
    assert [run.tags for run in (*cells, overview)] == [["first"]] * 3
    assert all((run.summary["rows"], run.summary["succeeded"]) == (3, 3) for run in cells)
    assert (overview.id, overview.group, overview.job_type, overview.exit_code) == (group, group, "sweep", 1)
    assert overview.config["model"] == ["simulated/a", "nonsense", "simulated/b"]
    assert (overview.config["samples"], overview.config["request"]["user"]) == (3, "I am ***")
    table = overview.tables["cells"]
    first, bad, last = (dict(zip(table["columns"], row, strict=True)) for row in table["data"])
    assert table["columns"][:4] == ["cell", "model", "exit_code", "message"]
    assert (first["model"], first["exit_code"], first["rows"], first["tokens/prompt"]) == ("simulated/a", 0, 3, 3)
    assert (last["cell"], last["model"], last["exit_code"]) == (2, "simulated/b", 0)
    assert (bad["model"], bad["exit_code"], bad["rows"]) == ("nonsense", 2, None)
    assert "has no provider" in bad["message"]
    assert (overview.summary["cells"], overview.summary["cells_failed"], overview.summary["rows"]) == (3, 1, 6)
    assert {"charts/Latency_table", "charts/Cost_table"} <= overview.tables.keys()
    for run in (sweep, *Command(here).runs()):
        assert CANARY.encode() not in everything_below(run / "wandb")


def test_the_overview_of_a_benchmark_has_its_levels(here: Path) -> None:
    options = ("bench.requests=20", "bench.repeats=1", "simulator.latency_s=0.01", "tracker.log_every_s=60")
    assert main(["-m", "+experiment=concurrency", "limits.concurrency=1,4", *options]) == 0

    [sweep] = here.glob("runs/concurrency/sweep-*")
    [overview] = offline_runs(sweep)
    levels = overview.tables["levels"]
    one, four = (dict(zip(levels["columns"], row, strict=True)) for row in levels["data"])
    assert (one["level"], four["level"]) == (1, 4)
    assert one["requests_per_s"] < four["requests_per_s"]
    assert [row[1] for row in overview.tables["cells"]["data"]] == [1, 4]
    charts = {key.removeprefix("charts/").removesuffix("_table") for key in overview.tables if "charts" in key}
    assert charts >= {"Throughput over load", "Latency over load", "Tokens for all over tokens for each"}
    throughput = overview.tables["charts/Throughput over load_table"]["data"]
    assert [(x, y) for x, _, y in throughput] == [(1, one["requests_per_s"]), (4, four["requests_per_s"])]
    assert overview.artifacts[f"results-concurrency-{sweep.name}"] == ["bench.json"]


def test_a_sweep_without_a_tracker_has_no_overview(here: Path) -> None:
    main(["-m", "prompt=hi", "model=simulated/a,simulated/b", "tracker=none"])

    [sweep] = here.glob("runs/default/sweep-*")
    assert not (sweep / "wandb").exists()
    assert not (sweep / "metrics.jsonl").exists()


def test_an_overview_that_fails_is_told_and_changes_nothing(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)

    assert main(["-m", "prompt=hi", "model=simulated/a,simulated/b"]) == 0
    assert "W&B does not track this run" in capfd.readouterr().err


def test_a_sweep_of_no_cells_has_nothing_to_track(tmp_path: Path) -> None:
    track_sweep(Sweep(tmp_path / "sweep-1"), exit_code=2)

    assert not (tmp_path / "sweep-1").exists()


def test_the_columns_are_what_sets_the_cells_apart(tmp_path: Path) -> None:
    cells = [
        Cell(number=0, name="", folder="/a", exit_code=0, summary={"rows": 5, "deployments": {"m": {"share": 1.0}}}),
        Cell(number=1, name="", folder="/b", message="killed"),
    ]
    shared = {"name": "same", "limits.rpm": "60"}
    runs = [
        RunFacts(label="", folder=Path(folder), state="", overrides={**shared, "request.temperature": value})
        for folder, value in (("/a", "0.5"), ("/b", "null"))
    ]

    table = cell_table(cells, runs)

    assert table.columns == ["cell", "request.temperature", "exit_code", "message", "rows"]
    assert table.rows == [[0, 0.5, 0, None, 5], [1, "null", None, "killed", None]]


async def test_the_run_of_a_cell_that_a_bug_ends_is_finished_as_failed(
    tmp_path: Path, fake: Callable[..., FakeWandb]
) -> None:
    wandb = fake()

    with pytest.raises(RuntimeError, match="a bug"):
        async with tracking(RunnerConfig(name="n"), tmp_path, {}):
            raise RuntimeError("a bug")

    assert [run.exit_code for run in wandb.runs] == [FAILED]


async def test_a_group_of_the_user_s_goes_before_the_sweep_s(tmp_path: Path, fake: Callable[..., FakeWandb]) -> None:
    wandb = fake()
    sweep = Sweep(tmp_path / "n" / "sweep-1")
    folder = tmp_path / "n" / "cell"
    folder.mkdir(parents=True)
    sweep.note(Cell(number=0, name="model=a", folder=str(folder)))
    for group in (None, "mine"):
        config = RunnerConfig(
            name="n", tracker=TrackerConfig(group=group), sweep=SweepConfig(folder=str(sweep.folder), over=["model"])
        )
        with pytest.raises(RuntimeError):
            async with tracking(config, folder, {}):
                raise RuntimeError

    assert [(call["id"], call["name"], call["group"]) for call in wandb.calls] == [
        ("n-cell", "n model=a", "n-sweep-1"),
        ("n-cell", "n model=a", "mine"),
    ]


async def test_cells_do_not_try_a_server_that_another_one_could_not_reach(
    tmp_path: Path, fake: Callable[..., FakeWandb]
) -> None:
    def unreachable(*, mode: str, **_: object) -> None:
        if mode == "online":
            raise ConnectionError("host unreachable")

    wandb = fake(init=unreachable)
    sweep = Sweep(tmp_path / "n" / "sweep-1")
    sweep.note(Cell(number=0, name="", folder=""))
    config = RunnerConfig(name="n", sweep=SweepConfig(folder=str(sweep.folder)))
    for cell in ("a", "b"):
        (tmp_path / cell).mkdir()
        with pytest.raises(RuntimeError):
            async with tracking(config, tmp_path / cell, {}):
                raise RuntimeError

    assert [call["mode"] for call in wandb.calls] == ["online", "offline", "offline"]
