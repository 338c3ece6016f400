"""What a report says of a run, read from its folder: finished, stopped or still going on, in constant memory."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from runner.bench.sweeps import BENCHMARK, Gathered, compare_benchmarks, gather
from runner.comparison import Comparison, compare, is_run
from runner.database import RUN_DATABASE
from runner.dataset.paths import suggestion
from runner.errors import ConfigError
from runner.intervals import Interval, clustered_mean_interval, effective_size, share_interval
from runner.recorded import folder_of, labels_of, overrides_of, settings_of
from runner.results import CURRENT, result_rows, rows_of, samples_of, summarize, sums, sums_by_name, values_at
from runner.shards import Shards, find_shards, opened, summarize_shards
from runner.store import Store
from runner.sweep import Cell, Sweep, cell_names, place_of

SAMPLES = 20
"""Rows that are shown of those that were answered, and of those that failed."""

_QUANTILES = 200
_BUCKETS = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """The mean of a scorer, with its 95 % interval: as wide as that of fewer rows where rows share answers."""

    mean: float
    n: int
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A class of errors, with an example."""

    kind: str
    count: int
    index: int  # of the example
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """One run, as far as it is known."""

    label: str  # what sets it apart from the others
    folder: Path
    state: str  # finished, running or killed, or why it stopped
    summary: Mapping[str, Any] = field(default_factory=dict)  # as in summary.json
    knows_rows: bool = True  # False: it has not seen its whole dataset, and its rows are those that it has taken up
    settings: Mapping[str, Any] = field(default_factory=dict)  # the configuration, without secrets
    overrides: Mapping[str, str] = field(default_factory=dict)  # what the command line set
    scores: Mapping[str, Score] = field(default_factory=dict)
    latencies_s: Sequence[float] = ()  # quantiles of the service time, evenly spaced from the least to the largest
    rate: Sequence[tuple[float, float]] = ()  # (seconds since the first answer, answers per second)
    last_answers_s: Mapping[str, float] = field(default_factory=dict)  # by deployment, since the first answer of any
    failures: Sequence[Failure] = ()
    samples: Sequence[Mapping[str, Any]] = ()  # rows as in results.jsonl


async def read_runs(paths: Sequence[Path]) -> list[RunFacts]:
    """The runs in these folders: runs themselves, sweeps, or folders that hold several runs.

    Raises:
        ConfigError: A folder holds no run.
        StoreError: A run's database cannot be read.
    """
    runs: list[RunFacts] = []
    unnamed: list[Path] = []
    for path in map(folder_of, paths):
        sweep = Sweep(path)
        if cells := sweep.cells():
            runs += [await _read_shards(shards) for shards in find_shards(sweep) if shards.stores]
            runs += [await _read_cell(cell) for cell in cells if cell.shard is None]
            continue
        names = cell_names(path)
        folders = sorted(_run_folders(path), key=partial(place_of, names))
        if not folders:
            is_output = path.suffix == ".html" and not path.is_dir()
            way_out = f" Did you mean -o {path}?" if is_output else suggestion(str(path)) if not path.exists() else ""
            raise ConfigError(
                f"{path}: there is no run (no results.sqlite), and no sweep.{way_out or ' Name a folder below runs/'}"
            )
        runs += [await _read_run(folder, names.get(folder.name, "")) for folder in folders]
        unnamed += [run.folder for run in runs[-len(folders) :] if not run.label]
    return _labelled(runs, dict(zip(unnamed, labels_of(unnamed), strict=True)))


def _labelled(runs: Sequence[RunFacts], labels: Mapping[Path, str]) -> list[RunFacts]:
    """The runs, those without a name under these labels, and those that share a name told apart by their folders."""
    named = [replace(run, label=run.label or labels.get(run.folder, "")) for run in runs]
    shared = {label for label, count in Counter(run.label for run in named).items() if count > 1}
    return [
        replace(run, label=f"{run.label} ({run.folder.parent.name}/{run.folder.name})".strip())
        if run.label in shared
        else run
        for run in named
    ]


async def read_comparisons(runs: Sequence[RunFacts]) -> list[Comparison]:
    """The runs against the first one, row by row, and the benchmarks likewise, level by level.

    Raises:
        StoreError: A run's database cannot be read.
    """
    named = [(run.label, run.folder) for run in runs if is_run(run.folder)]
    return [*(await compare(named) if len(named) > 1 else []), *compare_benchmarks(read_benchmarks(runs))]


def score_names(runs: Sequence[RunFacts]) -> list[str]:
    """The scorers that there are among the runs."""
    return list(dict.fromkeys(name for run in runs for name in run.scores))


def read_benchmarks(runs: Sequence[RunFacts]) -> list[Gathered]:
    """The benchmarks among the runs; those that differ in their level alone are one."""
    return gather([Cell(number=0, name=run.label, folder=str(run.folder), summary=run.summary) for run in runs])


