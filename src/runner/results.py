"""What a store says, for people and programs: result rows, the JSONL file, the summary. Nothing here is kept."""

from __future__ import annotations

import heapq
import json
import os
import sqlite3
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, contextmanager
from functools import lru_cache
from pathlib import Path
from types import NoneType
from typing import Any, BinaryIO, TypeVar

import orjson

from runner.answers import TRUNCATED
from runner.config import TaskKind
from runner.errors import StoreError
from runner.identity import MOST_LEVELS, check_levels, dump_json
from runner.private import open_private
from runner.store import Store
from runner.vector import unpack

T = TypeVar("T")

CURRENT = """
    FROM rows
    JOIN answers USING (ticket)
"""
"""The rows that the dataset holds now, each with what came of it, as the end of a SELECT."""

WAS_THERE = "(reused_from IS NOT NULL OR settled_at < (SELECT max(started_at) FROM sessions))"
"""Of an answer, in SQL: the last session did not ask for it."""


def result_rows(
    *stores: Store, limit: int | None = None, failed: bool | None = None
) -> AsyncGenerator[dict[str, Any], None]:
    """The settled rows in the dataset's order, each in the shape of a line of ``results.jsonl``.

    Several stores are those of a dataset's shards; a row of each is in memory. ``failed`` leaves only the rows that
    failed, or only those that did not.

    What was answered stands under the names of the run's task: ``output_text`` and its like, ``embedding``, or
    ``text``, ``language`` and ``duration_s``.

    A row that shares the answer of another one costs nothing of its own, and says in ``deduplicated_from`` whose it is.

    JSON that is stored as such (metadata, scores, details) is an `orjson.Fragment` here: write it with orjson.

    Raises:
        StoreError: There is something else in the store than a run puts there; names the row.
    """
    shards = [_result_rows(store, limit=limit, failed=failed) for store in stores]
    return shards[0] if len(shards) == 1 else _merged(shards, limit)


async def _merged(
    shards: Sequence[AsyncGenerator[dict[str, Any], None]], limit: int | None
) -> AsyncGenerator[dict[str, Any], None]:
    left = limit
    async with aclosing(in_order(shards, key=lambda row: (row["_index"], row.get("_sample", 0)))) as rows:
        async for row in rows:
            if left is not None and (left := left - 1) < 0:
                break
            yield row


async def _result_rows(store: Store, *, limit: int | None, failed: bool | None) -> AsyncGenerator[dict[str, Any], None]:
    meta = await store.meta()
    samples, task = samples_of(meta), meta.get("task", TaskKind.generate)
    sql = f"SELECT {', '.join(_COLUMNS)} {CURRENT} {_FIRSTS if meta.get('dedupe') == 'true' else _NO_FIRSTS}"
    if failed is not None:
        sql += f" WHERE error_type IS {'NOT ' if failed else ''}NULL"
    sql += " ORDER BY rows.position"
    if limit is not None:
        sql += f" LIMIT {limit:d}"
    async with aclosing(store.query(sql)) as records:
        async for record in records:
            values = tuple(record)  # once, as SQLite's rows are slow to go through, and slower by name
            try:
                _check_types(tuple(map(type, values)))
                row = _result_row(dict(zip(_COLUMNS, values, strict=True)), samples, task)
            except (ValueError, TypeError, AttributeError, RecursionError) as error:
                raise StoreError(f"{store.path} is damaged at row {record['position']} ({error})") from None
            yield row


def samples_of(meta: Mapping[str, str]) -> int:
    """How many rows of a store belong to a row of its dataset, by the facts of the store."""
    text = str(meta.get("samples", "1"))
    return max(1, int(text)) if text.isascii() and text.isdigit() else 1


async def in_order(streams: Sequence[AsyncGenerator[T, None]], *, key: Callable[[T], Any]) -> AsyncGenerator[T, None]:
    """The entries of several streams in one order, that of ``key``, which each of them keeps for itself."""
    async with AsyncExitStack() as stack:
        for stream in streams:
            await stack.enter_async_context(aclosing(stream))
        heads = []
        for place, stream in enumerate(streams):
            if (first := await anext(stream, None)) is not None:
                heads.append((key(first), place, first))
        heapq.heapify(heads)
        while heads:
            _, place, entry = heads[0]
            yield entry
            if (following := await anext(streams[place], None)) is not None:
                heapq.heapreplace(heads, (key(following), place, following))
            else:
                heapq.heappop(heads)


