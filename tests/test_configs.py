"""Every shipped configuration composes, is documented, and agrees with the types."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from harness import shipped
from runner.checks import check
from runner.composition import compose, conf_folder
from runner.config import RunnerConfig

CONF = conf_folder()
FILES = sorted(path for path in shipped("conf") if path.suffix == ".yaml" and path.name != "config.yaml")
OPTIONS = [path.relative_to(CONF).with_suffix("").as_posix() for path in FILES]


_LAUNCHERS = {
    "joblib": "hydra_plugins.hydra_joblib_launcher",
    "ray": "ray",
    "slurm": "hydra_plugins.hydra_submitit_launcher",
}
"""What each scale needs: an extra."""


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes_and_can_be_run(option: str) -> None:
    group, _, name = option.partition("/")
    override = f"+{group}={name}" if group in ("experiment", "scale") else f"{group}={name}"
    if group == "scale":
        pytest.importorskip(_LAUNCHERS[name])

    needed = {"dataset/single": [], "dataset/python": ["dataset.function=rows:all"]}.get(option)
    if needed is None:
        needed = ["dataset.path=rows.jsonl"] if group == "dataset" else []

    check(compose([override, *needed]))


def test_the_root_says_what_the_types_say() -> None:
    """A default stands in conf/, where users read it, and in the types, where code does: they are the same."""
    config = compose([])

    assert dict(_leaves(config)) == dict(_leaves(RunnerConfig()))


@pytest.mark.parametrize("path", FILES, ids=OPTIONS)
def test_every_file_begins_with_a_command(path: Path) -> None:
    comments = [line for line in path.read_text(encoding="utf-8").splitlines()[:3] if "@package" not in line]

    assert any(line.startswith("# python -m runner") for line in comments)


@pytest.mark.parametrize("path", [CONF / "config.yaml", *FILES], ids=["config", *OPTIONS])
def test_every_key_has_a_comment(path: Path) -> None:
    """Above it, beside it, or above the block that it belongs to."""
    documented = 0  # indentation below which the last comment no longer speaks
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        indentation = len(line) - len(line.lstrip())
        if line.startswith(("hydra:", "defaults:")):
            return
        if not line.strip():
            documented = 99
        elif line.lstrip().startswith("#") or " # " in line:
            documented = indentation
        assert documented <= indentation or line.endswith(":") or not line.strip(), f"{path.name}:{number}: {line}"


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for field in fields(node):
        value = getattr(node, field.name)
        if is_dataclass(value):
            yield from _leaves(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value
