"""Levels: what was measured at each, in figures with their intervals, and whether it was the server that was measured.

Definitions. Latency: from taking a slot (closed loop) or from the planned sending (open loop) to the answer, everything
included. Service time: of the last attempt, at the transport. Queue wait: for this client's own limits. TTFT: from
sending to the first piece of content. ITL: (last piece - first piece) / (output tokens - 1). Throughput: in a closed
loop, where load is steady, a request that began before the window or ended after it counts with the share of its time
that lies in it; in an open loop, where requests may pile up, those count that ended in it.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

from runner.bench.load import MOST_IN_FLIGHT
from runner.bench.records import Sample, Span
from runner.intervals import Interval, mean_of, quantile_interval, share_interval
from runner.metrics import percentile

_PERCENTS = (50, 95, 99)

_SLICES = 60
"""Slices of a window: its throughput's interval is made from those of 4 to 10 parts."""

_BUSY = 0.9
"""Share of a core from which the client counts as the bottleneck."""

_IDLE = 0.9
"""Share of the slots that have to be with the server."""

_LATE = 0.05
"""Share of the latency that the event loop may be late on average."""

_LAG_WARNING_S = 0.025


class Mode(StrEnum):
    """What the number of a level means."""

    closed = "closed"  # requests in flight
    open = "open"  # requests per second


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A measured value; the interval is None where the samples do not suffice for one."""

    value: float
    interval: Interval | None = None

    def as_json(self) -> dict[str, float | str | None]:
        stored: dict[str, float | str | None] = {"value": _json(self.value), "low": None, "high": None}
        if self.interval is not None:
            stored |= {"low": _json(self.interval.low), "high": _json(self.interval.high)}
        return stored

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> Figure:
        value, low, high = (None if stored[key] is None else float(stored[key]) for key in ("value", "low", "high"))
        assert value is not None
        return cls(value=value, interval=None if low is None or high is None else Interval(low=low, high=high))


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """Who was measured. ``limited_by`` is None where it was the server."""

    in_flight: float  # mean, at work in this program
    at_server: float  # mean, at the transport: throughput × service time, by Little's law
    lag_mean_s: float  # of the event loop
    lag_p99_s: float
    cpu_share: float  # of one core
    limited_by: str | None = None  # client, or limits: the configured rate limits
    notes: tuple[str, ...] = ()  # what was found


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelFacts:
    """One level. A percentile is None where the samples do not suffice to know it."""

    level: float
    mode: Mode
    repeats: int
    requests: int  # that ended in the window (open loop: that were to be sent in it)
    failed: int  # of them
    errors: Mapping[str, int]  # by class
    retries: int
    elapsed_s: float  # windows of all repeats
    requests_per_s: Figure  # answered
    goodput_per_s: float | None  # answered within every limit that bench.slo sets; None: it sets none
    tokens_per_s: Mapping[str, float] | None  # prompt, completion; None: the server counts none
    tokens_per_s_per_user: float | None  # completion tokens of a request / its latency, mean
    latency_s: Mapping[str, Figure | None]  # of those that were answered
    latency_with_failures_s: Mapping[str, Figure | None]  # a failure counts as an answer that never comes
    service_time_s: Mapping[str, Figure | None]
    queue_wait_s: Mapping[str, Figure | None]
    ttft_s: Mapping[str, Figure | None]
    itl_s: Mapping[str, Figure | None]
    tokens: Mapping[str, int]  # prompt, completion, cached
    cost_usd: float | None  # None: unknown
    audit: Audit

    @property
    def error_share(self) -> Interval:
        return share_interval(self.failed, self.requests)

    def percentile(self, what: str, percent: int) -> Figure | None:
        """For example ``percentile("latency_s", 95)``."""
        figures: Mapping[str, Figure | None] = getattr(self, what)
        return figures.get(f"p{percent}")

    def as_json(self) -> dict[str, Any]:
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        for name, value in plain.items():
            if isinstance(value, Figure):
                plain[name] = value.as_json()
            elif name in _QUANTILES:
                plain[name] = {key: figure and figure.as_json() for key, figure in value.items()}
        audit = {**asdict(self.audit), "notes": list(self.audit.notes)}
        return {**plain, "mode": self.mode.value, "audit": audit}

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> LevelFacts:
        """The level that `as_json` wrote."""
        values = dict(stored)
        for name in _QUANTILES:
            values[name] = {key: figure and Figure.of(figure) for key, figure in values[name].items()}
        values["requests_per_s"] = Figure.of(values["requests_per_s"])
        values["audit"] = Audit(**{**values["audit"], "notes": tuple(values["audit"]["notes"])})
        return cls(**{**values, "mode": Mode(values["mode"])})


_QUANTILES = ("latency_s", "latency_with_failures_s", "service_time_s", "queue_wait_s", "ttft_s", "itl_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Within:
    """Limits on a single request, for the goodput. Seconds."""

    latency_s: float = math.inf
    ttft_s: float = math.inf
    itl_s: float = math.inf

    @property
    def limits(self) -> bool:
        return min(self.latency_s, self.ttft_s, self.itl_s) < math.inf

    def holds(self, sample: Sample) -> bool:
        return (
            sample.latency_s <= self.latency_s
            and (sample.ttft_s or 0.0) <= self.ttft_s
            and (sample.itl_s or 0.0) <= self.itl_s
        )


def level_facts(mode: Mode, measurements: Iterable[tuple[Span, Iterable[Sample]]], *, within: Within) -> LevelFacts:
    """One level in figures, from all its repeats. Holds a few floats a request."""
    tally = _Tally(mode, within)
    for span, samples in measurements:
        tally.add(span, samples)
    return tally.facts()


class _Tally:
    """Counts the requests of a level."""

    def __init__(self, mode: Mode, within: Within) -> None:
        self._mode = mode
        self._within = within
        self._spans: list[Span] = []
        self._values = {name: array("d") for name in ("latency_s", "service_time_s", "queue_wait_s", "ttft_s", "itl_s")}
        self._errors: Counter[str] = Counter()
        self._requests = self._retries = self._good = 0
        self._tokens = Counter(prompt=0, completion=0, cached=0)
        self._counted = 0  # requests whose tokens are known
        self._cost_usd: float | None = 0.0
        self._per_user = 0.0
        self._done = 0.0  # requests
        self._at_server_s = 0.0
        self._rates: list[float] = []  # of slices of the windows

    def add(self, span: Span, samples: Iterable[Sample]) -> None:
        self._spans.append(span)
        work = _Work(span, self._mode)
        for sample in samples:
            work.add(sample)
            if self._mode is Mode.closed or sample.started_s >= 0:
                self._count(sample)
        work.end()
        self._done += work.done
        self._at_server_s += work.at_server_s
        self._rates += work.rates()

    def facts(self) -> LevelFacts:
        elapsed_s = math.fsum(span.window_s for span in self._spans)
        failed = self._errors.total()
        answered = self._requests - failed
        per_answer = self._done / answered / elapsed_s if answered and elapsed_s else 0.0
        interval = mean_of(self._rates)[1] if self._rates else None
        with_failures = array("d", self._values["latency_s"])
        with_failures.extend([math.inf] * failed)
        return LevelFacts(
            level=self._spans[0].level,
            mode=self._mode,
            repeats=len(self._spans),
            requests=self._requests,
            failed=failed,
            errors=dict(self._errors.most_common()),
            retries=self._retries,
            elapsed_s=elapsed_s,
            requests_per_s=Figure(value=answered * per_answer, interval=interval),
            goodput_per_s=self._good * per_answer if self._within.limits else None,
            tokens_per_s={kind: self._tokens[kind] * per_answer for kind in ("prompt", "completion")}
            if self._counted
            else None,
            tokens_per_s_per_user=self._per_user / self._counted if self._tokens["completion"] else None,
            **{name: _quantiles(values) for name, values in self._values.items()},
            latency_with_failures_s=_quantiles(with_failures),
            tokens=dict(self._tokens),
            cost_usd=self._cost_usd if answered else None,
            audit=self._audit(elapsed_s),
        )

    def _count(self, sample: Sample) -> None:
        self._requests += 1
        self._retries += sample.retries
        if sample.error is not None:
            self._errors[sample.error] += 1
            return
        for name, values in self._values.items():
            value = getattr(sample, name)
            if value is not None:
                values.append(value)
        self._good += self._within.holds(sample)
        if sample.completion_tokens is not None:
            self._counted += 1
            self._tokens["prompt"] += sample.prompt_tokens or 0
            self._tokens["completion"] += sample.completion_tokens
            self._tokens["cached"] += sample.cached_tokens or 0
            self._per_user += sample.completion_tokens / max(sample.latency_s, 1e-9)
        if self._cost_usd is not None:
            self._cost_usd = None if sample.cost_usd is None else self._cost_usd + sample.cost_usd

    def _audit(self, elapsed_s: float) -> Audit:
        def mean(name: str) -> float:
            total = math.fsum(getattr(span, name) * span.window_s for span in self._spans)
            return total / elapsed_s if elapsed_s else 0.0

        latencies = self._values["latency_s"]
        audit = Audit(
            in_flight=mean("in_flight"),
            at_server=self._at_server_s / elapsed_s if elapsed_s else 0.0,
            lag_mean_s=mean("lag_mean_s"),
            lag_p99_s=max(span.lag_p99_s for span in self._spans),
            cpu_share=mean("cpu_share"),
        )
        limited_by, notes = _judged(
            audit,
            slots=self._spans[0].level if self._mode is Mode.closed else None,
            most_in_flight=max(span.most_in_flight for span in self._spans),
            latency_s=percentile(sorted(latencies), 50) or 0.0,
            waiting=math.fsum(self._values["queue_wait_s"]) / (math.fsum(latencies) or 1.0),
            retried=self._retries > 0,
        )
        return replace(audit, limited_by=limited_by, notes=tuple(notes))


class _Work:
    """What was done within one window."""

    def __init__(self, span: Span, mode: Mode) -> None:
        self._mode = mode
        self.done = 0.0  # requests that were answered
        self.at_server_s = 0.0
        self._span = span
        self._slices = [0.0] * _SLICES  # requests done in each
        self._answered = self._ended = 0
        self._latency_s = self._service_s = self._all_s = 0.0

    def add(self, sample: Sample) -> None:
        latency_s = max(sample.latency_s, 1e-9)
        self._ended += 1
        self._all_s += latency_s
        self._service_s += sample.service_time_s
        self.at_server_s += self._overlap_s(sample.ended_s - sample.service_time_s, sample.ended_s)
        if sample.error is None:
            self._answered += 1
            self._latency_s += latency_s
            if self._mode is Mode.closed:
                self._spread(sample.started_s, sample.ended_s, latency_s)
            elif sample.ended_s <= self._span.window_s:
                self.done += 1
                self._slices[min(int(sample.ended_s / self._span.window_s * _SLICES), _SLICES - 1)] += 1

    def end(self) -> None:
        """Count what was unfinished: as if it took as long as the others, and ended as well as they did."""
        if not self._answered:
            return
        latency_s, window_s = self._latency_s / self._answered, self._span.window_s
        for started in self._span.unfinished:
            self._spread(started, window_s, max(latency_s, window_s - started), self._answered / self._ended)
            self.at_server_s += self._overlap_s(started, window_s) * min(1.0, self._service_s / self._all_s)

    def rates(self) -> list[float]:
        """Requests per second in slices that last a latency at least; none where the window is too short for that."""
        latency_s = self._latency_s / self._answered if self._answered else math.inf
        for count in (10, 6, 5, 4):
            if self._span.window_s >= count * latency_s:
                size = _SLICES // count
                length_s = self._span.window_s / count
                return [sum(self._slices[start : start + size]) / length_s for start in range(0, _SLICES, size)]
        return []

    def _spread(self, started: float, ended: float, latency_s: float, weight: float = 1.0) -> None:
        width = self._span.window_s / _SLICES
        start, end = max(0.0, started), min(ended, self._span.window_s)
        if end <= start:
            return
        self.done += weight * (end - start) / latency_s
        for number in range(int(start / width), min(int(end / width), _SLICES - 1) + 1):
            inside = min(end, (number + 1) * width) - max(start, number * width)
            self._slices[number] += weight * max(0.0, inside) / latency_s

    def _overlap_s(self, started: float, ended: float) -> float:
        return max(0.0, min(ended, self._span.window_s) - max(0.0, started))


def _judged(
    audit: Audit, *, slots: float | None, most_in_flight: int, latency_s: float, waiting: float, retried: bool
) -> tuple[str | None, list[str]]:
    """Who set the pace of a level, and what speaks for it.

    Args:
        slots: Requests that were to be in flight; None: as many as came.
        latency_s: The median.
        waiting: Share of the latency that was spent waiting for the client's own limits.
        retried: Whether there were retries: their pauses are the server's doing.
    """
    notes = []
    if audit.cpu_share >= _BUSY:
        notes.append(f"the client's thread is busy ({audit.cpu_share:.0%} of a core)")
    if audit.lag_mean_s > _LATE * latency_s > 0:
        notes.append(f"the client is late by {audit.lag_mean_s * 1000:.1f} ms on average")
    if slots is None and most_in_flight >= MOST_IN_FLIGHT:
        notes.append(f"the client keeps no more than {MOST_IN_FLIGHT} requests in flight")
    idle = slots is not None and audit.at_server < _IDLE * slots
    if idle and waiting <= 1 - _IDLE and not retried:
        notes.append(f"only {audit.at_server:.1f} requests were at the server")
    if notes:
        return "client", notes
    if waiting > 1 - _IDLE:
        return "limits", [f"requests spent {waiting:.0%} of their time waiting for the configured limits"]
    if audit.lag_p99_s > max(_LAG_WARNING_S, 2 * _LATE * latency_s):
        notes.append(f"the client was late by {audit.lag_p99_s * 1000:.0f} ms at times: the tail is in part its own")
    return None, notes


def _quantiles(values: array[float]) -> dict[str, Figure | None]:
    ordered = sorted(values)
    figures: dict[str, Figure | None] = {}
    for percent in _PERCENTS:
        interval = quantile_interval(ordered, percent / 100)
        value = percentile(ordered, percent)
        figures[f"p{percent}"] = None if interval is None or value is None else Figure(value=value, interval=interval)
    return figures


def _json(value: float) -> float | str:
    """A number as JSON has it; infinity, which it has not, as text that `float` reads."""
    return value if math.isfinite(value) else str(value)
