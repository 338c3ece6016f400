"""What W&B shows of a run: flat keys, tables, charts, an artifact."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from runner.charts import Chart, Lines, labels_apart
from runner.tracker.records import Table

TABLE_TEXT = 2_000
"""Characters of a text that a table shows."""


def flat(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The summary under W&B's keys: ``tokens/total``, ``cost/usd``, ``latency/p95``, ``scores/NAME``. No unknowns."""
    found: dict[str, Any] = {}
    for key, value in summary.items():
        if key == "scores":
            for name, score in value.items():
                known = score if isinstance(score, Mapping) else {"mean": score}
                found |= {f"scores/{name}": known.get("mean"), f"scores/{name}/n": known.get("n")}
        elif key == "deployments":
            for label, deployment in value.items():
                found |= flat({f"{key}/{label}/{name}": entry for name, entry in deployment.items()})
        elif isinstance(value, Mapping):
            found |= {f"{key.removesuffix('_s')}/{part}": entry for part, entry in value.items()}
        else:
            found[re.sub("^cost_", "cost/", key)] = value
    return {key: value for key, value in found.items() if value is not None}


def sample_table(samples: Sequence[Mapping[str, Any]], hide: Callable[[Any], Any]) -> Table:
    """Result rows as a table; texts are cut to `TABLE_TEXT` characters."""
    rows = [{name: json.loads(orjson.dumps(value, default=str)) for name, value in row.items()} for row in samples]
    cells = [_cells(hide(row)) for row in rows]
    columns = list(dict.fromkeys(name for row in cells for name in row))
    return Table(columns=columns, rows=[[row.get(name) for name in columns] for row in cells])


def shown(piece: Table | Chart, hide: Callable[[Any], Any]) -> Any:
    """A table or a chart as W&B's own."""
    if isinstance(piece, Table):
        return _table(piece.columns, [[_cell(hide(value)) for value in row] for row in piece.rows])

    import wandb

    if isinstance(piece, Lines):
        lines = [series for series in piece.series if series.points]
        return wandb.plot.line_series(
            xs=[[x for x, _ in line.points] for line in lines],
            ys=[[y for _, y in line.points] for line in lines],
            keys=labels_apart([hide(line.name) or piece.y for line in lines]),
            title=f"{piece.title} ({piece.y})",
            xname=piece.x,
        )
    labels = labels_apart([hide(bar.name) for bar in piece.values])
    rows = [[label, bar.value, bar.low, bar.high] for label, bar in zip(labels, piece.values, strict=True)]
    return wandb.plot.bar(_table(["name", piece.x, "low", "high"], rows), "name", piece.x, title=piece.title)


def wandb_artifact(name: str, files: Sequence[Path], *, folder: Path, offline: bool) -> Any:
    """An artifact of type ``results`` with these files, under their paths in ``folder``."""
    import wandb

    artifact = wandb.Artifact(name, type="results")
    # An offline artifact is uploaded later, when a resumed run may have replaced the file: it needs a copy.
    policy = "mutable" if offline else "immutable"
    for file in map(Path.resolve, files):
        path = str(file.relative_to(folder)) if file.is_relative_to(folder) else file.name
        artifact.add_file(str(file), name=path, policy=policy, skip_cache=True)
    return artifact


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Any:
    import wandb

    return wandb.Table(columns=list(columns), data=list(rows), allow_mixed_types=True, log_mode="IMMUTABLE")


def _cells(row: Mapping[str, Any]) -> dict[str, Any]:
    """A result row as cells of the sample table, by column."""
    usage = row.get("token_usage") or {}
    metrics = row.get("metrics") or {}
    error = row.get("error")
    columns: dict[str, Any] = {"_index": row.get("_index")}
    columns |= {name: row[name] for name in ("_sample", "input") if name in row}
    columns |= {
        "metadata": json.dumps(row.get("metadata") or {}, ensure_ascii=False),
        "output_text": row.get("output_text", row.get("text")),
        "error": f"{error['type']}: {error['message']}" if error else None,
    }
    columns |= {f"scores/{name}": score for name, score in (row.get("scores") or {}).items()}
    columns |= {name: usage.get(name) for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
    columns |= {name: metrics.get(name) for name in ("service_time_s", "end_to_end_s", "cost_usd")}
    return {name: _cell(value) for name, value in columns.items()}


def _cell(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= TABLE_TEXT else f"{text[:TABLE_TEXT]}…"
