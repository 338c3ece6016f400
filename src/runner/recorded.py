"""What is recorded of a run in its folder's ``.hydra``: its settings, what the command line set, and so its label.

Run folders may be someone else's: what is there is read as data, and a trap as nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from runner.database import RUN_DATABASE
from runner.redaction import redact

_LONGEST_LABEL = 60
_DEEPEST = 100

_NO_LABEL = ("hydra", "sweep", "tracker", "runs_dir", "env_file", "resume", "retry_failed", "budget", "name")
"""Beginnings of keys that say where a run is and how far it goes, and not what it is."""


def folder_of(path: Path) -> Path:
    """The folder of a run or a sweep for one of the files in it that people name; otherwise the path itself."""
    is_record = path.name in (RUN_DATABASE, "results.jsonl", "summary.json")
    return path.parent if is_record and path.is_file() else path


def settings_of(folder: Path) -> dict[str, Any]:
    """The composed configuration of the run in ``folder``, without secrets; empty where it is not recorded."""
    settings = _read_yaml(folder / ".hydra" / "config.yaml")
    return redact(settings) if isinstance(settings, dict) else {}


def overrides_of(folder: Path) -> dict[str, str]:
    """What the command line set for the run in ``folder``; empty where it is not recorded."""
    overrides = _read_yaml(folder / ".hydra" / "overrides.yaml")
    if not isinstance(overrides, list):
        return {}
    pairs = (str(override).partition("=") for override in overrides)
    return {key.lstrip("+"): value for key, _, value in pairs if not key.startswith("sweep.")}


def labels_of(folders: Sequence[Path]) -> list[str]:
    """A label for each run: the overrides that differ among them, where they have one name and that sets them apart.

    Otherwise it is ``NAME/ID``, as it is for a run that is alone.
    """
    places = [folder.absolute() for folder in folders]
    plain = [f"{place.parent.name}/{place.name}" for place in places]
    if len({place.parent for place in places}) > 1:
        return plain
    overrides = [overrides_of(folder) for folder in folders]
    keys = dict.fromkeys(key for each in overrides for key in each if not key.startswith(_NO_LABEL))
    differing = [key for key in keys if len({each.get(key) for each in overrides}) > 1]
    labels = [" ".join(f"{key}={each[key]}" for key in differing if key in each) for each in overrides]
    if len(set(labels)) < len(labels) or any(len(label) > _LONGEST_LABEL for label in labels):
        return plain
    return [label or name for label, name in zip(labels, plain, strict=True)]


def _read_yaml(path: Path) -> Any:
    """Plain data, interpolations as they stand. None where it cannot be read, or is a trap.

    A trap has aliases, ten lines of which unfold to gigabytes, or is nested beyond measure. Hydra writes neither.
    """
    try:
        text = path.read_text(encoding="utf-8")
        depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST or isinstance(event, yaml.AliasEvent):
                return None
        return yaml.safe_load(text)
    except (OSError, yaml.YAMLError, ValueError):
        return None
