"""A lifeline: workers that a launcher starts end with the process that started the multirun, however that ends.

A worker that outlives it (a joblib pool whose parent was killed) would go on paying, and hold the folder of its cell.
"""

from __future__ import annotations

import os
import signal
import threading
import time

_LAUNCHER = "RUNNER_LAUNCHER_PID"
_LOOK_S = 0.2


def tie_workers() -> None:
    """Have this process be the one that its workers end with."""
    os.environ[_LAUNCHER] = str(os.getpid())


def end_with_launcher() -> None:
    """In a worker that is a child of the launcher: be killed when that is gone. Elsewhere, nothing.

    What another daemon starts (a cluster's jobs) is not tied: that is meant to outlive the terminal.
    """
    launcher = os.environ.pop(_LAUNCHER, None)  # once is enough, and none of a worker's own children is meant
    if launcher is not None and os.getppid() == int(launcher):
        threading.Thread(target=_follow, args=(int(launcher),), daemon=True, name="lifeline").start()


def _follow(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(_LOOK_S)
    os.kill(os.getpid(), signal.SIGKILL)  # as the launcher ended: what is settled is kept
