"""The local file, which is always written."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson

from runner.private import open_private
from runner.redaction import Redactor
from runner.tracker.records import Ending

logger = logging.getLogger(__name__)


class LocalTracker:
    """Appends each point to a JSON-lines file, and at the end ``{"summary": …}``.

    A line that was logged is in the operating system's hands, so a killed process loses none. A resumed run goes on
    in the same file.
    """

    def __init__(self, path: Path, *, hide: Redactor) -> None:
        self._path = path
        self._hide = hide
        self._start = b""
        self._warned = False
        with suppress(OSError), path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":  # a machine that lost its power may have left half a line
                self._start = b"\n"

    def log(self, metrics: Mapping[str, float]) -> None:
        self._append(metrics)

    async def finish(self, ending: Ending) -> None:
        self._append({"summary": self._hide(ending.summary)})

    def _append(self, line: Mapping[str, Any]) -> None:
        try:
            with open_private(self._path, "a", buffering=0) as file:
                file.write(self._start + orjson.dumps(dict(line), default=str) + b"\n")
            self._start = b""
        except Exception as error:
            if not self._warned:
                logger.warning("%s cannot be written: %s", self._path, error)
            self._warned = True
