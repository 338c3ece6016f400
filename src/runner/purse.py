"""The purse: what a budget's runs have taken and reserved, in a file that all of them write to.

A reservation is entered before anything is sent, so that a process which is killed leaves it behind: what it had in
flight counts as taken, until its run goes on and knows better.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from enum import Enum
from operator import attrgetter
from pathlib import Path

from runner.errors import StoreError

PATIENCE_S = 30.0
"""A process that has not been heard of for so long is not waited for; what it reserved stays reserved."""

_BUSY_S = 30.0
_SLACK = 1e-9
"""Of a limit: sums of floats may be off by that much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Amounts:
    """What a budget counts."""

    usd: float = 0.0
    tokens: float = 0.0  # prompt and answer
    requests: float = 0.0  # sent, retries included
    seconds: float = 0.0  # that runs are at work

    def __add__(self, other: Amounts) -> Amounts:
        return Amounts(
            usd=self.usd + other.usd,
            tokens=self.tokens + other.tokens,
            requests=self.requests + other.requests,
            seconds=self.seconds + other.seconds,
        )

    def __sub__(self, other: Amounts) -> Amounts:
        return Amounts(
            usd=self.usd - other.usd,
            tokens=self.tokens - other.tokens,
            requests=self.requests - other.requests,
            seconds=self.seconds - other.seconds,
        )

    def of_one(self) -> Amounts:
        """What one of the requests takes, on the average."""
        return Amounts(usd=self.usd / self.requests, tokens=self.tokens / self.requests, requests=1)

    def beyond(self, limits: Mapping[str, float]) -> str | None:
        """The first of ``limits`` that this exceeds."""
        return next((name for name, limit in limits.items() if getattr(self, name) > limit * (1 + _SLACK)), None)


NOTHING = Amounts()


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """Room for one request. Give it back with `Purse.settle`."""

    held: Amounts
    excess: Amounts = NOTHING  # how much more it can take
    is_open: bool = False  # it may take more than was held; there is one of these at a time


class Refusal(Enum):
    """Why there is no room."""

    not_now = "what others have reserved may come back"
    used_up = "nothing more will come back"


