from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from runner.earlier import Sent, sent_within
from runner.estimate import Estimate
from runner.store import Claim, Outcome, Store, Terms
from runner.types import Attempt


async def filled(path: Path, *outcomes: dict[str, Any], lost: int = 0) -> Store:
    """A store after a session that settled ``outcomes`` and was killed with ``lost`` more in flight."""
    count = len(outcomes) + lost
    claims = [Claim(position=n, content=b"%16d" % n, metadata="{}") for n in range(count)]
    async with await Store.open(path) as store:
        known = await store.claim(claims, Terms())
        settled = [
            (n, Outcome(ticket=known[n].ticket, content=claims[n].content, **{"deployment": "a", **each}), None)
            for n, each in enumerate(outcomes)
        ]
        await store.save_all(settled)
        await store.note_lost([[(claims[n].content, known[n].ticket)] for n in range(len(outcomes), count)])
    return await Store.open(path)


def ended(ago_s: float, **others: Any) -> dict[str, Any]:
    values = {"prompt_tokens": 10, "completion_tokens": 5, "cost_usd": 0.1}
    return {"settled_at": time.time() - ago_s, **values, **others}


async def sent(
    path: Path, *outcomes: dict[str, Any], window_s: float = 60.0, lost: int = 0, **options: Any
) -> list[Sent]:
    async with await filled(path, *outcomes, lost=lost) as store:
        return await sent_within(store, window_s, **options)


async def test_what_was_sent_within_the_window_is_found_the_oldest_first(tmp_path: Path) -> None:
    found = await sent(tmp_path / "s", ended(10, service_time_s=20.0), ended(40), ended(70))

    assert [each.age_s for each in found] == [pytest.approx(40, abs=2), pytest.approx(30, abs=2)]
    assert [each.requests for each in found] == [1, 1]
    assert found[0].used == Estimate(prompt_tokens=10, completion_tokens=5)
    assert found[0].deployment == "a"


async def test_a_day_is_found_in_few_parts(tmp_path: Path) -> None:
    found = await sent(tmp_path / "s", *(ended(20_000 + n / 10) for n in range(200)), window_s=86_400.0)

    assert len(found) <= 2
    assert sum(each.requests for each in found) == 200
    assert sum(each.used.prompt_tokens for each in found) == 2_000


async def test_what_was_lost_counts_as_much_as_the_largest_answer(tmp_path: Path) -> None:
    found = await sent(tmp_path / "s", ended(20), ended(20, prompt_tokens=30), lost=2)

    [lost] = [each for each in found if each.deployment is None]
    assert lost.requests == 2
    assert lost.used == Estimate(prompt_tokens=60, completion_tokens=10)


async def test_what_was_lost_before_there_was_an_answer_counts_as_it_is_told(tmp_path: Path) -> None:
    [lost] = await sent(tmp_path / "s", lost=3, default_output_tokens=100)

    assert lost.used == Estimate(prompt_tokens=0, completion_tokens=300)


async def test_rows_that_were_lost_together_are_as_many_requests_as_they_can_have_been(tmp_path: Path) -> None:
    [lost] = await sent(tmp_path / "s", lost=130, group_size=64)

    assert lost.requests == 3


@pytest.mark.parametrize(
    ("error", "status", "cost_usd", "requests"),
    [
        ("ConnectError", None, 0.0, 0),
        ("InsufficientQuotaError", None, 0.0, 0),  # the limiter's own
        ("InsufficientQuotaError", 429, 0.0, 1),
        ("NoDeploymentError", None, 0.0, 0),
        ("Timeout", None, None, 1),
        ("RateLimitError", 429, 0.0, 1),
    ],
)
async def test_attempts_count_where_they_reached_a_server(
    tmp_path: Path, error: str, status: int | None, cost_usd: float | None, requests: int
) -> None:
    attempt = Attempt(
        number=1,
        deployment="a",
        started_at=time.time(),
        service_time_s=0.0,
        error=error,
        message="",
        status=status,
        cost_usd=cost_usd,
    )
    async with await filled(tmp_path / "s", ended(5, reused_from="other/run")) as store:
        await store.note_attempts([(b"%16d" % 0, 1)], attempt)
        assert sum(each.requests for each in await sent_within(store, 60.0)) == requests


async def test_answers_that_were_not_asked_for_here_and_rows_that_were_not_sent_are_not_counted(tmp_path: Path) -> None:
    refused = {"error_type": "ConnectError", "cost_usd": 0.0, "prompt_tokens": None}
    others = ended(5, reused_from="other/run"), ended(5, deployment=None), ended(5, **refused)

    assert await sent(tmp_path / "s", *others) == []


async def test_what_another_clock_wrote_is_not_counted(tmp_path: Path) -> None:
    found = await sent(tmp_path / "s", ended(-1_000), ended(-10))

    assert [(each.age_s, each.requests) for each in found] == [(0.0, 1)]


async def test_texts_that_share_a_request_are_one(tmp_path: Path) -> None:
    [found] = await sent(tmp_path / "s", ended(5), ended(5, shared=True))

    assert found.requests == 1
    assert found.used.prompt_tokens == 20
