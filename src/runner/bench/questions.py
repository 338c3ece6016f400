"""Questions: a dataset's rows, asked as long as a benchmark wants, each time in words of their own."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

from runner.advice import way_out
from runner.bench.load import Answer
from runner.config import CacheMode, RunnerConfig
from runner.errors import ConfigError, ConnectError, ItemError, RequestError, SystemicError
from runner.task import Item, Settled
from runner.types import Client, EmbeddingRequest, GenerationRequest, Request, Response, TokenUsage, Trace
from runner.workload import Workload

_SUSPECTS = 8
"""Requests that must fail in a systemic way, with no answer between, until the benchmark gives up."""


class Questions:
    """What a benchmark asks: the rows in the dataset's order, from the first one on again after the last.

    Rows that cannot be asked are passed over. Groups of rows that share a request are asked as one.

    Args:
        client: The stack that answers.
    """

    def __init__(self, config: RunnerConfig, workload: Workload, client: Client) -> None:
        self._config = config
        self._workload = workload
        self._client = client
        self._groups = self._cycle()
        self._suspects = 0

    def begin(self) -> None:
        """Start over: with the first row, and in words that no server remembers."""
        self._groups = self._cycle()

    async def ask(self) -> Answer:
        """Ask the next question. A failure is an answer too.

        Raises:
            SystemicError: Every request fails in a way that no waiting heals.
            ConfigError: No row can be asked.
        """
        group, client = next(self._groups)
        line = _Line(client)
        await self._workload.task.ask_for(group, line)
        answer = _answer(group[0].position // self._workload.samples, line.settled)
        for each in line.settled:
            self._judge(each)
        return answer

    def _judge(self, settled: Settled) -> None:
        error = settled.result
        if not isinstance(error, RequestError) or not (error.systemic or isinstance(error, ConnectError)):
            self._suspects = 0
            return
        self._suspects += 1
        if self._suspects >= _SUSPECTS:
            advice = way_out(error, settled.trace.deployment, self._config)
            where = "one request after the other"
            raise SystemicError(f"{type(error).__name__} on {where}: {str(error).rstrip('.')}. {advice}.")

    def _cycle(self) -> Iterator[tuple[Sequence[Item], Client]]:
        client = self._client
        if self._config.bench.cache is CacheMode.unique:
            client = Unique(client)
        size = self._workload.task.group_size
        while True:
            asked = 0
            group: list[Item] = []
            for item in self._workload.items():
                if item.error is not None:
                    continue
                group.append(item)
                if len(group) == size:
                    yield group, client
                    asked += 1
                    group = []
            if group and not asked:  # a dataset smaller than a group
                yield group, client
                asked += 1
            if not asked:
                raise ConfigError("no row of the dataset can be asked: run it without task=bench to see why")


class Unique:
    """A `Client` that begins each text with a mark of its own, so that no server knows it from another request.

    The mark stands before the user's first message: a system prompt that all rows share is still shared, as it is in
    use. It costs about ten tokens.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._token = secrets.token_hex(4)
        self._numbers = count()

    async def send(self, request: Request) -> Response:
        match request:
            case GenerationRequest():
                request = replace(request, input=marked(request.input, self._mark()))
            case EmbeddingRequest():
                request = replace(request, texts=[f"{self._mark()} {text}" for text in request.texts])
        return await self._client.send(request)

    async def aclose(self) -> None:
        await self._client.aclose()

    def _mark(self) -> str:
        return f"[{self._token}-{next(self._numbers)}]"


def marked(asked: Any, mark: str) -> Any:
    """An input of a generation with ``mark`` before the first text of the user's."""
    match asked:
        case str():
            return f"{mark} {asked}"
        case {"input": given}:
            return {**asked, "input": marked(given, mark)}
        case list():
            for place, message in enumerate(asked):
                match message:
                    case {"role": "user", "content": str(text)}:
                        return [*asked[:place], {**message, "content": f"{mark} {text}"}, *asked[place + 1 :]]
                    case {"role": "user", "content": list(blocks)}:
                        content = _marked_block(blocks, mark)
                        return [*asked[:place], {**message, "content": content}, *asked[place + 1 :]]
    return asked


def _marked_block(blocks: list[Any], mark: str) -> list[Any]:
    for place, block in enumerate(blocks):
        match block:
            case {"text": str(text)}:
                return [*blocks[:place], {**block, "text": f"{mark} {text}"}, *blocks[place + 1 :]]
    return blocks


class _Line:
    """A group's way to the client, without books."""

    def __init__(self, client: Client) -> None:
        self.settled: list[Settled] = []
        self._client = client

    def trace(self, places: Sequence[int]) -> Trace:
        return Trace()

    async def send(self, request: Request) -> Response:
        return await self._client.send(request)

    async def settle(self, settled: Settled) -> None:
        self.settled.append(settled)

    async def note_split(self, places: Sequence[int], trace: Trace, error: ItemError) -> None:
        return None


def _answer(row: int, settled: Sequence[Settled]) -> Answer:
    """What came of a group, as of one request."""
    traces = [each.trace for each in settled]
    error = next((each.result for each in settled if isinstance(each.result, ItemError)), None)
    usages = [
        (each.trace, response.usage)
        for each in settled
        if not isinstance(each.result, ItemError)
        for response in each.result
    ]
    known = [usage for _, usage in usages if usage is not None]
    costs = [trace.cost_usd(usage) for trace, usage in usages]
    return Answer(
        row=row,
        queue_wait_s=sum(trace.queue_wait_s for trace in traces),
        service_time_s=sum(trace.service_time_s for trace in traces),
        ttft_s=traces[0].ttft_s,
        itl_s=_itl_s(traces[0], usages[0][1] if usages else None),
        prompt_tokens=sum(usage.prompt_tokens for usage in known) if known else None,
        completion_tokens=sum(usage.completion_tokens for usage in known) if known else None,
        cached_tokens=sum(usage.cached_tokens or 0 for usage in known) if known else None,
        cost_usd=None if None in costs else sum(cost or 0.0 for cost in costs),
        retries=sum(trace.retries for trace in traces),
        error=None if error is None else type(error).__name__,
    )


def _itl_s(trace: Trace, usage: TokenUsage | None) -> float | None:
    """(last piece - first piece) / (output tokens - 1); where the server counts no tokens, its pieces count."""
    pieces = trace.chunk_times
    tokens = usage.completion_tokens if usage is not None else len(pieces)
    if trace.ttft_s is None or tokens < 2 or not pieces:
        return None
    return (pieces[-1] - trace.ttft_s) / (tokens - 1)
