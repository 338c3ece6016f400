"""The overview of a sweep: a run of its own in W&B, with the cells in a table, beside the cells' runs in one group."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from runner.bench.levels import LevelFacts
from runner.bench.sweeps import BENCHMARK, Gathered
from runner.composition import load_environment, of_run
from runner.config import RunnerConfig, TrackerKind
from runner.errors import FINISHED, SOME_FAILED, RunnerError
from runner.report import RunFacts, charts_of, read_benchmarks, read_runs
from runner.sweep import Cell, Sweep
from runner.tracker import Ending, Identity, Table, flat, group_of, open_tracker

logger = logging.getLogger(__name__)


def track_sweep(sweep: Sweep, *, exit_code: int) -> None:
    """Track a multirun that has ended. Raises nothing, and takes ``tracker.finish_timeout_s`` at most."""
    cells = sweep.cells()
    configs = list(_configs(cells))
    if not configs or configs[0].tracker.kind is TrackerKind.none:
        return
    with _said():
        try:
            load_environment(configs[0].env_file)
            asyncio.run(_track(sweep, cells, configs, exit_code))
        except KeyboardInterrupt:
            logger.warning("W&B has no overview of this sweep: interrupted")
        except Exception as error:
            logger.warning("W&B has no overview of this sweep: %s: %s", type(error).__name__, error)


async def _track(sweep: Sweep, cells: Sequence[Cell], configs: Sequence[RunnerConfig], exit_code: int) -> None:
    began = time.monotonic()
    config = configs[0].tracker
    try:
        async with asyncio.timeout(config.finish_timeout_s / 2):
            runs = await read_runs([sweep.folder])
    except (RunnerError, TimeoutError) as error:
        logger.warning("the sweep's run in W&B has no charts: %s", error or "its cells took too long to read")
        runs = []
    group = group_of(sweep)
    tracker = open_tracker(
        replace(config, finish_timeout_s=max(0.0, config.finish_timeout_s - (time.monotonic() - began))),
        folder=sweep.folder,
        identity=Identity(run_id=group, name=group, group=group, job_type="sweep"),
        settings=_in_common([asdict(each) for each in configs]),
        away=sweep.wandb_is_away,
    )
    benchmarks = read_benchmarks(runs)
    await tracker.finish(
        Ending(
            summary={**_totals(cells), "recommended": _recommended(benchmarks)},
            tables={"cells": cell_table(cells, runs), **({"levels": _level_table(benchmarks)} if benchmarks else {})},
            charts=charts_of(runs),
            artifacts=[sweep.folder / BENCHMARK],
            exit_code=exit_code,
        )
    )


def cell_table(cells: Sequence[Cell], runs: Sequence[RunFacts]) -> Table:
    """A row a cell: the keys that set it apart, how it ended and why, and its summary in W&B's keys."""
    overrides = {run.folder: run.overrides for run in runs}
    set_by = [overrides.get(Path(cell.folder), {}) for cell in cells]
    swept = [key for key in _keys(set_by) if len({each.get(key) for each in set_by}) > 1]
    summaries = [_figures(cell) for cell in cells]
    figures = _keys(summaries)
    return Table(
        columns=["cell", *swept, "exit_code", "message", *figures],
        rows=[
            [
                cell.number,
                *(_read(each.get(key)) for key in swept),
                cell.exit_code,
                cell.message,
                *map(summary.get, figures),
            ]
            for cell, each, summary in zip(cells, set_by, summaries, strict=True)
        ],
    )


def _configs(cells: Sequence[Cell]) -> Iterator[RunnerConfig]:
    """Those of the cells that had one."""
    for cell in cells:
        try:
            yield of_run(Path(cell.folder))
        except (RunnerError, OSError, ValueError):
            continue


def _in_common(settings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The settings of all cells: where they differ, a list of the values that there are."""
    common: dict[str, Any] = {}
    for key in _keys(settings):
        values = [each.get(key) for each in settings]
        if all(isinstance(value, Mapping) for value in values):
            common[key] = _in_common(values)  # type: ignore[arg-type]
        else:
            distinct = [value for place, value in enumerate(values) if value not in values[:place]]
            common[key] = distinct[0] if len(distinct) == 1 else distinct
    return common


def _totals(cells: Sequence[Cell]) -> dict[str, Any]:
    """What the cells add up to, under the keys of a summary."""
    summaries = [cell.summary for cell in cells]
    totals: dict[str, Any] = {
        "cells": len(cells),
        "cells_failed": sum(cell.exit_code not in (FINISHED, SOME_FAILED) for cell in cells),
    }
    for key in ("rows", "succeeded", "failed", "reused", "retries", "cost_usd", "elapsed_s"):
        known = [summary[key] for summary in summaries if summary.get(key) is not None]
        totals[key] = sum(known) if known else None
    for key in ("tokens", "errors"):
        total: Counter[str] = Counter()
        for summary in summaries:
            total.update({name: count for name, count in (summary.get(key) or {}).items() if count})
        totals[key] = dict(total)
    return totals


def _recommended(benchmarks: Sequence[Gathered]) -> dict[str, float]:
    return {each.name or "level": each.verdict.level for each in benchmarks if each.verdict.level is not None}


def _level_table(benchmarks: Sequence[Gathered]) -> Table:
    """A row a level of each benchmark."""
    rows = [{"benchmark": each.name, **_level(facts)} for each in benchmarks for facts in each.levels]
    columns = _keys(rows)
    return Table(columns=columns, rows=[[row.get(column) for column in columns] for row in rows])


def _level(facts: LevelFacts) -> dict[str, Any]:
    interval = facts.requests_per_s.interval
    row: dict[str, Any] = {
        "level": facts.level,
        "requests": facts.requests,
        "failed": facts.failed,
        "requests_per_s": facts.requests_per_s.value,
        "requests_per_s_low": interval and interval.low,
        "requests_per_s_high": interval and interval.high,
        "completion_tokens_per_s": facts.tokens_per_s and facts.tokens_per_s["completion"],
        "completion_tokens_per_s_per_user": facts.tokens_per_s_per_user,
        "cost_usd": facts.cost_usd,
        "limited_by": facts.audit.limited_by,
    }
    for what in ("latency_s", "service_time_s", "queue_wait_s", "ttft_s", "itl_s"):
        for percent in (50, 95, 99):
            figure = facts.percentile(what, percent)
            row[f"{what.removesuffix('_s')}_p{percent}_s"] = figure and figure.value
    return row


def _keys(records: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for record in records for key in record))


def _figures(cell: Cell) -> dict[str, Any]:
    """Its summary without what does not fit a table's cell, and without the share of each deployment."""
    whole = {key: value for key, value in cell.summary.items() if key != "deployments"}
    return {key: value for key, value in flat(whole).items() if isinstance(value, str | bool | int | float)}


def _read(value: str | None) -> Any:
    """The value of an override: a number, a truth or a text where it is one, otherwise as it is written."""
    try:
        read = yaml.safe_load(value or "")
    except yaml.YAMLError:
        return value
    return read if isinstance(read, str | bool | int | float) else value


@contextmanager
def _said() -> Iterator[None]:
    """Show on stderr what the tracker says: no run's log is open any more."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    spoken = logging.getLogger("runner")
    level, propagates = spoken.level, spoken.propagate
    spoken.addHandler(handler)
    spoken.setLevel(logging.INFO)
    spoken.propagate = False
    try:
        yield
    finally:
        spoken.removeHandler(handler)
        spoken.setLevel(level)
        spoken.propagate = propagates
