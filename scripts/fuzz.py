"""Fuzz what reads untrusted bytes, guided by coverage: ``nice python scripts/fuzz.py -max_total_time=300``.

Whatever the bytes are, each reader ends in a value or in the error that its docstring names. What is found goes into
the tests as an example. Needs ``pip install atheris``; arguments are libFuzzer's.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["runner"]):
    from runner import errors, quota
    from runner.config import DatasetConfig, DatasetKind, ScorerConfig
    from runner.database_url import path_of
    from runner.dataset import open_dataset
    from runner.response_format import ResponseFormat
    from runner.scoring import Scorers
    from runner.transports import wire
    from runner.transports.stream import EventReader, Stream
    from runner.types import EmbeddingRequest, Endpoint, GenerationRequest, Request, TranscriptionRequest

REQUESTS: list[Request] = [
    *(GenerationRequest(input="Hi.", endpoint=endpoint) for endpoint in Endpoint),
    EmbeddingRequest(texts=["a", "b"]),
    TranscriptionRequest(audio=b"", filename="a.wav"),
]
LAYOUT = ResponseFormat.of({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
SCORERS = Scorers({kind: ScorerConfig(kind=kind) for kind in ("exact_match", "contains", "json_valid")})
ROWS = Path(tempfile.mkdtemp()) / "rows"


def responses(data: bytes) -> None:
    for request in REQUESTS:
        with suppress(errors.RequestError):
            wire.decode(request, data, {})


def refusals(data: bytes) -> None:
    error = wire.error_from(data[0] + 345 if data else None, data, {"retry-after": data[:20].decode("latin-1")})
    error.message.encode("utf-8", "backslashreplace")


def streams(data: bytes) -> None:
    for endpoint in Endpoint:
        stream = Stream(GenerationRequest(input="Hi.", endpoint=endpoint))
        with suppress(errors.RequestError):
            for start in range(0, len(data), 7):
                stream.feed(data[start : start + 7])
            stream.end()
            wire.response_from(GenerationRequest(input="Hi.", endpoint=endpoint), stream.body(), {})


def events(data: bytes) -> None:
    whole, pieces = EventReader(), EventReader()
    together = [*whole.feed(data), *whole.end()]
    apart = [each for start in range(len(data)) for each in pieces.feed(data[start : start + 1])]
    assert together == [*apart, *pieces.end()], data


def hints(data: bytes) -> None:
    text = data.decode("latin-1")
    for now in (0.0, 1.7e9):
        seconds = quota.duration_s(text, now=now)
        assert seconds is None or 0 <= seconds < float("inf"), text
        quota.readings({"x-ratelimit-remaining-tokens": text, "x-ratelimit-reset-tokens": text[::-1]}, now=now)


def rows(data: bytes) -> None:
    ROWS.write_bytes(data)
    for kind in (DatasetKind.jsonl, DatasetKind.csv):
        with suppress(errors.DatasetError):
            for row in open_dataset(DatasetConfig(kind=kind, path=str(ROWS))):
                str(row.error)


def texts(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    with suppress(errors.ParseError):
        LAYOUT.parse(text)
    with suppress(errors.ConfigError):
        path_of(text, key="db_url")
    scores = SCORERS(text, {"target": text[: len(text) // 2]})
    assert all(score is None or 0 <= score <= 1 for score in scores.values())


READERS: list[Callable[[bytes], Any]] = [responses, refusals, streams, events, hints, rows, texts]


def one(data: bytes) -> None:
    """The first byte chooses the reader, the others are read."""
    if data:
        READERS[data[0] % len(READERS)](data[1:])


if __name__ == "__main__":
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
