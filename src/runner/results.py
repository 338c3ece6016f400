"""What a store says, for people and programs: result rows, the JSONL file, the summary. Nothing here is kept."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from runner.config import TaskKind
from runner.errors import StoreError
from runner.identity import dump_json
from runner.private import open_private
from runner.store import Store
from runner.vector import unpack

CURRENT = """
    FROM rows
    JOIN answers ON answers.content = rows.content AND answers.occurrence = rows.occurrence
"""
"""The rows that the dataset holds now, each with what came of it, as the end of a SELECT."""


async def result_rows(
    store: Store, *, limit: int | None = None, failed: bool | None = None
) -> AsyncGenerator[dict[str, Any], None]:
    """The settled rows in the dataset's order, each in the shape of a line of ``results.jsonl``.

    ``failed`` leaves only those that failed, or only those that did not.

    What was answered stands under the names of the run's task: ``output_text`` and its like, ``embedding``, or
    ``text``, ``language`` and ``duration_s``.

    JSON that is stored as such (metadata, scores, details) is an `orjson.Fragment` here: write it with orjson.

    Raises:
        StoreError: There is something else in the store than a run puts there; names the row.
    """
    meta = await store.meta()
    samples, task = samples_of(meta), meta.get("task", TaskKind.generate)
    sql = f"SELECT rows.position, rows.metadata, rows.scores, {_ARE_JSON} AS are_json, answers.* {CURRENT}"
    if failed is not None:
        sql += f" WHERE error_type IS {'NOT ' if failed else ''}NULL"
    sql += " ORDER BY rows.position"
    if limit is not None:
        sql += f" LIMIT {limit:d}"
    async with aclosing(store.query(sql)) as records:
        async for record in records:
            try:
                # By name in a dictionary, as SQLite's rows look through all their names each time.
                row = _result_row(dict(zip(record.keys(), record, strict=True)), samples, task)
            except (ValueError, TypeError, AttributeError, RecursionError) as error:
                raise StoreError(f"{store.path} is damaged at row {record['position']} ({error})") from None
            yield row


_ARE_JSON = "json_valid(coalesce(rows.metadata, '{}')) AND json_valid(coalesce(rows.scores, '{}'))"


def samples_of(meta: Mapping[str, str]) -> int:
    """How many rows of a store belong to a row of its dataset, by the facts of the store."""
    text = str(meta.get("samples", "1"))
    return max(1, int(text)) if text.isascii() and text.isdigit() else 1


async def write_jsonl(store: Store, path: Path) -> int:
    """Write the settled rows to ``path``, which is replaced as a whole or not at all. Returns how many they are."""
    count = 0
    with replacing(path) as file:
        async for row in result_rows(store):
            file.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
            count += 1
    return count


def replace_file(path: Path, content: bytes) -> None:
    """Write a small file as a whole or not at all."""
    with replacing(path) as file:
        file.write(content)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of ``path`` once it is whole, for its owner only: there are answers in it."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.unlink(missing_ok=True)
        with open_private(partial, "x") as file:
            yield file
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)  # where the disk is full, it would stand in the way
        raise


async def summarize(store: Store) -> dict[str, Any]:
    """The figures of ``summary.json``, from the store alone.

    ``latency_s`` is the service time of answered requests, from sending to the last byte; the wait in our own queue
    is ``queue_wait_s``, beside it. ``unparsed`` answers do not fit the run's ``response_format``. Rates are answers and
    tokens per second of all sessions together. Cost and rates count all that was ever answered in this run, the rest
    what the dataset holds now. ``reused`` rows were settled before the last session, or have their answer from
    elsewhere, as ``taken_over`` ones have that of another run; ``deduplicated`` ones share the answer of another row.

    What was paid lies between ``cost_usd`` and ``cost_usd_upper_bound``: each attempt of unknown cost (it timed out,
    or the process was killed) is bounded by what it can have cost. Where that is not to be known for some, they are
    ``attempts_without_bound``, and there is no upper bound. Attempts and retries that rows shared count once.
    """
    dedupe = (await store.meta()).get("dedupe") == "true"
    totals = await _one(store, _TOTALS)
    used = await _one(store, _USED)
    spent = await _one(store, _SPENT)
    sessions = await _one(store, "SELECT coalesce(sum(last_seen - started_at), 0) AS elapsed_s FROM sessions")
    rows = await _one(store, "SELECT count(*) AS n FROM rows")
    elapsed_s = sessions["elapsed_s"]
    measured = (await _one(store, f"SELECT count(*) AS n {CURRENT} {_MEASURED}"))["n"]
    is_bounded = not spent["without_bound"]
    return {
        "rows": rows["n"],
        "succeeded": totals["succeeded"],
        "failed": totals["failed"],
        "reused": totals["reused"],
        "tokens": {
            "prompt": used["prompt"],
            "completion": used["completion"],
            "total": used["total"],
            "cached": used["cached"],
            "reasoning": used["reasoning"],
        },
        "cost_usd": spent["cost_usd"] if spent["priced"] or not spent["answers"] or is_bounded else None,
        "cost_usd_upper_bound": spent["cost_usd"] + spent["bounds_usd"] if is_bounded else None,
        "attempts_of_unknown_cost": spent["unknown_costs"],
        "attempts_without_bound": spent["without_bound"],
        "deduplicated": (await _one(store, _DEDUPLICATED))["n"] if dedupe else 0,
        "taken_over": totals["taken_over"],
        "elapsed_s": elapsed_s,
        "requests_per_s": spent["answers"] / elapsed_s if elapsed_s else None,
        "tokens_per_s": spent["tokens"] / elapsed_s if elapsed_s else None,
        "latency_s": await _quantiles(store, "service_time_s", measured),
        "queue_wait_s": await _quantiles(store, "queue_wait_s", measured),
        "retries": used["retries"],
        "unparsed": totals["unparsed"],
        "errors": {row["error_type"]: row["n"] async for row in store.query(_ERRORS)},
        "deployments": await _deployments(store, totals["succeeded"]),
        "scores": await _scores(store),
    }


_TOTALS = f"""
    SELECT
        count(*) FILTER (WHERE error_type IS NULL) AS succeeded,
        count(error_type) AS failed,
        count(*) FILTER (
            WHERE reused_from IS NOT NULL OR settled_at < (SELECT max(started_at) FROM sessions)
        ) AS reused,
        count(reused_from) AS taken_over,
        count(CASE WHEN json_valid(details) THEN json_extract(details, '$.parse_error') END) AS unparsed
    {CURRENT}
