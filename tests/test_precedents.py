from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from harness import save
from runner.precedents import Precedent, precedents
from runner.store import Claim, Outcome, Store, Terms
from runner.types import TokenPrice

PRICE = TokenPrice(prompt=0.25, completion=0.5)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    async with await Store.open(tmp_path / "results.sqlite") as store:
        yield store


async def settle(store: Store, position: int, **columns: Any) -> None:
    content = b"%016d" % position
    await store.claim([Claim(position=position, content=content, metadata=None)], Terms())
    await save(store, position, Outcome(ticket=0, content=content, settled_at=1.0, **columns))
    await store.flush()


async def test_an_answer_costs_what_its_deployment_charges_now(store: Store) -> None:
    tokens = {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}
    await settle(store, 0, deployment="east", cost_usd=5.0, **tokens)
    assert await precedents(store, {"east": PRICE}, most=9) == [Precedent(tokens=12, usd=3.5, is_counted=True)]


async def test_an_answer_costs_what_it_did_where_its_tokens_or_their_price_are_unknown(store: Store) -> None:
    await settle(store, 0, deployment="east", cost_usd=5.0)
    await settle(store, 1, deployment="west", cost_usd=6.0, prompt_tokens=1, completion_tokens=1)
    await settle(store, 2, deployment="gone", cost_usd=None, prompt_tokens=1, completion_tokens=1)
    found = await precedents(store, {"east": PRICE, "west": None}, most=9)
    assert [each.usd for each in found] == [None, 6.0, 5.0]


async def test_the_last_answers_of_the_run_itself_are_precedents(store: Store) -> None:
    await settle(store, 0, total_tokens=1)
    await settle(store, 1, total_tokens=2, shared=True)
    await settle(store, 2, total_tokens=3, error_type="Timeout")
    await settle(store, 3, total_tokens=4, reused_from="other/run")
    await settle(store, 4, total_tokens=5)
    found = await precedents(store, {}, most=2)
    assert [(each.tokens, each.is_counted) for each in found] == [(5, True), (2, False)]
