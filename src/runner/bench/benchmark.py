"""A benchmark: levels of load on a server, measured one after the other, and what follows from them.

Each level and repeat that is complete stays in the run's folder and is not measured again; one that was cut short is
measured anew.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, closing, suppress
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import orjson

from runner.bench.ladder import first_levels, interleaved, next_level
from runner.bench.levels import LevelFacts, Mode, Within, level_facts
from runner.bench.load import MOST_IN_FLIGHT, ClosedLoop, Extent, Load, OpenLoop
from runner.bench.questions import Questions
from runner.bench.records import MEASUREMENTS, Records, Sample
from runner.bench.table import level_line
from runner.bench.verdict import Verdict, verdict_on
from runner.checks import check
from runner.concurrency import Window
from runner.config import Resume, RunnerConfig, SloConfig, replicas
from runner.database import RUN_DATABASE, lock_folder
from runner.errors import FINISHED, SOME_FAILED, STOPPED, ConfigError, Interrupted, RunStopped, SystemicError
from runner.experiment import Report
from runner.identity import WorkloadHasher, dump_json, run_id
from runner.metrics import Meter, Snapshot
from runner.progress import Progress, open_progress
from runner.results import replace_file
from runner.signals import handled_signals
from runner.stack import stack_of
from runner.sweep import Sweep
from runner.tracker import Ending, Tracker, tracking
from runner.transports import check_addresses
from runner.types import Client, TokenUsage
from runner.workload import Workload

_REDRAW_S = 0.2

_LOOKED_AT = 1000
"""Inputs that the identity of a workload is made of."""


async def run_bench(config: RunnerConfig, folder: Path, *, settings: Mapping[str, Any] | None = None) -> Report:
    """Run the benchmark that ``config`` describes in ``folder``, or go on with the one that is there.

    ``bench.json`` and ``summary.json`` are written at the end, however it comes; the requests are in ``measurements``.

    Args:
        settings: The composed configuration as plain data, for the tracker, which removes secrets from it.

    Raises:
        ConfigError: The configuration or the dataset cannot be used. Nothing was sent.
        StoreError: The folder is in use.
    """
    check(config)
    workload = Workload(config)
    workload.check()
    # Nobody waits for this window: a request keeps its place in the load while it waits.
    client = stack_of(config, Window(MOST_IN_FLIGHT))
    with lock_folder(folder / RUN_DATABASE):
        benchmark = Benchmark(config, workload, client, folder=folder)
        async with tracking(config, folder, settings) as tracker:
            try:
                reason = await _carry_out(benchmark, config, tracker)
            finally:
                await client.aclose()
        report = _conclude(benchmark, config, workload, folder, reason)
    await tracker.finish(
        Ending(
            summary=report.summary,
            artifacts=[folder / "bench.json", folder / "summary.json"],
            exit_code=report.exit_code,
        )
    )
    return report


class Benchmark:
    """One invocation of a benchmark at work.

    Args:
        folder: The run's.
    """

    def __init__(self, config: RunnerConfig, workload: Workload, client: Client, *, folder: Path) -> None:
        self._meter = Meter()
        self.levels: dict[float, LevelFacts] = {}
        self._config = config
        self._mode = Mode.closed if config.bench.rate is None else Mode.open
        self._first = first_levels(config.bench, config.limits.concurrency)
        self._load: Load = ClosedLoop() if self._mode is Mode.closed else OpenLoop(arrivals=config.bench.arrivals)
        self._level = 0.0  # under way
        self._folder = folder
        self._questions = Questions(config, workload, client)
        self._records = Records(folder / MEASUREMENTS, fingerprint=run_id(config))
        if config.resume is Resume.fresh:
            self._records.forget()
        self._spans = self._records.spans()
        if config.resume is Resume.require and not self._spans:
            raise ConfigError(f"resume=require, but {folder} holds no earlier measurement: use resume=auto")
        for level in {level for level, _ in self._spans}:
            self.levels[level] = self._facts(level)
        self._total = self._count()

    @property
    def is_complete(self) -> bool:
        """Whether there is nothing to measure any more."""
        return next(self._missing(), None) is None

    async def measure(self, progress: Progress, tracker: Tracker) -> None:
        """Measure what is missing.

        Raises:
            SystemicError: Every request fails in a way that no waiting heals, or nothing can be written.
        """
        try:
            await self._measure(progress, tracker)
        except OSError as error:
            raise SystemicError(
                f"what was measured cannot be kept ({error.strerror or error}): {self._folder}"
            ) from None

    def snapshot(self) -> Snapshot:
        """Of the requests that are measured; how many they will be is not known of an adaptive ladder."""
        in_flight = self._load.in_flight
        window = int(self._level) if self._mode is Mode.closed else in_flight
        return self._meter.snapshot(total=self._total, in_flight=in_flight, window=window)

    def verdict(self) -> Verdict:
        return verdict_on(list(self.levels.values()), self._config.bench)

    async def _measure(self, progress: Progress, tracker: Tracker) -> None:
        bench = self._config.bench
        load = self._load
        extent = Extent(warmup=bench.warmup, requests=bench.requests, duration_s=bench.duration)
        async with load:
            for level, repeat in self._missing():
                self._questions.begin()
                self._level = level
                with self._records.writing(level, repeat) as writer:

                    def take(sample: Sample) -> None:
                        writer.add(sample)
                        self._note(sample)

                    span = await load.measure(level, repeat, ask=self._questions.ask, extent=extent, take=take)
                    writer.end(span)
                self._spans[level, repeat] = span
                self.levels[level] = self._facts(level)
                progress.note(level_line(self.levels[level]))
                tracker.log(_point(self.levels[level]))

    def _missing(self) -> Iterator[tuple[float, int]]:
        """What is still to be measured, each level and repeat after the other; looks at what was."""
        bench, levels = self._config.bench, self._first
        if levels is None:  # by first measurements alone, so that it goes on as it began
            ladder = {level: self._facts(level, repeats=1) for level, repeat in self._spans if repeat == 1}
            while (level := next_level(ladder, bench)) is not None:
                yield level, 1
                ladder[level] = self._facts(level, repeats=1)
            levels = sorted(ladder)
        for level, repeat in interleaved(levels, bench.repeats):
            if (level, repeat) not in self._spans:
                yield level, repeat

    def _facts(self, level: float, *, repeats: int | None = None) -> LevelFacts:
        """What was measured at a level, in the first so many repeats or in all."""
        measurements = [
            (self._spans[each, repeat], self._records.samples(each, repeat))
            for each, repeat in sorted(self._spans)
            if each == level and (repeats is None or repeat <= repeats)
        ]
        return level_facts(self._mode, measurements, within=_within(self._config.bench.slo))

    def _count(self) -> int | None:
        bench = self._config.bench
        if self._first is None or bench.requests is None:
            return None
        return sum(1 for _ in self._missing()) * bench.requests

    def _note(self, sample: Sample) -> None:
        self._meter.retried(sample.retries)
        if sample.error is not None:
            self._meter.failed(sample.error)
            return
        usage = None
        if sample.completion_tokens is not None:
            prompt = sample.prompt_tokens or 0
            usage = TokenUsage(
                prompt_tokens=prompt,
                completion_tokens=sample.completion_tokens,
                total_tokens=prompt + sample.completion_tokens,
                cached_tokens=sample.cached_tokens,
            )
        self._meter.answered(
            usage,
            cost_usd=sample.cost_usd,
            latency_s=sample.latency_s,
            queue_wait_s=sample.queue_wait_s,
        )


async def _carry_out(benchmark: Benchmark, config: RunnerConfig, tracker: Tracker) -> RunStopped | None:
    """Measure until all is there, or until something ends it: then why."""
    if benchmark.is_complete:
        return None
    await check_addresses(replicas(config))
    reason: RunStopped | None = None
    async with _shown(benchmark, config, tracker) as progress:
        measuring = asyncio.ensure_future(_in_turn(benchmark.measure(progress, tracker), config))

        def on_signal(signum: int) -> None:
            nonlocal reason
            reason = reason or Interrupted(signum)
            measuring.cancel()

        with handled_signals(on_signal):
            try:
                await measuring
            except RunStopped as stop:
                reason = stop
            except asyncio.CancelledError:
                if reason is None:
                    raise
    return reason


async def _in_turn(measuring: Coroutine[Any, Any, None], config: RunnerConfig) -> None:
    """Measure while no other cell of the sweep does: they would measure each other."""
    with closing(measuring):
        async with AsyncExitStack() as turn:
            if config.sweep.folder is not None and config.bench.take_turns:
                await turn.enter_async_context(Sweep(Path(config.sweep.folder)).turn())
            await measuring


@asynccontextmanager
async def _shown(benchmark: Benchmark, config: RunnerConfig, tracker: Tracker) -> AsyncIterator[Progress]:
    """Keep progress and the tracker's time series up to date."""
    progress = open_progress(config.name)
    for facts in sorted(benchmark.levels.values(), key=lambda facts: facts.level):
        progress.note(f"{level_line(facts)}  (measured before)")
    ticker = asyncio.create_task(_tick(benchmark, progress, tracker, config.tracker.log_every_s))
    try:
        yield progress
    finally:
        ticker.cancel()
        await asyncio.wait([ticker])
        progress.update(benchmark.snapshot())
        progress.close()


