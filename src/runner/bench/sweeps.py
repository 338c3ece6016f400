"""Benchmarks of a sweep: one level a cell, or a benchmark a cell, gathered when the cells have ended."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import orjson

from runner.bench.levels import LevelFacts
from runner.bench.records import MEASUREMENTS, Records
from runner.bench.verdict import Verdict, verdict_on
from runner.comparison import FAILED, Comparison, Pairs
from runner.config import BenchConfig, SloConfig
from runner.results import replace_file
from runner.sweep import Cell

BENCHMARK = "bench.json"
"""What a benchmark writes into its folder, and a sweep of benchmarks into its own."""

_LEVEL_KEY = re.compile(r"(?:^|(?<= ))(?:limits\.concurrency|bench\.rate|bench\.levels)=\S+ ?")
"""What the level of a cell is set with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """The levels of the cells that differ in nothing but their level, as of one benchmark."""

    name: str  # what these cells have in common and others have not; empty where there are no others
    levels: Sequence[LevelFacts]
    verdict: Verdict
    folders: Mapping[float, Path]  # of the run that measured each level
    workload: str  # identity of the rows, and of how they were asked about
    inputs: str  # identity of what was asked about them


def gather(cells: Sequence[Cell]) -> list[Gathered]:
    """The benchmarks that ``cells`` make up; none where no cell is a benchmark."""
    groups: dict[str, dict[float, tuple[LevelFacts, Cell]]] = {}
    for cell in cells:
        for stored in (cell.summary.get("bench") or {}).get("levels", ()):
            facts = LevelFacts.of(stored)
            groups.setdefault(_LEVEL_KEY.sub("", cell.name).strip(), {})[facts.level] = facts, cell
    return [_gathered(name, dict(sorted(levels.items()))) for name, levels in groups.items()]


def compare_benchmarks(gathered: Sequence[Gathered]) -> list[Comparison]:
    """Each benchmark against the first one, level by level, row by row."""
    return [comparison for other in gathered[1:] for comparison in _compare(gathered[0], other)]


def write_gathered(gathered: Sequence[Gathered], path: Path) -> None:
    """Write them as JSON: by name, the levels and the recommendation."""
    content = {
        each.name: {
            "levels": [facts.as_json() for facts in each.levels],
            "recommendation": each.verdict.as_json(),
        }
        for each in gathered
    }
    replace_file(path, orjson.dumps(content, option=orjson.OPT_INDENT_2))


def _gathered(name: str, levels: Mapping[float, tuple[LevelFacts, Cell]]) -> Gathered:
    facts = [facts for facts, _ in levels.values()]
    folders = {level: Path(cell.folder) for level, (_, cell) in levels.items()}
    first = next(iter(levels.values()))[1]
    return Gathered(
        name=name,
        levels=facts,
        verdict=verdict_on(facts, _settings(Path(first.folder))),
        folders=folders,
        workload=first.summary["bench"]["workload"],
        inputs=first.summary["bench"]["inputs"],
    )


def _compare(first: Gathered, second: Gathered) -> Iterator[Comparison]:
    names = Comparison(first=first.name, second=second.name, same_prompts=first.inputs == second.inputs)
    if first.workload != second.workload:
        yield replace(names, refusal="their workloads differ: compare benchmarks with the same rows and parameters")
        return
    for level in sorted(first.folders.keys() & second.folders.keys()):
        rows, others = (_rows(each.folders[level], level) for each in (first, second))
        pairs = Pairs()
        for row in sorted(rows.keys() & others.keys()):
            pairs.add(rows[row], others[row])
        at = f"at {level:g}"
        yield replace(names, first=f"{first.name} {at}", second=f"{second.name} {at}", differences=pairs.differences())


def _rows(folder: Path, level: float) -> dict[int, dict[str, list[float]]]:
    """What was measured of each row of the dataset at a level."""
    records = Records(folder / MEASUREMENTS)
    rows: dict[int, dict[str, list[float]]] = {}
    for each, repeat in sorted(records.spans()):
        for sample in records.samples(level, repeat) if each == level else ():
            values = rows.setdefault(sample.row, {})
            values.setdefault(FAILED, []).append(float(sample.error is not None))
            for name in _FIGURES if sample.error is None else ():
                if (value := getattr(sample, name)) is not None:
                    values.setdefault(name, []).append(float(value))
    return rows


_FIGURES = ("latency_s", "ttft_s", "itl_s", "prompt_tokens", "completion_tokens", "cost_usd")


def _settings(folder: Path) -> BenchConfig:
    """How a cell was told to judge."""
    try:
        settings = orjson.loads((folder / BENCHMARK).read_bytes())["settings"]
        return BenchConfig(plateau=settings["plateau"], rate=settings["rate"], slo=SloConfig(**settings["slo"]))
    except (OSError, ValueError, KeyError, TypeError):
        return BenchConfig()
