"""The workload: a dataset's rows, each turned into what is asked for it and given its identity."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from typing import Any

from runner.ceiling import Ceiling
from runner.checks import check_all
from runner.config import RunnerConfig, ShardConfig
from runner.dataset import Row, count_rows, open_dataset
from runner.digests import Digests
from runner.errors import DatasetError, ItemError, RowError
from runner.identity import ContentHasher, dump_text
from runner.prompt import Ask, is_half_quoted, spelt
from runner.response_format import ResponseFormat
from runner.scoring import Scorers
from runner.task import Item, suffixes_of, task_of
from runner.types import OUTPUT_LIMITS

_PEEK = 10
"""Rows that are looked at before anything is sent."""


class Workload:
    """What an experiment asks, read lazily and as often as wanted.

    Raises:
        ConfigError: The templates, the mapper, the response format or the scorers cannot be used.
    """

    def __init__(self, config: RunnerConfig) -> None:
        self.scorers = Scorers(config.scorers)
        self.samples = config.samples
        self.response_format = None
        if config.response_format is not None:
            self.response_format = ResponseFormat.configured(config.response_format)
            config = replace(config, response_format=self.response_format.schema_param)  # what a name stands for
        self.task = task_of(config, self.response_format)
        self._config = config
        self._dataset = config.dataset
        self._suffixes = suffixes_of(config)
        self._hash = ContentHasher(config)
        self._ceiling = Ceiling(config)

    def check(self) -> list[str]:
        """Look at the first rows.

        Returns:
            What can be done and may not be meant, a sentence each.

        Raises:
            DatasetError: The dataset cannot be read.
            ConfigError: A template or a scorer names a field that none of the first rows has.
        """
        rows = list(islice(open_dataset(self._dataset, suffixes=self._suffixes), _PEEK))
        readable = [row for row in rows if row.error is None]
        fields = {name for row in readable for name in row.fields}
        check_all(lambda: self.task.check(rows), lambda: self.scorers.check(fields) if readable else None)
        return [*self._skipped(), *self._doubts(rows)]

    def count(self) -> int | None:
        """How many items there are, where that is quickly known."""
        rows = count_rows(self._dataset, suffixes=self._suffixes)
        return None if rows is None else rows * self.samples

    def items(self) -> Iterator[Item]:
        """The items in the dataset's order. Those with files are not `identified` yet."""
        for row in open_dataset(self._dataset, suffixes=self._suffixes):
            yield from self._items_of(row)

    async def identified(self, items: Sequence[Item], digests: Digests) -> Sequence[Item]:
        """The items with what their files hold in their identity."""
        paths = {path for item in items for path in item.files}
        if not paths:
            return items
        found = await digests.of(paths)
        return [self._with_files(item, found) if item.files else item for item in items]

    @property
    def asks(self) -> str:
        """What all items have in common, as a hash in hex."""
        return self._hash.common

    def hasher(self, limits: Mapping[str, Any]) -> ContentHasher:
        """What the items would be hashed with under other limits on an answer's length."""
        others = {key: value for key, value in self._config.request.items() if key not in OUTPUT_LIMITS}
        return ContentHasher(replace(self._config, request={**others, **limits}))

    def content(self, item: Item, hasher: ContentHasher) -> bytes:
        """The identity of what ``item`` asks, by another hasher than the workload's own."""
        return hasher(_asked(item), item.position % self.samples)

    def cost_bound(self, item: Item) -> float | None:
        """The most that one attempt at ``item`` costs, in US dollars; None: not to be known."""
        if item.error is not None:
            return 0.0
        return None if item.files else self._ceiling.usd(item.input)

    def _skipped(self) -> Iterator[str]:
        """Files beside those that the task can send."""
        if self._suffixes is None:
            return
        whole = replace(self._dataset, limit=None, shard=ShardConfig())
        found, wanted = count_rows(whole) or 0, count_rows(whole, suffixes=self._suffixes) or 0
        if wanted < found:
            skipped = f"{found - wanted:,} of {found:,} files skipped"
            yield f"dataset.path={whole.path}: {skipped}: their names end with none of {', '.join(self._suffixes)}"

    def _doubts(self, rows: Sequence[Row]) -> Iterator[str]:
        for key, text in (("prompt", self._config.prompt), ("system", self._config.system)):
            if text and is_half_quoted(text):
                yield f"{key} begins with a quote that nothing closes, and is sent with it: {text[:40]}…"
        asks: list[Ask] = []
        for row in rows:
            with suppress(ItemError):
                asks.append(self.task.ask(row))
        same = all((ask.input, ask.files) == (asks[0].input, asks[0].files) for ask in asks)
        if len(asks) > 1 and same and any(row.fields != rows[0].fields for row in rows):
            longest = max(rows[0].fields.items(), key=lambda field: len(str(field[1])), default=("FIELD", None))
            yield (
                f"the first {len(asks)} rows ask the very same: does prompt name a field of theirs, as in"
                f" {spelt(longest[0])}?"
            )

    def _items_of(self, row: Row) -> Sequence[Item]:
        """A row's item, or one for each repeat."""
        error: ItemError | None = row.error
        ask = _NOTHING
        if error is None:
            try:
                ask = self.task.ask(row)
            except ItemError as failure:
                error, ask = failure, _NOTHING._replace(metadata=row.fields)
        try:
            text = dump_text(ask.metadata)
            contents = [self._hash(ask.input, sample) for sample in range(self.samples)]
        except ValueError as failure:
            error, ask, text = RowError(f"{row.source}: {failure}"), _NOTHING, "{}"
        if error is not None:
            contents = [self._unusable(error, sample) for sample in range(self.samples)]
        return [
            Item(
                position=row.index * self.samples + sample,
                fields=row.fields,
                content=content,
                metadata=text,
                input=ask.input,
                files=ask.files,
                error=error,
            )
            for sample, content in enumerate(contents)
        ]

    def _with_files(self, item: Item, found: Mapping[str, bytes | ItemError]) -> Item:
        sample = item.position % self.samples
        digests: list[bytes] = []
        for path in item.files:
            digest = found[path]
            if isinstance(digest, ItemError):
                return item._replace(input=None, content=self._unusable(digest, sample), error=digest)
            digests.append(digest)
        item = item._replace(digests=tuple(digests))
        return item._replace(content=self._hash(_asked(item), sample))

    def _unusable(self, error: ItemError, sample: int) -> bytes:
        return self._hash(["unusable", str(error)], sample)


