"""The prelude: from the first import until a run begins, a signal ends the process with one line and no traceback.

Imports nothing that takes time, so that it can come first.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from types import FrameType
from typing import Any


def begin() -> None:
    """Have SIGINT and SIGTERM end the process quietly, unless somebody else handles or ignores them."""
    for signum, default in _DEFAULTS.items():
        if signal.getsignal(signum) == default:
            signal.signal(signum, _end_process)


def end() -> None:
    """Leave signals to whoever comes next. Only the main thread can; does nothing where there is no prelude."""
    for signum, default in _DEFAULTS.items():
        if signal.getsignal(signum) is _end_process:
            signal.signal(signum, default)


def _end_process(signum: int, frame: FrameType | None) -> None:
    """Nothing was sent and nothing is half written, so there is nothing to wait for."""
    with suppress(OSError):
        os.write(2, f"runner: interrupted by {signal.Signals(signum).name} before anything was sent\n".encode())
    os._exit(128 + signum)


_DEFAULTS: dict[signal.Signals, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
