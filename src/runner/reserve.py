"""The reserve: room on the disk that is held back, so that what is paid for still finds a place when it is full."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

RESERVE_BYTES = 4 * 2**20
"""What some hundred answers need, and the journal of their commit."""

_SHARE = 8
"""On a small disk, the reserve is the share of the free room that is one in so many."""


class Reserve:
    """Holds back some of the disk that ``path`` is on, in a file at ``path``, until `give_up` or `release`.

    A file that a killed process left is taken over. Where nothing can be held back, there is no reserve.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._held = False
        with suppress(OSError):
            size = min(RESERVE_BYTES, shutil.disk_usage(path.parent).free // _SHARE)
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            try:
                os.pwrite(file, bytes(size), 0)
                self._held = True
            finally:
                os.close(file)

    def give_up(self) -> bool:
        """Free the room for others. False: there was none."""
        held, self._held = self._held, False
        with suppress(OSError):
            self._path.unlink(missing_ok=True)
        return held

    def release(self) -> None:
        """Free it as it is not needed any more."""
        self.give_up()
