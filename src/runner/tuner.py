"""The tuner: finds out how many requests should be in flight, and keeps finding out. ``limits.concurrency=auto``.

It judges a window by the throughput alone, since on servers that batch, latency rises long before throughput ends.

- It starts with a few requests and doubles the window while that brings more, then steps back to what was needed.
- Now and then it tries a larger window, which must bring 5 % more, and a smaller one, which may lose 3 %.
- Where throughput changes at the same window, the server has changed: the search begins again, or the window shrinks.
- A refusal (429, 503, 529) cuts the window at once, and once for all that were sent before the cut. The number in
  flight at which it came is taken for a wall: up to there the window grows again, beyond it only after a while, each
  time a longer one. Refusals far below the wall are not a matter of how many are in flight: then, as with timeouts,
  only a considerable share of them cuts.
- A window that was not full teaches nothing: requests that were sent while fewer were in flight are not looked at.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from runner.concurrency import SoftStart, Window
from runner.config import LimitsConfig
from runner.throughput import Round, Sample
from runner.wall import Wall

logger = logging.getLogger(__name__)

_SOFT = 8
"""What the window opens to, softly, while there is no answer yet."""

_SOFT_STEP_S = 0.5

_FOLLOWS = 0.25
"""The part of a larger window that must show in the throughput for the climb to go on."""

_HEADROOM = 1.2
"""The window by what seems to be needed. With some to spare, a server that gets faster shows it at once."""

_SHRUNK = -0.2
"""What a window that was cut to a slower server may lose: the server may still be slowing down."""

_COLLAPSE = -0.5
"""A trial that halves the throughput, twice in a row, is over."""

_CUT = 0.85
_REGROWTH = 0.5
"""A refusal cuts the window to so much of it; each answer gives back so many slots."""

_TROUBLE = 0.25
"""Share of refusals and timeouts that cuts the window where no wall explains them."""

_MEMORY = 32
"""Requests that this share is taken over, at least."""

_SPARE_FILES = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class _Direction:
    """How a trial of another window goes."""

    factor: float
    bar: float  # relative change of the throughput that it must exceed
    rounds: int  # after which it is given up, undecided
    patience_s: tuple[float, float]  # until the next trial: at first, and after many that failed

    def verdict(self, gain: float, error: float, *, rounds: int) -> bool | None:
        """Whether it has succeeded after so many rounds; None: not to be said yet."""
        if rounds >= self.rounds:
            return gain > self.bar + error
        is_clear = rounds >= 2 and abs(gain - self.bar) > 2 * error
        return gain > self.bar if is_clear else None


_UP = _Direction(factor=1.5, bar=0.05, rounds=12, patience_s=(2.0, 10.0))
_DOWN = _Direction(factor=1 / 1.5, bar=-0.03, rounds=5, patience_s=(10.0, 80.0))


class Ticket(NamedTuple):
    """A request on the wire, as it was sent."""

    epoch: int  # cuts there had been: refusals of an older epoch are old news
    in_flight: int  # this one included
    sent_at: float


class Tuner:
    """Sets the limit of a `Window` by what comes of the requests; see the module.

    Tell it of every request that is sent, and how that one ended. Belongs to one event loop.

    Args:
        window: Set to a few slots at once, and to more as soon as requests are sent.
        maximum: Slots at most.
        label: Whose window it is, for the log; empty: the run's.
    """

    def __init__(self, window: Window, *, maximum: int = 1024, label: str = "") -> None:
        self._window = window
        self._name = f"window of {label}" if label else "window"
        self._maximum = maximum
        window.limit = min(SoftStart.FIRST, maximum)
        self._soft_start: SoftStart | None = None
        self._level = self._target = float(window.limit)  # where the window is, and where it goes
        self._slope = 1.0  # slots an answer on the way up
        self._told = self._level  # where the window is by the log
        self._home: float | None = None  # the level to come back to while another one is tried
        self._in_flight = 0
        self._epoch = 0
        self._trouble = 0.0  # recent share of refusals and timeouts
        self._wall = Wall()
        self._counts_tokens = True
        self._plan: _Plan | None = None

    @classmethod
    def of(cls, limits: LimitsConfig, window: Window, *, label: str = "") -> Tuner | None:
        """The tuner that a configuration asks for; None where ``concurrency`` is a number."""
        if limits.concurrency != "auto":
            return None
        files = _open_files()
        maximum = max(1, min(limits.max_concurrency, (files - _SPARE_FILES) // 2))  # a simulated model's server too
        if maximum < limits.max_concurrency:
            logger.info("window at most %d: this process may open %d files (ulimit -n)", maximum, files)
        return cls(window, maximum=maximum, label=label)

    # What becomes of requests

    def sent(self) -> Ticket:
        """A request goes on the wire."""
        if self._soft_start is None:
            self._soft_start = SoftStart(self._window, target=min(_SOFT, self._maximum), step_s=_SOFT_STEP_S)
        self._in_flight += 1
        return Ticket(self._epoch, self._in_flight, time.perf_counter())

    def answered(self, ticket: Ticket, tokens: int | None) -> None:
        """An answer came, with so many tokens, prompt and all; None: unknown, and requests are counted from now on."""
        self._in_flight -= 1
        if tokens is None and self._counts_tokens:
            self._counts_tokens = False
            self._plan = None
        plan = self._plan or self._begin()
        self._trouble -= self._trouble / max(_MEMORY, self._level)
        now = time.perf_counter()
        work = tokens if self._counts_tokens and tokens is not None else 1
        self._round.done += work
        if ticket.epoch != self._epoch:
            return
        if self._level < self._target:
            self._set(min(self._level + self._slope, self._target))
            if self._level == self._target and self._home is None:
                self._tell_growth(self._level)
        if self._look.least <= ticket.in_flight <= self._look.most:
            self._round.add(in_flight=ticket.in_flight, work=work, seconds=now - ticket.sent_at, now=now)
            if self._look.suffices(self._round):
                self._begin_round(plan.send(self._round))

    def refused(self, ticket: Ticket, status: int | None) -> None:
        """The provider said that it is too much: 429, 503 or 529."""
        self._in_flight -= 1
        if ticket.epoch != self._epoch:
            return
        if self._wall.stands(ticket.in_flight, time.perf_counter()):
            self._cut(ticket.in_flight, f"HTTP {status} with {ticket.in_flight} in flight")
        else:
            self._suffer(ticket, f"many a request ended in HTTP {status}")

    def timed_out(self, ticket: Ticket) -> None:
        """No answer came in time."""
        self._in_flight -= 1
        if ticket.epoch == self._epoch:
            self._suffer(ticket, "many a request timed out")

    def left(self, ticket: Ticket) -> None:
        """A request ended in a way that says nothing about the window."""
        self._in_flight -= 1

    # Rounds: a plan says what to look at, and is told what was seen

    def _begin(self) -> _Plan:
        if self._soft_start is not None:
            self._soft_start.close()
        self._level = self._target = self._told = float(self._window.limit)
        return self._follow(self._search())

    def _follow(self, plan: _Plan) -> _Plan:
        self._plan = plan
        self._home = None
        self._begin_round(next(plan))
        return plan

    def _begin_round(self, look: _Look) -> None:
        self._look = look
        self._round = Round()

    def _go(self, level: float) -> None:
        """Move the window: at once, or an answer at a time where a provider refuses."""
        self._target = max(1.0, min(level, self._top))
        if self._target < self._level or not self._wall.is_known:
            self._set(self._target)
        self._slope = 1.0

    def _set(self, level: float) -> None:
        self._level = level
        limit = int(level)
        if limit != self._window.limit:
            self._window.limit = limit

    @property
    def _top(self) -> float:
        return min(self._maximum, self._wall.top(time.perf_counter()))

    @property
    def _here(self) -> _Look:
        """A whole round at the level that the window has, or is going to have."""
        level = self._target
        return _Look(answers=8, least=level - max(1.0, 0.1 * level), most=1.1 * level, whole=True)

    # The search

    def _search(self, *, climb: bool = True) -> _Plan:
        while True:
            if climb:
                yield from self._climb()
            yield from self._keep(climbed=climb)
            climb = True

    def _climb(self) -> _Plan:
        """Double the window while the throughput follows; then step back to what was needed."""
        before = yield _Look(answers=max(4, self._level // 4))
        why = "the search begins"
        while True:
            home = self._level
            self._go(2 * home)
            if self._target < home + 1:
                return
            self._tell(home, self._target, why)
            after = yield _Look(answers=max(2, self._target // 4), least=max(home, 0.75 * self._target))
            if not _follows(after, before):  # a quick look can mislead
                after = yield _Look(answers=max(8, self._target // 4), least=0.9 * self._target)
            if not _follows(after, before):
                needed = before.in_flight * max(1.0, after.rate / before.rate)
                self._settle(math.ceil(_HEADROOM * needed), f"about {needed:.0f} suffice")
                return
            why = self._percent(after.gain(before))
            before = after

    def _keep(self, *, climbed: bool) -> _Plan:
        """Stay, and try other windows now and then. Ends where there is suddenly more to be had."""
        agenda = _Agenda(time.perf_counter(), {_UP: 1.0, _DOWN: 0.0 if climbed else _DOWN.patience_s[0]})
        here = Sample(infer=self._counts_tokens)
        shrunk = False  # and no larger window was tried since
        while True:
            odd = yield from self._watch(here, agenda)
            if odd is None:
                direction = agenda.next
                gain = yield from self._try(direction, here)
                agenda.tried(direction, gain is not None, time.perf_counter())
                if gain is not None:
                    here = Sample(infer=self._counts_tokens)
                if direction is _UP:
                    shrunk = False
                    if gain is not None and gain > _FOLLOWS:
                        return
                continue
            change = here.change(odd)
            here = Sample(infer=self._counts_tokens)
            if change > 0:
                logger.info("%s %d: suddenly %s", self._name, self._level, self._percent(change))
                return
            if shrunk:  # the throughput may well have fallen because of it
                agenda.hurry(_UP)
            elif (yield from self._shrink(change, odd)):
                shrunk = True
                agenda.hurry(_UP)

    def _watch(self, here: Sample, agenda: _Agenda) -> Generator[_Look, Round, Round | None]:
        """Look on until a trial is due, or until two rounds are odd in the same way: the second of them."""
        odd: Round | None = None
        while True:
            round_ = yield self._here
            if len(here) >= 3 and here.is_odd(round_):
                if odd is not None and here.change(odd) * here.change(round_) > 0:
                    return round_
                odd = round_
                continue
            odd = None
            here.add(round_)
            if len(here) >= 4 and agenda.is_due(round_):
                return None

    def _try(self, direction: _Direction, here: Sample) -> Generator[_Look, Round, float | None]:
        """Try another window and stay there if it is better: what it brings, or None where it is not."""
        home = self._level
        if direction is _UP:
            level = max(home, min(math.ceil(_UP.factor * home), self._top))
        else:  # what a provider lets in, it serves
            level = home if self._wall.holds(home) else max(1, math.floor(_DOWN.factor * home))
        if level == home:
            return None
        self._home = home
        self._go(level)
        there = Sample(infer=self._counts_tokens)
        gain, collapses, is_better = 0.0, 0, None
        while is_better is None:
            round_ = yield self._here
            there.add(round_)
            gain, error = there.against(here)
            is_better = direction.verdict(gain, error, rounds=len(there))
            collapses = collapses + 1 if here.change(round_) < _COLLAPSE else 0
            if collapses == 2:
                is_better = False
        self._home = None
        if is_better:
            self._tell(home, self._level, self._percent(gain))
            return gain
        logger.debug("%s stays %d: with %d %s", self._name, home, level, self._percent(gain))
        self._go(home)
        return None

    def _shrink(self, change: float, odd: Round) -> Generator[_Look, Round, bool]:
        """Follow a server that has become slower, if it was the number of its slots that changed."""
        home = self._level
        level = math.ceil(_HEADROOM * (1 + change) * home)
        if level >= home:
            return False
        self._home = home
        self._go(level)
        round_ = yield self._here
        self._home = None
        if round_.counted / odd.counted - 1 < _SHRUNK:
            self._go(home)
            return False
        self._tell(home, self._level, f"the server gives {self._percent(change)}")
        return True

    # Refusals

    def _suffer(self, ticket: Ticket, why: str) -> None:
        self._trouble += (1 - self._trouble) / max(_MEMORY, self._level)
        if self._trouble > _TROUBLE:
            self._wall.reconsider()
            self._cut(ticket.in_flight, why)

    def _cut(self, in_flight: int, why: str) -> None:
        """Make the window smaller, and let it grow back to where it was, or to the wall."""
        if self._plan is None:
            self._begin()
        before = self._level
        goal = before if self._home is None else self._home
        self._epoch += 1
        self._trouble = 0.0
        self._settle(max(1.0, _CUT * min(in_flight, before)), why)
        self._target = max(self._level, min(goal, self._top))
        self._slope = _REGROWTH
        self._follow(self._search(climb=False))

    # Telling

    def _settle(self, level: float, why: str) -> None:
        before = self._level
        self._go(min(level, before))
        self._tell(before, self._level, why)

    def _tell(self, before: float, after: float, why: str) -> None:
        self._tell_growth(before)
        self._told = after
        self._window.why = why
        logger.info("%s %d -> %d: %s", self._name, before, after, why)

    def _tell_growth(self, level: float) -> None:
        """What went on between two of the changes that are told, so that each line begins where the last one ended."""
        if int(level) != int(self._told):
            logger.info(
                "%s %d -> %d: %s", self._name, self._told, level, "grown back" if self._home is None else "tried"
            )
            self._told = level

    def _percent(self, change: float) -> str:
        return f"{100 * change:+.0f} % {'tokens' if self._counts_tokens else 'requests'}/s"


def _follows(after: Round, before: Round) -> bool:
    return after.gain(before) >= _FOLLOWS * (after.in_flight / before.in_flight - 1)


def _open_files() -> int:
    """How many files this process may have open."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return 1 << 20
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 20 if limit == resource.RLIM_INFINITY else limit


