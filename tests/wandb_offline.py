"""Reads an offline W&B run back from its folder: the format is LevelDB's log, with protobuf records in it."""

from __future__ import annotations

import gzip
import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_BLOCK = 32 * 1024
_FULL, _LAST = 1, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineRun:
    """What ``wandb sync`` would upload."""

    id: str
    name: str
    job_type: str
    project: str
    group: str
    tags: list[str]
    config: dict[str, Any]
    history: list[dict[str, Any]]  # in the order of logging
    summary: dict[str, Any]
    tables: dict[str, dict[str, Any]]  # by key: {"columns": …, "data": …}
    artifacts: dict[str, list[str]]  # by name: the paths in it
    exit_code: int | None  # None: the run was not finished
    step_metrics: dict[str, str]  # by pattern


def read_offline_run(folder: Path) -> OfflineRun:
    """The run in ``offline-run-…``."""
    config: dict[str, Any] = {}
    history: list[dict[str, Any]] = []
    summary: dict[str, Any] = {}
    artifacts: dict[str, list[str]] = {}
    step_metrics: dict[str, str] = {}
    run, exit_code = None, None
    for record in _records(next(folder.glob("*.wandb")).read_bytes()):
        match record.WhichOneof("record_type"):
            case "run":
                run = record.run
                config |= _items(record.run.config.update)
            case "config":
                config |= _items(record.config.update)
            case "history":
                history.append(_items(record.history.item))
            case "summary":
                summary |= _items(record.summary.update)
            case "artifact":
                artifacts[record.artifact.name] = [entry.path for entry in record.artifact.manifest.contents]
            case "metric":
                step_metrics[record.metric.glob_name] = record.metric.step_metric
            case "exit":
                exit_code = record.exit.exit_code
    assert run is not None, f"no run in {folder}"
    tables = {
        key.removesuffix("/_type"): json.loads((folder / "files" / summary[key.replace("_type", "path")]).read_text())
        for key, value in summary.items()
        if key.endswith("/_type") and value == "table-file"
    }
    return OfflineRun(
        id=run.run_id,
        name=run.display_name,
        job_type=run.job_type,
        project=run.project,
        group=run.run_group,
        tags=list(run.tags),
        config=config,
        history=history,
        summary=summary,
        tables=tables,
        artifacts=artifacts,
        exit_code=exit_code,
        step_metrics=step_metrics,
    )


def offline_runs(folder: Path) -> list[OfflineRun]:
    """The runs that the one in ``folder`` kept for ``wandb sync``."""
    return [read_offline_run(path) for path in sorted((folder / "wandb").glob("offline-run-*"))]


def everything_below(folder: Path) -> bytes:
    """All bytes of all files and names, unpacked where they are packed."""
    found = b""
    for path in folder.rglob("*"):
        found += str(path.relative_to(folder)).encode() + b"\n"
        if path.is_file():
            data = path.read_bytes()
            found += gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
    return found


def _records(data: bytes) -> Iterator[Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    magic, version, _ = struct.unpack_from("<4sHB", data)
    assert (magic, version) == (b":W&B", 0xBEE1)
    position, parts = struct.calcsize("<4sHB"), bytearray()
    while position + 7 <= len(data):
        room = _BLOCK - position % _BLOCK
        if room < 7:
            position += room
            continue
        crc, length, kind = struct.unpack_from("<IHB", data, position)
        body = data[position + 7 : position + 7 + length]
        assert crc == zlib.crc32(bytes([kind]) + body)
        position += 7 + length
        parts += body
        if kind in (_FULL, _LAST):
            yield Record.FromString(bytes(parts))
            parts.clear()


def _items(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
