"""The workload: a dataset's rows, each turned into what is asked for it and given its identity."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from runner.config import RunnerConfig
from runner.dataset import Row, count_rows, open_dataset
from runner.errors import RowError
from runner.identity import ContentHasher, dump_text
from runner.prompt import PromptBuilder
from runner.scoring import Scorers
from runner.types import Attempt, GenerateInput, GenerationRequest, Trace

_PEEK = 10
"""Rows that are looked at before anything is sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One thing to ask: a row, or one of its repeats."""

    position: int  # dataset index × samples + sample
    fields: Mapping[str, Any]  # the row's
    content: bytes  # identity of what is asked
    metadata: str  # JSON
    input: GenerateInput | None  # None: there is an error
    error: RowError | None = None


class Workload:
    """What an experiment asks, read lazily and as often as wanted.

    Raises:
        ConfigError: The templates, the mapper or the scorers cannot be used.
    """

    def __init__(self, config: RunnerConfig) -> None:
        self.scorers = Scorers(config.scorers)
        self.samples = config.samples
        self._dataset = config.dataset
        self._endpoint = config.endpoint
        self._params = {key: value for key, value in config.request.items() if key != "timeout"}
        self._build = PromptBuilder(
            prompt=config.prompt, system=config.system, mapper=config.mapper, endpoint=config.endpoint
        )
        self._hash = ContentHasher(config)

    def check(self) -> None:
        """Look at the first rows.

        Raises:
            DatasetError: The dataset cannot be read.
            ConfigError: A template or a scorer names a field that none of the first rows has.
        """
        rows = list(islice(open_dataset(self._dataset), _PEEK))
        self._build.check(rows)
        self.scorers.check({name for row in rows for name in row.fields})

    def count(self) -> int | None:
        """How many items there are, where that is quickly known."""
        rows = count_rows(self._dataset)
        return None if rows is None else rows * self.samples

    def items(self) -> Iterator[Item]:
        """The items in the dataset's order."""
        for row in open_dataset(self._dataset):
            yield from self._items_of(row)

    def request(self, item: Item, on_failure: Callable[[Attempt], Awaitable[None]]) -> GenerationRequest:
        """The request of ``item``, with a fresh trace.

        Raises:
            RowError: The row cannot be asked.
        """
        if item.error is not None:
            raise item.error
        assert item.input is not None
        trace = Trace(row=item.position // self.samples, on_failure=on_failure)
        return GenerationRequest(input=item.input, endpoint=self._endpoint, params=self._params, trace=trace)

    def _items_of(self, row: Row) -> Iterator[Item]:
        error = row.error
        asked, metadata = None, {}
        if error is None:
            try:
                ask = self._build(row)
            except RowError as failure:
                error = failure
                metadata = row.fields
            else:
                asked, metadata = ask.input, ask.metadata
        try:
            text = dump_text(metadata)
            contents = [self._hash(asked, sample) for sample in range(self.samples)]
        except ValueError as failure:
            error, asked, text = RowError(f"{row.source}: {failure}"), None, "{}"
        if error is not None:
            contents = [self._hash(["unusable", str(error)], sample) for sample in range(self.samples)]
        for sample, content in enumerate(contents):
            yield Item(
                position=row.index * self.samples + sample,
                fields=row.fields,
                content=content,
                metadata=text,
                input=asked,
                error=error,
            )


class ClaimSize:
    """How many items to claim at once: enough to share a transaction, few enough to be in flight soon.

    What a killed run had claimed counts as perhaps paid for, so a slow run claims no more than its slots.
    """

    MOST = 256
    _SOON_S = 0.25

    def __init__(self, slots: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._least = min(max(slots, 8), self.MOST)
        self._size = self._least
        self._clock = clock
        self._asked_at: float | None = None

    def next(self) -> int:
        """The size of the next claim, by how long the last one lasted."""
        now = self._clock()
        if self._asked_at is not None:
            lasted_s = now - self._asked_at
            if lasted_s < self._SOON_S:
                self._size = min(2 * self._size, self.MOST)
            elif lasted_s > 4 * self._SOON_S:
                self._size = max(self._size // 2, self._least)
        self._asked_at = now
        return self._size
