"""What the client itself costs: each contender sends the same requests to a server that answers at once.

    python scripts/benchmark.py                                             # the comparison
    python scripts/benchmark.py --infermesh /path/to/its/python             # with the predecessor
    python scripts/benchmark.py --rows 200000 --repeats 1 --only experiment # memory at scale
    python scripts/benchmark.py --only litellm litellm_batch                # what this package adds to LiteLLM
    python scripts/benchmark.py start                                       # how soon the command is there
    python scripts/benchmark.py routing --replicas 64                       # what the router adds to a request
    python scripts/benchmark.py server                                      # the server alone, until stdin ends
    python scripts/benchmark.py limits --requests 200000                    # the rate limiter alone
    python scripts/benchmark.py auto                                        # the window that is found, see auto.py
    py-spy record -- python scripts/benchmark.py raw --server URL           # one contender, once, in this process

The comparison prints a JSON line per contender, with the medians of its runs, and a line with the ratios of those
rates, and of CPU per request likewise. Every run is a process of its own, and the contenders take turns (A B C A B C
…), so that a machine that gets slower meets all of them.

In-process contenders warm up with one request per slot, and are timed from the first request to the last answer. Of a
command (``experiment``, ``infermesh_cli``) the whole process is timed, and the same command over one row is taken off
as its start-up: rate = rows / (wall time - start-up). CPU is counted alike, user and system, of the client only. Peak
memory is the whole process's. On a machine that has other work, CPU per request is the steadier figure.

``raw`` is the best that one would write with aiohttp, ``plain`` what most write: ``session.post(json=…)`` and
``await answer.json()``. ``wire`` sends prepared bytes and decodes nothing. It shows what the server can take: where
``wire/raw`` is not well above 1, the rates are the server's and not the client's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import urlsplit

# Only the standard library up here: this file also runs in an interpreter that has infermesh and nothing of ours, and
# a child's peak memory is never below that of the process it was forked from.

MODEL = "m"
MICRO_BATCH_SIZE = 32
DIMENSIONS = 256

Q = TypeVar("Q")
A = TypeVar("A")


def main() -> None:
    arguments = parse_arguments()
    if arguments.what == "throughput":
        throughput(arguments)
    elif arguments.what == "routing":
        routing(arguments)
    elif arguments.what == "start":
        start(arguments)
    elif arguments.what == "server":
        asyncio.run(serve())
    elif arguments.what == "limits":
        print(json.dumps(limits(arguments.requests)))
    elif arguments.what == "auto":
        import_module("auto").main([])
    else:
        with server_at(arguments.server) as server:
            job = Job(server=server, requests=arguments.requests, concurrency=arguments.concurrency)
            print(json.dumps(asdict(IN_PROCESS[arguments.what](job))), flush=True)


def parse_arguments() -> argparse.Namespace:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what",
        nargs="?",
        default="throughput",
        choices=["throughput", "routing", "start", "server", "limits", "auto", *IN_PROCESS],
        help="default: throughput",
    )
    parser.add_argument("--requests", "--rows", type=int, default=20_000, metavar="N", help="default: 20000")
    parser.add_argument("--concurrency", type=int, default=64, metavar="N", help="requests in flight; default: 64")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="runs of each contender; default: 3")
    parser.add_argument("--server", metavar="URL", help="an OpenAI-compatible server, up to /v1; default: a stub")
    parser.add_argument("--infermesh", metavar="PYTHON", help="an interpreter that has infermesh, to compare with it")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, metavar="NAME", help=" ".join(CONTENDERS))
    parser.add_argument("--all", action="store_true", help="the slow ones too")
    parser.add_argument("--replicas", type=int, default=64, metavar="N", help="of the router; default: 64")
    return parser.parse_intermixed_args()


# The comparison


def throughput(arguments: argparse.Namespace) -> None:
    """Run the contenders in turn; print their medians, and how they compare."""
    names = arguments.only or [
        name
        for name in CONTENDERS
        if (arguments.all or name not in ONLY_ON_REQUEST) and (arguments.infermesh or name not in NEEDS_INFERMESH)
    ]
    if not arguments.infermesh and NEEDS_INFERMESH & set(names):
        raise SystemExit("--infermesh must name an interpreter that has infermesh")
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with server_at(arguments.server) as server:
        for repeat in range(arguments.repeats):
            for name in names:
                job = Job(
                    server=server,
                    requests=max(1, round(arguments.requests * SHARES.get(name, 1.0))),
                    concurrency=arguments.concurrency,
                    python=arguments.infermesh if name in NEEDS_INFERMESH else sys.executable,
                )
                run = run_command(name, job) if name in COMMANDS else run_in_child(name, job)
                runs[name].append(run)
                print(f"{repeat + 1}/{arguments.repeats} {name}: {run}", file=sys.stderr, flush=True)
    medians: dict[str, dict[str, float | None]] = {}
    for name in names:
        medians[name] = {key: median(runs[name], key) for key in ("requests_per_s", "cpu_ms_per_request")}
        peak_rss_mb = max(run["peak_rss_mb"] for run in runs[name])
        print(json.dumps({"name": name, **medians[name], "peak_rss_mb": peak_rss_mb, "runs": runs[name]}))
    print(
        json.dumps({"ratios": ratios(medians, "requests_per_s"), "cpu_ratios": ratios(medians, "cpu_ms_per_request")})
    )


def ratios(medians: Mapping[str, Mapping[str, float | None]], key: str) -> dict[str, float]:
    """How the contenders compare, as far as they took part."""
    found = {}
    for ratio in RATIOS:
        above, below = (medians.get(name, {}).get(key) for name in ratio.split("/"))
        if above and below:
            found[ratio] = round(above / below, 3)
    return found


def run_in_child(name: str, job: Job) -> dict[str, Any]:
    """One run of an in-process contender, in a process of its own."""
    script = [job.python, __file__, name, "--server", job.server]
    ended = finish([*script, "--requests", str(job.requests), "--concurrency", str(job.concurrency)])
    timing = json.loads(ended.output)
    return figures(job, elapsed_s=timing["elapsed_s"], cpu_s=timing["cpu_s"], peak_rss_mb=ended.peak_rss_mb)


def run_command(name: str, job: Job) -> dict[str, Any]:
    """One run of a command, less the same command over one row."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        startup, _ = COMMANDS[name](replace(job, requests=1), Path(folder, "startup"))
        whole, own_figures = COMMANDS[name](job, Path(folder, "whole"))
    run = figures(
        job,
        elapsed_s=whole.wall_s - startup.wall_s,
        cpu_s=whole.cpu_s - startup.cpu_s,
        peak_rss_mb=whole.peak_rss_mb,
    )
    return {**run, "wall_s": round(whole.wall_s, 3), "startup_s": round(startup.wall_s, 3), **own_figures}


