"""Throughput as seen by a client that cannot see its server: rounds of answers, and whether two windows differ."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from statistics import fmean, stdev

_ROUND_S = 0.25
"""A whole round is no shorter than this, in seconds, so that hiccups of the event loop even out."""

_ROUNDS = 12
"""Rounds that a sample remembers."""

_CHANGE = 0.15, 0.5
"""A round that differs from its predecessors by more than this is odd, however much or little those differed."""

_ERROR = 0.01
"""No mean is known better than this."""


@dataclass(slots=True)
class Round:
    """A stretch of answers, and what they say about the server's throughput, in two ways.

    By counting: the work that was done in the time. Right as soon as the server is saturated; where it is not, the
    answers that come in were asked at the window before. And by Little's law, from what each request met: with n in
    flight when it was sent, n are answered in the time that it takes. Right as soon as a request of the new window is
    answered, and without noise where the time goes with the tokens; too low on a saturated server as long as only
    short answers are back.

    Work is tokens, or requests where the provider does not count tokens.
    """

    started: float = 0.0  # when the first answer came, which is itself not counted
    ended: float = 0.0
    answers: int = 0
    admitted: int = 0  # sum over the answers: requests in flight when it was sent
    work: float = 0.0  # likewise: those, times the work in it
    busy_s: float = 0.0  # likewise: the time that it took
    longest_s: float = 0.0
    done: float = 0.0  # work of all answers that came meanwhile, of requests of this window or not

    def add(self, *, in_flight: int, work: float, seconds: float, now: float) -> None:
        """An answer to a request of this window. Its work is in ``done`` already."""
        if not self.answers:
            self.started = now
            self.done = 0.0
        self.ended = now
        self.answers += 1
        self.admitted += in_flight
        self.work += in_flight * work
        self.busy_s += max(seconds, 1e-6)
        self.longest_s = max(self.longest_s, seconds)

    @property
    def is_whole(self) -> bool:
        """Whether it lasted as long as its requests took on average, so that waves of answers even out."""
        return self.ended - self.started >= max(_ROUND_S, self.mean_s)

    @property
    def mean_s(self) -> float:
        return self.busy_s / self.answers

    @property
    def in_flight(self) -> float:
        return self.admitted / self.answers

    @property
    def counted(self) -> float:
        """Work per second, by counting. Of a whole round only."""
        return self.done / (self.ended - self.started)

    @property
    def inferred(self) -> float:
        """Work per second, by Little's law."""
        return self.work / self.busy_s

    @property
    def rate(self) -> float:
        """Work per second: whichever is more, as either errs on the low side."""
        return max(self.inferred, self.counted) if self.is_whole else self.inferred

    def gain(self, before: Round) -> float:
        """Relative difference of the rates: 0.2 is a fifth more."""
        return self.rate / before.rate - 1


class Sample:
    """Whole rounds of one window.

    Args:
        infer: Whether Little's law is trusted: it needs work that explains the time.
    """

    def __init__(self, *, infer: bool) -> None:
        self._infer = infer
        self._counted: deque[float] = deque(maxlen=_ROUNDS)
        self._inferred: deque[float] = deque(maxlen=_ROUNDS)

    def __len__(self) -> int:
        return len(self._counted)

    def add(self, round_: Round) -> None:
        self._counted.append(round_.counted)
        self._inferred.append(round_.inferred)

    def change(self, round_: Round) -> float:
        """Relative difference of a round to those here, by counting, which tells a change of the server at once."""
        return round_.counted / fmean(self._counted) - 1

    def is_odd(self, round_: Round) -> bool:
        """Whether a round differs by more than chance from those here, which are three at least."""
        least, most = _CHANGE
        deviation = stdev(self._counted) / fmean(self._counted)
        return abs(self.change(round_)) > max(least, min(most, 3 * deviation))

    def against(self, other: Sample) -> tuple[float, float]:
        """Relative difference of the means, and its standard error."""
        ours, theirs = self._rates, other._rates
        mean, base = fmean(ours), fmean(theirs)
        squares = sum((rate - mean) ** 2 for rate in ours) + sum((rate - base) ** 2 for rate in theirs)
        variance = squares / max(1, len(ours) + len(theirs) - 2)
        error = math.sqrt(variance * (1 / len(ours) + 1 / len(theirs))) / base
        return mean / base - 1, max(_ERROR, error)

    @property
    def _rates(self) -> deque[float]:
        """The quiet measure, unless the other one is clearly higher: then the quiet one is too low."""
        if not self._infer:
            return self._counted
        if len(self) < 2:
            return self._inferred
        doubt = 2 * stdev(self._counted) / math.sqrt(len(self))
        return self._counted if fmean(self._counted) - doubt > fmean(self._inferred) else self._inferred