async def write_jsonl(rows: AsyncGenerator[dict[str, Any], None], path: Path) -> int:
    """Write `result_rows` to ``path``, which is replaced as a whole or not at all. Returns how many they are."""
    count = 0
    with replacing(path) as file:
        async with aclosing(rows):
            async for row in rows:
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


async def summarize(*stores: Store) -> dict[str, Any]:
    """The figures of ``summary.json``, from the store alone; or from those of a dataset's shards, as of one run.

    ``latency_s`` is the service time of answered requests, from sending to the last byte; the wait in our own queue
    is ``queue_wait_s``, beside it. ``truncated`` answers were cut off at the limit on their length, ``unparsed`` ones
    do not fit the run's ``response_format``. Rates are answers, rows (with those that share an answer) and tokens per
    second at work, over all ``sessions`` that asked something; where some overlap, the time counts once. Where
    ``resume=fresh`` asked everything anew, sessions, time and rates begin there. ``retries`` are attempts that
    followed a failed one in the same session, once they have come to an end; by class and deployment, they go by what
    they followed. These, cost and rates count all that was asked in this run, for rows that have changed since too; the
    rest counts what the dataset holds now.
    ``reused`` rows were answered before the last session, or have their answer from elsewhere, as ``taken_over`` ones
    have that of another run; ``deduplicated`` ones share the answer of another row.

    ``cost_usd_former`` is the part of the cost that was for answers which no row has any more: the rows have changed,
    or were asked anew. What was paid lies between ``cost_usd`` and ``cost_usd_upper_bound``: each attempt of unknown
    cost (it timed out, or the process was killed) is bounded by what it can have cost. Where that is not to be known
    for some, they are ``attempts_without_bound``, and there is no upper bound. Attempts and retries that rows shared
    count once.
    """
    deduping = [store for store in stores if (await store.meta()).get("dedupe") == "true"]
    totals = await sums(stores, _TOTALS)
    used = await sums(stores, _USED)
    spent = await sums(stores, _SPENT)
    rows = await sums(stores, "SELECT count(*) AS n FROM rows")
    deduplicated = (await sums(deduping, _DEDUPLICATED))["n"]
    settled = await sums_by_name(stores, _DEPLOYMENTS)
    measured = sum(each["measured"] for each in settled.values())
    deployments = await _deployments(stores, settled, totals["succeeded"])
    sessions = await _sessions(stores)
    elapsed_s = _time_in(sessions)
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
        "cost_usd_former": former if (former := spent["cost_usd"] - used["cost_usd"]) > _ROUNDING_USD else 0.0,
        "attempts_of_unknown_cost": spent["unknown_costs"],
        "attempts_without_bound": spent["without_bound"],
        "deduplicated": deduplicated,
        "taken_over": totals["taken_over"],
        "sessions": len(sessions),
        "elapsed_s": elapsed_s,
        "requests_per_s": spent["answers"] / elapsed_s if elapsed_s else None,
        "rows_per_s": (spent["answers"] + deduplicated) / elapsed_s if elapsed_s else None,
        "tokens_per_s": spent["tokens"] / elapsed_s if elapsed_s else None,
        "latency_s": await _quantiles(stores, "service_time_s", _MEASURED, count=measured),
        "queue_wait_s": await _quantiles(stores, "queue_wait_s", _MEASURED, count=measured),
        "retries": sum(each["retries"] for each in deployments.values()),
        "truncated": totals["truncated"],
        "unparsed": totals["unparsed"],
        "errors": await _counts(stores, _ERRORS) if totals["failed"] else {},
        "deployments": deployments,
        "scores": await _scores(stores),
    }


