from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from runner.cli import main as run
from runner.report.__main__ import main

pytestmark = [
    pytest.mark.usefixtures("no_wandb_account"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of Pydantic's, when the extra is imported
]

CANARY = "sk-canary-5f1d0c9ab7e2"


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    run(["-m", "prompt=hi", "name=n", "limits.concurrency=1,2,4", "tracker=none", "tracker.project=mine"])
    [folder] = tmp_path.glob("runs/n/sweep-*")
    return folder


def test_without_a_key_the_report_is_a_file_beside_the_page(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("wandb_workspaces", reason="the extra is not installed: pip install -e '.[report]'")
    assert main([str(sweep), "--wandb", "--output", "out.html"]) == 0

    said = capsys.readouterr().out
    saved = json.loads(Path("out.wandb.json").read_text())
    blocks = saved["spec"]["blocks"]
    texts = [block["content"] for block in blocks if block["type"] == "markdown-block"]
    grids = [block["metadata"] for block in blocks if block["type"] == "panel-grid"]
    filters = [runset["filters"]["filters"][0]["value"] for grid in grids for runset in grid["runSets"]]
    panels = [panel["config"] for grid in grids for panel in grid["panelBankSectionConfig"]["panels"]]
    assert "out.wandb.json\nW&B has no API key: set WANDB_API_KEY" in said
    assert Path("out.html").exists()
    assert (saved["displayName"], saved["project"]["name"]) == (f"n/{sweep.name}", "mine")
    assert "| limits.concurrency=4 | finished |" in texts[0]
    assert "limits.concurrency=1 → limits.concurrency=2" in texts[1]
    assert filters == [[f"n-{path.parent.name}" for path in sorted_cells(sweep)], [f"n-{sweep.name}"]]
    assert {"config:limits.value.concurrency"} == {panel["xAxis"] for panel in panels if "xAxis" in panel}


def test_the_servers_of_a_run_are_in_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb_workspaces", reason="the extra is not installed: pip install -e '.[report]'")
    monkeypatch.chdir(tmp_path)
    servers = "deployments={left: {model: simulated/echo}, right: {model: simulated/echo}}"
    run(["prompt=hi", "samples=60", "name=n", servers, "tracker=none"])

    assert main([*map(str, tmp_path.glob("runs/n/*")), "--wandb"]) == 0

    assert "### Servers of n" in Path("report.wandb.json").read_text()


def test_differences_say_why_some_are_of_fewer_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb_workspaces", reason="the extra is not installed: pip install -e '.[report]'")
    monkeypatch.chdir(tmp_path)
    same = ("dataset.limit=4", "prompt=Same.", "simulator.latency_s=0", "tracker=none")
    run(["-m", "+experiment=quickstart", "model=simulated/a,simulated/b", *same])

    assert main([*map(str, tmp_path.glob("runs/quickstart/sweep-*")), "--wandb"]) == 0

    assert "rows that share an answer count once" in Path("report.wandb.json").read_text()


def sorted_cells(sweep: Path) -> list[Path]:
    """The folders of the cells, in their order, each with a file in it."""
    notes = [json.loads(path.read_text()) for path in (sweep / "cells").glob("*.json")]
    return [Path(note["folder"]) / "results.sqlite" for note in sorted(notes, key=lambda note: note["number"])]


def test_without_the_extra_it_says_what_to_install(
    sweep: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)

    assert main([str(sweep), "--wandb"]) == 2
    assert (
        capsys.readouterr().err == "report: --wandb needs an extra: pip install -e '.[report]' in runner's checkout\n"
    )


def test_what_a_label_holds_is_text_without_its_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb_workspaces", reason="the extra is not installed: pip install -e '.[report]'")
    monkeypatch.setenv("SOME_API_KEY", CANARY)
    monkeypatch.chdir(tmp_path)
    run(["-m", "prompt=hi", "name=n", f"system='a | b',' <b>{CANARY}</b> '", "tracker=none"])
    [folder] = tmp_path.glob("runs/n/sweep-*")

    assert main([str(folder), "--wandb", "--title", f"of {CANARY}"]) == 0

    saved = Path("report.wandb.json").read_text()
    assert CANARY not in saved
    texts = [block.get("content", "") for block in json.loads(saved)["spec"]["blocks"]]
    assert any(r"system='a \| b'" in text and r"\<b\>\*\*\*\</b\>" in text for text in texts)