async def _tick(benchmark: Benchmark, progress: Progress, tracker: Tracker, log_every_s: float) -> None:
    logged = time.monotonic()
    while True:
        await asyncio.sleep(_REDRAW_S)
        snapshot = benchmark.snapshot()
        progress.update(snapshot)
        if time.monotonic() - logged >= log_every_s:
            logged = time.monotonic()
            tracker.log(snapshot.as_series())


def _conclude(
    benchmark: Benchmark, config: RunnerConfig, workload: Workload, folder: Path, reason: RunStopped | None
) -> Report:
    """Write what was found."""
    levels = sorted(benchmark.levels.values(), key=lambda facts: facts.level)
    verdict = benchmark.verdict() if levels else None
    bench = {
        **_identity(config, workload),
        "levels": [facts.as_json() for facts in levels],
        "recommendation": verdict and verdict.as_json(),
    }
    ended = {"stopped": reason.reason if reason else None, "why": str(reason) if reason else None}
    summary = {**_summary(levels, verdict), **ended, "bench": bench}
    with suppress(OSError):
        settings = {**asdict(config.bench), "model": config.model}
        replace_file(folder / "bench.json", orjson.dumps({**bench, "settings": settings}, option=orjson.OPT_INDENT_2))
        replace_file(folder / "summary.json", orjson.dumps(summary, option=orjson.OPT_INDENT_2))
    if isinstance(reason, Interrupted):
        exit_code = 128 + reason.signum
    elif reason is not None:
        exit_code = STOPPED
    else:
        exit_code = SOME_FAILED if summary["failed"] else FINISHED
    return Report(exit_code=exit_code, summary=summary, message=str(reason) if reason else None)


