"""Whether benchmarks and comparisons can be believed, against simulated servers of which all is known.

python scripts/bench.py capacity     # throughput at each level against min(level, slots) / service time
python scripts/bench.py capacity --slots 3 --service-s 0.1 --levels 1 2 3 4 8 --streamed
python scripts/bench.py client       # a server faster than the client: nothing may be recommended
python scripts/bench.py accuracy     # models of 70 % and 75 % on the same rows: does the interval hold the truth?
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from runner.bench import run_bench
from runner.bench.table import evidence, verdict_line
from runner.bench.verdict import Verdict
from runner.comparison import Difference, compare
from runner.config import (
    BenchConfig,
    DatasetConfig,
    DatasetKind,
    LimitsConfig,
    RunnerConfig,
    ScorerConfig,
    SimulatorConfig,
    TaskConfig,
    TaskKind,
    TrackerConfig,
    TrackerKind,
)
from runner.experiment import run_experiment

NO_TRACKER = TrackerConfig(kind=TrackerKind.none)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["capacity", "client", "accuracy"])
    parser.add_argument("--slots", type=int, help="of capacity: of this server alone")
    parser.add_argument("--service-s", type=float, default=0.25, help="of that server (default: %(default)s)")
    parser.add_argument("--levels", type=int, nargs="+", default=LEVELS, help="of that server")
    parser.add_argument("--streamed", action="store_true", help="ask that server for streams")
    parser.add_argument("--requests", type=int, default=100, help="of capacity, at each level (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=20, help="of accuracy (default: %(default)s)")
    given = parser.parse_args()
    own = [(given.slots, given.service_s, given.levels, given.streamed)] if given.slots else CAPACITIES
    with tempfile.TemporaryDirectory() as folder:
        match given.what:
            case "capacity":
                right = [capacity(Path(folder), *case, requests=given.requests) for case in own]
            case "client":
                right = [faster_than_the_client(Path(folder))]
            case _:
                right = [accuracy(Path(folder), given.seeds)]
    return 0 if all(right) else 1


LEVELS = [1, 2, 4, 8, 16, 32]

CAPACITIES = [(1, 0.25, LEVELS, False), (8, 0.25, LEVELS, False), (8, 0.25, LEVELS, True)]
CAPACITIES += [(100, 0.5, [*LEVELS, 100, 200], False)]
"""Slots, seconds of service, levels, and whether answers are streamed."""


def capacity(folder: Path, slots: int, service_s: float, levels: list[int], streamed: bool, *, requests: int) -> bool:
    """Measure a server whose throughput is min(level, slots) / service time."""
    print(f"\n{slots} slots, {service_s:g} s{', streamed' if streamed else ''}")
    with serving("--slots", str(slots), "--latency-s", str(service_s), "--latency-spread", "0") as url:
        config = benchmark(url, levels=levels, requests=requests)
        config = replace(config, request={"stream": streamed})
        report = asyncio.run(run_bench(config, folder / f"{slots}-{streamed}"))
    right = True
    for level in report.summary["bench"]["levels"]:
        expected = min(level["level"], slots) / service_s
        rate, p50 = level["requests_per_s"]["value"], level["latency_s"]["p50"]["value"]
        right = right and (level["level"] > 32 or abs(rate / expected - 1) <= 0.03)
        print(
            f"{level['level']:>5g}: {rate:7.2f}/s, expected {expected:6.1f}/s ({rate / expected - 1:+.1%}),"
            f" p50 {p50:.3f} s {level['audit']['limited_by'] or ''}"
        )
    verdict = show(report.summary["bench"]["recommendation"])
    return right and verdict.level == min((level for level in levels if level >= slots), default=max(levels))


def faster_than_the_client(folder: Path) -> bool:
    """Measure a server that answers at once."""
    with serving("--latency-s", "0", "--latency-spread", "0") as url:
        report = asyncio.run(run_bench(benchmark(url, levels=[8, 32, 128], requests=3000), folder))
    for level in report.summary["bench"]["levels"]:
        audit = level["audit"]
        print(
            f"{level['level']:>5g}: {level['requests_per_s']['value']:.0f}/s, limited by {audit['limited_by']}:", end=""
        )
        print(f" {'; '.join(audit['notes'])}")
    return show(report.summary["bench"]["recommendation"]).level is None


def accuracy(folder: Path, seeds: int) -> bool:
    """Compare models of 70 % and 75 % accuracy over 2,000 rows, and over 50."""
    differences = [[asyncio.run(difference(folder, seed, rows)) for seed in range(seeds)] for rows in (2000, 50)]
    covered = sum(0.05 in each.interval for each in differences[0] if each.interval)
    undecided = sum(not each.is_told for each in differences[1])
    print(f"2,000 rows: the interval holds the truth for {covered} of {seeds} seeds")
    print(f"50 rows: it cannot tell for {undecided} of {seeds} seeds")
    return covered >= 0.95 * seeds


async def difference(folder: Path, seed: int, rows: int) -> Difference:
    questions = folder / "questions.jsonl"
    lines = ({"question": f"What is word {n} of list {seed}?", "answer": f"word{n}"} for n in range(rows))
    questions.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    runs = []
    for name, right in (("a", 0.70), ("b", 0.75)):
        config = RunnerConfig(
            model=f"simulated/{name}",
            dataset=DatasetConfig(kind=DatasetKind.jsonl, path=str(questions)),
            prompt="{{ question }}",
            scorers={"accuracy": ScorerConfig(target="answer")},
            simulator=SimulatorConfig(seed=seed, latency_s=0.0, accuracy=right, answers=str(questions)),
            limits=LimitsConfig(concurrency=64),
            tracker=NO_TRACKER,
        )
        runs.append((name, folder / f"{seed}-{rows}-{name}"))
        await run_experiment(config, runs[-1][1])
    [comparison] = await compare(runs)
    return next(each for each in comparison.differences if each.figure == "score accuracy")


def benchmark(url: str, *, levels: list[int], requests: int) -> RunnerConfig:
    return RunnerConfig(
        task=TaskConfig(kind=TaskKind.bench),
        model="openai_like/simulated",
        api_base=url,
        prompt="Say hello.",
        bench=BenchConfig(levels=levels, requests=requests),
        tracker=NO_TRACKER,
    )


def show(recommendation: dict[str, object]) -> Verdict:
    verdict = Verdict.of(recommendation)
    print("\n".join([verdict_line(verdict), *evidence(verdict)]))
    return verdict


@contextmanager
def serving(*options: str) -> Iterator[str]:
    """A simulated server in a process of its own."""
    command = [sys.executable, "-m", "runner.simulator", "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield server.stdout.readline().split()[-1]
        server.terminate()


if __name__ == "__main__":
    sys.exit(main())
