"""Confidence intervals: what a sample says about where it came from, and when it says nothing.

All are two-sided, of `CONFIDENCE` unless told otherwise, and assume that the values are independent of each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist, fmean, stdev

CONFIDENCE = 0.95
_TAIL = (1 - CONFIDENCE) / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """From ``low`` to ``high``, both included."""

    low: float
    high: float

    def overlaps(self, other: Interval) -> bool:
        return self.low <= other.high and other.low <= self.high

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


def quantile_interval(sorted_values: Sequence[float], q: float) -> Interval | None:
    """Where the ``q``-quantile (0 to 1) of the distribution lies, by order statistics: no distribution is assumed.

    None where the sample is too small for it: it takes 6 values for a median, 72 for p95, 368 for p99.
    """
    ranks = _quantile_ranks(len(sorted_values), q)
    return None if ranks is None else Interval(low=sorted_values[ranks[0] - 1], high=sorted_values[ranks[1] - 1])


def samples_for(q: float) -> int:
    """How many values `quantile_interval` needs."""
    edge = max(q, 1 - q)
    return max(2, math.ceil(math.log(_TAIL) / math.log(edge)))


def mean_interval(mean: float, deviation: float, n: int, *, confidence: float = CONFIDENCE) -> Interval | None:
    """Where the mean of the distribution lies, by Student's t; None for fewer than four values.

    Args:
        deviation: The sample's standard deviation (with n - 1).
    """
    if n < 4:
        return None
    half = student_t(n - 1, confidence) * deviation / math.sqrt(n)
    return Interval(low=mean - half, high=mean + half)


def mean_of(values: Sequence[float]) -> tuple[float, Interval | None]:
    """The mean of the values, and its interval."""
    mean = fmean(values)
    return mean, mean_interval(mean, stdev(values), len(values)) if len(values) > 1 else None


def effective_size(n: float, alike: float) -> float:
    """How many independent values tell as much as ``n`` that come in clusters: of k clusters of one size, k.

    Source: Kish's effective sample size, the square of the sum of weights over the sum of their squares.

    Args:
        alike: The sum, over the values, of how many are in the cluster of each; ``n`` where each stands for itself.
    """
    return n**2 / alike


def clustered_mean_interval(
    mean: float, squares: float, n: int, independent: float, *, confidence: float = CONFIDENCE
) -> Interval | None:
    """As `mean_interval`, of ``n`` values that tell as much as so many ``independent`` ones.

    Args:
        squares: The sum of the squares of the values' deviations from their mean.
    """
    if independent < 4:
        return None
    deviation = math.sqrt(max(0.0, squares) / n * independent / (independent - 1))
    return mean_interval(mean, deviation, int(independent), confidence=confidence)


def share_interval(successes: float, n: float, *, confidence: float = CONFIDENCE) -> Interval:
    """Where a probability lies, by Wilson's score interval: right for few trials and near 0 and 1 too.

    Source: https://doi.org/10.1080/01621459.1927.10502953
    """
    if n == 0:
        return Interval(low=0.0, high=1.0)
    share, z = successes / n, _normal(confidence)
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return Interval(low=max(0.0, centre - half), high=min(1.0, centre + half))


def paired_shares_interval(
    *, both: float, first: float, second: float, neither: float, confidence: float = CONFIDENCE
) -> Interval:
    """Where the difference of two probabilities (second - first) lies, from trials in pairs.

    Newcombe's hybrid score interval with a continuity correction, his method 10: it keeps its coverage where the
    normal one loses it, for few pairs and shares near 0 and 1. Source: https://pubmed.ncbi.nlm.nih.gov/9839354/

    Args:
        both, first, second, neither: How many pairs had a success in both trials, only in the first, …; fractions where
            pairs are not independent and count for less than one.
    """
    n = both + first + second + neither
    share_1, share_2 = (both + first) / n, (both + second) / n
    range_1, range_2 = (share_interval(each, n, confidence=confidence) for each in (both + first, both + second))
    product = both * neither - first * second
    if product > 0:
        product = max(0.0, product - n / 2)
    margins = (both + first) * (second + neither) * (both + second) * (first + neither)
    phi = product / math.sqrt(margins) if margins else 0.0
    down_1, up_1 = share_1 - range_1.low, range_1.high - share_1
    down_2, up_2 = share_2 - range_2.low, range_2.high - share_2
    difference = share_2 - share_1
    return Interval(
        low=difference - math.sqrt(max(0.0, down_2**2 - 2 * phi * down_2 * up_1 + up_1**2)),
        high=difference + math.sqrt(max(0.0, up_2**2 - 2 * phi * up_2 * down_1 + down_1**2)),
    )


@lru_cache(maxsize=4096)
def student_t(freedom: int, confidence: float = CONFIDENCE) -> float:
    """The quantile of Student's t that an interval takes, at 95 % to three digits from 3 degrees of freedom on.

    Source: the expansion 26.7.5 in Abramowitz and Stegun's handbook, https://personal.math.ubc.ca/~cbm/aands/page_949.htm
    """
    z, v = _normal(confidence), freedom
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * v**4)
    )


@lru_cache
def _normal(confidence: float) -> float:
    return NormalDist().inv_cdf((1 + confidence) / 2)


@lru_cache(maxsize=4096)
def _quantile_ranks(n: int, q: float) -> tuple[int, int] | None:
    """Ranks, from 1, of the order statistics that enclose the ``q``-quantile of ``n`` values.

    The number of values below the quantile is binomial: the ranks leave at most half of what is not covered on each
    side. Exact for any ``n``.
    """
    if n < samples_for(q):
        return None
    spread = math.sqrt(n * q * (1 - q))
    first = max(0, math.floor(n * q - 8 * spread) - 1)  # below, nothing is left that counts
    low, below = 0, 0.0
    for count in range(first, n + 1):
        below += math.exp(
            math.lgamma(n + 1)
            - math.lgamma(count + 1)
            - math.lgamma(n - count + 1)
            + count * math.log(q)
            + (n - count) * math.log1p(-q)
        )
        if below <= _TAIL:
            low = count + 1
        elif below >= 1 - _TAIL:
            return (low, count + 1) if low > 0 and count < n else None
    return None
