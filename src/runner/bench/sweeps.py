"""Benchmarks of a sweep: one level a cell, or a benchmark a cell, gathered when the cells have ended."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson

from runner.bench.levels import LevelFacts
from runner.bench.verdict import Verdict, verdict_on
from runner.config import BenchConfig, SloConfig
from runner.results import replace_file
from runner.sweep import Cell

_LEVEL_KEY = re.compile(r"(?:^|(?<= ))(?:limits\.concurrency|bench\.rate|bench\.levels)=\S+ ?")
"""What the level of a cell is set with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """The levels of the cells that differ in nothing but their level, as of one benchmark."""

    name: str  # what these cells have in common and others have not; empty where there are no others
    levels: Sequence[LevelFacts]
    verdict: Verdict


def gather(cells: Sequence[Cell]) -> list[Gathered]:
    """The benchmarks that ``cells`` make up; none where no cell is a benchmark."""
    groups: dict[str, tuple[dict[float, LevelFacts], BenchConfig]] = {}
    for cell in cells:
        bench = cell.summary.get("bench")
        if not bench or not bench["levels"]:
            continue
        name = _LEVEL_KEY.sub("", cell.name).strip()
        levels, _ = groups.setdefault(name, ({}, _settings(Path(cell.folder))))
        for stored in bench["levels"]:
            facts = LevelFacts.of(stored)
            levels[facts.level] = facts
    return [
        Gathered(
            name=name,
            levels=[levels[level] for level in sorted(levels)],
            verdict=verdict_on(list(levels.values()), settings),
        )
        for name, (levels, settings) in groups.items()
    ]


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


def _settings(folder: Path) -> BenchConfig:
    """How a cell was told to judge."""
    try:
        settings = orjson.loads((folder / "bench.json").read_bytes())["settings"]
        return BenchConfig(plateau=settings["plateau"], rate=settings["rate"], slo=SloConfig(**settings["slo"]))
    except (OSError, ValueError, KeyError, TypeError):
        return BenchConfig()