class _Look(NamedTuple):
    """Which answers to look at."""

    answers: float  # at least
    least: float = 0.0  # in flight when the request was sent
    most: float = math.inf
    whole: bool = False  # and for a while

    def suffices(self, round_: Round) -> bool:
        return round_.answers >= self.answers and (not self.whole or round_.is_whole)


_Plan: TypeAlias = Generator[_Look, Round, None]


class _Agenda:
    """When to try which direction again: the more often one failed, the later."""

    def __init__(self, now: float, delays_s: dict[_Direction, float]) -> None:
        self._began = now
        self._due = {direction: now + delay_s for direction, delay_s in delays_s.items()}
        self._patience_s = {direction: direction.patience_s[0] for direction in delays_s}

    @property
    def next(self) -> _Direction:
        return min(self._due, key=self._due.__getitem__)

    def is_due(self, round_: Round) -> bool:
        """Whether it is time. A smaller window waits until long answers have come back: short ones alone mislead."""
        settled_s = 0.0 if self.next is _UP else max(round_.longest_s, 5 * round_.mean_s)
        return round_.ended >= max(self._due[self.next], self._began + settled_s)

    def tried(self, direction: _Direction, moved: bool, now: float) -> None:
        first_s, most_s = direction.patience_s
        if not moved:
            self._patience_s[direction] = min(2 * self._patience_s[direction], most_s)
            self._due[direction] = now + self._patience_s[direction]
            return
        self._began = now
        self._due = {other: now + patience_s for other, patience_s in self._patience_s.items()}
        self._patience_s[direction] = first_s
        self._due[direction] = now

    def hurry(self, direction: _Direction) -> None:
        self._due[direction] = -math.inf
