"""limits.concurrency=auto against the best fixed window, over HTTP, at servers that it is told nothing about.

    python scripts/auto.py                              # all cases, some ten minutes
    python scripts/auto.py --case "64 slots" "wall 50"
    python scripts/benchmark.py auto                    # the same as the first

Prints a JSON line per case: tokens per second of the best of a few fixed windows, those of auto from its tenth second
on, their ratio, and the windows that auto had then. In a case with changes, each stretch is held against the best
fixed window for that server, from 15 seconds after the change on. The simulated provider is a process of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from runner.batch import run_batch
from runner.concurrency import Window
from runner.config import DeploymentConfig, LimitsConfig, RetryConfig, SimulatorConfig
from runner.stack import open_stack
from runner.tuner import Tuner
from runner.types import GenerationRequest

WARM_UP_S = 3.0
FIXED_S = 10.0
AUTO_FROM_S = 10.0
AUTO_S = 35.0
FOLLOWED_S = 15.0
"""How long auto has to follow a change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A server, and the fixed windows that are tried at it."""

    server: Mapping[str, Any]  # settings of the simulator
    fixed: Sequence[int]
    max_tokens: Sequence[int] = (24,)  # of the requests, in turn
    changes: Sequence[tuple[float, Mapping[str, Any], Sequence[int]]] = ()  # when, settings, fixed windows for them


CASES = {
    "1 slot": Case(server={"slots": 1, "latency_s": 0.1}, fixed=(1, 2)),
    "8 slots": Case(server={"slots": 8, "latency_s": 0.2}, fixed=(8, 12)),
    "64 slots": Case(server={"slots": 64, "latency_s": 0.5}, fixed=(64, 96)),
    "300 slots": Case(server={"slots": 300, "latency_s": 0.8}, fixed=(300, 400)),
    "64 slots, short and long answers": Case(
        server={"slots": 64, "ttft_s": 0.05, "itl_s": 0.005, "output_tokens": 256},
        fixed=(64, 96),
        max_tokens=(16, 16, 48, 16, 160, 16, 48, 256),
    ),
    "wall 50": Case(server={"max_in_flight": 50, "latency_s": 0.5}, fixed=(40, 45, 50)),
    "64, 16, 64 slots": Case(
        server={"slots": 64, "latency_s": 0.5},
        fixed=(64, 96),
        changes=((30.0, {"slots": 16}, (16, 24)), (60.0, {"slots": 64}, (64, 96))),
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help=", ".join(CASES))
    for name in parser.parse_args(argv).case:
        print(json.dumps({"case": name, **asyncio.run(compare(CASES[name]))}), flush=True)


async def compare(case: Case) -> dict[str, Any]:
    stretches = [(AUTO_FROM_S, case.server, case.fixed)]
    stretches += [(when + FOLLOWED_S, {**case.server, **settings}, fixed) for when, settings, fixed in case.changes]
    ends = [*(when for when, _, _ in case.changes), stretches[-1][0] + AUTO_S - AUTO_FROM_S]
    auto = await load(case, LimitsConfig(concurrency="auto"), seconds=ends[-1], changes=case.changes)
    lines = []
    for (begin, settings, fixed), end in zip(stretches, ends, strict=True):
        rates = {window: await fixed_rate(case, settings, window) for window in fixed}
        best = max(rates, key=rates.__getitem__)
        windows = auto.windows(begin, end)
        line = {
            "best_fixed": {"window": best, "tokens_per_s": round(rates[best])},
            "auto": {"windows": [min(windows), max(windows)], "tokens_per_s": round(auto.rate(begin, end))},
            "auto/best_fixed": round(auto.rate(begin, end) / rates[best], 3),
        }
        lines.append(line)
    return {**lines[0], **({"then": lines[1:]} if lines[1:] else {}), "last_window": auto.seen[-1][1]}


async def fixed_rate(case: Case, settings: Mapping[str, Any], window: int) -> float:
    server = Case(server=settings, fixed=(), max_tokens=case.max_tokens)
    done = await load(server, LimitsConfig(concurrency=window), seconds=WARM_UP_S + FIXED_S)
    return done.rate(WARM_UP_S, WARM_UP_S + FIXED_S)


@dataclass(slots=True)
class Load:
    """What came of a load, in seconds since its begin."""

    answers: list[tuple[float, int]] = field(default_factory=list)  # when, tokens
    seen: list[tuple[float, int]] = field(default_factory=list)  # when, window

    def rate(self, begin: float, end: float) -> float:
        return sum(tokens for when, tokens in self.answers if begin <= when < end) / (end - begin)

    def windows(self, begin: float, end: float) -> list[int]:
        return [window for when, window in self.seen if begin <= when < end]


async def load(
    case: Case,
    limits: LimitsConfig,
    *,
    seconds: float,
    changes: Sequence[tuple[float, Mapping[str, Any], Sequence[int]]] = (),
) -> Load:
    """Keep a server of its own busy for so long."""
    with simulator(case.server) as url:
        window = Window.of(limits)
        client = open_stack(
            {"m": DeploymentConfig(model="openai_like/m", api_base=url)},
            limits=limits,
            retry=RetryConfig(max_retries=100),
            simulator=SimulatorConfig(),
            window=window,
            tuner=Tuner.of(limits, window),
        )
        done = Load()
        numbers = itertools.count()
        began = time.perf_counter()

        def elapsed_s() -> float:
            return time.perf_counter() - began

        async def chunks() -> AsyncIterator[Sequence[int]]:
            while elapsed_s() < seconds:
                yield list(itertools.islice(numbers, 256))

        async def ask(number: int) -> None:
            if elapsed_s() < seconds:
                params = {"max_tokens": case.max_tokens[number % len(case.max_tokens)]}
                response = await client.send(GenerationRequest(input=f"Question {number}", params=params))
                done.answers.append((elapsed_s(), response.usage.completion_tokens if response.usage else 0))

        async def watch() -> None:
            while True:
                done.seen.append((elapsed_s(), window.limit))
                await asyncio.sleep(0.1)

        async def change() -> None:
            for when, settings, _ in changes:
                await asyncio.sleep(when - elapsed_s())
                root = url.removesuffix("/v1")
                async with (
                    aiohttp.ClientSession() as session,
                    session.post(f"{root}/settings", json=settings) as answer,
                ):
                    answer.raise_for_status()

        others = [asyncio.create_task(watch()), asyncio.create_task(change())]
        await run_batch(chunks(), ask, window=window)
        for other in others:
            other.cancel()
        await client.aclose()
        return done


@contextmanager
def simulator(settings: Mapping[str, Any]) -> Iterator[str]:
    """The URL of a simulated provider, which ends with the block."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", "runner.simulator", "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield server.stdout.readline().split()[-1]
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