def _run_folders(path: Path) -> Iterator[Path]:
    for pattern in (".", "*", "*/*"):
        found = {
            file.parent
            for name in (RUN_DATABASE, BENCHMARK)
            for file in path.glob(f"{pattern}/{name}")
            if not Sweep(file.parent).cells()
        }
        if found:
            yield from found
            return


async def _read_cell(cell: Cell) -> RunFacts:
    folder = Path(cell.folder)
    if not is_run(folder) and not (folder / BENCHMARK).is_file():
        return RunFacts(
            label=cell.name, folder=folder, state=cell.message or "it did not begin", overrides=overrides_of(folder)
        )
    return await _read_run(folder, cell.name)


async def _read_shards(shards: Shards) -> RunFacts:
    """All of them as the one run that they are."""
    first = Path(shards.cells[0].folder)
    async with opened(shards.stores) as stores:
        ended = sum(bool(cell.summary) for cell in shards.cells)
        knows_rows = ended == shards.count or (len(stores) == shards.count and await _saw_all(stores))
        summary = await summarize_shards(shards, stores)
        facts = RunFacts(
            label=shards.name or f"{shards.count} shards",
            folder=shards.folder,
            state=str(summary["stopped"] or "finished"),
            summary=summary,
            knows_rows=knows_rows,
            settings=settings_of(first),
            overrides={
                key: value for key, value in overrides_of(first).items() if not key.startswith("dataset.shard.")
            },
        )
        return await _with_rows(facts, stores)


async def _with_rows(facts: RunFacts, stores: Sequence[Store]) -> RunFacts:
    """With what the rows of all its stores say."""
    return replace(
        facts,
        scores=await _scores(stores),
        latencies_s=await _latencies(stores),
        rate=await _rate(stores),
        last_answers_s=await _last_answers(stores),
        failures=await _failures(stores),
        samples=await _samples(stores),
    )


async def _read_run(folder: Path, label: str) -> RunFacts:
    if not is_run(folder):
        measured = _last_summary(folder) or {}
        return RunFacts(
            label=label,
            folder=folder,
            state=str(measured.get("stopped") or "finished"),
            summary=measured,
            settings=settings_of(folder),
            overrides=overrides_of(folder),
        )
    async with await Store.open_readonly(folder / RUN_DATABASE) as store:
        ended = await _ended(store)
        told = _last_summary(folder) if ended else None
        knows_rows = told is not None or await _saw_all([store])  # before it is summarized, as it may go on
        summary = await summarize(store) if told is None else told
        facts = RunFacts(
            label=label,
            folder=folder,
            state=str(summary.get("stopped") or "finished") if ended else "running or killed",
            summary=summary,
            knows_rows=knows_rows,
            settings=settings_of(folder),
            overrides=overrides_of(folder),
        )
        return await _with_rows(facts, [store])


async def _ended(store: Store) -> bool:
    """Whether the last session came to its end."""
    sql = "SELECT ended_at IS NOT NULL AS ended FROM sessions ORDER BY id DESC LIMIT 1"
    return any([row["ended"] async for row in store.query(sql)])


async def _saw_all(stores: Sequence[Store]) -> bool:
    """Whether the datasets of all of them were seen to their ends."""
    return all([(await store.meta()).get("rows") for store in stores])


def _last_summary(folder: Path) -> dict[str, Any] | None:
    """The content of ``summary.json``, if it is what a run writes there; the store tells the same."""
    try:
        summary: dict[str, Any] = json.loads((folder / "summary.json").read_bytes())
        are_numbers = [isinstance(summary.get(key), int | float | None) for key in _NUMBERS]
        are_tables = [
            all(isinstance(value, int | float | None) for value in (summary.get(key) or {}).values()) for key in _TABLES
        ]
        are_deployments = [_is_deployment(each) for each in (summary.get("deployments") or {}).values()]
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return None
    return summary if all(are_numbers) and all(are_tables) and all(are_deployments) else None


def _is_deployment(told: Mapping[str, Any]) -> bool:
    counts = [told[key] for key in ("answered", "failed", "share", "retries")]
    values = [*told["latency_s"].values(), *told.get("retries_by_error", {}).values()]
    return all(isinstance(each, int | float) for each in counts) and all(
        isinstance(each, int | float | None) for each in values
    )


_NUMBERS = (
    *("rows", "succeeded", "failed", "reused", "truncated", "unparsed", "retries"),
    *("elapsed_s", "requests_per_s", "rows_per_s", "tokens_per_s"),
    *("cost_usd", "cost_usd_upper_bound", "level"),
)
_TABLES = ("tokens", "latency_s", "queue_wait_s", "errors")