def figures(job: Job, *, elapsed_s: float, cpu_s: float, peak_rss_mb: float) -> dict[str, Any]:
    return {
        "requests": job.requests,
        "elapsed_s": round(elapsed_s, 3),
        "requests_per_s": rate(job.requests, elapsed_s),
        "cpu_ms_per_request": round(1000 * cpu_s / job.requests, 4),
        "peak_rss_mb": round(peak_rss_mb, 1),
    }


def rate(requests: int, elapsed_s: float) -> float | None:
    """None where the time is lost in the noise of the start-up."""
    return round(requests / elapsed_s, 1) if elapsed_s > 0 else None


def median(runs: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [run[key] for run in runs if run[key] is not None]
    return round(statistics.median(values), 4) if values else None


# The start


def start(arguments: argparse.Namespace) -> None:
    """Print what ``--help`` costs, and how soon after the command a direct run asks its first request: medians."""
    command = [sys.executable, "-m", "runner"]
    helps = [finish([*command, "--help"]) for _ in range(arguments.repeats)]
    firsts = [first_request_s(command) for _ in range(arguments.repeats)]
    print(json.dumps({"name": "help", "cpu_s": round(statistics.median(ended.cpu_s for ended in helps), 3)}))
    print(json.dumps({"name": "first_request", "after_s": round(statistics.median(firsts), 3)}))


def first_request_s(command: Sequence[str]) -> float:
    """Seconds from the command to its first request, which is not answered."""
    with socket.create_server(("127.0.0.1", 0)) as server, tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/v1"
        asked = ["prompt=Hello.", f"model=hosted_vllm/{MODEL}", f"api_base={url}", "tracker=none"]
        started = time.perf_counter()
        with subprocess.Popen([*command, *asked], cwd=folder, stderr=subprocess.DEVNULL) as process:
            try:
                import_module("million").await_request(server, process)
                return time.perf_counter() - started
            finally:
                process.kill()


# The router alone


def routing(arguments: argparse.Namespace) -> None:
    """Print, for each strategy, the CPU microseconds that the router adds to a request that is answered at once.

    Both sides send through a limiter without limits, one request after the other. They take turns, and the medians of
    their differences are given.
    """
    from runner.config import STRATEGIES
    from runner.limited import Limited
    from runner.limiter import RateLimiter
    from runner.router import Recallable, Replica, Router, strategy_of
    from runner.types import Client, Generation, GenerationRequest, Request, Response

    answer = Response(output=Generation(text="yes"), model_id=MODEL, request_id=None, usage=None, headers={})

    class Instant:
        async def send(self, request: Request) -> Response:
            return answer

        async def aclose(self) -> None:
            pass

    def replica(number: int) -> Replica:
        recall = Recallable(Instant())
        return Replica(f"gpu-{number}", Limited(recall, RateLimiter(), label=f"gpu-{number}"), recall=recall)

    block = " ".join(prompt(number) for number in range(40))
    texts = [f"{block[number % 50 :]}{prompt(number)}" for number in range(arguments.requests)]

    async def microseconds(client: Client) -> float:
        requests = [GenerationRequest(input=text) for text in texts]
        started = time.process_time()
        for request in requests:
            await client.send(request)
        return 1e6 * (time.process_time() - started) / len(requests)

    async def measure(name: str) -> list[float]:
        replicas = [replica(number) for number in range(arguments.replicas)]
        router = Router(replicas, strategy=strategy_of(name, replicas))
        alone = Limited(Instant(), RateLimiter(), label="alone")
        added = [await microseconds(router) - await microseconds(alone) for _ in range(arguments.repeats)]
        await router.aclose()
        return added

    for name in STRATEGIES:
        added = asyncio.run(measure(name))
        line = {"strategy": name, "replicas": arguments.replicas, "added_us": round(statistics.median(added), 2)}
        print(json.dumps(line))


# Contenders in the process. Each opens its client, warms up, and is timed while it answers `job.prompts`.


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a contender is to do."""

    server: str  # URL up to /v1
    requests: int
    concurrency: int
    python: str = sys.executable  # interpreter that has the contender

    @property
    def prompts(self) -> list[str]:
        return [prompt(number) for number in range(self.requests)]

    @property
    def warm_up(self) -> list[str]:
        return [prompt(-number) for number in range(self.concurrency)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds of the clock, and of the processor in this process."""

    elapsed_s: float
    cpu_s: float


class Stopwatch:
    """``with stopwatch: …``, then ``stopwatch.timing``."""

    timing: Timing

    def __enter__(self) -> None:
        self._cpu_s = cpu_s(resource.getrusage(resource.RUSAGE_SELF))
        self._started = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        elapsed_s = time.perf_counter() - self._started
        self.timing = Timing(elapsed_s=elapsed_s, cpu_s=cpu_s(resource.getrusage(resource.RUSAGE_SELF)) - self._cpu_s)


def wire(job: Job) -> Timing:
    """Prepared bytes over sockets, nothing decoded: what the server can take from one client."""
    url = urlsplit(job.server)
    stopwatch = Stopwatch()

    def message(prompt: str) -> bytes:
        body = json.dumps(chat(prompt)).encode()
        head = f"POST {url.path}/chat/completions HTTP/1.1\r\nhost: {url.netloc}\r\ncontent-type: application/json"
        return b"%s\r\ncontent-length: %d\r\n\r\n%s" % (head.encode(), len(body), body)

    async def send(messages: Sequence[bytes]) -> int:
        loop = asyncio.get_running_loop()
        waiting = iter(messages)
        senders = []
        for _ in range(job.concurrency):
            _, sender = await loop.create_connection(lambda: Sender(waiting), url.hostname or "", url.port or 80)
            senders.append(sender)
        with stopwatch:
            for sender in senders:
                sender.send_next()
            answered = await asyncio.gather(*(sender.answered for sender in senders))
        return sum(answered)

    require(asyncio.run(send([message(prompt) for prompt in job.prompts])) == job.requests, "requests were lost")
    return stopwatch.timing


def raw(job: Job) -> Timing:
    """aiohttp and orjson in a loop of workers: the best that one would write by hand."""
    import aiohttp
    import orjson

    stopwatch = Stopwatch()
    url = f"{job.server}/chat/completions"
    headers = {"content-type": "application/json"}

    async def run() -> list[str]:
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), cookie_jar=aiohttp.DummyCookieJar()
        ) as session:

            async def ask(prompt: str) -> str:
                async with session.post(url, data=orjson.dumps(chat(prompt)), headers=headers) as answer:
                    answer.raise_for_status()
                    text: str = orjson.loads(await answer.read())["choices"][0]["message"]["content"]
                    return text

            return await ask_timed(ask, job, stopwatch)

    require(all(asyncio.run(run())), "requests failed")
    return stopwatch.timing


