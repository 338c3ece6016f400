"""Signals as events, so that a run ends where it can and not where it stands."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from runner import prelude

ECHO_S = 0.3
"""A second signal that follows so closely is the first one, forwarded by a wrapper such as ``timeout``."""

PREEMPTION = signal.SIGUSR2
"""With it, submitit's jobs are told to save themselves and to get back into the queue."""


class Preempted(SystemExit):
    """A scheduler's wrapper around this process ends it, to have it run again."""


@contextmanager
def preemption() -> Iterator[None]:
    """Have such a wrapper, where there is one, end what runs here with `Preempted`."""
    requeue = signal.getsignal(PREEMPTION)
    if not callable(requeue) or threading.current_thread() is not threading.main_thread():
        yield
        return

    def preempt(signum: int, frame: FrameType | None) -> None:
        try:
            requeue(signum, frame)
        except SystemExit as end:
            raise Preempted(end.code) from None

    signal.signal(PREEMPTION, preempt)
    try:
        yield
    finally:
        signal.signal(PREEMPTION, requeue)


@contextmanager
def handled_signals(handle: Callable[[int], None]) -> Iterator[None]:
    """Have SIGINT and SIGTERM handled on the event loop; only the main thread can.

    Where a scheduler's wrapper has handlers of its own, SIGTERM is left to it, and so is preemption, once what
    ``handle`` began has ended.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    prelude.end()
    loop = asyncio.get_running_loop()
    signals = [signal.SIGINT]
    if not callable(signal.getsignal(signal.SIGTERM)):
        signals.append(signal.SIGTERM)
    for signum in signals:
        loop.add_signal_handler(signum, handle, signum)
    try:
        with _preemption(loop, handle):
            yield
    finally:
        for signum in signals:
            loop.remove_signal_handler(signum)


@contextmanager
def _preemption(loop: asyncio.AbstractEventLoop, handle: Callable[[int], None]) -> Iterator[None]:
    """Have it handled first, and then by whom it is meant for, who ends the process."""
    requeue = signal.getsignal(PREEMPTION)
    if not callable(requeue):
        yield
        return
    came = False

    def preempt() -> None:
        nonlocal came
        if not came:
            came = True
            handle(PREEMPTION)

    loop.add_signal_handler(PREEMPTION, preempt)
    try:
        yield
    finally:
        loop.remove_signal_handler(PREEMPTION)
        signal.signal(PREEMPTION, requeue)
        if came:
            signal.raise_signal(PREEMPTION)


@contextmanager
def first_signal(handle: Callable[[int], None]) -> Iterator[None]:
    """Have the first SIGINT or SIGTERM given to ``handle``, outside of an event loop; the next ends the process."""
    prelude.end()
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    came_at = 0.0

    def on_signal(signum: int, frame: FrameType | None) -> None:
        nonlocal came_at
        if not came_at:
            came_at = time.monotonic()
            handle(signum)
        elif time.monotonic() - came_at > ECHO_S:
            restore()
            signal.raise_signal(signum)

    def restore() -> None:
        for signum, handler in before.items():
            signal.signal(signum, handler)

    for signum in before:
        signal.signal(signum, on_signal)
    try:
        yield
    finally:
        restore()
