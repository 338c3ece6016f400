"""`prompt_map`: a list of prompts in, their answers out, kept on the way."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TextIO

from pydantic import BaseModel

from runner.checks import check_count, check_deployment, check_request
from runner.concurrency import Window
from runner.config import DeploymentConfig, LimitsConfig, RetryConfig, RunnerConfig, SimulatorConfig, replicas
from runner.database import lock_folder
from runner.database_url import DB_URL_DEFAULT, path_of, results_path
from runner.digests import Digests
from runner.errors import APIResponseError, ConfigError, Interrupted, ParseError, StoreError, SystemicError
from runner.identity import ContentHasher, dump_text
from runner.keywords import spelt
from runner.limited import Limited
from runner.limiter import RateLimiter
from runner.metrics import Meter
from runner.outcomes import count
from runner.progress import printable, write
from runner.prompt_rows import STORE_KIND, PromptRow, check_form, check_place, shaped, write_rows
from runner.response_format import Layout, ResponseFormat
from runner.retry import Retrying
from runner.run import GRACE_S, Run
from runner.scoring import Scorers
from runner.stack import open_stack
from runner.store import Outcome, Store
from runner.task import Generate, Item
from runner.transports import check_addresses
from runner.transports.worker import Worker, WorkerTransport, identity_of
from runner.types import Client, Generation, Request, Response

_OPENROUTER = "openrouter/"

logger = logging.getLogger(__name__)


@spelt
async def prompt_map(
    prompts: Iterable[str],
    worker: Worker | None = None,
    model_name: str | None = None,
    openrouter_api_key: str | None = None,
    response_model: Layout | None = None,
    *,
    model: str | None = None,
    api_base: str | None = None,
    temperature: float | None = 0.0,
    concurrency: int = 32,
    rpm_limit: float | None = None,
    max_attempts: int = 8,
    output_shape: Literal["original", "unique"] = "original",
    return_dtype: Literal["list[dict]", "list[str]", "list[tuple[str,str]]", "polars"] = "list[dict]",
    cache_db_url: str | Path = DB_URL_DEFAULT,
    results_db_url: str | Path | None = None,
    cache_key: str | None = None,
    teardown: bool = True,
    teardown_results: bool = False,
    progress_update_every: int = 200,
    verbose: bool = True,
    simulator: SimulatorConfig | None = None,
) -> Any:
    """Answer every prompt, and lose no answer if it is interrupted: the same call then asks what is left.

    Choose it for a list of texts that fits in memory; `LMClient` for full answers and nothing on disk, the command
    for datasets. Equal prompts are asked once. What answers is ``worker``, or else ``model``, or else ``model_name``,
    or else the variable MODEL, from the environment or ``.env``.

    An answer is known again by its prompt, the model, the temperature and the schema; that of a worker by the
    worker's name, its code and the texts that it refers to.

    Ctrl-C, or cancelling, waits 10 s at most for the answers on their way; doing so again ends it at once.

    Args:
        prompts: What to ask.
        worker: A function of a prompt that returns the answer. A coroutine function runs on the event loop, any
            other in a thread. What it raises is tried again.
        model_name: With an OpenRouter key, a model of OpenRouter's (``openai/gpt-4o-mini``), or ``simulated/echo``;
            without a key, as ``model``.
        openrouter_api_key: The key. None: the variable OPENROUTER_API_KEY, from the environment or ``.env``.
        response_model: A Pydantic model or a JSON schema that answers must satisfy; a result is then JSON. An answer
            that does not satisfy it is tried again.
        model: A LiteLLM model string, whichever keys there are.
        api_base: Address of an OpenAI-compatible server, up to and including ``/v1``.
        temperature: For the model; None leaves it to the provider.
        concurrency: Prompts at work at once.
        rpm_limit: Requests per minute, evenly paced; None: no limit.
        max_attempts: How often a prompt is tried in all, with growing waits between.
        output_shape: ``original``, a row a prompt, in their order, and where there is no answer, the status
            ``missing`` and the result None; ``unique``, a row an answered prompt, by its first place.
        return_dtype: The rows as dictionaries with ``idx``, ``key``, ``prompt``, ``status`` and ``result``
            (one that is missing also has an ``error``), as results, as (prompt, result), or as a Polars frame of
            the same columns.
        cache_db_url: The SQLite database of answers, ``sqlite+aiosqlite:///my_runs.db``.
        results_db_url: The SQLite database that the returned rows are written to, table ``results``. None:
            ``NAME-results.db`` beside the cache.
        cache_key: Tells one ``worker`` from another instead of its name and code.
        teardown: Whether the answers leave the cache at the end. They stay where a prompt has none yet.
        teardown_results: Whether the results database is removed at the end.
        progress_update_every: Answers from one line of progress to the next.
        verbose: Whether progress is printed.
        simulator: Settings of ``simulated/…`` models.

    Returns:
        The rows, as ``output_shape`` and ``return_dtype`` say.

    Raises:
        ConfigError: An argument cannot be used. Nothing was asked.
        StoreError: A database cannot be used.
        RunStopped: Every prompt would fail the same way: the key is wrong, nobody listens. Answers are kept.
    """
    check_form(return_dtype, output_shape)
    check_count("concurrency", concurrency)
    check_count("max_attempts", max_attempts)
    check_count("progress_update_every", progress_update_every)
    check_request("", {"temperature": temperature})
    if rpm_limit is not None and (not isinstance(rpm_limit, int | float) or not rpm_limit >= 1):
        raise ConfigError(f"rpm_limit={rpm_limit!r}: a number of at least 1, or None for no limit")
    if worker is not None and not callable(worker):
        raise ConfigError(f"worker is of type {type(worker).__name__}, and not a function of a prompt")
    cache, results = _paths(cache_db_url, results_db_url)
    check_place(results)
    form = None if response_model is None else ResponseFormat.of(response_model, key="response_model")
    config = RunnerConfig(
        limits=LimitsConfig(concurrency=concurrency, rpm=rpm_limit, max_request_burst=1),
        retry=RetryConfig(max_retries=max_attempts - 1),
        request={} if form is None else {"response_format": form.schema_param},
        simulator=simulator or SimulatorConfig(),
    )
    if worker is not None:
        config.model = f"worker/{cache_key or identity_of(worker)}"
    elif cache_key is not None:
        raise ConfigError("cache_key names a worker, and there is none: a model is known by its name")
    else:
        deployment = _deployment(model, model_name, openrouter_api_key, api_base)
        config.model, config.deployments = deployment.model, {deployment.model: deployment}
        config.request |= {} if temperature is None else {"temperature": temperature}

    workload = _Prompts(prompts, config)
    window = Window(concurrency)
    client = _open_client(config, window, worker, form)
    progress = _Progress(workload, window, every=progress_update_every, stream=sys.stdout if verbose else None)
    async with aclosing(client), await _open_store(cache, progress.on_commit) as store:
        run = Run(config, workload, client=client, store=store, meter=progress.meter, window=window)
        if await run.settled() < workload.count():
            await check_addresses(replicas(config))
        progress.begin()
        await _finish(run, progress, cache)
        answers = [(row["text"], row["error"]) async for row in store.query(_ANSWERS)]
        rows = workload.rows(answers, unique=output_shape == "unique")
        await asyncio.to_thread(write_rows, results, rows)
        errors = [error for _, error in answers if error is not None]
        emptied = teardown and not errors and await store.forget_rows() == 0
    progress.end()
    if errors:
        logger.warning(
            "%d of %d prompts have no answer, for example: %s. The next call asks them again; %s keeps the answers",
            *(len(errors), len(answers), printable(errors[0]), cache),
        )
    if emptied:
        _remove(cache)
    if teardown_results:
        results.unlink(missing_ok=True)
    return shaped(rows, return_dtype)


def _paths(cache_db_url: str | Path, results_db_url: str | Path | None) -> tuple[Path, Path]:
    cache = path_of(cache_db_url, key="cache_db_url")
    if results_db_url is None:
        return cache, results_path(cache)
    results = path_of(results_db_url, key="results_db_url")
    if results.absolute() == cache.absolute():
        results = results_path(cache)
        logger.warning("results_db_url is the cache_db_url: the results go to %s", results)
    return cache, results


def _deployment(
    model: str | None, model_name: str | None, openrouter_api_key: str | None, api_base: str | None
) -> DeploymentConfig:
    """The model that the arguments, the environment and ``.env`` name, in this order."""
    from dotenv import find_dotenv, load_dotenv

    load_dotenv(find_dotenv(usecwd=True))
    key = openrouter_api_key or os.environ.get("OPENROUTER_API_KEY")
    if model is None:
        model = model_name or os.environ.get("MODEL")
        if not model:
            raise ConfigError(
                "prompt_map needs something that answers: a worker, a model, or model_name with openrouter_api_key;"
                " or set MODEL and OPENROUTER_API_KEY in the environment or in .env"
            )
        if key and not model.startswith((_OPENROUTER, "simulated/")):
            model = f"{_OPENROUTER}{model}"
    deployment = DeploymentConfig(model=model, api_base=api_base)
    if model.startswith(_OPENROUTER):
        deployment.api_key, deployment.api_key_env = key, "OPENROUTER_API_KEY"
    check_deployment("", deployment)
    return deployment


def _open_client(config: RunnerConfig, window: Window, worker: Worker | None, form: ResponseFormat | None) -> Client:
    client: Client
    if worker is None:
        client = open_stack(
            replicas(config),
            limits=config.limits,
            retry=RetryConfig(max_retries=0),
            simulator=config.simulator,
            window=window,
        )
    else:
        transport = WorkerTransport(worker, threads=config.limits.concurrency)
        client = Limited(transport, RateLimiter.of(config.limits), label=config.model)
    if form is not None:
        client = _Fitting(client, form)
    return Retrying(client, config.retry, slot=window)


class _Fitting:
    """A `Client` for which an answer in another form than was asked for is no answer."""

    def __init__(self, client: Client, form: ResponseFormat) -> None:
        self._client = client
        self._form = form

    async def send(self, request: Request) -> Response:
        response = await self._client.send(request)
        assert isinstance(response.output, Generation)
        try:
            parsed = self._form.parse(response.output.text)
        except ParseError as error:
            raise APIResponseError(str(error)) from None
        if isinstance(parsed, BaseModel):
            return replace(response, output=replace(response.output, text=parsed.model_dump_json()))
        return response

    async def aclose(self) -> None:
        await self._client.aclose()


class _Prompts:
    """What a run asks: each different prompt once, in the order of their first places."""

    def __init__(self, prompts: Iterable[str], config: RunnerConfig) -> None:
        if isinstance(prompts, str | bytes | Mapping) or not isinstance(prompts, Iterable):
            raise ConfigError(f"prompts is of type {type(prompts).__name__}: give a list of texts")
        self.given = list(prompts)
        self.scorers = Scorers({})
        self.response_format = None
        self.task = Generate(config, None)
        self._places: dict[str, int] = {}
        for idx, prompt in enumerate(self.given):
            if not isinstance(prompt, str):
                raise ConfigError(f"prompts[{idx}] is of type {type(prompt).__name__}, not str")
            self._places.setdefault(prompt, idx)
        content = ContentHasher(config)
        self._contents = [content(prompt, 0) for prompt in self._places]

    def count(self) -> int:
        return len(self._places)

    def items(self) -> Iterator[Item]:
        for position, (prompt, idx) in enumerate(self._places.items()):
            yield Item(
                position=position,
                fields={},
                content=self._contents[position],
                metadata=dump_text({"idx": idx, "prompt": prompt}),
                input=prompt,
            )

    async def identified(self, items: Sequence[Item], digests: Digests) -> Sequence[Item]:
        return items

    def rows(self, answers: Sequence[tuple[str | None, str | None]], *, unique: bool) -> list[PromptRow]:
        """What is handed out, from the answer (text, error) of each position."""
        rows = {
            prompt: PromptRow(
                idx=idx,
                key=self._contents[position].hex(),
                prompt=prompt,
                status="done" if answers[position][1] is None else "missing",
                result=answers[position][0],
                error=answers[position][1],
            )
            for position, (prompt, idx) in enumerate(self._places.items())
        }
        if unique:
            return [row for row in rows.values() if row.status == "done"]
        return [replace(rows[prompt], idx=idx) for idx, prompt in enumerate(self.given)]


class _Progress:
    """Lines about how far it is, on a stream or nowhere."""

    def __init__(self, workload: _Prompts, window: Window, *, every: int, stream: TextIO | None) -> None:
        self.meter = Meter()
        self._given = len(workload.given)
        self._total = workload.count()
        self._window = window
        self._every = every
        self._stream = stream
        self._settled = 0

    def begin(self) -> None:
        self.say(f"Total: {self._given:,} | unique: {self._total:,}")

    def on_commit(self, outcomes: Sequence[Outcome]) -> None:
        count(self.meter, outcomes)
        before, self._settled = self._settled, self._settled + len(outcomes)
        if before // self._every < self._settled // self._every:
            self._show()

    def end(self) -> None:
        now = self.meter.snapshot()
        known = f" ({now.reused:,} were there already)" if now.reused else ""
        self.say(f"Batch complete: {now.done - now.failed:,} done{known}, {now.failed:,} failed")

    def say(self, text: str) -> None:
        write(self._stream, f"{text}\n")

    def _show(self) -> None:
        now = self.meter.snapshot(total=self._total, in_flight=self._window.active, window=self._window.limit)
        counts = {
            "done": now.done - now.failed,
            "failed": now.failed,
            "inflight": now.in_flight,
            "pending": max(0, self._total - now.done - now.in_flight),
        }
        self.say(f"[{time.strftime('%H:%M:%S')}] progress: {counts} | rolling RPM: {60 * now.requests_per_s:,.0f}")


async def _open_store(cache: Path, on_commit: Callable[[Sequence[Outcome]], None]) -> Store:
    try:
        store = await Store.open(cache, on_commit=on_commit)
    except StoreError as error:
        raise StoreError(f"cache_db_url: {error}, or name another cache_db_url") from None
    try:
        meta = await store.meta()
        if meta and meta.get("kind") != STORE_KIND:
            raise StoreError(f"cache_db_url: {cache} belongs to a run of the command: name another one")
        await store.put_meta({"kind": STORE_KIND})
    except BaseException:
        await store.aclose()
        raise
    return store


async def _finish(run: Run, progress: _Progress, cache: Path) -> None:
    """Ask until nothing is left. Cancelled, let the answers that are on their way come in first."""
    work = asyncio.ensure_future(run.until_done())
    try:
        await asyncio.shield(work)
    except asyncio.CancelledError:
        run.interrupt(Interrupted(signal.SIGINT))
        progress.say(f"interrupted: waiting {GRACE_S:g} s at most for what is in flight; the same call then goes on")
        await work
        raise
    if run.stop.reason is not None:
        raise SystemicError(f"{run.stop.reason} What was answered is kept in {cache}: the same call goes on.")


def _remove(database: Path) -> None:
    """Remove an SQLite file, unless another process has taken it up meanwhile."""
    with suppress(StoreError), lock_folder(database):
        for suffix in ("", "-wal", "-shm"):
            database.with_name(f"{database.name}{suffix}").unlink(missing_ok=True)


_ANSWERS = """
    SELECT
        answers.output_text AS text,
        CASE
            WHEN answers.ticket IS NULL THEN 'it was not asked'
            ELSE answers.error_type || ': ' || ifnull(answers.error_message, '')
        END AS error
    FROM rows
    LEFT JOIN answers USING (ticket)
    ORDER BY rows.position
"""