_NOTHING = Ask(input=None, metadata={})


def _asked(item: Item) -> Any:
    """What is hashed of an item."""
    return [item.input, [digest.hex() for digest in item.digests]] if item.digests else item.input


class Reader:
    """Reads items a few at a time, on the event loop, and what comes before an error first.

    Args:
        items: In the dataset's order.
        identified: `Workload.identified`.
    """

    _LONG_S = 0.05

    def __init__(
        self, items: Iterator[Item], identified: Callable[[Sequence[Item]], Awaitable[Sequence[Item]]]
    ) -> None:
        self.error: DatasetError | None = None
        self._items = items
        self._identified = identified

    async def read(self, most: int) -> Sequence[Item]:
        """Some items, as many as come quickly. None: the dataset is at its end, or at its ``error``."""
        taken: list[Item] = []
        ends_at = time.monotonic() + self._LONG_S
        try:
            while self.error is None and len(taken) < most and time.monotonic() < ends_at:
                if (item := next(self._items, None)) is None:
                    break
                taken.append(item)
        except DatasetError as error:
            self.error = error
        try:
            return await self._identified(taken)
        except DatasetError as error:
            self.error = error
            return []


class ChunkSize:
    """How many items to claim at once: enough to share a transaction, few enough to be in flight soon.

    What a killed run had claimed counts as perhaps paid for, so a slow run claims few more than it has slots.
    """

    MOST = 256
    _SOON_S = 0.25
    _RECENT_S = 1.0

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since = clock()
        self._settled = 0

    def next(self, *, slots: int, settled: int) -> int:
        """What is settled soon at the speed of late, or a part of the slots if that is more.

        Args:
            slots: Items that may be in flight at once.
            settled: Items that have been settled so far.
        """
        passed_s = max(self._SOON_S, self._clock() - self._since)
        soon = int((settled - self._settled) * self._SOON_S / passed_s)
        if passed_s > self._RECENT_S:
            self._since, self._settled = self._clock(), settled
        return min(max(soon, slots // 4, 8), self.MOST)