"""

_USED = """
    SELECT
        coalesce(sum(prompt_tokens), 0) AS prompt,
        coalesce(sum(completion_tokens), 0) AS completion,
        coalesce(sum(total_tokens), 0) AS total,
        coalesce(sum(cached_tokens), 0) AS cached,
        coalesce(sum(reasoning_tokens), 0) AS reasoning,
        coalesce(sum(retries) FILTER (WHERE NOT shared), 0) AS retries
    FROM answers
    WHERE EXISTS (SELECT 1 FROM rows WHERE rows.content = answers.content AND rows.occurrence = answers.occurrence)
"""

_SPENT = """
    WITH attempt (answered, tokens, cost_usd, bound_usd, shared) AS (
        SELECT error_type IS NULL, total_tokens, cost_usd, cost_bound_usd, shared FROM answers WHERE reused_from IS NULL
        UNION ALL
        SELECT FALSE, NULL, cost_usd, cost_bound_usd, shared FROM attempts
    )
    SELECT
        count(*) FILTER (WHERE answered) AS answers,
        coalesce(sum(tokens), 0) AS tokens,
        coalesce(sum(cost_usd), 0.0) AS cost_usd,
        count(cost_usd) FILTER (WHERE answered) AS priced,
        count(*) FILTER (WHERE cost_usd IS NULL AND NOT shared) AS unknown_costs,
        count(*) FILTER (WHERE cost_usd IS NULL AND bound_usd IS NULL AND NOT shared) AS without_bound,
        coalesce(sum(bound_usd) FILTER (WHERE cost_usd IS NULL), 0.0) AS bounds_usd
    FROM attempt
