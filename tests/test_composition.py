"""Composition: which files stand for the options that are chosen."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness import Command
from runner.composition import compose, conf_folder
from runner.errors import ConfigError

DEFAULT = conf_folder() / "limits" / "default.yaml"
"""An option that is shipped, and that the root chooses by default."""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's own ``conf/limits/default.yaml``, and another option beside it."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "conf" / "limits" / "default.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("rpm: 7\n", encoding="utf-8")
    path.with_name("mine.yaml").write_text("rpm: 5\n", encoding="utf-8")
    (tmp_path / "conf" / "config.yaml").write_text("prompt: of a stranger\n", encoding="utf-8")
    return path


def experiment(own: Path, name: str, text: str) -> None:
    path = own.parents[1] / "experiment" / f"{name}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"# @package _global_\n{text}\n", encoding="utf-8")


def test_what_nobody_chose_may_be_in_two_folders(own: Path) -> None:
    assert compose([]).limits.rpm is None
    assert compose(["limits=auto", "prompt=hi", "request.temperature=1"]).limits.concurrency == "auto"
    assert compose(["limits=mine"]).limits.rpm == 5


def test_an_option_that_is_in_two_folders_is_refused_with_both_files(own: Path) -> None:
    with pytest.raises(ConfigError, match="limits/default is in two folders, and not the same") as caught:
        compose(["limits=default"])

    assert f"{own} would be left aside for {DEFAULT}. Rename one" in str(caught.value)


def test_the_same_file_in_two_folders_is_one(own: Path) -> None:
    own.write_bytes(DEFAULT.read_bytes())

    assert compose(["limits=default"]).limits.rpm is None


def test_an_experiment_chooses_too(own: Path) -> None:
    experiment(own, "outer", "defaults: [inner]")
    experiment(own, "inner", "defaults: [{override /limits: default}]")
    experiment(own, "base", "defaults: [quickstart]")
    experiment(own, "quickstart", "prompt: mine")

    with pytest.raises(ConfigError, match="limits/default is in two folders"):
        compose(["+experiment=outer"])
    with pytest.raises(ConfigError, match="experiment/quickstart is in two folders"):
        compose(["+experiment=base"])
    with pytest.raises(ConfigError, match="experiment/quickstart is in two folders"):
        compose(["+experiment=quickstart"])
    assert compose(["+experiment=outer", "limits=auto"]).limits.concurrency == "auto"


@pytest.mark.parametrize("arguments", [["limits=auto,default"], ["+experiment=grid"]])
async def test_a_sweep_over_what_is_in_two_folders_does_not_begin(
    own: Path, command: Command, arguments: list[str]
) -> None:
    experiment(own, "grid", "hydra: {sweeper: {params: {limits: 'auto,default'}}}")

    done = await command("-m", "prompt=hi", *arguments)

    assert (done.exit_code, done.out) == (2, "")
    assert "limits/default is in two folders" in done.err
    assert not (command.folder / "runs").exists()
