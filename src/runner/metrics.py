"""What a run has done so far: counted as it happens, read as a `Snapshot` once in a while.

The progress bar, the tracker's time series and the budget's forecast show the same snapshot.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

RECENT_S = 10.0
"""How far back the recent rates look, in seconds."""

RECENT_ANSWERS = 2_000
"""How many answers the percentiles look at."""

_TICKS = 20  # in RECENT_S
_TICK_S = RECENT_S / _TICKS


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentSnapshot:
    """One deployment at one moment. Totals count attempts of this process; percentiles are recent."""

    state: str  # up, slow, paused, probing (coming back) or out
    answered: int
    failed: int  # attempts, retried or not
    share: float  # of all answers
    in_flight: int
    requests_per_s: float  # answered
    latency_p50_s: float | None  # service time; None: no answer yet
    latency_p95_s: float | None
    errors: dict[str, int]  # failed attempts by error class

    @property
    def is_out(self) -> bool:
        return self.state == "out"


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A run at one moment. Totals are of this process; rates and percentiles are recent."""

    total: int | None  # rows to do; None: unknown
    done: int  # rows settled: answered, failed, reused or deduplicated
    failed: int  # of them
    reused: int  # of them: answers that were there already
    deduplicated: int = 0  # of them: they share the answer of another row
    left_alone: int = 0  # of those that failed: they did before, and were not asked again
    in_flight: int  # requests on their way, without those that wait to be sent
    window: int  # how many may be in flight now
    window_why: str = ""  # why that last changed; empty: it is as it was set
    held_up_s: float = 0.0  # how much longer no request goes out, for a pause or a limit
    loop_lag_s: float | None = None  # how late the event loop was at the worst, of late; None: nobody looked
    elapsed_s: float
    requests_per_s: float  # answered or failed, over the last RECENT_S
    rows_per_s: float  # likewise, with the rows that share an answer
    tokens_per_s: float  # prompt and completion, over the last RECENT_S
    prompt_tokens: int
    completion_tokens: int  # reasoning included
    cached_tokens: int  # part of prompt_tokens
    reasoning_tokens: int  # part of completion_tokens
    cost_usd: float  # of the answers with a price
    cost_unknown: int  # answers without one
    latency_p50_s: float | None  # of the last RECENT_ANSWERS answers; None: no answer yet
    latency_p95_s: float | None
    latency_p99_s: float | None
    queue_wait_p95_s: float | None
    retries: int
    errors: dict[str, int]  # failed rows by error class
    eta_s: float | None  # until the last row; None: unknown
    scores: dict[str, float]  # means so far
    deployments: Mapping[str, DeploymentSnapshot] = field(default_factory=dict)  # by label, where there are several

    @property
    def asked(self) -> int:
        """Rows that this process has asked and that have come to their end."""
        return self.done - self.reused - self.deduplicated - self.left_alone

    def as_series(self) -> dict[str, float]:
        """One point of the tracker's time series, under ``ts/``. What is unknown is left out."""
        point: dict[str, float | None] = {
            "elapsed_s": self.elapsed_s,
            "done": self.done,
            "failed": self.failed,
            "reused": self.reused,
            "deduplicated": self.deduplicated,
            "in_flight": self.in_flight,
            "window": self.window,
            "loop_lag_s": self.loop_lag_s,
            "requests_per_s": self.requests_per_s,
            "tokens_per_s": self.tokens_per_s,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "cached_tokens": self.cached_tokens,
            "reasoning_tokens": self.reasoning_tokens,
            "cost_usd": self.cost_usd,
            "latency_p50_s": self.latency_p50_s,
            "latency_p95_s": self.latency_p95_s,
            "latency_p99_s": self.latency_p99_s,
            "queue_wait_p95_s": self.queue_wait_p95_s,
            "retries": self.retries,
            **{f"score/{name}": mean for name, mean in self.scores.items()},
        }
        for label, deployment in self.deployments.items():
            point |= {
                f"deployment/{label}/up": float(not deployment.is_out),
                f"deployment/{label}/share": deployment.share,
                f"deployment/{label}/in_flight": deployment.in_flight,
                f"deployment/{label}/requests_per_s": deployment.requests_per_s,
                f"deployment/{label}/latency_p50_s": deployment.latency_p50_s,
                f"deployment/{label}/latency_p95_s": deployment.latency_p95_s,
                f"deployment/{label}/failed": deployment.failed,
            }
        return {f"ts/{key}": value for key, value in point.items() if value is not None}