"""

_DEDUPLICATED = "SELECT (SELECT count(*) FROM rows) - (SELECT count(*) FROM (SELECT DISTINCT content FROM rows)) AS n"

_MEASURED = "WHERE error_type IS NULL AND reused_from IS NULL"
"""The answers of this run, whose times are its own."""

_ERRORS = f"SELECT error_type, count(*) AS n {CURRENT} WHERE error_type IS NOT NULL GROUP BY error_type ORDER BY n DESC"


_TYPES: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("output_text", "finish_reason", "request_id", "model_id", "deployment", "reused_from"), (str,)),
    **dict.fromkeys(("error_type", "error_message", "details", "metadata", "scores"), (str,)),
    **dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens", "reasoning_tokens"), (int,)),
    **dict.fromkeys(("cached_tokens", "error_status", "retries"), (int,)),
    **dict.fromkeys(("queue_wait_s", "service_time_s", "end_to_end_s", "ttft_s", "cost_usd"), (float, int)),
}
"""What is in the columns of a row, beside null: SQLite keeps a value of any type in any column."""


def _result_row(record: Any, samples: int, task: str) -> dict[str, Any]:
    for name, types in _TYPES.items():
        if (value := record[name]) is not None and type(value) not in types:
            raise TypeError(f"{name} is of type {type(value).__name__}")
    if not record["are_json"]:
        raise ValueError("metadata or scores are no JSON")
    details = json.loads(record["details"]) if record["details"] else {}
    details = {name: orjson.Fragment(dump_json(value)) for name, value in details.items()}
    row: dict[str, Any] = {"_index": record["position"] // samples}
    if samples > 1:
        row["_sample"] = record["position"] % samples
    usage = {"token_usage": _usage(record), "request_id": record["request_id"], "model_id": record["model_id"]}
    if task == TaskKind.embed:
        row |= {"embedding": unpack(record["embedding"]) if record["embedding"] else None, **usage}
    elif task == TaskKind.transcribe:
        heard = {name: details.pop(name, None) for name in ("language", "duration_s")}
        row |= {"text": record["output_text"], **heard, **usage}
    else:
        row |= {
            "output_text": record["output_text"],
            "output_parsed": details.pop("output_parsed", None),
            **usage,
            "finish_reason": record["finish_reason"],
            "tool_calls": details.pop("tool_calls", []),
        }
    return row | {
        **details,
        "error": _error(record),
        "metadata": _fragment(record["metadata"]),
        "scores": _fragment(record["scores"]),
        "metrics": {
            "queue_wait_s": record["queue_wait_s"],
            "service_time_s": record["service_time_s"],
            "end_to_end_s": record["end_to_end_s"],
            "deployment": record["deployment"],
            "retries": record["retries"],
            "cost_usd": record["cost_usd"],
            "ttft_s": record["ttft_s"],
        },
        **({"reused_from": record["reused_from"]} if record["reused_from"] else {}),
    }


def _usage(record: Any) -> dict[str, Any] | None:
    if record["total_tokens"] is None:
        return None
    kinds = ("prompt_tokens", "completion_tokens", "total_tokens", "reasoning_tokens", "cached_tokens")
    return {kind: record[kind] for kind in kinds}


def _error(record: Any) -> dict[str, Any] | None:
    if record["error_type"] is None:
        return None
    return {"type": record["error_type"], "message": record["error_message"], "status": record["error_status"]}


def _fragment(text: str | None) -> orjson.Fragment:
    return orjson.Fragment(text or "{}")


async def _one(store: Store, sql: str) -> Any:
    rows = [row async for row in store.query(sql)]
    return rows[0]


async def _quantiles(store: Store, column: str, count: int) -> dict[str, float | None]:
    """p50, p95 and p99 of a column over ``count`` measured rows; SQLite sorts, one row a quantile comes back."""
    places = {percent: round((count - 1) * percent / 100) for percent in (50, 95, 99)}
    sql = f"""
        SELECT place, value
        FROM (SELECT {column} AS value, row_number() OVER (ORDER BY {column}) - 1 AS place {CURRENT} {_MEASURED})
        WHERE place IN ({", ".join(map(str, places.values()))})
    """
    values = {row["place"]: row["value"] async for row in store.query(sql)}
    return {f"p{percent}": values.get(place) for percent, place in places.items()}


async def _deployments(store: Store, answers: int) -> dict[str, dict[str, Any]]:
    """What each deployment did, by label: rows that it answered, that failed at last there, and failed attempts."""
    retries = {row["deployment"]: row["n"] async for row in store.query(_RETRIES)}
    rows = {row["deployment"]: row async for row in store.query(_DEPLOYMENTS)}
    latencies = await _latencies(store, {label: row["answered"] for label, row in rows.items() if row["answered"]})
    deployments: dict[str, dict[str, Any]] = {}
    for label in sorted(rows.keys() | retries.keys()):
        row = rows.get(label)
        answered = row["answered"] if row else 0
        deployments[label] = {
            "answered": answered,
            "failed": row["failed"] if row else 0,
            "share": answered / answers if answers else 0.0,
            "latency_s": latencies.get(label, {"p50": None, "p95": None}),
            "retries": retries.get(label, 0),
        }
    return deployments


async def _latencies(store: Store, answered: Mapping[str, int]) -> dict[str, dict[str, float]]:
    """p50 and p95 of the answers of each deployment, of which there are so many."""
    places = {
        (label, percent): round((count - 1) * percent / 100)
        for label, count in answered.items()
        for percent in (50, 95)
    }
    if not places:
        return {}
    sql = _RANKED.format(", ".join(["(?, ?)"] * len(places)))
    parameters = [value for (label, _), place in places.items() for value in (label, place)]
    values = {(row["deployment"], row["place"]): row["value"] async for row in store.query(sql, parameters)}
    return {label: {f"p{percent}": values[label, places[label, percent]] for percent in (50, 95)} for label in answered}


_RETRIES = (
    "SELECT deployment, count(*) AS n FROM attempts WHERE NOT shared AND deployment IS NOT NULL GROUP BY deployment"
)

_DEPLOYMENTS = f"""
    SELECT deployment, count(*) FILTER (WHERE error_type IS NULL) AS answered, count(error_type) AS failed
    {CURRENT}
    WHERE deployment IS NOT NULL
    GROUP BY deployment
"""

_RANKED = f"""
    SELECT deployment, place, value
    FROM (
        SELECT
            deployment,
            service_time_s AS value,
            row_number() OVER (PARTITION BY deployment ORDER BY service_time_s) - 1 AS place
        {CURRENT}
        WHERE error_type IS NULL AND deployment IS NOT NULL
    )
    WHERE (deployment, place) IN (VALUES {{}})
"""
"""The answers at some places, the fastest of a deployment being at 0."""


async def _scores(store: Store) -> dict[str, dict[str, float]]:
    """Mean and number of rows by scorer."""
    sql = """
        SELECT entry.key AS name, avg(entry.value) AS mean, count(entry.value) AS n
        FROM rows, json_each(rows.scores) AS entry
        WHERE rows.scores IS NOT NULL
        GROUP BY entry.key
    """
    return {row["name"]: {"mean": row["mean"], "n": row["n"]} async for row in store.query(sql)}
