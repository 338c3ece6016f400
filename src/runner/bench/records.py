"""Records of a benchmark: what was measured of each request, kept in a file for each level and repeat.

A measurement is a JSONL file that appears when it is complete: a line a request, and at the end one about the whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from runner.results import replacing

MEASUREMENTS = "measurements"
"""The folder of the measurements in a run's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One request that ended while its level was measured. Seconds; times are since the measuring began."""

    row: int  # position in the dataset
    started_s: float  # closed loop: when it took its slot; open loop: when it was to be sent
    ended_s: float
    queue_wait_s: float  # in this client
    service_time_s: float  # of the last attempt, at the transport
    ttft_s: float | None  # streamed answers only
    itl_s: float | None  # streamed answers only: (last token - first token) / (tokens - 1)
    prompt_tokens: int | None
    completion_tokens: int | None
    cached_tokens: int | None
    cost_usd: float | None
    retries: int
    error: str | None  # class

    @property
    def latency_s(self) -> float:
        return self.ended_s - self.started_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One level, measured once: what is not about a single request."""

    level: float  # requests in flight, or requests per second
    repeat: int  # from 1
    window_s: float  # how long was measured
    unfinished: tuple[float, ...]  # when the requests in flight at the end had started
    in_flight: float  # mean number of requests at work
    most_in_flight: int  # ever, in the window
    cpu_share: float  # of one core, used by the event loop's thread
    lag_mean_s: float  # how late the event loop came to what was due
    lag_p99_s: float
    started_at: float  # Unix time


class Records:
    """The measurements in a folder.

    Args:
        fingerprint: Of the configuration: a file that another one made is not taken for its own. Not needed to read.
    """

    def __init__(self, folder: Path, *, fingerprint: str | None = None) -> None:
        self._folder = folder
        self._fingerprint = fingerprint

    def spans(self) -> dict[tuple[float, int], Span]:
        """The measurements that are complete, by level and repeat."""
        found = {}
        for path in self._folder.glob("*.jsonl"):
            last = _last_line(path)
            if "span" in last and self._fingerprint in (None, last["fingerprint"]):
                span = Span(**{**last["span"], "unfinished": tuple(last["span"]["unfinished"])})
                found[span.level, span.repeat] = span
        return found

    def samples(self, level: float, repeat: int) -> Iterator[Sample]:
        """The requests of a measurement, in the order in which they ended."""
        with self._path(level, repeat).open("rb") as file:
            for line in file:
                values = orjson.loads(line)
                if isinstance(values, list):
                    yield Sample(**dict(zip(_COLUMNS, values, strict=True)))

    @contextmanager
    def writing(self, level: float, repeat: int) -> Iterator[Writer]:
        """Take down a measurement. It is there when the block ends well, and otherwise not at all."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with replacing(self._path(level, repeat)) as file:
            yield Writer(file, self._fingerprint)

    def forget(self) -> None:
        """Drop all measurements."""
        for path in self._folder.glob("*.jsonl"):
            path.unlink()

    def _path(self, level: float, repeat: int) -> Path:
        return self._folder / f"level-{level:g}-{repeat}.jsonl"


class Writer:
    """A measurement on its way into a file."""

    def __init__(self, file: BinaryIO, fingerprint: str | None) -> None:
        self._file = file
        self._fingerprint = fingerprint

    def add(self, sample: Sample) -> None:
        values = [getattr(sample, name) for name in _COLUMNS]
        self._file.write(orjson.dumps(values, option=orjson.OPT_APPEND_NEWLINE))

    def end(self, span: Span) -> None:
        last = {"columns": _COLUMNS, "fingerprint": self._fingerprint, "span": asdict(span)}
        self._file.write(orjson.dumps(last, option=orjson.OPT_APPEND_NEWLINE))


_COLUMNS = tuple(field.name for field in fields(Sample))


def _last_line(path: Path) -> Mapping[str, Any]:
    line = b"{}"
    with path.open("rb") as file:
        for line in file:  # noqa: B007
            pass
    try:
        last = orjson.loads(line)
    except ValueError:
        return {}
    return last if isinstance(last, dict) else {}