_TOTALS = f"""
    SELECT
        count(*) FILTER (WHERE error_type IS NULL) AS succeeded,
        count(error_type) AS failed,
        count(*) FILTER (WHERE error_type IS NULL AND {WAS_THERE}) AS reused,
        count(reused_from) AS taken_over,
        count(CASE WHEN json_valid(details) THEN json_extract(details, '$.parse_error') END) AS unparsed,
        count(*) FILTER (WHERE {TRUNCATED}) AS truncated
    {CURRENT}
"""

_USED = """
    SELECT
        coalesce(sum(prompt_tokens), 0) AS prompt,
        coalesce(sum(completion_tokens), 0) AS completion,
        coalesce(sum(total_tokens), 0) AS total,
        coalesce(sum(cached_tokens), 0) AS cached,
        coalesce(sum(reasoning_tokens), 0) AS reasoning,
        total(cost_usd) FILTER (WHERE reused_from IS NULL) AS cost_usd
    FROM answers
    WHERE ticket IN (SELECT ticket FROM rows)
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

_ROUNDING_USD = 1e-12
"""What sums of the same costs, in another order, may differ by."""

_DEDUPLICATED = f"SELECT count(*) - count(DISTINCT ticket) AS n {CURRENT}"

_MEASURED = "WHERE error_type IS NULL AND reused_from IS NULL"
"""The answers of this run, whose times are its own."""

_ERRORS = f"""
    SELECT error_type AS name, count(*) AS n {CURRENT} WHERE error_type IS NOT NULL GROUP BY name
"""


_TYPES: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("output_text", "finish_reason", "request_id", "model_id", "deployment", "reused_from"), (str,)),
    **dict.fromkeys(("error_type", "error_message", "details", "metadata", "scores"), (str,)),
    **dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens", "reasoning_tokens"), (int,)),
    **dict.fromkeys(("cached_tokens", "error_status", "retries", "first"), (int,)),
    **dict.fromkeys(("queue_wait_s", "service_time_s", "end_to_end_s", "ttft_s", "cost_usd"), (float, int)),
}
"""What is in the columns of a row, beside null: SQLite keeps a value of any type in any column."""


_ARE_JSON = "json_valid(ifnull(metadata, '{}')) AND json_valid(ifnull(scores, '{}'))"

_COLUMNS = ("position", "embedding", _ARE_JSON, *_TYPES)

_FIRSTS = """
    LEFT JOIN (SELECT ticket, min(position) AS first FROM rows GROUP BY ticket HAVING count(*) > 1) USING (ticket)
