from __future__ import annotations

import os
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from harness import SOURCES
from runner.cli import main
from runner.help import help_text


def test_help_lists_the_groups_of_the_user_beside_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "conf" / "deployments" / "rack.yaml"
    own.parent.mkdir(parents=True)
    own.touch()

    assert main(["--help"]) == 0

    shown = capsys.readouterr().out
    assert "none | rack" in shown
    assert "+experiment=" in shown
    assert "quickstart" in shown


@pytest.mark.parametrize("width", [60, 80, 140])
def test_help_fits_the_terminal(width: int) -> None:
    assert max(map(len, help_text([], width=width).splitlines())) <= width


def test_a_command_that_is_broken_is_still_one() -> None:
    shown = help_text([], width=60)

    command = (
        "python -m runner model=hosted" + shown.split("python -m runner model=hosted", 1)[1].split("\n      rows", 1)[0]
    )
    assert "prompt=Summarize: {{ text }}" in shlex.split(command.replace("\\\n", ""))


def test_the_version_is_the_package_s_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0

    assert capsys.readouterr().out == f"runner {version('runner')}\n"


def completed(line: str, folder: Path) -> list[str]:
    """What bash offers for ``line`` after the README's one-liner."""
    script = folder / "runner"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m runner "$@"\n', encoding="utf-8")
    script.chmod(0o755)
    commands = f"""
        eval "$(runner -sc install=bash)"
        COMP_LINE={shlex.quote(line)} COMP_WORDS=({line}) COMP_CWORD={len(line.split()) - 1}
        COMP_POINT=${{#COMP_LINE}}
        hydra_bash_completion
        complete -p runner
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    environment = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(SOURCES)}
    done = subprocess.run(
        ["bash", "-c", commands], cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    registered, *offered = done.stdout.splitlines()
    assert registered.endswith("-F hydra_bash_completion runner"), done.stderr
    return offered


def test_bash_completes_keys_groups_and_the_user_s_own_experiments(tmp_path: Path) -> None:
    own = tmp_path / "conf" / "experiment" / "tickets.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("# @package _global_\n", encoding="utf-8")

    assert completed("runner limits.conc", tmp_path) == ["limits.concurrency="]
    assert completed("runner +experiment=ti", tmp_path) == ["+experiment=tickets"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_complete_the_command_too(shell: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "runner", "-sc", f"install={shell}"],
        env={**os.environ, "PYTHONPATH": str(SOURCES)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )

    assert "runner" in done.stdout.splitlines()[-1] + done.stdout.splitlines()[-2]
    assert "__main__" not in done.stdout


@pytest.mark.parametrize("width", [60, 80, 100])
def test_a_field_of_a_template_is_never_broken(width: int) -> None:
    shown = help_text([], width=width)
    assert shown.count("{{") == shown.count("{{ text }}")