def _summary(levels: list[LevelFacts], verdict: Verdict | None) -> dict[str, Any]:
    """The figures that every run has. Rates and latencies are those of ``level``, the recommended or the fastest."""
    costs = [facts.cost_usd for facts in levels if facts.cost_usd is not None]
    errors: dict[str, int] = {}
    for facts in levels:
        for kind, number in facts.errors.items():
            errors[kind] = errors.get(kind, 0) + number
    tokens = {kind: sum(facts.tokens[kind] for facts in levels) for kind in ("prompt", "completion", "cached")}
    requests, failed = sum(facts.requests for facts in levels), sum(facts.failed for facts in levels)
    summary: dict[str, Any] = {
        "rows": requests,
        "succeeded": requests - failed,
        "failed": failed,
        "reused": 0,
        "tokens": {**tokens, "total": tokens["prompt"] + tokens["completion"], "reasoning": 0},
        "cost_usd": sum(costs) if costs else None,
        "elapsed_s": sum(facts.elapsed_s for facts in levels),
        "requests_per_s": None,
        "tokens_per_s": None,
        "retries": sum(facts.retries for facts in levels),
        "errors": errors,
        "scores": {},
    }
    chosen = [facts for facts in levels if verdict is not None and facts.level == verdict.level]
    if shown := chosen or sorted(levels, key=lambda facts: facts.requests_per_s.value)[-1:]:
        [facts] = shown
        summary["level"] = facts.level
        summary["requests_per_s"] = facts.requests_per_s.value
        summary["tokens_per_s"] = sum(facts.tokens_per_s.values()) if facts.tokens_per_s else None
        for name in ("latency_s", "queue_wait_s"):
            summary[name] = {key: figure and figure.value for key, figure in getattr(facts, name).items()}
    return summary


def _identity(config: RunnerConfig, workload: Workload) -> dict[str, str]:
    """The rows and how they are asked about, as a hash: benchmarks with the same one are compared. And the inputs."""
    hasher = WorkloadHasher()
    for item in islice(workload.items(), _LOOKED_AT):
        hasher.add(item.fields, item.input)
    params = {key: value for key, value in config.request.items() if key != "timeout"}
    facts = hasher.facts
    asked = [facts["rows"], params, config.bench.cache.value, config.endpoint.value, workload.task.group_size]
    return {"workload": hashlib.blake2b(dump_json(asked), digest_size=8).hexdigest(), "inputs": facts["inputs"]}


def _within(slo: SloConfig) -> Within:
    """The strictest limit that ``slo`` sets for each latency, on a single request."""

    def strictest(what: str) -> float:
        limits = [getattr(slo, name) for name in slo.__dataclass_fields__ if name.startswith(f"{what}_p")]
        return min((limit for limit in limits if limit is not None), default=float("inf"))

    return Within(latency_s=strictest("latency"), ttft_s=strictest("ttft"), itl_s=strictest("itl"))


def _point(facts: LevelFacts) -> dict[str, float]:
    """A level as a point of the tracker's time series."""
    point = {"level": facts.level, "requests_per_s": facts.requests_per_s.value, "failed": float(facts.failed)}
    for percent in (50, 95, 99):
        figure = facts.percentile("latency_s", percent)
        if figure is not None:
            point[f"latency_p{percent}_s"] = figure.value
    return {f"bench/{key}": value for key, value in point.items()}