class Usage(Protocol):
    """Tokens that an answer took, as a `TokenUsage` or a stored answer has them. None: none, or unknown."""

    @property
    def prompt_tokens(self) -> int | None: ...
    @property
    def completion_tokens(self) -> int | None: ...
    @property
    def cached_tokens(self) -> int | None: ...
    @property
    def reasoning_tokens(self) -> int | None: ...


class Meter:
    """Counts what a run does, in constant memory, from one thread.

    Args:
        clock: Seconds, monotonic. The run begins when the meter is made.
        most_requests_per_s: What limits let out in the long run, counted as `Snapshot.requests_per_s` is. The time
            left does not go by a burst that is faster.
        most_tokens_per_s: Likewise.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.perf_counter,
        most_requests_per_s: float = math.inf,
        most_tokens_per_s: float = math.inf,
    ) -> None:
        self._clock = clock
        self._most_requests_per_s = most_requests_per_s
        self._most_tokens_per_s = most_tokens_per_s
        self._started = clock()
        self._answered = 0
        self._failed = 0
        self._reused = 0
        self._deduplicated = 0
        self._left_alone = 0
        self._retries = 0
        self._prompt_tokens = 0
        self._completion_tokens = 0
        self._cached_tokens = 0
        self._reasoning_tokens = 0
        self._cost_usd = 0.0
        self._cost_unknown = 0
        self._errors: Counter[str] = Counter()
        self._scores: dict[str, _Mean] = {}
        self._latencies: deque[float] = deque(maxlen=RECENT_ANSWERS)
        self._queue_waits: deque[float] = deque(maxlen=RECENT_ANSWERS)
        self._tick = _Tick()
        self._ticks: deque[_Tick] = deque([self._tick], maxlen=_TICKS + 1)

    def answered(
        self,
        usage: Usage | None,
        *,
        cost_usd: float | None,
        latency_s: float,
        queue_wait_s: float,
    ) -> None:
        """A row was answered.

        Args:
            usage: None where the provider did not say; the row then counts no tokens.
            cost_usd: None where no price is known.
            latency_s: What the caller of the run waits for: `RequestMetrics.end_to_end_s` or its service time.
            queue_wait_s: How long the request waited in this client.
        """
        tokens = 0
        if usage is not None:
            prompt_tokens, completion_tokens = usage.prompt_tokens or 0, usage.completion_tokens or 0
            tokens = prompt_tokens + completion_tokens
            self._prompt_tokens += prompt_tokens
            self._completion_tokens += completion_tokens
            self._cached_tokens += usage.cached_tokens or 0
            self._reasoning_tokens += usage.reasoning_tokens or 0
        if cost_usd is None:
            self._cost_unknown += 1
        else:
            self._cost_usd += cost_usd
        self._answered += 1
        self._latencies.append(latency_s)
        self._queue_waits.append(queue_wait_s)
        self._settled(tokens)

    def failed(self, error_type: str) -> None:
        """A row failed for good, with an error of the class ``error_type``."""
        self._failed += 1
        self._errors[error_type] += 1
        self._settled(0)

    def retried(self, n: int = 1) -> None:
        """``n`` attempts that followed failed ones have come to an end."""
        self._retries += n

    def reused(self, n: int = 1) -> None:
        """``n`` rows need not be asked: their answers are known. They count as done, and not for the rates."""
        self._reused += n

    def deduplicated(self, n: int = 1) -> None:
        """``n`` rows share the answers that others have got. They count as done, for the rates as rows only."""
        self._deduplicated += n
        self._current_tick().shared += n

    def stands_at(self, done: int, *, reused: int, left_alone: int = 0) -> None:
        """So many rows are done, and so many of them were before, answered or failed: what is neither that nor was
        asked is shared."""
        self._reused = reused
        self._left_alone = left_alone
        self._deduplicated = max(0, done - self.settled - reused - left_alone)

    @property
    def settled(self) -> int:
        """Rows that were asked and have come to their end."""
        return self._answered + self._failed

    def scored(self, scores: Mapping[str, float | None]) -> None:
        """An answer was scored. None is no score: it does not count for the mean."""
        for name, score in scores.items():
            if score is None:
                continue
            mean = self._scores.get(name)
            if mean is None:
                mean = self._scores[name] = _Mean()
            mean.total += score
            mean.count += 1

    def snapshot(
        self,
        now: float | None = None,
        *,
        total: int | None = None,
        in_flight: int = 0,
        window: int = 0,
        window_why: str = "",
        held_up_s: float = 0.0,
        loop_lag_s: float | None = None,
        deployments: Mapping[str, DeploymentSnapshot] | None = None,
    ) -> Snapshot:
        """The run at ``now`` (the clock's time; None: this moment). The meter does not know the rest: pass it.

        Costs a sort of the recent latencies: call it about once a second.
        """
        elapsed_s = max(0.0, (self._clock() if now is None else now) - self._started)
        requests_per_s, rows_per_s, tokens_per_s = self._recent_rates(elapsed_s)
        too_fast = max(1.0, requests_per_s / self._most_requests_per_s, tokens_per_s / self._most_tokens_per_s)
        done = self.settled + self._reused + self._deduplicated + self._left_alone
        latencies = sorted(self._latencies)
        return Snapshot(
            total=total,
            done=done,
            failed=self._failed + self._left_alone,
            reused=self._reused,
            deduplicated=self._deduplicated,
            left_alone=self._left_alone,
            in_flight=in_flight,
            window=window,
            window_why=window_why,
            held_up_s=held_up_s,
            loop_lag_s=loop_lag_s,
            elapsed_s=elapsed_s,
            requests_per_s=requests_per_s,
            rows_per_s=rows_per_s,
            tokens_per_s=tokens_per_s,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            cached_tokens=self._cached_tokens,
            reasoning_tokens=self._reasoning_tokens,
            cost_usd=self._cost_usd,
            cost_unknown=self._cost_unknown,
            latency_p50_s=percentile(latencies, 50),
            latency_p95_s=percentile(latencies, 95),
            latency_p99_s=percentile(latencies, 99),
            queue_wait_p95_s=percentile(sorted(self._queue_waits), 95),
            retries=self._retries,
            errors=dict(self._errors),
            eta_s=None if total is None else self._eta_s(max(0, total - done), rows_per_s / too_fast, elapsed_s),
            scores={name: mean.total / mean.count for name, mean in self._scores.items()},
            deployments=deployments or {},
        )

    def _settled(self, tokens: int) -> None:
        tick = self._current_tick()
        tick.asked += 1
        tick.tokens += tokens

    def _current_tick(self) -> _Tick:
        number = int((self._clock() - self._started) / _TICK_S)
        if self._tick.number != number:
            self._tick = _Tick(number)
            self._ticks.append(self._tick)
        return self._tick

    def _recent_rates(self, elapsed_s: float) -> tuple[float, float, float]:
        """Requests, rows and tokens per second, over whole ticks and the one that has begun: the span is exact."""
        first = max(0, int(elapsed_s / _TICK_S) - _TICKS)
        span_s = elapsed_s - first * _TICK_S
        if span_s <= 0:
            return 0.0, 0.0, 0.0
        recent = [tick for tick in self._ticks if tick.number >= first]
        asked, shared = sum(tick.asked for tick in recent), sum(tick.shared for tick in recent)
        return asked / span_s, (asked + shared) / span_s, sum(tick.tokens for tick in recent) / span_s

    def _eta_s(self, remaining: int, rate: float, elapsed_s: float) -> float | None:
        if remaining == 0:
            return 0.0
        if rate > 0:
            return remaining / rate
        worked = self.settled + self._deduplicated  # requests slower than RECENT_S: only the whole run tells
        return remaining * elapsed_s / worked if worked else None


def percentile(sorted_values: Sequence[float], q: float) -> float | None:
    """The ``q``-th percentile (0 to 100) of ascending values, by linear interpolation as NumPy does; None of nothing.

    Values of ``+inf`` (a failure counted as an answer that never comes) are fine.
    """
    if not 0 <= q <= 100:
        raise ValueError(f"q={q}: a percentile lies between 0 and 100")
    if not sorted_values:
        return None
    position = (len(sorted_values) - 1) * q / 100
    below = int(position)
    share = position - below
    low = sorted_values[below]
    if share == 0:
        return low
    high = sorted_values[below + 1]
    return low if low == high else min(high, low + (high - low) * share)


@dataclass(slots=True)
class _Tick:
    """What settled in one slice of time."""

    number: int = 0  # since the start
    asked: int = 0  # rows
    shared: int = 0  # rows that share an answer
    tokens: int = 0


@dataclass(slots=True)
class _Mean:
    total: float = 0.0
    count: int = 0