def plain(job: Job) -> Timing:
    """aiohttp as its documentation shows it, in the same loop of workers."""
    import aiohttp

    stopwatch = Stopwatch()
    url = f"{job.server}/chat/completions"

    async def run() -> list[str]:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

            async def ask(prompt: str) -> str:
                async with session.post(url, json=chat(prompt)) as answer:
                    answer.raise_for_status()
                    text: str = (await answer.json())["choices"][0]["message"]["content"]
                    return text

            return await ask_timed(ask, job, stopwatch)

    require(all(asyncio.run(run())), "requests failed")
    return stopwatch.timing


def generate_batch(job: Job, transport: str = "auto") -> Timing:
    """This package as a library."""
    from runner import DeploymentConfig, LMClient
    from runner.config import TransportKind

    stopwatch = Stopwatch()
    deployment = DeploymentConfig(model=f"hosted_vllm/{MODEL}", api_base=job.server, transport=TransportKind(transport))
    with LMClient(deployments={MODEL: deployment}, max_parallel_requests=job.concurrency) as client:
        client.generate_batch(job.warm_up)
        prompts = job.prompts
        with stopwatch:
            batch = client.generate_batch(prompts)
    require(not any(batch.errors), f"requests failed: {next(filter(None, batch.errors), None)}")
    return stopwatch.timing


