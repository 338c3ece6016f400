"""The watchdog: notices an event loop that is late, and requests that take far longer than the others."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterable, Iterator

from runner.metrics import Snapshot
from runner.types import Trace

LATE_S = 0.25
"""A loop that is later than this, again and again for a while, is worth a warning: latencies are its own by then."""

_WINDOW_S = 5.0
_WHILE_S = 10.0
_SILENCE_S = 60.0

_SLOW = 5.0
SLOW_S = 10.0
"""A request is far past the p99 where it takes this many times as long, and at least so many seconds."""

_ANSWERS = 50
"""Answers that a p99 is believed from."""

_NAMED = 3
"""Slow requests that one note names."""


class Watchdog:
    """Watches from within the loop. `rest` is the pulse, between two of which `notes` says what is wrong."""

    def __init__(self) -> None:
        self._lags: deque[tuple[float, float]] = deque()  # when, how late
        self._late_since: float | None = None
        self._silent_until = float("-inf")
        self._named: dict[int, Trace] = {}  # slow requests in flight that were named, by id
        self._none_named_until = float("-inf")

    async def rest(self, seconds: float) -> None:
        """Sleep, and see how late the loop wakes the sleeper up."""
        due = time.perf_counter() + seconds
        await asyncio.sleep(seconds)
        now = time.perf_counter()
        self._lags.append((now, max(0.0, now - due)))
        while self._lags[0][0] < now - _WINDOW_S:
            self._lags.popleft()
        if self.lag_s <= LATE_S:
            self._late_since = None
        elif self._late_since is None:
            self._late_since = now

    @property
    def lag_s(self) -> float:
        """How late the loop was at the worst, of late."""
        return max((late for _, late in self._lags), default=0.0)

    def notes(self, snapshot: Snapshot, in_flight: Iterable[Trace]) -> Iterator[str]:
        """What a person should know by now, each thing once, and one of its kind a minute.

        Args:
            snapshot: The run at this moment.
            in_flight: The traces of its requests.
        """
        now = time.perf_counter()
        if self._late_since is not None and now - self._late_since >= _WHILE_S and now >= self._silent_until:
            self._silent_until = now + _SILENCE_S
            yield (
                f"the event loop is up to {self.lag_s:.1f} s late: this process is short of CPU, and latencies are"
                " partly its own. Lower limits.concurrency, make the mapper and the scorers lighter, or share the rows"
                " out among processes (dataset.shard.count, dataset.shard.index)"
            )
        yield from self._slow_requests(snapshot, in_flight, now)

    def _slow_requests(self, snapshot: Snapshot, in_flight: Iterable[Trace], now: float) -> Iterator[str]:
        p99_s = snapshot.latency_p99_s
        if p99_s is None or snapshot.asked - snapshot.failed < _ANSWERS:
            return
        bound_s = max(SLOW_S, _SLOW * p99_s)
        slow = {id(trace): trace for trace in in_flight if trace.on_the_wire and now - trace.sent_at > bound_s}
        self._named = {key: trace for key, trace in self._named.items() if key in slow}
        new = sorted((slow[key] for key in slow.keys() - self._named.keys()), key=lambda trace: trace.sent_at)
        if not new or now < self._none_named_until:
            return
        self._named, self._none_named_until = slow, now + _SILENCE_S
        for trace in new[:_NAMED]:
            yield (
                f"row {trace.row} has been waiting for {trace.deployment} for {now - trace.sent_at:.0f} s;"
                f" 99 % of the answers take less than {p99_s:.2g} s. It is given up at request.timeout"
            )
        if len(new) > _NAMED:
            yield f"and so have {len(new) - _NAMED:,} more"
