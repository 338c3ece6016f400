"""The limits in real time: what a provider's sliding minute sees of us.

    python scripts/limits.py simulator                   # ten minutes against the simulator's own limits
    python scripts/limits.py simulator --over 1.2        # with limits that are set 20 % too high
    python scripts/limits.py share --by file             # four processes, one of which is killed
    python scripts/limits.py share --by redis            # and Redis is stopped for ten seconds
    python scripts/limits.py ray                         # four workers of Ray share one limit through Redis

Prints a JSON line. `share` measures where requests are granted; ``most_in_a_minute`` is over all processes. In `ray`
the judge is the simulator: what it served in each sliding minute.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from runner import LMClient, RateLimiter
from runner.config import DeploymentConfig, LimitsConfig, Shared, SimulatorConfig
from runner.sharing import open_shared
from runner.simulator import Simulator
from runner.types import TokenUsage
from trial.world import Redis

KILLED_AT, STOPPED_AT, STOPPED_S = 0.4, 0.6, 10.0
"""Shares of the time after which one process is killed, and Redis is stopped; and for how long that is."""


def main() -> None:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["simulator", "share", "ray", "process"])
    parser.add_argument("--seconds", type=float, default=None)
    parser.add_argument("--rpm", type=int, default=None)
    parser.add_argument("--tpm", type=int, default=100_000)
    parser.add_argument("--over", type=float, default=1.0, help="our limits, as a share of the simulator's")
    parser.add_argument("--by", choices=["file", "redis"], default="file")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="where a process shares limits and writes down its grants")
    parser.add_argument("--redis-url", default="", help="where it shares them instead")
    arguments = parser.parse_args()
    if arguments.what == "simulator":
        print(json.dumps(asyncio.run(simulator(arguments))))
    elif arguments.what == "share":
        print(json.dumps(share(arguments)))
    elif arguments.what == "ray":
        print(json.dumps(asyncio.run(ray(arguments))))
    else:
        asyncio.run(process(arguments))


async def simulator(arguments: argparse.Namespace) -> dict[str, Any]:
    """Requests of mixed sizes, as many as get through."""
    seconds, rpm, tpm = arguments.seconds or 600.0, arguments.rpm or 600, arguments.tpm
    choice = random.Random(1)
    async with Simulator(SimulatorConfig(rpm=rpm, tpm=tpm, latency_s=0.5)) as provider:
        client = LMClient(
            model="openai/simulated",
            api_base=provider.url,
            api_key="none",
            rpm=rpm * arguments.over,
            tpm=tpm * arguments.over,
            max_parallel_requests=64,
        )
        failed = asked = 0

        async def work() -> None:
            nonlocal failed, asked
            while True:
                words = choice.choice([10, 60, 400])
                try:
                    await client.agenerate("word " * words, max_tokens=words)
                    asked += words
                except Exception:
                    failed += 1

        workers = [asyncio.create_task(work()) for _ in range(64)]
        await asyncio.sleep(seconds)
        totals = await ledger(provider)
        for worker in workers:
            worker.cancel()
        await asyncio.wait(workers)
        await client.aclose()
    answered, refused = totals["by_status"].get("200", 0), totals["by_status"].get("429", 0)
    return {
        "name": f"simulator, limits times {arguments.over:g}",
        "seconds": seconds,
        "answered": answered,
        "refused": refused,
        "failed": failed,
        "requests_used": round(answered / (rpm * seconds / 60), 4),
        "tokens_used": round((totals["tokens"]["prompt"] + asked) / (tpm * seconds / 60), 4),
        "wasted": round(refused / max(1, answered), 4),
    }


async def ledger(provider: Simulator) -> dict[str, Any]:
    import aiohttp

    async with aiohttp.ClientSession() as session, session.get(f"{provider.url.removesuffix('/v1')}/ledger") as answer:
        totals: dict[str, Any] = await answer.json()
        return totals


def share(arguments: argparse.Namespace) -> dict[str, Any]:
    """Processes that share a limit; one of them is killed with -9, and Redis is stopped and started again."""
    seconds, rpm = arguments.seconds or 200.0, arguments.rpm or 1_200
    with tempfile.TemporaryDirectory(prefix="limits-") as name, ExitStack() as stack:
        folder = Path(name)
        redis = stack.enter_context(Redis().running()) if arguments.by == "redis" else None
        command = [sys.executable, __file__, "process", "--by", arguments.by, "--folder", name, "--rpm", str(rpm)]
        command += ["--redis-url", redis.url] if redis else []
        began = time.monotonic()
        processes = [subprocess.Popen(command) for _ in range(arguments.processes)]
        stopped_s = 0.0
        try:
            sleep_until(began + KILLED_AT * seconds)
            killed = processes[0].pid
            processes[0].send_signal(signal.SIGKILL)
            killed_at = time.monotonic()
            sleep_until(began + STOPPED_AT * seconds)
            if redis is not None:
                redis.kill()
                time.sleep(STOPPED_S)
                redis.start()
                stopped_s = STOPPED_S + 60.0  # what was granted is forgotten: a minute counts as used up
            sleep_until(began + seconds)
        finally:
            ended = time.monotonic()
            for each in processes:
                each.kill()
                each.wait()
        grants = {
            int(path.stem): [float(line) for line in path.read_text().split()] for path in folder.glob("*.grants")
        }
    every = sorted(at for times in grants.values() for at in times)
    first = every[0]
    before_kill = [sum(first + 10 <= at < killed_at for at in times) for times in grants.values()]
    return {
        "name": f"{arguments.processes} processes share {rpm} rpm by {arguments.by}",
        "seconds": round(ended - first, 1),
        "granted": len(every),
        "used": round(len(every) / ((ended - first - stopped_s) * rpm / 60), 4),
        "used_after_the_kill": round(
            sum(at >= killed_at for at in every) / ((ended - killed_at - stopped_s) * rpm / 60), 4
        ),
        "most_in_a_minute": most_in(every, 60.0),
        "shares_before_the_kill": sorted(round(n / max(1, sum(before_kill)), 3) for n in before_kill),
        "granted_by_the_killed_one_after": sum(at > killed_at + 0.01 for at in grants[killed]),
    }


async def process(arguments: argparse.Namespace) -> None:
    """One that takes what it gets, and writes down when."""
    folder: Path = arguments.folder
    limits = LimitsConfig(rpm=arguments.rpm, shared=Shared(arguments.by), shared_folder=str(folder))
    limits.redis_url = arguments.redis_url or limits.redis_url
    deployments = {"a": DeploymentConfig(model="simulated/echo")}
    limiter = RateLimiter.of(limits, quota=open_shared(limits, deployments))
    with (folder / f"{os.getpid()}.grants").open("w", buffering=1) as file:

        async def work() -> None:
            while True:
                handle = await limiter.acquire()
                file.write(f"{time.monotonic()}\n")
                await asyncio.sleep(0.05)
                handle.settle(TokenUsage())

        await asyncio.gather(*(work() for _ in range(32)))


async def ray(arguments: argparse.Namespace) -> dict[str, Any]:
    """A multirun of shards on a local Ray cluster, all against one simulator."""
    seconds, rpm, count = arguments.seconds or 100.0, arguments.rpm or 1_200, arguments.processes
    served: list[float] = []
    with tempfile.TemporaryDirectory(prefix="limits-") as name, Redis().running() as redis:
        folder = Path(name)
        rows = round(rpm * seconds / 60)
        (folder / "rows.jsonl").write_text("".join(f'{{"prompt": "row {n}"}}\n' for n in range(rows)))
        async with Simulator(SimulatorConfig(latency_s=0.05)) as provider:
            command = [
                *(sys.executable, "-m", "runner", "-m", "+scale=ray", "tracker=none", "dataset=jsonl"),
                *("dataset.path=rows.jsonl", "model=openai_like/simulated", f"api_base={provider.url}"),
                *(f"limits.rpm={rpm}", f"limits.redis_url={redis.url}", "retry.max_retries=0"),
                *(f"dataset.shard.index=range(0,{count})", f"dataset.shard.count={count}"),
                f"+hydra.launcher.ray.init.num_cpus={count}",
            ]
            process = await asyncio.create_subprocess_exec(*command, cwd=folder, stdout=asyncio.subprocess.DEVNULL)
            ended = asyncio.create_task(process.wait())
            seen = 0
            while not ended.done():
                await asyncio.wait([ended], timeout=0.02)
                now, total = time.monotonic(), (await ledger(provider))["by_status"].get("200", 0)
                served += [now] * (total - seen)
                seen = total
    took_s = served[-1] - served[0]
    return {
        "name": f"{count} workers of Ray share {rpm} rpm by redis",
        "exit_code": process.returncode,
        "seconds": round(took_s, 1),
        "answered": len(served),
        "used": round(len(served) / (took_s * rpm / 60), 4),
        "most_in_a_minute": most_in(served, 60.0),
    }


def sleep_until(at: float) -> None:
    time.sleep(max(0.0, at - time.monotonic()))


def most_in(times: Iterable[float], window_s: float) -> int:
    window: list[float] = []
    most = start = 0
    for at in times:
        window.append(at)
        while window[start] <= at - window_s:
            start += 1
        most = max(most, len(window) - start)
    return most


if __name__ == "__main__":
    main()