"""
"""The position of the first of the rows that share an answer; null where none do."""

_NO_FIRSTS = "CROSS JOIN (SELECT NULL AS first)"


@lru_cache  # as most rows are of the same types
def _check_types(types: tuple[type, ...]) -> None:
    for name, found in zip(_COLUMNS, types, strict=True):
        if found is not NoneType and found not in _TYPES.get(name, (found,)):
            raise TypeError(f"{name} is of type {found.__name__}")


def _result_row(record: Mapping[str, Any], samples: int, task: str) -> dict[str, Any]:
    if not record[_ARE_JSON]:
        raise ValueError("metadata or scores are no JSON")
    details = {}
    if record["details"]:
        details = {name: orjson.Fragment(dump_json(value)) for name, value in json.loads(record["details"]).items()}
    row: dict[str, Any] = {"_index": record["position"] // samples}
    if samples > 1:
        row["_sample"] = record["position"] % samples
    if task == TaskKind.embed:
        row["embedding"] = unpack(record["embedding"]) if record["embedding"] else None
    elif task == TaskKind.transcribe:
        row["text"] = record["output_text"]
        row |= {name: details.pop(name, None) for name in ("language", "duration_s")}
    else:
        row["output_text"] = record["output_text"]
        row["output_parsed"] = details.pop("output_parsed", None)
    row["token_usage"] = _usage(record)
    row["request_id"] = record["request_id"]
    row["model_id"] = record["model_id"]
    if task not in (TaskKind.embed, TaskKind.transcribe):
        row["finish_reason"] = record["finish_reason"]
        row["tool_calls"] = details.pop("tool_calls", [])
    row |= details
    row["error"] = _error(record)
    row["metadata"] = _fragment(record["metadata"])
    row["scores"] = _fragment(record["scores"])
    is_first = record["first"] in (None, record["position"])
    row["metrics"] = {
        "queue_wait_s": record["queue_wait_s"],
        "service_time_s": record["service_time_s"],
        "end_to_end_s": record["end_to_end_s"],
        "deployment": record["deployment"],
        "retries": record["retries"] if is_first else 0,
        "cost_usd": record["cost_usd"] if is_first else 0.0,
        "ttft_s": record["ttft_s"],
    }
    if record["reused_from"]:
        row["reused_from"] = record["reused_from"]
    if not is_first:
        row["deduplicated_from"] = record["first"] // samples
    return row


def _usage(record: Any) -> dict[str, Any] | None:
    if record["total_tokens"] is None:
        return None
    return {
        "prompt_tokens": record["prompt_tokens"],
        "completion_tokens": record["completion_tokens"],
        "total_tokens": record["total_tokens"],
        "reasoning_tokens": record["reasoning_tokens"],
        "cached_tokens": record["cached_tokens"],
    }


def _error(record: Any) -> dict[str, Any] | None:
    if record["error_type"] is None:
        return None
    return {"type": record["error_type"], "message": record["error_message"], "status": record["error_status"]}


def _fragment(text: str | None) -> orjson.Fragment:
    if text is None:
        return orjson.Fragment("{}")
    if (brackets := text.count("{") + text.count("[")) > MOST_LEVELS:
        check_levels(json.loads(text), brackets)
    return orjson.Fragment(text)


async def rows_of(
    stores: Sequence[Store], sql: str, parameters: Sequence[Any] = ()
) -> AsyncGenerator[sqlite3.Row, None]:
    """The rows of a SELECT, of one store after the other."""
    for store in stores:
        async for row in store.query(sql, parameters):
            yield row


async def sums(stores: Sequence[Store], sql: str, parameters: Sequence[Any] = ()) -> Mapping[str, Any]:
    """The one row of a SELECT of numbers, added up over the stores; of no store, zeros."""
    return (await sums_by_name(stores, f"SELECT 'all' AS name, * FROM ({sql})", parameters)).get("all", Counter())


async def sums_by_name(
    stores: Sequence[Store], sql: str, parameters: Sequence[Any] = ()
) -> dict[Any, Mapping[str, Any]]:
    """The rows of a SELECT of a ``name`` and numbers, those of one name added up over the stores."""
    found: dict[Any, Counter[str]] = {}
    async for row in rows_of(stores, sql, parameters):
        name, *numbers = row
        found.setdefault(name, Counter()).update(dict(zip(row.keys()[1:], numbers, strict=True)))
    return dict(found)


async def _sessions(stores: Sequence[Store]) -> list[tuple[float, float]]:
    """When each session whose answers count began and was last seen, in their order; of those that asked something."""
    return sorted([(row["started_at"], row["last_seen"]) for store in stores async for row in store.query(_SESSIONS)])


def _time_in(sessions: Sequence[tuple[float, float]]) -> float:
    """For how long there was a session, of one store or of several."""
    elapsed_s = until = 0.0
    for began, ended in sessions:
        elapsed_s += max(0.0, ended - max(began, until))
        until = max(until, ended)
    return elapsed_s


_SESSIONS = """
    SELECT started_at, last_seen
    FROM sessions
    WHERE last_seen > started_at
    AND id >= coalesce((SELECT CAST(value AS INTEGER) FROM meta WHERE name = 'first_session'), 0)
