"""Digests of files: what identifies a recording or a picture, wherever it lies and whenever it was touched."""

from __future__ import annotations

import asyncio
import hashlib
import os
import stat
import time
from collections.abc import Collection, Iterable, Mapping

from runner.errors import ItemError, RequestTooLargeError, RowError
from runner.store import FileMark, Store

_SETTLED_NS = 2_000_000_000
"""A file that was written so recently may be written again without a later time in its books."""


class Digests:
    """The contents of a run's files in 16 bytes each.

    A file is read once; afterwards it is known by its path, size and modification time, which the store keeps. So a
    resumed run looks at ten thousand files without reading them, one that was moved or touched is read and recognised,
    and one that was changed is another one.

    Args:
        store: Keeps what is known.
        max_bytes: Larger files are not read. None: any size.
    """

    def __init__(self, store: Store, *, max_bytes: int | None) -> None:
        self._store = store
        self._max_bytes = max_bytes

    async def of(self, paths: Collection[str]) -> dict[str, bytes | ItemError]:
        """The digest of each file, or why it has none. The files are read in a thread."""
        known = await self._store.files({os.path.abspath(path) for path in paths})
        found, new = await asyncio.to_thread(self._look, paths, known)
        if new:
            await self._store.put_files(new)
        return found

    def _look(
        self, paths: Iterable[str], known: Mapping[str, FileMark]
    ) -> tuple[dict[str, bytes | ItemError], list[FileMark]]:
        found: dict[str, bytes | ItemError] = {}
        new: list[FileMark] = []
        for path in paths:
            try:
                mark = self._mark(path, known)
            except ItemError as error:
                found[path] = error
            except (OSError, ValueError) as error:  # ValueError: a path with a NUL in it
                found[path] = _unreadable(path, error)
            else:
                found[path] = mark.digest
                if known.get(mark.path) != mark and time.time_ns() - mark.mtime_ns > _SETTLED_NS:
                    new.append(mark)
        return found, new

    def _mark(self, path: str, known: Mapping[str, FileMark]) -> FileMark:
        there = os.stat(path)
        if not stat.S_ISREG(there.st_mode):
            raise RowError(f"{path} is no file")
        if self._max_bytes is not None and there.st_size > self._max_bytes:
            raise RequestTooLargeError(
                f"{path} has {there.st_size:,} bytes, and at most {self._max_bytes:,} are sent: cut it, or raise"
                " task.max_bytes where the server takes more"
            )
        mark = known.get(os.path.abspath(path))
        if mark is not None and (mark.size, mark.mtime_ns) == (there.st_size, there.st_mtime_ns):
            return mark
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, _hash).digest()
        return FileMark(path=os.path.abspath(path), size=there.st_size, mtime_ns=there.st_mtime_ns, digest=digest)


async def read_unchanged(path: str, digest: bytes) -> bytes:
    """The content of a file that has this digest, read in a thread.

    Raises:
        RowError: It cannot be read, or holds something else by now.
    """
    return await asyncio.to_thread(_read_unchanged, path, digest)


def _read_unchanged(path: str, digest: bytes) -> bytes:
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise _unreadable(path, error) from None
    if _hash(content).digest() != digest:
        raise RowError(f"{path} was changed while the run was going on: run the same command again")
    return content


def _hash(content: bytes = b"") -> hashlib.blake2b:
    return hashlib.blake2b(content, digest_size=16)


def _unreadable(path: str, error: OSError | ValueError) -> RowError:
    return RowError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}")
