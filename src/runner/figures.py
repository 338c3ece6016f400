"""Figures as people read them: three digits or so, with a unit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from itertools import pairwise
from typing import Any


def score(value: float | Mapping[str, Any] | None) -> str:
    """A score's mean, or ``{"mean": …, "n": …}``: ``81.0% (n = 280)``."""
    mean, count = (value.get("mean"), value.get("n")) if isinstance(value, Mapping) else (value, None)
    if mean is None:
        text = "none"
    elif 0 <= mean <= 1:
        text = f"{mean:.1%}"
    else:
        text = f"{mean:.4g}"
    return text if count is None else f"{text} (n = {count:,})"


def rows_per_s(summary: Mapping[str, Any]) -> float | None:
    """The rate that a ``summary.json`` tells; of a benchmark, which has no rows that share answers, its requests."""
    rate: float | None = summary.get("rows_per_s", summary.get("requests_per_s"))
    return rate


def left_to_ask(summary: Mapping[str, Any]) -> int:
    """How many rows of a ``summary.json`` were neither answered nor failed: the run ended before."""
    rows, succeeded, failed = (int(summary.get(name) or 0) for name in ("rows", "succeeded", "failed"))
    return max(0, rows - succeeded - failed)


def closing_cost(known: float | None, upper_bound: float | None, *, without_bound: int = 0) -> str:
    """A cost, and what it may be at most where attempts of unknown cost were made, or how many have no bound."""
    if known is None:
        return "unknown"
    if without_bound:
        return f"{dollars(known)}, and {without_bound:,} attempts of unknown cost (request.max_tokens would bound it)"
    bounded = upper_bound is not None and upper_bound > known
    return f"{dollars(known)}, at most {dollars(upper_bound)}" if bounded and upper_bound else dollars(known)


def short(value: float) -> str:
    """Three digits or so: ``0.53``, ``23.1``, ``1.2k``."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size * 0.9995:
            scaled = value / size
            return f"{scaled:.1f}{unit}" if scaled < 99.95 else f"{scaled:.0f}{unit}"
    if value == 0:
        return "0"
    if value < 0.995:
        return f"{value:.2f}"
    return f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def by_name(total: str, counts: Mapping[str, int]) -> str:
    """A total and what it is made of: ``22 retries (20 Timeout, 2 RateLimit)``."""
    return f"{total} ({', '.join(f'{count:,} {name}' for name, count in counts.items())})" if counts else total


def dollars(value: float) -> str:
    """US dollars: ``$0.0123``, ``$12.30``."""
    if value == 0:
        return "$0"
    if value < 0.0001:
        return f"${value:.6f}" if value >= 0.000001 else "<$0.000001"
    return f"${value:.4f}" if value < 1 else f"${value:,.2f}"


def small_dollars(value: float) -> str:
    """US dollars in three digits, as for one request of many: ``$0.0123``, ``$0.000000263``."""
    if value >= 1:
        return dollars(value)
    digits = f"{value:.3g}"
    return f"${plain(float(digits)) if value >= _TINY_USD else digits}"


_TINY_USD = 1e-9
"""Sums below differ by rounding alone, and have too many zeros to be written out."""


def plain(value: float) -> str:
    """A number as people write it into a configuration, without an exponent: ``0.00002``, ``2000000``."""
    return format(Decimal(str(value)).normalize(), "f")


def dollars_apart(values: Sequence[float]) -> list[str]:
    """US dollars of values side by side: as `dollars`, with more digits where different ones would look the same.

    Values that differ by less than a hundredth of the largest are taken for the same.
    """
    texts = [dollars(value) for value in values]
    least = max(values, default=0.0) / 100
    ordered = sorted(zip(values, texts, strict=True))
    if not any(one[1] == two[1] and two[0] - one[0] >= least > 0 for one, two in pairwise(ordered)):
        return texts
    decimals = 2 - math.floor(math.log10(max(values)))
    return [f"${value:,.{decimals}f}" if value else "$0" for value in values]


def seconds(value: float) -> str:
    """A latency: ``320 ms``, ``1.25 s``."""
    return f"{value * 1000:.0f} ms" if value < 0.9995 else f"{value:.2f} s"


def duration(seconds: float) -> str:
    """A long time: ``45s``, ``3m 05s``, ``2h 10m``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02}s"
    if whole < 86_400:
        return f"{whole // 3600}h {whole % 3600 // 60:02}m"
    return f"{whole // 86_400}d {whole % 86_400 // 3600:02}h"
