"""How the lines of ``runner.log`` are written; ``conf/config.yaml`` names it to Hydra."""

from __future__ import annotations

import logging
from types import TracebackType

from runner.progress import printable


class OneLine(logging.Formatter):
    """A message a line, and nothing in it that acts on the terminal of whoever reads it: servers' words are in there.

    Tracebacks keep their lines.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        return printable(super().formatMessage(record))

    def formatException(  # noqa: N802
        self, ei: tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]
    ) -> str:
        return "\n".join(map(printable, super().formatException(ei).splitlines()))