def litellm_batch(job: Job) -> Timing:
    """This package as a library, by way of LiteLLM."""
    return generate_batch(job, "litellm")


def raw_embeddings(job: Job) -> Timing:
    """aiohttp and orjson as in `raw`, with as many texts in a request as `embed_batch` has."""
    import aiohttp
    import orjson

    stopwatch = Stopwatch()
    url = f"{job.server}/embeddings"
    headers = {"content-type": "application/json"}

    async def run() -> list[list[float]]:
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), cookie_jar=aiohttp.DummyCookieJar()
        ) as session:

            async def ask(texts: Sequence[str]) -> list[list[float]]:
                body = orjson.dumps({"model": MODEL, "input": texts})
                async with session.post(url, data=body, headers=headers) as answer:
                    answer.raise_for_status()
                    return [entry["embedding"] for entry in orjson.loads(await answer.read())["data"]]

            await ask_all(ask, micro_batches(job.warm_up), job.concurrency)
            texts = job.prompts
            with stopwatch:
                answers = await ask_all(ask, micro_batches(texts), job.concurrency)
            return [vector for vectors in answers for vector in vectors]

    require(len(asyncio.run(run())) == job.requests, "texts were lost")
    return stopwatch.timing


def embed_batch(job: Job) -> Timing:
    """This package as a library, one text a row."""
    from runner import LMClient

    stopwatch = Stopwatch()
    with LMClient(model=f"hosted_vllm/{MODEL}", api_base=job.server, max_parallel_requests=job.concurrency) as client:
        client.embed_batch(job.warm_up)
        texts = job.prompts
        with stopwatch:
            batch = client.embed_batch(texts, micro_batch_size=MICRO_BATCH_SIZE)
    require(not any(batch.errors), f"texts failed: {next(filter(None, batch.errors), None)}")
    return stopwatch.timing


