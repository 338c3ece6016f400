"""Precedents: what the last answers of a run took, at the prices of now; what others will take is told from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from sqlite3 import Row

from runner.store import Store
from runner.types import TokenPrice, TokenUsage


@dataclass(frozen=True, slots=True, kw_only=True)
class Precedent:
    """An answer."""

    tokens: float | None  # None: unknown
    usd: float | None  # None: unknown
    is_counted: bool  # not so: its request is counted with another of its rows


async def precedents(store: Store, prices: Mapping[str, TokenPrice | None], *, most: int) -> list[Precedent]:
    """The last answers of this run, up to so many.

    Args:
        prices: What each deployment charges now, whatever it did when it answered. None: unknown.
    """
    return [
        Precedent(
            tokens=row["total_tokens"], usd=_cost_now(row, prices.get(row["deployment"])), is_counted=not row["shared"]
        )
        async for row in store.query(_LAST, (most,))
    ]


def _cost_now(answer: Row, price: TokenPrice | None) -> float | None:
    """What an answer would cost now; what it did cost, where that is not to be known."""
    if price is None or answer["prompt_tokens"] is None or answer["completion_tokens"] is None:
        cost: float | None = answer["cost_usd"]
        return cost
    usage = TokenUsage(
        prompt_tokens=answer["prompt_tokens"],
        completion_tokens=answer["completion_tokens"],
        cached_tokens=answer["cached_tokens"],
    )
    return price.cost_usd(usage)


_LAST = """
    SELECT deployment, prompt_tokens, completion_tokens, cached_tokens, total_tokens, cost_usd, shared
    FROM answers
    WHERE error_type IS NULL AND reused_from IS NULL
    ORDER BY ticket DESC
    LIMIT ?
"""
