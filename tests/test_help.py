from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest

from runner.cli import main


def test_help_lists_the_groups_of_the_user_beside_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "conf" / "deployments" / "rack.yaml"
    own.parent.mkdir(parents=True)
    own.touch()

    assert main(["--help"]) == 0

    shown = capsys.readouterr().out
    assert "deployments=none|rack" in shown
    assert "+experiment=" in shown
    assert "quickstart" in shown


def test_the_version_is_the_package_s_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0

    assert capsys.readouterr().out == f"runner {version('runner')}\n"