def litellm(job: Job) -> Timing:
    """``litellm.acompletion`` in the same loop of workers as `raw`."""
    acompletion = import_module("litellm").acompletion
    stopwatch = Stopwatch()

    async def ask(prompt: str) -> str:
        answer = await acompletion(
            model=f"hosted_vllm/{MODEL}",
            api_base=job.server,
            messages=chat(prompt)["messages"],
            max_retries=0,
            num_retries=0,
        )
        text: str = answer.choices[0].message.content
        return text

    async def run() -> list[str]:
        return await ask_timed(ask, job, stopwatch)

    require(all(asyncio.run(run())), "requests failed")
    return stopwatch.timing


def infermesh_batch(job: Job) -> Timing:
    """The predecessor as a library."""
    stopwatch = Stopwatch()
    client = import_module("infermesh").LMClient(
        model=f"hosted_vllm/{MODEL}", api_base=job.server, max_parallel_requests=job.concurrency
    )
    client.generate_batch(job.warm_up)
    prompts = job.prompts
    with stopwatch:
        batch = client.generate_batch(prompts)
    client.close()
    require(not any(batch.errors or ()), "requests failed")
    return stopwatch.timing


def limits(requests: int) -> dict[str, Any]:
    """The rate limiter alone: four limits, a thousand workers in line, headers read and usage settled each time.

    The limit is 25,000 a second, so that there is a line; what the limiter could do is in the rate per CPU second.
    """
    from runner import RateLimiter

    stopwatch = Stopwatch()
    limiter = RateLimiter(1.5e6, 1e9, 1e9, 1e13)
    headers = {"x-ratelimit-remaining-requests": "1500000", "x-ratelimit-limit-requests": "1500000"}
    numbers = iter(range(requests))

    async def work() -> None:
        for _ in numbers:
            handle = await limiter.acquire(100)
            await limiter.adjust(handle, 90, headers)

    async def run() -> None:
        with stopwatch:
            await asyncio.gather(*(work() for _ in range(1_000)))

    asyncio.run(run())
    timing = stopwatch.timing
    return {
        "name": "limits",
        "requests_per_s": rate(requests, timing.elapsed_s),
        "cpu_us_per_request": round(1e6 * timing.cpu_s / requests, 2),
        "requests_per_cpu_s": rate(requests, timing.cpu_s),
    }


async def ask_all(ask: Callable[[Q], Awaitable[A]], questions: Sequence[Q], concurrency: int) -> list[A]:
    """The answers in order, from ``concurrency`` workers that share one iterator."""
    answers: dict[int, A] = {}
    numbered = enumerate(questions)

    async def work() -> None:
        for number, question in numbered:
            answers[number] = await ask(question)

    await asyncio.gather(*(work() for _ in range(concurrency)))
    return [answers[number] for number in range(len(questions))]


async def ask_timed(ask: Callable[[str], Awaitable[str]], job: Job, stopwatch: Stopwatch) -> list[str]:
    """The answers to the job's prompts, timed after a warm-up."""
    await ask_all(ask, job.warm_up, job.concurrency)
    prompts = job.prompts
    with stopwatch:
        return await ask_all(ask, prompts, job.concurrency)


def micro_batches(texts: Sequence[str]) -> list[Sequence[str]]:
    return [texts[start : start + MICRO_BATCH_SIZE] for start in range(0, len(texts), MICRO_BATCH_SIZE)]


def prompt(number: int) -> str:
    return f"Question {number}: what is {number} times {number + 1}? Answer with one number and nothing else."


