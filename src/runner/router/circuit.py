"""The circuit breaker of one deployment: whether it is asked, tried with one request at a time, or left alone."""

from __future__ import annotations

import random
import time

from runner.errors import ConnectError, RequestError, Timeout
from runner.types import Trace

_FAILURE_TOKENS, _TIMEOUT_TOKENS, _SUCCESS_TOKENS = 5.0, 10.0, 1.0
"""What an outcome takes from the retry budget, or gives back: the AWS SDKs' figures."""

_IN_A_ROW = 10
"""Failures with no answer between that mean an outage, however quickly they come …"""

_IN_A_WHILE, _WHILE_S = 3, 2.0
"""… and refusals that do if they have gone on for so long."""

_FIRST_PAUSE_S = 0.5
_LEAST_PATIENCE_S = 1.0
_RAMP = 16
_IN_USE = 0.75


class Sent:
    """A request that was given to the deployment: after which opening of its circuit, and what it is up to."""

    __slots__ = ("epoch", "trace")

    def __init__(self, epoch: int, trace: Trace) -> None:
        self.epoch = epoch
        self.trace = trace


class Circuit:
    """Closed while a deployment answers. It opens when requests to it would be wasted:

    - nobody listens there;
    - ten requests failed in a row with no answer between, or three were turned away over two seconds;
    - its retry budget is used up: a failure takes 5 tokens, a timeout 10, an answer gives 1 back
      (https://docs.aws.amazon.com/sdkref/latest/guide/feature-retry-behavior.html), so that one in six may fail for
      ever;
    - `trip` says so.

    What fails for the second time may do so through its own fault. So a request that failed before counts only where
    it was turned away.

    An open circuit admits one request after half a second, then after pauses that double up to ``cooldown_s``, or as
    long as the server asks for. Once one is answered, more are let through, twice as many with every round of
    answers; once that is more than come, it is closed. An answer may take minutes: a request that has been on the wire
    for twice the time in which the last one failed (a second at least) counts like an answer, unless it was a timeout.

    Args:
        budget: Tokens of the retry budget.
        cooldown_s: The longest pause between two probes.
        seed: Makes the jitter of the pauses repeatable.
    """

    def __init__(self, *, budget: float = 500.0, cooldown_s: float = 2.0, seed: int | None = None) -> None:
        self.closed = True
        self.cause: RequestError | None = None  # what opened it last
        self._budget = budget
        self._cooldown_s = cooldown_s
        self._random = random.Random(seed)
        self._tokens = budget
        self._failures = 0  # since the last answer
        self._failing_since = 0.0
        self._answered_at = float("-inf")
        self._epoch = 0  # counts the openings: what was sent before one does not speak of what came after
        self._pause_s = 0.0
        self._probe_at = 0.0
        self._probes: set[Sent] = set()  # in flight
        self._allowance = 1  # probes that may be
        self._grown_at = 0.0
        self._patience_s = 0.0

    @property
    def answering(self) -> bool:
        """Closed, or on the way there: it has answered since it opened."""
        return self.closed or self._allowance > 1

    def admits(self, now: float) -> bool:
        """Whether a request may be sent. Times are `time.monotonic`'s."""
        if self.closed:
            return True
        if now < self._probe_at:
            return False
        patience_s = self._patience_s
        if now - self._grown_at >= patience_s and (late := sum(out_s >= patience_s for out_s in self._out_s())):
            self._grow(self._allowance + late, now)
        return self.closed or len(self._probes) < self._allowance

    def due(self, now: float) -> float:
        """When an open circuit admits a request, if none that is in flight comes back before."""
        if now < self._probe_at or len(self._probes) < self._allowance:
            return self._probe_at
        return max(self._grown_at, now - max(self._out_s(), default=0.0)) + self._patience_s

    def sent(self, now: float, trace: Trace) -> Sent:
        """A request goes, if only into a queue. Returns what its outcome is to be reported with."""
        sent = Sent(self._epoch, trace)
        if not self.closed:
            if not self._probes:
                self._grown_at = now
            self._probes.add(sent)
        return sent

    def answered(self, sent: Sent) -> None:
        """It was answered, if only by a refusal of the request itself."""
        now = self._answered_at = time.monotonic()
        self._failures = 0
        self._tokens = min(self._budget, self._tokens + _SUCCESS_TOKENS)
        if self.closed:
            return
        if sent.epoch == self._epoch:
            self._probes.discard(sent)
            self._grow(self._allowance + 1, now)
        else:
            self._probe_at = min(self._probe_at, now)  # it has come back to life

    def failed(self, sent: Sent, error: RequestError, *, lasted_s: float, again: bool) -> None:
        """It failed through the deployment's fault.

        Args:
            lasted_s: How long it took to fail.
            again: The request had failed before.
        """
        if sent.epoch != self._epoch:
            return
        now = time.monotonic()
        if self.closed:
            if again and not error.turned_away:
                return
            self._tokens -= _TIMEOUT_TOKENS if isinstance(error, Timeout) else _FAILURE_TOKENS
            if not self._failures:
                self._failing_since = now
            self._failures += 1
            nobody = isinstance(error, ConnectError) and self._answered_at < now - lasted_s
            long_enough = error.turned_away and now - self._failing_since >= _WHILE_S
            if not (nobody or self._failures >= (_IN_A_WHILE if long_enough else _IN_A_ROW) or self._tokens < 0):
                return
        self._open(error, now, lasted_s=lasted_s)

    def returned(self, sent: Sent) -> None:
        """It came to nothing that would speak of the deployment."""
        self._probes.discard(sent)

    def trip(self, error: RequestError, *, pause_s: float = 0.0) -> None:
        """Open it, and probe after ``pause_s`` at the earliest."""
        self._open(error, time.monotonic(), pause_s=pause_s)

    def _open(self, error: RequestError, now: float, *, lasted_s: float = 0.0, pause_s: float = 0.0) -> None:
        self.closed = False
        self.cause = error
        self._epoch += 1
        self._probes.clear()
        self._allowance = 1
        self._patience_s = float("inf") if isinstance(error, Timeout) else max(_LEAST_PATIENCE_S, 2 * lasted_s)
        self._pause_s = min(max(2 * self._pause_s, _FIRST_PAUSE_S), self._cooldown_s)
        jittered_s = self._pause_s * self._random.uniform(0.8, 1.0)
        self._probe_at = now + max(jittered_s, pause_s, error.retry_after_s or 0.0)

    def _out_s(self) -> list[float]:
        """For how long each of the probes that did not stay in a queue has been on the wire."""
        now = time.perf_counter()
        return [now - sent.trace.sent_at for sent in self._probes if sent.trace.on_the_wire]

    def _grow(self, allowance: int, now: float) -> None:
        if self._allowance > _RAMP and len(self._probes) < _IN_USE * self._allowance:  # more than come
            self.closed = True
            self._probes.clear()
            self._failures = 0
            self._tokens = max(self._tokens, self._budget / 10)
        self._allowance = allowance
        self._grown_at = now
        self._pause_s = 0.0