async def _scores(stores: Sequence[Store]) -> dict[str, Score]:
    sql = """
        WITH shared AS (
            SELECT
                entry.key AS name,
                total(entry.value) AS sum,
                total(entry.value * entry.value) AS squares,
                count(entry.value) AS n,
                count(*) FILTER (WHERE entry.value NOT IN (0, 1)) AS graded
            FROM rows, json_each(rows.scores) AS entry
            WHERE rows.scores IS NOT NULL AND entry.value IS NOT NULL
            GROUP BY entry.key, iif((SELECT value FROM meta WHERE name = 'dedupe') = 'true', ticket, position)
        )
        SELECT
            name,
            sum(sum) AS sum,
            sum(squares) AS squares,
            sum(n) AS n,
            sum(graded) AS graded,
            sum(n * n) AS alike
        FROM shared
        GROUP BY name
    """
    scores = {}
    for name, found in (await sums_by_name(stores, sql)).items():
        n = found["n"]
        mean = found["sum"] / n
        independent = effective_size(n, found["alike"])
        if found["graded"]:
            squares = found["squares"] - n * mean**2
            interval = clustered_mean_interval(mean, squares, n, independent) or _UNKNOWN
        else:
            interval = share_interval(mean * independent, independent)
        scores[name] = Score(mean=mean, n=n, low=interval.low, high=interval.high)
    return scores


_UNKNOWN = Interval(low=-math.inf, high=math.inf)


async def _latencies(stores: Sequence[Store]) -> list[float]:
    answered = f"{CURRENT} WHERE error_type IS NULL AND reused_from IS NULL"
    n = (await sums(stores, f"SELECT count(*) AS n {answered}"))["n"]
    if not n:
        return []
    places = sorted({round(step * (n - 1) / _QUANTILES) for step in range(_QUANTILES + 1)})
    found = await values_at(places, stores, f"SELECT service_time_s AS value {answered}")
    return [found[place] for place in places]


async def _rate(stores: Sequence[Store]) -> list[tuple[float, float]]:
    """The run's own answers per second over its time, the pauses between its sessions included; none of less than two
    seconds, of which there is no line."""
    first, last = await _span(stores)
    if last - first < 2:
        return []
    buckets = min(int(last - first), _BUCKETS)
    width = (last - first) / buckets
    sql = """
        SELECT min(CAST((settled_at - ?) / ? AS INTEGER), ?) AS name, count(*) AS n
        FROM answers
        WHERE reused_from IS NULL
        GROUP BY name
    """
    found = await sums_by_name(stores, sql, (first, width, buckets - 1))
    return [
        ((bucket + 0.5) * width, found[bucket]["n"] / width if bucket in found else 0.0) for bucket in range(buckets)
    ]


async def _last_answers(stores: Sequence[Store]) -> dict[str, float]:
    """When each deployment answered last: one that went away in the middle of the run is told by it."""
    sql = """
        SELECT deployment, max(settled_at) AS last
        FROM answers
        WHERE error_type IS NULL AND reused_from IS NULL AND deployment IS NOT NULL
        GROUP BY deployment
    """
    first, _ = await _span(stores)
    found: dict[str, float] = {}
    async for row in rows_of(stores, sql):
        found[row["deployment"]] = max(found.get(row["deployment"], 0.0), row["last"] - first)
    return found


async def _span(stores: Sequence[Store]) -> tuple[float, float]:
    """When the first and the last row were settled by being asked, Unix time; zeros where none was."""
    sql = "SELECT min(settled_at) AS first, max(settled_at) AS last FROM answers WHERE reused_from IS NULL"
    spans = [row async for row in rows_of(stores, sql) if row["first"] is not None]
    return (min(row["first"] for row in spans), max(row["last"] for row in spans)) if spans else (0.0, 0.0)


async def _failures(stores: Sequence[Store]) -> list[Failure]:
    sql = f"""
        SELECT error_type AS kind, count(*) AS n, min(rows.position) AS position, error_message AS message
        {CURRENT}
        WHERE error_type IS NOT NULL
        GROUP BY error_type
    """
    samples = samples_of(await stores[0].meta())
    found: dict[str, Failure] = {}
    async for row in rows_of(stores, sql):
        kind, index = row["kind"], row["position"] // samples
        failure = Failure(kind=kind, count=row["n"], index=index, message=row["message"] or "")
        if before := found.get(kind):
            failure = replace(min(before, failure, key=lambda each: each.index), count=before.count + failure.count)
        found[kind] = failure
    return sorted(found.values(), key=lambda failure: -failure.count)


async def _samples(stores: Sequence[Store]) -> list[dict[str, Any]]:
    rows = [row async for row in result_rows(*stores, limit=SAMPLES, failed=False)]
    rows += [row async for row in result_rows(*stores, limit=SAMPLES, failed=True)]
    return [orjson.loads(orjson.dumps(row)) for row in rows]