def chat(prompt: str) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": prompt}]}


def require(is_true: bool, otherwise: str) -> None:
    """A rate over requests that failed is worth nothing."""
    if not is_true:
        raise SystemExit(otherwise)


def cpu_s(usage: resource.struct_rusage) -> float:
    return usage.ru_utime + usage.ru_stime


# Contenders that are commands. Each runs its command in a new folder and says what the command reports of itself.


def experiment(job: Job, folder: Path) -> tuple[Ended, dict[str, Any]]:
    """This package's command, with its store, its results file and its summary."""
    ended = finish(
        [
            *(job.python, "-m", "runner"),
            *(f"model=hosted_vllm/{MODEL}", f"api_base={job.server}"),
            *("dataset=jsonl", f"dataset.path={rows_file(job, folder)}"),
            *(f"limits.concurrency={job.concurrency}", "tracker=none"),
            *("name=benchmark", f"runs_dir={folder / 'runs'}"),
        ]
    )
    [path] = folder.glob("runs/benchmark/*/summary.json")
    summary = json.loads(path.read_bytes())
    require(summary["succeeded"] == job.requests, f"{job.requests - summary['succeeded']} rows failed")
    return ended, {"requests_per_s_by_summary": rate(job.requests, summary["elapsed_s"])}


def infermesh_cli(job: Job, folder: Path) -> tuple[Ended, dict[str, Any]]:
    """The predecessor's command, with its checkpoint."""
    results = folder / "results.jsonl"
    ended = finish(
        [
            *(str(Path(job.python).with_name("infermesh")), "generate"),
            *("--model", f"hosted_vllm/{MODEL}", "--api-base", job.server),
            *("--max-parallel-requests", str(job.concurrency)),
            *("--input-jsonl", str(rows_file(job, folder)), "--output-jsonl", str(results)),
        ]
    )
    with results.open(encoding="utf-8") as lines:
        answered = sum(bool(json.loads(line)["output_text"]) for line in lines)
    require(answered == job.requests, f"{job.requests - answered} rows failed")
    return ended, {}


def rows_file(job: Job, folder: Path) -> Path:
    folder.mkdir()
    path = folder / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(job.requests):
            file.write(json.dumps({"prompt": prompt(number)}) + "\n")
    return path


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A process that has ended well."""

    output: bytes
    wall_s: float  # from its start to its end
    cpu_s: float  # user and system, all threads
    peak_rss_mb: float


def finish(command: Sequence[str]) -> Ended:
    """Run ``command`` to its end. Exits with its last words if it fails."""
    environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "WANDB_MODE": "disabled"}
    with tempfile.TemporaryFile() as log:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, env=environment
        )
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - started
        process.stdout.close()
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            log.seek(0)
            last_words = (output + log.read())[-4000:].decode(errors="replace")
            raise SystemExit(f"{' '.join(command)}\nended with {process.returncode}:\n{last_words}")
    kibibyte = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes
    return Ended(output=output, wall_s=wall_s, cpu_s=cpu_s(usage), peak_rss_mb=usage.ru_maxrss * kibibyte / 1e6)


IN_PROCESS: Mapping[str, Callable[[Job], Timing]] = {
    "wire": wire,
    "raw": raw,
    "plain": plain,
    "generate_batch": generate_batch,
    "raw_embeddings": raw_embeddings,
    "embed_batch": embed_batch,
    "litellm": litellm,
    "litellm_batch": litellm_batch,
    "infermesh_batch": infermesh_batch,
}
COMMANDS: Mapping[str, Callable[[Job, Path], tuple[Ended, dict[str, Any]]]] = {
    "experiment": experiment,
    "infermesh_cli": infermesh_cli,
}
CONTENDERS = (
    *("wire", "raw", "plain", "generate_batch", "experiment", "raw_embeddings", "embed_batch"),
    *("litellm", "litellm_batch", "infermesh_batch", "infermesh_cli"),
)
ONLY_ON_REQUEST = {"raw_embeddings", "embed_batch", "litellm", "litellm_batch"}
NEEDS_INFERMESH = {"infermesh_batch", "infermesh_cli"}
SHARES = {"litellm": 0.1, "litellm_batch": 0.1, "infermesh_batch": 0.1, "infermesh_cli": 0.05}
"""Of --requests: those that are so slow that fewer requests take as long."""

RATIOS = (
    "wire/raw",
    "generate_batch/raw",
    "experiment/raw",
    "generate_batch/plain",
    "experiment/plain",
    "embed_batch/raw_embeddings",
    "generate_batch/litellm",
    "litellm_batch/litellm",
    "generate_batch/infermesh_batch",
    "experiment/infermesh_cli",
)


# The server: one fixed chat completion, or fixed vectors, at once, with as little work as Python allows


@contextmanager
def server_at(url: str | None) -> Iterator[str]:
    """``url``, or that of a stub in a process of its own, which ends with the block."""
    if url is not None:
        yield url.rstrip("/")
        return
    with subprocess.Popen(
        [sys.executable, __file__, "server"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as stub:
        assert stub.stdout is not None
        address = stub.stdout.readline().strip()
        require(bool(address), "the stub server did not start")
        yield address


async def serve() -> None:
    """Print the stub's URL and serve until stdin ends, so that it never outlives its parent."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Stub, "127.0.0.1", 0)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)
    ended = asyncio.Event()

    def wait_for_end() -> None:
        sys.stdin.read()
        loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=wait_for_end, daemon=True).start()
    await ended.wait()


