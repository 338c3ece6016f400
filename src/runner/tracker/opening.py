"""Opening a tracker: which it is, and under which identity it tracks a run."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from runner.config import RunnerConfig, TrackerConfig, TrackerKind, TrackerMode
from runner.redaction import Redactor
from runner.sweep import Sweep
from runner.tracker.local import LocalTracker
from runner.tracker.records import Ending, Tracker
from runner.tracker.wandb_tracker import Identity, WandbTracker

logger = logging.getLogger(__name__)

FAILED = 1
"""The exit code of a run that an exception ended."""


@asynccontextmanager
async def tracking(config: RunnerConfig, folder: Path, settings: Mapping[str, Any] | None) -> AsyncIterator[Tracker]:
    """Track the run in ``folder`` for as long as the block takes, and after it until its end is tracked.

    The run's identity comes from its name and folder, so that one that goes on is the same run; a cell of a sweep is
    in the sweep's group, under what sets it apart. A block that fails or is cancelled ends the run with the exit code
    `FAILED`.
    """
    identity = identity_of(config, folder)
    away = None
    if config.sweep.folder is not None:
        sweep = Sweep(Path(config.sweep.folder))
        away = sweep.wandb_is_away
        apart = next((cell.name for cell in sweep.cells() if Path(cell.folder) == folder), "")
        name = f"{config.name} {apart}".rstrip()
        identity = replace(identity, name=name, group=group_of(sweep), job_type="cell")
    tracker = open_tracker(config.tracker, folder=folder, identity=identity, settings=settings or {}, away=away)
    try:
        yield tracker
    except (Exception, asyncio.CancelledError):
        await tracker.finish(Ending(summary={}, exit_code=FAILED))
        raise


def identity_of(config: RunnerConfig, folder: Path) -> Identity:
    """As which run the one in ``folder`` appears."""
    return Identity(run_id=f"{config.name}-{folder.name}", name=config.name)


def group_of(sweep: Sweep) -> str:
    """What the runs of a sweep have in common: its identity, too."""
    return f"{sweep.folder.parent.name}-{sweep.folder.name}"


def open_tracker(
    config: TrackerConfig, *, folder: Path, identity: Identity, settings: Mapping[str, Any], away: Path | None = None
) -> Tracker:
    """Start to track the run in ``folder``. Returns at once: W&B starts on a thread of its own.

    ``WANDB_MODE`` decides what ``tracker.mode=auto`` leaves open, and ``disabled`` there switches W&B off in any case.

    Args:
        settings: The whole configuration as plain data; secrets in it are kept from all that is tracked.
        away: A file that runs share: it is made when W&B cannot be reached, and where it is, W&B is not tried again.
    """
    hide = Redactor(settings)
    local = LocalTracker(folder / "metrics.jsonl", hide=hide)
    mode = None if config.kind == TrackerKind.none else _mode(TrackerMode(config.mode))
    if mode is None:
        return local
    return WandbTracker(
        local, config, mode=mode, folder=folder.resolve(), identity=identity, settings=settings, hide=hide, away=away
    )


_MODES = {
    "online": TrackerMode.online,
    "run": TrackerMode.online,
    "shared": TrackerMode.online,
    "offline": TrackerMode.offline,
    "dryrun": TrackerMode.offline,
}


def _mode(configured: TrackerMode) -> TrackerMode | None:
    """The mode that holds. None: W&B is switched off."""
    wish = os.environ.get("WANDB_MODE", "").strip().lower()
    if wish == "disabled":
        return None
    if wish and wish not in _MODES:
        logger.warning("WANDB_MODE=%s is ignored: it knows online, offline and disabled", wish)
    return _MODES.get(wish, configured) if configured is TrackerMode.auto else configured
