"""A shared quota in a file: several processes of one host."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from runner.bucket import Limit
from runner.errors import ConfigError
from runner.sharing.ledger import Ledger, Order, Slice

NETWORK_FILE_SYSTEMS = frozenset(
    {"9p", "afs", "beegfs", "ceph", "cifs", "fuse.glusterfs", "fuse.s3fs", "fuse.sshfs", "glusterfs", "gpfs", "lustre"}
    | {"ncpfs", "nfs", "nfs4", "ocfs2", "smb3", "smbfs", "wekafs"}
)

_MOUNTS = Path("/proc/self/mountinfo")
_BUSY_S = 5.0
_SCHEMA = """
    CREATE TABLE IF NOT EXISTS ledger (
        id INTEGER PRIMARY KEY,
        written_at REAL NOT NULL, -- seconds of the host's monotonic clock
        state BLOB NOT NULL
    )
"""


class FileQuota:
    """A `SharedQuota` in an SQLite database, which is what makes an exchange whole or nothing, also under ``kill -9``.

    The clock is the host's monotonic one, which all its processes share. After a restart of the host it begins again,
    and the ledger with it.

    Args:
        path: The database; one a quota.
        clock: Seconds, the same for all processes.
        mounts: What is mounted where, in the format of ``/proc/self/mountinfo``.

    Raises:
        ConfigError: The folder cannot be used, or is on a network file system, whose locks do not hold.
    """

    def __init__(
        self,
        path: Path,
        limits: Sequence[Limit],
        *,
        clock: Callable[[], float] = time.monotonic,
        mounts: Path = _MOUNTS,
    ) -> None:
        self.limits = limits
        self._path = path
        self._clock = clock
        self._database: sqlite3.Connection | None = None
        self._process = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"limits.shared_folder={path.parent}: {error.strerror}: name another folder") from None
        kind = file_system_of(path.parent, mounts)
        if kind in NETWORK_FILE_SYSTEMS:
            raise ConfigError(
                f"limits.shared_folder={path.parent} is on a network file system ({kind}), where locks do not hold:"
                " name a folder on a local disk, or use limits.shared=redis"
            )

    def exchange(self, order: Order) -> Slice:
        try:
            database = self._open()
            database.execute("BEGIN IMMEDIATE")
            try:
                now = self._clock()
                ledger = Ledger(self.limits)
                for written_at, state in database.execute("SELECT written_at, state FROM ledger"):
                    if written_at <= now:  # otherwise the host was restarted since
                        ledger.load(state)
                slice_ = ledger.exchange(order, now)
                database.execute("INSERT OR REPLACE INTO ledger VALUES (1, ?, ?)", (now, ledger.dump()))
                database.execute("COMMIT")
            except BaseException:
                database.rollback()
                raise
        except (sqlite3.Error, ValueError) as error:
            self.close()
            raise OSError(f"{self._path} cannot be used ({error}): make room, or delete it") from None
        return slice_

    def close(self) -> None:
        if self._database is not None and self._process == os.getpid():
            self._database.close()
        self._database = None

    def _open(self) -> sqlite3.Connection:
        """The connection; after a fork another one, as SQLite demands."""
        if self._database is None or self._process != os.getpid():
            self._database = sqlite3.connect(
                self._path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False, cached_statements=8
            )
            self._process = os.getpid()
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = OFF")  # a crash of the host ends the processes too
            self._database.execute(_SCHEMA)
        return self._database


def file_system_of(folder: Path, mounts: Path = _MOUNTS) -> str | None:
    """The type of the file system that holds ``folder``, or None where the host does not say (not Linux)."""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    folder = folder.resolve()
    best: tuple[int, str] | None = None
    for line in lines:
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.partition(" ")[0]
        if len(fields) < 5:
            continue
        point = Path(fields[4].encode().decode("unicode_escape"))
        if folder.is_relative_to(point) and (best is None or len(point.parts) >= best[0]):
            best = len(point.parts), kind
    return best[1] if best else None
