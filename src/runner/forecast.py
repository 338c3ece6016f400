"""Forecasts: what rows will take that were not asked yet, from those that were."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from runner.budget import shown
from runner.precedents import precedents
from runner.store import Store
from runner.types import TokenPrice

CONFIDENCE = 0.99
"""How often an interval holds what comes."""

SAMPLE = 10_000
"""Answers that are looked at, the latest ones."""

_Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """What is expected, and the range that it will most likely be in."""

    expected: float
    low: float
    high: float

    def __add__(self, other: Interval) -> Interval:
        return Interval(expected=self.expected + other.expected, low=self.low + other.low, high=self.high + other.high)

    def __mul__(self, factor: float) -> Interval:
        return Interval(expected=self.expected * factor, low=self.low * factor, high=self.high * factor)

    def beyond(self, amount: float) -> Interval:
        """What is more than ``amount``."""
        return Interval(
            expected=max(0.0, self.expected - amount),
            low=max(0.0, self.low - amount),
            high=max(0.0, self.high - amount),
        )

    def shown(self, name: str) -> str:
        """For people, as an amount of the budget's limit of that name."""
        return f"{shown(name, self.expected)} ({shown(name, self.low)} to {shown(name, self.high)})"


ZERO = Interval(expected=0.0, low=0.0, high=0.0)


def total_of(rows: int, sample: Sequence[float], guesses: Sequence[float] = (), *, guessed: float = 0.0) -> Interval:
    """What ``rows`` further rows take together, where those of ``sample`` took what they did.

    Args:
        guesses: What was expected of each row of the sample. What comes is taken to be proportional to it, beside
            chance; without, to be the same for all rows.
        guessed: What is expected of the further rows together.
    """
    if not rows:
        return ZERO
    if not guesses or not sum(guesses):
        guesses, guessed = [1.0] * len(sample), float(rows)
    ratio = sum(sample) / sum(guesses)
    expected = ratio * guessed
    if len(sample) < 3:
        return Interval(expected=expected, low=0.0, high=4 * expected)
    freedom = len(sample) - 1
    squares = sum((each - ratio * guess) ** 2 for each, guess in zip(sample, guesses, strict=True))
    # Of the rows themselves, and of what the sample says about their mean.
    variance = squares / freedom * (rows + rows**2 / len(sample))
    student = _Z + (_Z**3 + _Z) / (4 * freedom) + (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / (96 * freedom**2)
    margin = student * math.sqrt(variance)
    return Interval(expected=expected, low=max(0.0, expected - margin), high=expected + margin)


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """Rows that have no answer yet."""

    asked: int  # to be asked
    sharing: int = 0  # that come to have the answers of these
    is_most: bool = False  # whether some of ``asked`` may turn out to share an answer

    def __str__(self) -> str:
        most = "at most " if self.is_most else ""
        if not self.sharing:
            return f"{most}{self.asked:,} rows are left"
        return f"{most}{self.asked:,} rows are left to ask, whose answers {self.sharing:,} more share"


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What is left to do, and what it will take."""

    left: Left
    tokens: Interval | None  # None: there is no answer to go by
    usd: Interval | None  # None: likewise, or no price is known

    def __str__(self) -> str:
        said = [str(self.left)]
        if self.usd is not None:
            said.append(self.usd.shown("usd"))
        if self.tokens is not None:
            said.append(self.tokens.shown("tokens"))
        return ": ".join([said[0], " and ".join(said[1:])]) if said[1:] else said[0]


async def forecast(store: Store, left: Left, prices: Mapping[str, TokenPrice | None]) -> Forecast:
    """What the rows that are left will take, if they are like those that were answered.

    Args:
        prices: What each deployment charges now, whatever it did when it answered. None: unknown.
    """
    answers = await precedents(store, prices, most=SAMPLE)
    tokens = [each.tokens for each in answers if each.tokens is not None]
    costs = [each.usd for each in answers if each.usd is not None]
    return Forecast(
        left=left,
        tokens=total_of(left.asked, tokens) if tokens else None,
        usd=total_of(left.asked, costs) if costs else None,
    )
