"""What a run leaves on the disk is its owner's: there are prompts and answers in it, and nothing leads out of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import BinaryIO, Literal, cast

from runner.errors import StoreError


@contextmanager
def for_owner_only() -> Iterator[None]:
    """Files and folders that this process makes meanwhile have the modes 0600 and 0700, whatever its umask.

    For a command that is a process of its own: the umask is the process's, and its children inherit it. Logs of Hydra
    and W&B, which take no mode, are made so.
    """
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def keep_private(folder: Path) -> None:
    """Close the folder of a run that begins to others: a launcher's worker on another host has an umask of its own.

    One that its owner has opened to them since stays open.
    """
    if not any(folder.glob("*.sqlite")):
        folder.chmod(0o700)


def open_private(path: Path, mode: Literal["a", "a+", "x"], *, buffering: int = -1) -> BinaryIO:
    """`open`, in binary, for a file that is made with mode 0600, and that is no link: a folder from elsewhere may have
    one in its place.

    Raises:
        OSError: It cannot be opened, or is a link.
    """
    return cast(BinaryIO, open(path, f"{mode}b", buffering, opener=_opener))


def make_private(path: Path) -> None:
    """Make a file with mode 0600, unless there is one.

    Raises:
        OSError: It cannot be made.
    """
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))


def check_folder(folder: Path) -> None:
    """Refuse a run's folder whose files are links: a folder from elsewhere would have this run write anywhere.

    Raises:
        StoreError: One is; names it.
    """
    if not folder.is_dir():
        return
    for path in chain(folder.iterdir(), folder.glob(".hydra/*")):
        if path.is_symlink():
            raise StoreError(f"{path} is a link: a run writes into its own folder only, so remove it")


def _opener(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)
