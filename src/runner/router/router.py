"""The router: several deployments behave like one reliable server."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from statistics import median

from runner.errors import ConnectError, NoDeploymentError, RateLimitError, RequestError, Timeout
from runner.limited import PATIENCE_S
from runner.metrics import DeploymentSnapshot, percentile
from runner.router.circuit import Sent
from runner.router.replica import LONG_PAUSE_S, TRIAL_S, Replica, is_fault
from runner.router.strategies import Shuffle, Strategy
from runner.types import Request, Response

logger = logging.getLogger(__name__)

UNREACHABLE_S = 30.0
"""How long requests wait where nobody has ever listened: the address is wrong, or the server is being restarted."""

_IDLE_S = 2.0
"""An outage is over for those who come after so long a time in which nobody wanted anything: they wait anew."""

_DEFAULT_PAUSE_S = 1.0
_TOLD_AFTER_S = 2.0
_SILENCE_S = 60.0  # after a warning, before another one of its kind
_CLOSED = "the client was closed before a deployment could take the request"

_MISFITS = 3
_MISFIT_PAUSE_S = 60.0

_WATCH_S = 0.5
_SILENT_TIMES, _SILENT_LEAST_S = 5.0, 2.0
_SLOW_TIMES, _RECOVERED_TIMES = 10.0, 5.0
_ENOUGH_ANSWERS = 20
"""Answers from which on latencies are compared; a quarter of them for the replica that is judged."""


class Router:
    """A `Client` that gives each request to one of several replicas, and gets around those that are out.

    A request that fails through its replica's fault may be sent again at once (``trace.at_once``) where another replica
    can take it; those that failed it are avoided until none is left. A replica is left alone

    - while its circuit is open, see `Circuit`; the first request after a pause tries whether it is back;
    - while it asks for a pause (429 or 503 with a hint), or is full;
    - while it answers ten times slower than its peers, save for a trial every two seconds;
    - once it is silent: it has requests and has answered none for five times the usual p99 (two seconds at least),
      while others have answered theirs.

    A silent one gets one more request as a probe. If that has no answer for as long either, it hangs, and what is out
    there is called back and sent elsewhere. Where no probe can come, since all slots wait for it (``is_full``), its
    oldest request is called back first, and makes room for one. Where none comes for another reason, there is no hurry:
    the same happens after four times as long. What is called back may be paid for twice, so that it happens to a
    request once at most.

    While all are out, requests wait, and a warning says so.

    Belongs to one event loop.

    Args:
        replicas: Where requests may go. Those of a higher ``order`` are asked only while all of lower ones are out.
        strategy: Chooses among those that can take a request.
        failover: Whether a request that failed is sent elsewhere at once. Otherwise it is tried again like any other.
        max_wait_s: How long requests wait while all are out, before they fail with a `NoDeploymentError`. The end of a
            pause is waited for longer, up to `PATIENCE_S`; where all pauses are longer than that, nothing is. Where no
            connection was ever made, it is `UNREACHABLE_S` at most.
        is_full: Whether no more requests can come before some come back.
    """

    def __init__(
        self,
        replicas: Sequence[Replica],
        *,
        strategy: Strategy | None = None,
        failover: bool = True,
        max_wait_s: float = 600.0,
        is_full: Callable[[], bool] = lambda: False,
    ) -> None:
        orders = sorted({replica.order for replica in replicas})
        self._groups = [[replica for replica in replicas if replica.order == order] for order in orders]
        self._replicas = list(replicas)
        self._strategy = strategy or Shuffle()
        self._failover = failover
        self._max_wait_s = max_wait_s
        self._is_full = is_full
        self._waiting: deque[_Waiter] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._watch: asyncio.TimerHandle | None = None
        self._out_since: float | None = None  # all of them
        self._told = False
        self._silent_until = float("-inf")
        self._left_at = 0.0  # when a request, or its wait, came to an end last
        self._closed = False
        for replica in replicas:
            if replica.window is not None:
                replica.window.add_filler(self._hand_over)

    async def send(self, request: Request) -> Response:
        trace = request.trace
        trace.at_once, trace.sent_at = False, 0.0
        again = bool(trace.failures)  # by now: hedging adds to them while this one is out
        now = time.monotonic()
        if self._out_since is not None and self._is_idle and now - self._left_at > _IDLE_S:
            self._out_since, self._told = None, False
        replica = None if self._waiting else self._choose(request, now)
        if replica is None:
            replica, mark = await self._turn(request)
        else:
            mark = replica.enter(now, trace)
        if self._watch is None and replica.recall is not None:
            self._watch = asyncio.get_running_loop().call_later(_WATCH_S, self._look_after)
        try:
            response = await replica.client.send(request)
        except RequestError as error:
            self._note_failure(replica, mark, request, error, again=again)
            raise
        except BaseException:
            replica.cancelled(mark, trace)
            raise
        else:
            was_closed = replica.circuit.closed
            replica.answered(mark, trace, response.usage)
            if replica.circuit.closed and not was_closed:
                logger.info("%s is back", replica.label)
            if self._out_since is not None:
                self._back()
            return response
        finally:
            replica.leave()
            self._left_at = time.monotonic()
            if self._waiting:
                self._hand_over()

    async def aclose(self) -> None:
        self._closed = True
        for timer in (self._timer, self._watch):
            if timer is not None:
                timer.cancel()
        self._dismiss(_CLOSED)
        for replica in self._replicas:
            await replica.client.aclose()

    def has_other(self, request: Request) -> bool:
        """Whether a replica that ``request`` does not avoid can take it now."""
        now = time.monotonic()
        return any(replica.label not in request.trace.avoid for replica in self._candidates(request, now))

    def snapshot(self) -> Mapping[str, DeploymentSnapshot]:
        """How the replicas do, by label."""
        answers = sum(replica.answers for replica in self._replicas)
        return {replica.label: replica.snapshot(answers=answers) for replica in self._replicas}

    # Choosing

    def _choose(self, request: Request, now: float) -> Replica | None:
        candidates = self._candidates(request, now)
        if len(candidates) > 1:
            return self._strategy.pick(candidates, request)
        return candidates[0] if candidates else None

    def _candidates(self, request: Request, now: float) -> Sequence[Replica]:
        """Those that can take ``request`` now, of the lowest order that is not out. One that is to be tried is all."""
        avoid = request.trace.avoid
        for group in self._groups:
            ready = [
                replica
                for replica in group
                if replica.circuit.closed
                and not replica.slow
                and replica.paused_until <= now
                and (replica.window is None or replica.window.active < replica.window.limit)
            ]
            if len(ready) == len(group) and not avoid:
                return ready
            trials, slow = self._unwell(group, now, ready)
            for choice in (trials[:1], ready, slow):
                if fresh := [replica for replica in choice if replica.label not in avoid]:
                    return fresh
            if found := trials[:1] or ready or slow:
                return found
            if not all(replica.is_out(now) for replica in group):
                return ()
        return ()

    def _unwell(
        self, group: Sequence[Replica], now: float, ready: list[Replica]
    ) -> tuple[list[Replica], list[Replica]]:
        """Those of ``group`` that are due to be tried, and the slow ones. Those that are coming back join ``ready``."""
        trials: list[Replica] = []
        slow: list[Replica] = []
        for replica in group:
            if not replica.has_room or replica.paused_until > now or not replica.circuit.admits(now):
                continue
            if not replica.circuit.answering or (replica.slow and replica.trial_at <= now):
                trials.append(replica)
            elif replica.slow:
                slow.append(replica)
            elif not replica.circuit.closed:
                ready.append(replica)
        return trials, slow

    # Waiting

    async def _turn(self, request: Request) -> tuple[Replica, Sent]:
        """Wait, first come, first served, until a replica takes ``request``; its mark, as `Replica.enter` gives it."""
        queued = time.perf_counter()
        waiter = _Waiter(request, asyncio.get_running_loop().create_future())
        self._waiting.append(waiter)
        self._hand_over()
        try:
            return await waiter.granted
        except asyncio.CancelledError:
            if not waiter.granted.cancelled() and waiter.granted.exception() is None:  # granted in the same moment
                replica, mark = waiter.granted.result()
                replica.circuit.returned(mark)
                replica.leave()
            self._hand_over()
            raise
        finally:
            self._left_at = time.monotonic()
            request.trace.queue_wait_s += time.perf_counter() - queued

    def _hand_over(self) -> None:
        """Give replicas to those who wait, in order, and see to it that the next one gets its own in time."""
        now = time.monotonic()
        while self._waiting:
            waiter = self._waiting[0]
            if not waiter.granted.done():
                replica = self._choose(waiter.request, now)
                if replica is None:
                    break
                waiter.granted.set_result((replica, replica.enter(now, waiter.request.trace)))
            self._waiting.popleft()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._closed:
            self._dismiss(_CLOSED)
        if self._waiting:
            self._give_up_in_time(now)
        if self._waiting:
            self._timer = asyncio.get_running_loop().call_later(self._delay(now), self._hand_over)

    def _delay(self, now: float) -> float:
        """Seconds until something may have changed without anybody's coming back."""
        due = [math.inf if self._out_since is None else self._out_since + self._patience(self._out_since)[0]]
        for replica in self._replicas:
            if replica.paused_until > now:
                due.append(replica.paused_until)
            elif not replica.circuit.closed:
                due.append(replica.circuit.due(now))
            elif replica.slow:
                due.append(replica.trial_at)
        return min(max(min(due) - now, 0.02), 60.0)

    def _give_up_in_time(self, now: float) -> None:
        if not all(replica.is_out(now) for replica in self._replicas):
            return
        if self._out_since is None:
            self._out_since = now
            wait_s = max(_TOLD_AFTER_S, self._silent_until - now)
            asyncio.get_running_loop().call_later(wait_s, self._tell_if_out, now)
        if now - self._out_since >= self._patience(self._out_since)[0]:
            self._dismiss(f"no deployment has answered for {now - self._out_since:.0f} s: {self._causes()}")

    def _dismiss(self, message: str) -> None:
        """Fail all who wait."""
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.granted.done():
                waiter.granted.set_exception(NoDeploymentError(message))

    def _patience(self, since: float) -> tuple[float, str]:
        """How many seconds requests wait where all have been out ``since`` then, and what says so."""
        never = all(
            isinstance(replica.circuit.cause, ConnectError) and not replica.answers for replica in self._replicas
        )
        pauses_s = [replica.paused_until - since for replica in self._replicas if replica.circuit.answering]
        if len(pauses_s) == len(self._replicas) and min(pauses_s) > PATIENCE_S:
            return 0.0, "all ask for longer pauses than anybody waits for"
        to_wait_out_s = max((pause_s for pause_s in pauses_s if pause_s <= PATIENCE_S), default=0.0)
        usual = (self._max_wait_s, "routing.max_wait_s")
        if never:
            usual = min(usual, (UNREACHABLE_S, "no connection was ever made"))
        return max(usual, (to_wait_out_s, "the longest pause that is asked for"))

    def _causes(self) -> str:
        """Why each one is out."""
        now = time.monotonic()
        causes = {
            replica.label: f"it asks for a pause of {replica.paused_until - now:.0f} s"
            if replica.circuit.answering and replica.paused_until > now
            else str(replica.circuit.cause)
            for replica in self._replicas
        }
        if len(causes) == 1:
            return "".join(causes.values())
        return "; ".join(f"{label}: {cause}" for label, cause in causes.items())

    def _tell_if_out(self, since: float) -> None:
        if self._out_since == since and not self._closed:
            self._told, self._silent_until = True, time.monotonic() + _SILENCE_S
            which = "the deployment is" if len(self._replicas) == 1 else f"all {len(self._replicas)} deployments are"
            logger.warning(
                "%s out, and requests wait for up to %g s (%s): %s", which, *self._patience(since), self._causes()
            )

    def _back(self) -> None:
        assert self._out_since is not None
        if self._told:
            logger.warning("answers come again, after %.0f s", time.monotonic() - self._out_since)
        self._out_since, self._told = None, False

    @property
    def _is_idle(self) -> bool:
        return not self._waiting and not any(replica.in_flight for replica in self._replicas)

    # What comes of a request

    def _note_failure(
        self, replica: Replica, mark: Sent, request: Request, error: RequestError, *, again: bool
    ) -> None:
        """Have the replica judged by it, and say whether the request can be sent again at once."""
        trace = request.trace
        was_closed = replica.circuit.closed
        replica.failed(mark, trace, error, again=again)
        if error.turned_away and (error.retry_after_s is not None or error.pauses):
            self._pause(replica, error)
        if not (is_fault(error) or isinstance(error, RateLimitError) or error.systemic):
            return
        trace.avoid.add(replica.label)
        elsewhere = self.has_other(request)
        if error.systemic and elsewhere and (replica.misfits >= _MISFITS or not was_closed):
            replica.circuit.trip(error, pause_s=_MISFIT_PAUSE_S)
        if was_closed and not replica.circuit.closed:
            logger.info("%s is out: %s: %s", replica.label, type(error).__name__, error)
        if self._failover and elsewhere:
            trace.at_once = True
        else:
            trace.avoid.clear()
            trace.at_once = not replica.circuit.closed and error.retryable  # it waits here until one is back

    def _pause(self, replica: Replica, error: RequestError) -> None:
        """Ask it nothing for a while. One replica alone is paused by its limiter, which also knows its rate."""
        pause_s = _DEFAULT_PAUSE_S if error.retry_after_s is None else error.retry_after_s
        if len(self._replicas) > 1 or not error.pauses:
            now = time.monotonic()
            if pause_s > LONG_PAUSE_S and replica.paused_until < now + pause_s / 2:
                logger.warning("%s asks for a pause of %.0f s: %s", replica.label, pause_s, error)
            replica.pause(pause_s)

    # Watching

    def _look_after(self) -> None:
        """Find replicas that hang or are slow; comes again for as long as anything is in flight."""
        self._watch = None
        if self._closed or not any(replica.in_flight for replica in self._replicas):
            return
        self._watch = asyncio.get_running_loop().call_later(_WATCH_S, self._look_after)
        p99s = [percentile(sorted(replica.recent_s), 99) or 0.0 for replica in self._replicas if replica.recent_s]
        if sum(replica.answers for replica in self._replicas) < _ENOUGH_ANSWERS:
            return
        now = time.monotonic()
        for replica in self._replicas:
            typical_s = max(median(p99s), replica.latency_s or 0.0)
            self._find_silent(replica, now, max(_SILENT_LEAST_S, _SILENT_TIMES * typical_s))
            self._find_slow(replica, now)

    def _find_silent(self, replica: Replica, now: float, bound_s: float) -> None:
        recall = replica.recall
        if recall is None or recall.silent_s(now) < bound_s:
            return
        others = [other for other in self._replicas if other.recall is not None and other is not replica]
        if all(other.recall.silent_s(now) > bound_s / 2 for other in others if other.recall is not None):
            return  # nobody answers: it may be this side
        why = f"{replica.label} has answered nothing for {recall.silent_s(now):.1f} s, while others have"
        if replica.circuit.answering:
            if now >= replica.silent_at + _SILENCE_S:
                logger.warning("%s: it is probed", why)
            replica.silent_at, replica.scouted = now, False
            replica.circuit.trip(Timeout(why))
            return
        waited_s = now - max(recall.sent_at, replica.silent_at)
        if waited_s < bound_s:
            return
        if recall.sent_at > replica.silent_at or replica.scouted:
            recall.recall(unanswered_s=bound_s, why=why)
        elif self._is_full() or waited_s >= 4 * bound_s:
            replica.silent_at, replica.scouted = now, True
            recall.recall(unanswered_s=bound_s, why=why, at_most=1)

    def _find_slow(self, replica: Replica, now: float) -> None:
        peers = [
            other.latency_s
            for other in self._replicas
            if other is not replica and other.order == replica.order and other.latency_s is not None and not other.slow
        ]
        if not peers or replica.latency_s is None or len(replica.recent_s) < _ENOUGH_ANSWERS // 4:
            return
        times = replica.latency_s / max(median(peers), 1e-3)
        if not replica.slow and times > _SLOW_TIMES:
            replica.slow, replica.trial_at = True, now + TRIAL_S
            logger.warning(
                "%s is %.0f times slower than the others: it is only tried now and then", replica.label, times
            )
        elif replica.slow and times < _RECOVERED_TIMES:
            replica.slow = False
            logger.warning("%s is as fast as the others again", replica.label)
            self._hand_over()


class _Waiter:
    __slots__ = ("granted", "request")

    def __init__(self, request: Request, granted: asyncio.Future[tuple[Replica, Sent]]) -> None:
        self.request = request
        self.granted = granted