class Purse:
    """One run's hand in the purse. Belongs to one thread.

    Args:
        path: The file, one a budget.
        holder: The run's name, unique among those that share the file.
        limits: Amounts by name, for all holders together.

    Raises:
        StoreError: Of every method: the file cannot be used.
    """

    def __init__(self, path: Path, *, holder: str, limits: Mapping[str, float]) -> None:
        self.path = path
        self.limits = limits
        self._holder = holder
        self._session = 0
        self._spent = NOTHING
        self._held = NOTHING
        self._excess = NOTHING
        self._open = 0
        self._others = _Others(taken=NOTHING, waited_for=0, opened=0)
        self._is_written = True
        self._written_at = 0.0
        self._database: sqlite3.Connection | None = None

    def open(self, session: int, *, known: Amounts, most: Amounts) -> None:
        """Take part.

        What the run has taken so far lies between ``known`` and ``most``. Where its last session wrote here too, this
        file knows better: reservations are what was in flight, and ``most`` counts all that was taken up.

        Args:
            session: The number of the run's session, one higher than that of the last.
        """
        self._session = session
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(self.path, timeout=_BUSY_S, isolation_level=None)
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = NORMAL")
            self._database.execute(_SCHEMA)
            last = self._database.execute(_MINE, (self._holder, session - 1)).fetchone()
        except (sqlite3.Error, OSError) as error:
            self.close()
            raise StoreError(f"{self.path} cannot be used ({error})") from None
        self._spent = most
        if last is not None:
            pairs = zip(map(min, zip(last, _VALUES(most), strict=True)), _VALUES(known), strict=True)
            self._spent = Amounts(**dict(zip(_NAMES, map(max, pairs), strict=True)))
        self._exchange()

    def close(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None

    @property
    def taken(self) -> Amounts:
        """By all holders, reservations included; others as of the last exchange."""
        return self._spent + self._held + self._others.taken

    @property
    def held(self) -> Amounts:
        """What this holder has reserved."""
        return self._held

    def reserve(self, most: Amounts, guess: Amounts) -> Reservation | Refusal:
        """Room for a request that takes ``most`` at most.

        Where there is no room for that, one request at a time is let through with ``guess`` reserved. So all of them
        together can exceed a limit by no more than one of them exceeds its reservation.
        """
        granted: list[Reservation] = []

        def decide() -> None:
            if (self.taken + most).beyond(self.limits) is None:
                granted.append(Reservation(held=_finite(most)))
            elif not self._open and not self._others.opened and (self.taken + guess).beyond(self.limits) is None:
                granted.append(Reservation(held=guess, excess=_finite(most) - guess, is_open=True))
            for reservation in granted:
                self._held += reservation.held
                self._excess += reservation.excess
                self._open += reservation.is_open

        self._exchange(decide)
        if granted:
            return granted[0]
        is_awaited = self._held.requests > 0 or self._others.waited_for > 0
        return Refusal.not_now if is_awaited and self.late is None else Refusal.used_up

    @property
    def late(self) -> str | None:
        """The limit that no settlement can bring back: the time."""
        limit = self.limits.get("seconds")
        return "seconds" if limit is not None and self.taken.seconds >= limit else None

    def settle(self, reservation: Reservation, taken: Amounts) -> None:
        """A request took so much. The others see it at the next `reserve` or `flush`."""
        self._held -= reservation.held
        self._excess -= reservation.excess
        self._open -= reservation.is_open
        self.spend(taken)

    def spend(self, taken: Amounts) -> None:
        self._spent += taken
        self._is_written = False

    def flush(self) -> None:
        """Let the others see how this holder stands, and see how they do."""
        if not self._is_written or time.time() - self._written_at > PATIENCE_S / 10:
            self._exchange()

    def _exchange(self, decide: Callable[[], None] = lambda: None) -> None:
        """Read the others' lines, decide, and write the own one, all in one transaction."""
        assert self._database is not None
        before = self._held, self._excess, self._open
        now = time.time()
        try:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                *sums, waited_for, opened = self._database.execute(
                    _OTHERS, {"holder": self._holder, "alive": now - PATIENCE_S}
                ).fetchone()
                taken = Amounts(**dict(zip(_NAMES, sums, strict=True)))
                self._others = _Others(taken=taken, waited_for=waited_for, opened=opened)
                decide()
                amounts = (*_VALUES(self._spent), *_VALUES(self._held), *_VALUES(self._excess))
                self._database.execute(_PUT, (self._holder, self._session, now, self._open, *amounts))
                self._database.execute("COMMIT")
            except BaseException:
                self._held, self._excess, self._open = before
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            raise StoreError(f"{self.path} cannot be used ({error}): make room on that disk") from None
        self._is_written, self._written_at = True, now


@dataclass(frozen=True, slots=True, kw_only=True)
class _Others:
    """How the other holders stand."""

    taken: Amounts  # and reserved; of those that died, all that their requests can have taken
    waited_for: int  # how many are at work and have something reserved
    opened: int  # how many of these have an open reservation


def _finite(amounts: Amounts) -> Amounts:
    """With nothing in the place of what has no bound."""
    unbounded = [name for name in _NAMES if getattr(amounts, name) == float("inf")]
    return replace(amounts, **dict.fromkeys(unbounded, 0.0))


_NAMES = tuple(field.name for field in fields(Amounts))
_VALUES = attrgetter(*_NAMES)

_COLUMNS = [f"{kind}_{name}" for kind in ("spent", "held", "excess") for name in _NAMES]

_SCHEMA = f"""
    CREATE TABLE IF NOT EXISTS holders (
        name    TEXT PRIMARY KEY,
        session INTEGER NOT NULL, -- of the run, the last one that wrote here
        seen_at REAL NOT NULL,    -- Unix seconds
        open    INTEGER NOT NULL, -- requests in flight that may take more than was reserved
        {", ".join(f"{column} REAL NOT NULL" for column in _COLUMNS)}
    )
"""

_PUT = f"INSERT OR REPLACE INTO holders VALUES ({', '.join('?' * (4 + len(_COLUMNS)))})"

_MINE = f"""
    SELECT {", ".join(f"spent_{name} + held_{name} + max(0, excess_{name})" for name in _NAMES)}
    FROM holders
    WHERE name = ? AND session = ?
"""

_OTHERS = f"""
    SELECT
        {", ".join(f"total(spent_{n} + held_{n} + iif(seen_at < :alive, max(0, excess_{n}), 0))" for n in _NAMES)},
        count(*) FILTER (WHERE held_requests > 0 AND seen_at >= :alive),
        count(*) FILTER (WHERE open > 0 AND seen_at >= :alive)
    FROM holders
    WHERE name != :holder
"""