"""


async def _quantiles(
    stores: Sequence[Store],
    column: str,
    where: str,
    parameters: Sequence[Any] = (),
    *,
    count: int,
    percents: Sequence[int] = (50, 95, 99),
) -> dict[str, float | None]:
    """Percentiles of a column: the values that stand so far down among the ``count`` of all stores; None of nothing."""
    places = {f"p{percent}": round((count - 1) * percent / 100) for percent in percents}
    sql = f"SELECT {column} AS value {CURRENT} {where}"
    found = await values_at(places.values(), stores, sql, parameters) if count else {}
    return {name: found.get(place) for name, place in places.items()}


async def values_at(
    places: Collection[int], stores: Sequence[Store], sql: str, parameters: Sequence[Any] = ()
) -> dict[int, float]:
    """The values of a SELECT that stand at ``places``, from 0, where those of all stores are in ascending order."""
    if len(stores) == 1:  # where SQLite counts
        ranked = f"SELECT value, row_number() OVER (ORDER BY value) - 1 AS place FROM ({sql})"
        sql = f"SELECT value, place FROM ({ranked}) WHERE place IN ({', '.join(map(str, places))})"
        return {row["place"]: row["value"] async for row in stores[0].query(sql, parameters)}
    last = max(places)
    streams = [store.query(f"{sql} ORDER BY value LIMIT {last + 1:d}", parameters) for store in stores]
    found = {}
    place = 0
    async with aclosing(in_order(streams, key=lambda row: row["value"])) as rows:
        async for row in rows:
            if place in places:
                found[place] = row["value"]
            if place == last:
                break
            place += 1
    return found


async def _deployments(
    stores: Sequence[Store], found: Mapping[str | None, Mapping[str, Any]], answers: int
) -> dict[str, dict[str, Any]]:
    """What each deployment did, by label: rows that it answered, that failed at last there, and failed attempts, also
    by class."""
    rows = {label: numbers for label, numbers in found.items() if label is not None}
    retries: dict[str, Counter[str]] = {}
    async for row in rows_of(stores, _RETRIES):
        retries.setdefault(row["deployment"], Counter())[row["error_type"]] += row["n"]
    return {
        label: {
            "answered": (answered := rows[label]["answered"] if label in rows else 0),
            "failed": rows[label]["failed"] if label in rows else 0,
            "share": answered / answers if answers else 0.0,
            "latency_s": await _quantiles(
                stores,
                "service_time_s",
                "WHERE error_type IS NULL AND deployment = ?",
                (label,),
                count=answered,
                percents=(50, 95),
            ),
            "retries": retries[label].total() if label in retries else 0,
            "retries_by_error": dict(retries[label].most_common()) if label in retries else {},
        }
        for label in sorted(rows.keys() | retries.keys())
    }


_DEPLOYMENTS = f"""
    SELECT
        deployment AS name,
        count(*) FILTER (WHERE error_type IS NULL) AS answered,
        count(error_type) AS failed,
        count(*) FILTER (WHERE error_type IS NULL AND reused_from IS NULL) AS measured
    {CURRENT}
    GROUP BY deployment
"""

_RETRIES = """
    WITH followed AS (
        SELECT content, number - 1 AS number, count(*) AS times
        FROM (
            SELECT content, number FROM attempts WHERE number > 1 AND NOT shared
            UNION ALL
            SELECT content, retries + 1 FROM answers WHERE retries > 0 AND NOT shared
        )
        GROUP BY content, number
    )
    SELECT deployment, error_type, count(*) AS n
    FROM (
        SELECT *, row_number() OVER (PARTITION BY content, number ORDER BY id DESC) AS age
        FROM attempts
        WHERE NOT shared AND deployment IS NOT NULL AND error_type NOT IN ('GivenUp', 'Lost')
    )
    JOIN followed USING (content, number)
    WHERE age <= times
    GROUP BY deployment, error_type
"""
"""Failed attempts that another followed within the session: of the nth ones, as many as there are of number n + 1."""


async def _counts(stores: Sequence[Store], sql: str) -> dict[str, int]:
    """What a SELECT of ``name`` and ``n`` counts, the most frequent first."""
    found = {name: numbers["n"] for name, numbers in (await sums_by_name(stores, sql)).items()}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


async def _scores(stores: Sequence[Store]) -> dict[str, dict[str, float | None]]:
    """Mean and number of rows by scorer."""
    found = await sums_by_name(stores, _SCORES)
    return {
        name: {"mean": each["sum"] / each["n"] if each["n"] else None, "n": each["n"]} for name, each in found.items()
    }


_SCORES = """
    SELECT entry.key AS name, total(entry.value) AS sum, count(entry.value) AS n
    FROM rows, json_each(rows.scores) AS entry
    WHERE rows.scores IS NOT NULL
    GROUP BY entry.key
"""
