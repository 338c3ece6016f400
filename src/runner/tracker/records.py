"""What is tracked of a run, and the protocol of those who take it down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from runner.charts import Chart


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows under their columns."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """What is tracked when a run has ended."""

    summary: Mapping[str, Any]  # the content of summary.json
    samples: Sequence[Mapping[str, Any]] = ()  # result rows as in results.jsonl, at most tracker.table_rows
    tables: Mapping[str, Table] = field(default_factory=dict)  # others, by name
    charts: Sequence[Chart] = ()
    artifacts: Sequence[Path] = ()  # files to keep with the run, as they are
    exit_code: int


class Tracker(Protocol):
    """Takes down what a run does. Neither method raises."""

    def log(self, metrics: Mapping[str, float]) -> None:
        """One point of the time series, with ``elapsed_s`` as its x axis. Returns at once."""
        ...

    async def finish(self, ending: Ending) -> None:
        """The end of the run. Takes ``tracker.finish_timeout_s`` at most."""
        ...
