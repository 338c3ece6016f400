"""W&B's service: its variables for as long as it is used, its credentials, its end."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

_BUSY_S = 5.0
"""How long a run waits for the one before it to let go of W&B."""

_TEARDOWN_S = 1.0
"""How long the service is given to end. It needs milliseconds if nothing is left to send."""

_turn = threading.Lock()


@contextmanager
def turn(folder: Path) -> Iterator[None]:
    """Have W&B alone, and let go of it at the end: a process has one service, one environment and one active run.

    Args:
        folder: As for `environment`.

    Raises:
        RuntimeError: Another run of this process has it, and does not end.
    """
    if not _turn.acquire(timeout=_BUSY_S):
        raise RuntimeError("it is busy with another run of this process")
    try:
        yield
    finally:
        with environment(folder):
            tear_down()
        _turn.release()


@contextmanager
def environment(folder: Path) -> Iterator[None]:
    """W&B's variables for as long as it is called: no setting of its own says where it keeps data and cache.

    ``WANDB_CONFIG_DIR`` stays the user's: there are the server and the credentials.

    Args:
        folder: Absolute. What W&B writes is under ``wandb`` in it.
    """
    wanted = {
        "WANDB_DATA_DIR": str(folder / "wandb" / "data"),
        "WANDB_CACHE_DIR": str(folder / "wandb" / "cache"),
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_SILENT": "true",
        "WANDB_MODE": None,  # an unknown one is an error, and `mode=` says it anyway
        "WANDB_SERVICE": None,  # another process's service may be gone
    }
    before = {name: os.environ.get(name) for name in wanted}
    _set_environment(wanted)
    try:
        yield
    finally:
        _set_environment(before)


def has_credentials() -> bool:
    """Whether W&B itself finds some: its variables, its settings, netrc. Asks neither the server nor the user."""
    import wandb

    return bool(wandb.login(verify=False, prompt=False))


def tear_down() -> None:
    """Let go of the service, and keep W&B's hook at the interpreter's exit from waiting for it.

    A service that has something left to send to a server that does not answer is left to itself.
    """
    ending = threading.Thread(target=_tear_down, name="runner-wandb-teardown", daemon=True)
    ending.start()
    ending.join(_TEARDOWN_S)


def _tear_down() -> None:
    with suppress(Exception, SystemExit):
        import wandb

        wandb.teardown()


def _set_environment(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