class Messages:
    """Cuts a stream of bytes into HTTP/1.1 messages with a content-length."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The messages that ``data`` completes."""
        rest = self._rest + data if self._rest else data
        complete = []
        while (head := rest.find(b"\r\n\r\n")) >= 0:
            length = _CONTENT_LENGTH.search(rest, 0, head)
            end = head + 4 + (int(length[1]) if length else 0)
            if len(rest) < end:
                break
            complete.append(rest[:end])
            rest = rest[end:]
        self._rest = rest
        return complete


_CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


class Stub(asyncio.Protocol):
    """The server's side of one connection."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._write = transport.write
        self._messages = Messages()

    def data_received(self, data: bytes) -> None:
        if complete := self._messages.feed(data):
            self._write(b"".join(map(answer_to, complete)))


class Sender(asyncio.Protocol):
    """The client's side of one connection: sends the next message when the last one was answered.

    Args:
        waiting: Messages to send, shared with the other senders.
    """

    def __init__(self, waiting: Iterator[bytes]) -> None:
        self.answered: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting = waiting
        self._count = 0
        self._messages = Messages()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if self._messages.feed(data):
            self._count += 1
            self.send_next()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.answered.done():
            self.answered.set_result(self._count)

    def send_next(self) -> None:
        message = next(self._waiting, None)
        if message is None:
            self.answered.set_result(self._count)
            self._transport.close()
        else:
            self._transport.write(message)


def answer_to(message: bytes) -> bytes:
    if message.startswith(b"POST /v1/embeddings "):
        return vectors(message.count(b'","'))  # as often as there are texts, as the model's name stands before them
    return COMPLETION


@cache
def vectors(count: int) -> bytes:
    vector = [round(0.001 * number - 0.03, 4) for number in range(DIMENSIONS)]
    data = [{"object": "embedding", "index": index, "embedding": vector} for index in range(count)]
    usage = {"prompt_tokens": 24 * count, "total_tokens": 24 * count}
    return http({"object": "list", "data": data, "model": MODEL, "usage": usage})


def http(body: Mapping[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nx-request-id: req-stub\r\ncontent-length: "
    return b"%s%d\r\n\r\n%s" % (head.encode(), len(content), content)


COMPLETION = http(
    {
        "id": "chatcmpl-stub",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "The product of the two numbers is left to the reader."},
                "finish_reason": "stop",
                "logprobs": None,
            }
        ],
        "usage": {"prompt_tokens": 24, "completion_tokens": 12, "total_tokens": 36},
    }
)


if __name__ == "__main__":
    main()
