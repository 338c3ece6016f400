from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import key_of, save
from runner.claims import Elsewhere
from runner.database import SCHEMA_VERSION
from runner.errors import StoreError
from runner.reuse import first_of
from runner.store import Claim, Known, Outcome, Store, Terms
from runner.types import Attempt

SOURCES = Path(__file__).resolve().parents[1] / "src"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "results.sqlite"


def content(name: object) -> bytes:
    return str(name).encode().rjust(16, b".")


def claims(*names: object, first: int = 0) -> list[Claim]:
    """Rows that ask these things, at consecutive positions."""
    return [
        Claim(position=first + n, content=content(name), metadata=f'{{"name":"{name}"}}')
        for n, name in enumerate(names)
    ]


def answer(name: object, ticket: int = 0, **others: Any) -> Outcome:
    values: dict[str, Any] = {"settled_at": 1.0, "output_text": f"answer to {name}", **others}
    return Outcome(ticket=ticket, content=content(name), **values)


def failure(name: object, ticket: int = 0, **others: Any) -> Outcome:
    values: dict[str, Any] = {"error_type": "Timeout", "error_message": "slow", "output_text": None, **others}
    return answer(name, ticket, **values)


async def claim(store: Store, *names: object, first: int = 0, **options: Any) -> list[Known]:
    return await store.claim(claims(*names, first=first), Terms(**options))


async def answered(store: Store, *names: object, **options: Any) -> list[bool]:
    return [known.answered for known in await claim(store, *names, **options)]


async def table(store: Store, sql: str) -> list[tuple[Any, ...]]:
    return [tuple(row) async for row in store.query(sql)]


async def answers(store: Store) -> list[tuple[str, str | None]]:
    """What is answered, and how, in any order."""
    rows = await table(store, "SELECT content, output_text FROM answers")
    return sorted((name.decode().lstrip("."), text) for name, text in rows)


async def shown(store: Store) -> list[str | None]:
    """The answer of each row there is."""
    return [
        text
        for _, text in await table(
            store, "SELECT position, output_text FROM rows LEFT JOIN answers USING (ticket) ORDER BY position"
        )
    ]


async def attempts(store: Store) -> list[tuple[str, str]]:
    rows = await table(store, "SELECT content, error_type FROM attempts ORDER BY id")
    return [(name.decode().lstrip("."), kind) for name, kind in rows]


# Asking and answering


async def test_no_more_rows_are_taken_up_than_wanted_and_those_after_them_are_not_claimed(path: Path) -> None:
    async with await Store.open(path) as store:
        first = await store.claim(claims(*"abcdef"), Terms(), most=2)
        rest = await store.claim(claims(*"cdef", first=2), Terms())
        for position, name in enumerate("abcdef"):
            await save(store, position, answer(name))
        await store.flush()
        settled = await store.claim(claims(*"abcdef"), Terms(), most=2)
        longer = await store.claim(claims(*"abcdefghi"), Terms(), most=2)
        few = await store.claim(claims(*"ijklmn", first=8), Terms(wanted={12}.__contains__), most=1)

    assert [each.answered for each in first] == [False, False]
    assert len(rest) == 4
    assert [each.answered for each in settled] == [True] * 6
    assert [each.answered for each in longer] == [*[True] * 6, False, False]
    assert [each.answered for each in few] == [*[True] * 4, False, True]


async def test_a_session_lasts_until_it_was_flushed_last(path: Path) -> None:
    async with await Store.open(path) as store:
        await claim(store, "a")
        [(began, seen)] = await table(store, "SELECT started_at, last_seen FROM sessions")
        await asyncio.sleep(0.01)
        await store.flush()
        [(_, flushed)] = await table(store, "SELECT started_at, last_seen FROM sessions")

    assert began == seen < flushed


async def test_a_session_that_has_nothing_to_ask_takes_no_time(path: Path) -> None:
    async with await Store.open(path) as store:
        await claim(store, "a")
        await save(store, 0, answer("a"))
    async with await Store.open(path) as store:
        await claim(store, "a")
        await asyncio.sleep(0.01)
        await store.flush()
        assert await table(store, "SELECT last_seen > started_at FROM sessions") == [(1,), (0,)]


async def test_a_row_is_asked_once_over_sessions(path: Path) -> None:
    async with await Store.open(path) as store:
        assert await answered(store, "a", "b", "c") == [False, False, False]
        await save(store, 0, answer("a"))
        await save(store, 2, answer("c"))
    async with await Store.open(path) as store:
        assert await answered(store, "a", "b", "c") == [True, False, True]
        await save(store, 1, answer("b"))
    async with await Store.open(path) as store:
        assert await answered(store, "a", "b", "c") == [True, True, True]


async def test_an_outcome_is_kept_in_every_detail(path: Path) -> None:
    outcome = Outcome(
        ticket=7,
        content=content("a"),
        settled_at=1_700_000_000.25,
        output_text="Grüße\n\x00🐎",
        details='{"reasoning":"because"}',
        finish_reason="stop",
        request_id="req-1",
        model_id="m-2",
        prompt_tokens=1,
        completion_tokens=2,
        total_tokens=3,
        reasoning_tokens=4,
        cached_tokens=5,
        error_type="Timeout",
        error_message="slow",
        error_status=408,
        deployment="east",
        retries=6,
        queue_wait_s=0.5,
        service_time_s=1.5,
        end_to_end_s=2.5,
        ttft_s=0.125,
        cost_usd=1e-9,
        cost_bound_usd=2e-9,
        embedding=b"\x00\x01",
        reused_from="other/run",
    )
    async with await Store.open(path) as store:
        await claim(store, "a")
        await save(store, 0, outcome)
    async with await Store.open_readonly(path) as store:
        [row] = [dict(row) async for row in store.query("SELECT * FROM answers")]
    assert Outcome(**row) == outcome


async def test_rows_that_ask_the_same_are_asked_each(path: Path) -> None:
    async with await Store.open(path) as store:
        first = await claim(store, "a", "b", "a", "a")
        await save(store, 2, answer("a", output_text="second"))
        second = await claim(store, "a", "c", first=4)
        assert len({each.ticket for each in [*first, *second]}) == 6
    async with await Store.open(path) as store:
        assert await answered(store, "a", "b", "a", "a") == [False, False, True, False]


async def test_rows_may_be_reordered_added_and_removed_between_sessions(path: Path) -> None:
    async with await Store.open(path) as store:
        await claim(store, "a", "b", "c")
        for position, name in enumerate("abc"):
            await save(store, position, answer(name))
    async with await Store.open(path) as store:
        assert await answered(store, "c", "new", "a") == [True, False, True]
        await save(store, 1, answer("new"))
    async with await Store.open_readonly(path) as store:
        assert await answers(store) == [(name, f"answer to {name}") for name in ("a", "b", "c", "new")]
        assert await shown(store) == ["answer to c", "answer to new", "answer to a"]


async def test_a_removed_duplicate_gives_its_answer_to_the_one_that_moves_up(path: Path) -> None:
    async with await Store.open(path) as store:
        await claim(store, "a", "a")
        await save(store, 1, answer("a", output_text="second"))
        await save(store, 0, answer("a", output_text="first"))
    async with await Store.open(path) as store:
        assert await answered(store, "b", "a") == [False, True]
        assert (await shown(store))[1] in ("first", "second")


async def test_a_failed_row_is_tried_again_and_its_failure_moves_to_the_ledger(path: Path) -> None:
    async with await Store.open(path) as store:
        await claim(store, "a", "b")
        await save(
            store,
            0,
            failure(
                "a", settled_at=100.0, service_time_s=2.0, retries=3, error_status=504, deployment="x", cost_usd=0.5
            ),
        )
        await save(store, 1, answer("b"))
    async with await Store.open(path) as store:
        assert await answered(store, "a", "b") == [False, True]
        [attempt] = [dict(row) async for row in store.query("SELECT * FROM attempts")]
        assert await answers(store) == [("b", "answer to b")]
    assert attempt == {
        "id": 1,
        "content": content("a"),
        "number": 4,
        "deployment": "x",
        "started_at": 98.0,
        "service_time_s": 2.0,
        "error_type": "Timeout",
        "error_message": "slow",
        "error_status": 504,
        "cost_usd": 0.5,
        "cost_bound_usd": None,
        "shared": 0,
    }


async def test_a_failed_row_that_has_moved_is_tried_again_and_leaves_no_failure_behind(path: Path) -> None:
    async with await Store.open(path) as store:
        await claim(store, "a", "b")
        await save(store, 0, failure("a"))
        await save(store, 1, answer("b"))
    async with await Store.open(path) as store:
        assert await answered(store, "b", "a") == [True, False]
        assert await attempts(store) == [("a", "Timeout")]
        await save(store, 1, answer("a"))
        await store.flush()
        assert await store.forget_rows() == 0


async def test_a_failed_row_stays_failed_where_retries_are_not_wanted(path: Path) -> None:
    async with await Store.open(path) as store:
        await claim(store, "a")
        await save(store, 0, failure("a"))
    async with await Store.open(path) as store:
        assert await answered(store, "a", retry_failed=False) == [True]
        assert await attempts(store) == []


async def test_a_later_outcome_replaces_an_earlier_one(path: Path) -> None:
    async with await Store.open(path) as store:
        await claim(store, "a")
        await save(store, 0, failure("a"))
        await save(store, 0, answer("a", output_text="at last"))
    async with await Store.open_readonly(path) as store:
        assert await answers(store) == [("a", "at last")]


async def test_a_row_is_brought_up_to_date_where_only_its_metadata_changed(path: Path) -> None:
    async with await Store.open(path) as store:
        await store.claim([Claim(position=0, content=content("a"), metadata="1")], Terms(scored=True))
        await save(store, 0, answer("a"), '{"exact":0}')
    async with await Store.open(path) as store:
        [known] = await store.claim([Claim(position=0, content=content("a"), metadata="2")], Terms(scored=True))
        assert (known.answered, known.unscored_text) == (True, "answer to a")
        assert await table(store, "SELECT metadata, scores FROM rows") == [("2", None)]


async def test_rows_beyond_the_dataset_are_dropped_and_their_answers_kept(path: Path) -> None:
    async with await Store.open(path) as store:
        await claim(store, "a", "b", "c")
        for position, name in enumerate("abc"):
            await save(store, position, answer(name))
        await store.truncate(1)
        assert await table(store, "SELECT position FROM rows") == [(0,)]
    async with await Store.open(path) as store:
        assert await answered(store, "a", "b", "c") == [True, True, True]


async def test_many_rows_go_through_in_chunks_of_any_size(path: Path) -> None:
    names = [n % 700 for n in range(1_500)]
    async with await Store.open(path) as store:
        tickets: set[int] = set()
        position = 0
        for size in (1, 63, 64, 65, 128, 256, 500, 423):
            part = names[position : position + size]
            known = await claim(store, *part, first=position)
            tickets |= {each.ticket for each in known}
            for n, (name, each) in enumerate(zip(part, known, strict=True)):
                await save(store, position + n, answer(name, each.ticket))
            position += size
    assert len(tickets) == 1_500
    async with await Store.open_readonly(path) as store:
        assert await shown(store) == [f"answer to {name}" for name in names]


async def test_from_the_first_row_that_changed_on_the_dataset_is_another_one(path: Path) -> None:
    async with await Store.open(path) as store:
        await claim(store, "a", "b", "a", "c", "a")
        for position, name in enumerate("abaca"):
            await save(store, position, answer(name, output_text=f"{name}{position}"))
    async with await Store.open(path) as store:
        assert await answered(store, "b", "b") == [True, False]
        assert await table(store, "SELECT position FROM rows") == [(0,), (1,)]
        assert await answered(store, "a", "c", "a", first=2) == [True, True, True]
        b, _, one, c, other = await shown(store)
        assert (b, c) == ("b1", "c3")
        assert one != other
        assert {one, other} <= {"a0", "a2", "a4"}


async def test_what_a_pilot_has_just_answered_stays_where_it_is(path: Path) -> None:
    async with await Store.open(path) as store:
        await claim(store, "a", "b", "a")
    async with await Store.open(path) as store:
        assert await answered(store, "a", "b", "a", wanted={2}.__contains__) == [True, True, False]
        await save(store, 2, answer("a"))
        await store.flush()
        assert await answered(store, "a", "b", wanted={0, 1}.__contains__) == [False, False]
        assert await answered(store, "a", first=2, wanted={0, 1}.__contains__) == [True]
        assert await shown(store) == [None, None, "answer to a"]


async def test_the_end_of_an_interrupted_pass_over_a_changed_dataset_is_not_mixed_with_the_old_one(path: Path) -> None:
    async with await Store.open(path) as store:
        await claim(store, "x", "a", "b", "x")
    async with await Store.open(path) as store:
        await claim(store, "y", "a")  # and interrupted
    async with await Store.open(path) as store:
        await claim(store, "y", "a", "b", "x")
        rows = await table(store, "SELECT content, ticket FROM rows ORDER BY position")
        assert [name for name, _ in rows] == [content(name) for name in "yabx"]
        assert len({ticket for _, ticket in rows}) == 4


async def test_a_claim_that_fails_leaves_the_answers_to_the_next_one(path: Path) -> None:
    def fail(row: Any) -> float:
        raise OSError("no bound")

    async with await Store.open(path) as store:
        await claim(store, "a", "b")
        for position, name in enumerate("ab"):
            await save(store, position, answer(name))
    async with await Store.open(path) as store:
        with pytest.raises(OSError, match="no bound"):
            await claim(store, "b", "new", "a", cost_bound=fail)
        assert await answered(store, "b", "new", "a") == [True, False, True]


# Sharing


async def test_rows_that_ask_the_same_may_share_one_answer(path: Path) -> None:
    async with await Store.open(path) as store:
        known = await claim(store, "a", "b", "a", dedupe=True)
        assert [(each.answered, each.shared) for each in known] == [(False, False), (False, False), (False, True)]
        assert known[0].ticket == known[2].ticket != known[1].ticket
        [known] = [await claim(store, "b", "c", first=3, dedupe=True)]
        assert [each.shared for each in known] == [True, False]
        await save(store, 0, answer("a"))
        await store.flush()
        assert [each.answered for each in await claim(store, "a", first=5, dedupe=True)] == [True]
    async with await Store.open(path) as store:
        known = await claim(store, "a", "b", "a", "b", "c", "a", dedupe=True)
        assert [each.answered for each in known] == [True, False, True, False, False, True]
        assert [each.shared for each in known] == [False, False, False, True, False, False]


async def test_very_many_rows_may_share_one_answer(path: Path) -> None:
    async with await Store.open(path) as store:
        known = [
            fact for first in range(0, 50_000, 250) for fact in await claim(store, *"a" * 250, first=first, dedupe=True)
        ]
        assert len({fact.ticket for fact in known}) == 1
        assert [fact.shared for fact in known] == [False, *[True] * 49_999]


async def test_a_shared_failure_is_given_up_once_and_not_again_in_the_same_session(path: Path) -> None:
    async with await Store.open(path) as store:
        await claim(store, "a", "a", dedupe=True)
        await save(store, 0, failure("a"))
    async with await Store.open(path) as store:
        known = await claim(store, "a", dedupe=True)
        assert not known[0].answered
        await save(store, 0, failure("a"))
        await store.flush()
        known = await claim(store, "a", first=1, dedupe=True)
        assert (known[0].answered, known[0].shared) == (False, True)
        assert await attempts(store) == [("a", "Timeout")]
        assert await table(store, "SELECT count(*) FROM answers") == [(1,)]


async def test_of_rows_that_share_a_request_one_is_lost_by_a_kill(path: Path, tmp_path: Path) -> None:
    async with await Store.open(path) as store:
        await claim(store, "a", "a", "a", dedupe=True)
        killed = as_killed(path, tmp_path / "killed")
    async with await Store.open(killed) as store:
        assert await attempts(store) == [("a", "Lost")]


# Answers from elsewhere


async def test_what_is_found_elsewhere_is_kept_and_not_asked_for(path: Path) -> None:
    looked: list[list[int]] = []

    async def elsewhere(asked: Sequence[Claim]) -> list[Outcome | None]:
        looked.append([row.position for row in asked])
        found = {content("b"): answer("b", cost_usd=0.0, reused_from="other/run")}
        return [found.get(row.content) for row in asked]

    async with await Store.open(path) as store:
        await claim(store, "a")
        await save(store, 0, answer("a"))
        await store.flush()
        known = await claim(store, "a", "b", "a", "c", elsewhere=elsewhere, scored=True)
        assert [each.answered for each in known] == [True, True, False, False]
        assert [each.copied for each in known] == [False, True, False, False]
        assert [each.unscored_text for each in known] == ["answer to a", "answer to b", None, None]
        assert looked == [[1, 2, 3]]
        assert await table(store, "SELECT position FROM rows WHERE session IS NOT NULL") == [(0,), (2,), (3,)]


async def test_no_answer_from_elsewhere_comes_to_a_second_row_in_a_later_session(path: Path, tmp_path: Path) -> None:
    other = await lent(tmp_path / "other" / "results.sqlite", "one", "two")
    for wanted in (["one"], ["one", "two"], ["one", "two", None]):
        async with await Store.open(path) as store, await Store.open_readonly(other) as lender:
            await claim(store, *"a" * len(wanted), elsewhere=lending(lender))
            assert await shown(store) == wanted


async def test_no_answer_comes_to_a_second_row_by_way_of_another_run(path: Path, tmp_path: Path) -> None:
    first = await lent(tmp_path / "first" / "results.sqlite", "one")
    second = await lent(tmp_path / "second" / "results.sqlite", "one")
    async with (
        await Store.open(path) as store,
        await Store.open_readonly(first) as lender,
        await Store.open_readonly(second) as copier,
    ):
        await claim(store, "a", "a", elsewhere=first_of([lending(lender), lending(copier)]))
        assert await shown(store) == ["one", None]


async def test_where_rows_share_answers_they_share_those_from_elsewhere(path: Path, tmp_path: Path) -> None:
    other = await lent(tmp_path / "other" / "results.sqlite", "one")
    async with await Store.open(path) as store, await Store.open_readonly(other) as lender:
        await claim(store, "a", "a", elsewhere=lending(lender), dedupe=True)
        assert await shown(store) == ["one", "one"]


async def lent(path: Path, *texts: str) -> Path:
    """A store with these answers to the same thing, which took a time of its own each."""
    async with await Store.open(path) as store:
        await claim(store, *"a" * len(texts))
        for position, text in enumerate(texts):
            await save(store, position, answer("a", output_text=text, service_time_s=position + 0.1))
    return path


def lending(store: Store) -> Elsewhere:
    async def elsewhere(asked: Sequence[Claim]) -> list[Outcome | None]:
        return await store.take([row.content for row in asked])

    return elsewhere


async def test_a_failure_for_which_there_is_an_answer_elsewhere_moves_to_the_ledger(path: Path) -> None:
    async def elsewhere(asked: Sequence[Claim]) -> list[Outcome | None]:
        return [answer("a", reused_from="other/run") for _ in asked]

    async with await Store.open(path) as store:
        await claim(store, "a")
        await save(store, 0, failure("a"))
        await store.flush()
        assert await answered(store, "a", elsewhere=elsewhere) == [True]
        assert await attempts(store) == [("a", "Timeout")]
        assert await answers(store) == [("a", "answer to a")]


async def test_a_search_elsewhere_that_fails_leaves_everything_as_it_was(path: Path) -> None:
    async def elsewhere(asked: Sequence[Claim]) -> list[Outcome | None]:
        raise StoreError("the other run is out of reach")

    async with await Store.open(path) as store:
        await claim(store, "a", "b")
        await save(store, 0, failure("a"))
        await store.flush()
        with pytest.raises(StoreError, match="out of reach"):
            await claim(store, "a", "other", elsewhere=elsewhere)
        assert await attempts(store) == []
        assert await table(store, "SELECT content FROM rows") == [(content("a"),), (content("b"),)]


# Starting over


async def test_a_store_that_starts_over_keeps_the_books_of_what_this_run_paid(path: Path) -> None:
    async with await Store.open(path) as store:
        await claim(store, "a", "b", "c", scored=True)
        await save(store, 0, answer("a", cost_usd=0.5, retries=1), '{"exact":1}')
        await save(store, 1, failure("b", cost_bound_usd=0.25))
        await save(store, 2, answer("c", cost_usd=0.0, reused_from="other/run"))
    async with await Store.open(path) as store:
        await store.start_over()
        assert await answers(store) == []
        entries = await table(store, "SELECT error_type, number, cost_usd, cost_bound_usd FROM attempts ORDER BY id")
        assert entries == [("GivenUp", 2, 0.5, None), ("Timeout", 1, None, 0.25)]
        assert await table(store, "SELECT count(scores) FROM rows") == [(0,)]
        assert await answered(store, "a", "b", "c") == [False, False, False]


# What attempts can have cost


async def test_what_a_killed_session_had_taken_up_is_bounded_in_the_ledger(path: Path, tmp_path: Path) -> None:
    async with await Store.open(path) as store:
        await claim(store, "a", "b", "c", cost_bound=lambda row: None if row.position == 2 else row.position + 0.5)
        await store.note_attempts([await key_of(store, 0)], replace(ATTEMPT, cost_usd=None))
        await save(store, 1, answer("b", cost_usd=0.125))
        await store.flush()
        killed = as_killed(path, tmp_path / "killed")
    async with await Store.open(killed) as store:
        entries = await table(store, "SELECT content, error_type, cost_usd, cost_bound_usd FROM attempts ORDER BY id")
    assert entries == [
        (content("a"), "RateLimitError", None, 0.5),
        (content("a"), "Lost", None, 0.5),
        (content("c"), "Lost", None, None),
    ]


async def test_a_clock_that_is_set_back_hides_nothing_that_was_lost(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with await Store.open(path) as store:
        monkeypatch.setattr("time.time", lambda: 1.0)
        await claim(store, "a")
        killed = as_killed(path, tmp_path / "killed")
    async with await Store.open(killed) as store:
        assert await attempts(store) == [("a", "Lost")]


# Scores


async def test_answers_without_scores_come_back_to_be_scored(path: Path) -> None:
    async with await Store.open(path) as store:
        assert (await claim(store, "a", "b", "c", scored=True))[0].unscored_text is None
        await save(store, 0, answer("a"), '{"exact":1}')
        await save(store, 1, answer("b"))
        await save(store, 2, failure("c"))
    async with await Store.open(path) as store:
        known = await claim(store, "a", "b", "c", scored=True, retry_failed=False)
        assert [each.unscored_text for each in known] == [None, "answer to b", None]
        await store.put_scores([(1, '{"exact":0}')])
        known = await claim(store, "a", "b", "c", scored=True, retry_failed=False)
        assert [each.unscored_text for each in known] == [None, None, None]


async def test_a_row_whose_answer_was_moved_to_it_is_scored_again(path: Path) -> None:
    async with await Store.open(path) as store:
        await claim(store, "a", "b", scored=True)
        await save(store, 0, answer("a"), '{"exact":1}')
    async with await Store.open(path) as store:
        known = await claim(store, "b", "a", scored=True)
        assert known[1].unscored_text == "answer to a"


async def test_forgotten_scores_are_wanted_again(path: Path) -> None:
    async with await Store.open(path) as store:
        await claim(store, "a", scored=True)
        await save(store, 0, answer("a"), '{"exact":1}')
        await store.flush()
        await store.forget_scores()
        assert (await claim(store, "a", scored=True))[0].unscored_text == "answer to a"


async def test_without_scorers_no_text_is_read(path: Path) -> None:
    async with await Store.open(path) as store:
        await claim(store, "a")
        await save(store, 0, answer("a"))
        await store.flush()
        assert (await claim(store, "a", scored=False))[0].unscored_text is None


# Facts and the ledger


async def test_facts_about_the_run_are_kept_and_replaced(path: Path) -> None:
    async with await Store.open(path) as store:
        assert await store.meta() == {}
        await store.put_meta({"samples": "1", "scorers": "x"})
        await store.put_meta({"samples": "2"})
    async with await Store.open(path) as store:
        assert await store.meta() == {"samples": "2", "scorers": "x"}


ATTEMPT = Attempt(
    number=2,
    deployment="east",
    started_at=50.0,
    service_time_s=0.5,
    error="RateLimitError",
    message="slow down",
    status=429,
    cost_usd=0.0,
)


async def test_a_failed_attempt_is_durable_when_its_note_returns(path: Path) -> None:
    async with await Store.open(path) as store:
        await store.note_attempts([(content("a"), 1)], ATTEMPT)
        async with await Store.open_readonly(path) as reader:
            [row] = [dict(row) async for row in reader.query("SELECT * FROM attempts")]
    assert row == {
        "id": 1,
        "content": content("a"),
        "number": 2,
        "deployment": "east",
        "started_at": 50.0,
        "service_time_s": 0.5,
        "error_type": "RateLimitError",
        "error_message": "slow down",
        "error_status": 429,
        "cost_usd": 0.0,
        "cost_bound_usd": None,
        "shared": 0,
    }


async def test_requests_that_were_cancelled_in_flight_are_entered_as_lost(path: Path) -> None:
    async with await Store.open(path) as store:
        await store.note_lost([])
        await store.note_lost([[(content("a"), 0)], [(content("b"), 1)]])
        assert await attempts(store) == [("a", "Lost"), ("b", "Lost")]
        assert await table(store, "SELECT count(*) FROM attempts WHERE cost_usd IS NULL") == [(2,)]


async def test_a_session_knows_when_it_began_was_last_seen_and_ended(path: Path) -> None:
    async with await Store.open(path) as store:
        await claim(store, "a")
        await asyncio.sleep(0.01)
        await save(store, 0, answer("a"))
        await store.flush()
        [(started, seen, ended)] = await table(store, "SELECT started_at, last_seen, ended_at FROM sessions")
        assert started < seen
        assert ended is None
    async with await Store.open(path) as store:
        sessions = await table(store, "SELECT ended_at >= last_seen FROM sessions ORDER BY id")
    assert sessions == [(1,), (None,)]


# Durability


async def test_outcomes_that_come_together_become_durable_together(path: Path) -> None:
    groups: list[Sequence[Outcome]] = []
    async with await Store.open(path, on_commit=groups.append) as store:
        await claim(store, *range(100))
        for n in range(100):
            await save(store, n, answer(n, n + 1))
        assert groups == []
        await asyncio.sleep(0.2)
        assert [outcome.content for group in groups for outcome in group] == [content(n) for n in range(100)]
        assert len(groups) <= 2
        async with await Store.open_readonly(path) as reader:
            assert len(await answers(reader)) == 100


async def test_outcomes_that_come_during_a_commit_are_kept_and_reported_once(path: Path) -> None:
    reported: list[Outcome] = []
    async with await Store.open(path, on_commit=reported.extend) as store:
        for first in range(0, 3_000, 250):
            await claim(store, *range(first, first + 250), first=first)

        async def work(numbers: range) -> None:
            for n in numbers:
                await asyncio.sleep(random.random() * 0.001)
                await save(store, n, answer(n, n + 1), "{}")

        await asyncio.gather(*(work(range(start, 3_000, 30)) for start in range(30)))
    assert Counter(outcome.content for outcome in reported) == Counter(content(n) for n in range(3_000))
    async with await Store.open_readonly(path) as store:
        assert len(await answers(store)) == 3_000
        assert await table(store, "SELECT count(*) FROM rows WHERE scores = '{}'") == [(3_000,)]


async def test_savers_wait_while_too_much_is_waiting_to_be_written(path: Path) -> None:
    reported: list[Outcome] = []
    waiting = 0
    async with await Store.open(path, on_commit=reported.extend) as store:
        for n in range(5_000):
            await save(store, n, answer(n, n + 1))
            waiting = max(waiting, n + 1 - len(reported))
    assert waiting <= 256
    async with await Store.open_readonly(path) as store:
        assert len(await answers(store)) == 5_000


async def test_a_flush_returns_when_everything_handed_in_is_durable(path: Path) -> None:
    reported: set[bytes] = set()

    def report(outcomes: Sequence[Outcome]) -> None:
        reported.update(outcome.content for outcome in outcomes)

    async with await Store.open(path, on_commit=report) as store:
        for n in range(60):
            await save(store, n, answer(n, n + 1, output_text="x" * 200_000))
            await asyncio.sleep(0.009 + n / 60 * 0.003)  # just when the writer begins
            await store.flush()
            assert content(n) in reported


async def test_flushes_at_the_same_time_report_everything_once(path: Path) -> None:
    reported: list[Outcome] = []
    async with await Store.open(path, on_commit=reported.extend) as store:
        for n in range(200):
            await save(store, n, answer(n, n + 1))
            if n % 20 == 0:
                await asyncio.gather(*(store.flush() for _ in range(3)))
    assert Counter(outcome.content for outcome in reported) == Counter(content(n) for n in range(200))


async def test_closing_commits_what_is_pending(path: Path) -> None:
    reported: list[Outcome] = []
    store = await Store.open(path, on_commit=reported.extend)
    for n in range(10):
        await save(store, n, answer(n, n + 1))
    await store.aclose()
    assert len(reported) == 10
    async with await Store.open_readonly(path) as store:
        assert len(await answers(store)) == 10


@pytest.mark.parametrize("delay_s", [0.0, 0.0095, 0.0100, 0.0102, 0.0104, 0.0106, 0.0108, 0.011, 0.0115, 0.012])
async def test_closing_at_any_moment_of_a_commit_loses_nothing(path: Path, delay_s: float) -> None:
    reported: list[Outcome] = []
    store = await Store.open(path, on_commit=reported.extend)
    for n in range(200):
        await save(store, n, answer(n, n + 1, output_text="x" * 1_000))
    await asyncio.sleep(delay_s)
    await store.aclose()
    assert len(reported) == 200
    async with await Store.open_readonly(path) as store:
        assert len(await answers(store)) == 200
        assert await table(store, "SELECT count(*) FROM sessions WHERE ended_at IS NULL") == [(0,)]


async def test_a_claim_that_is_cancelled_leaves_the_store_in_order(path: Path) -> None:
    async with await Store.open(path) as store:
        for n in range(40):
            claiming = asyncio.create_task(claim(store, *range(200)))
            for _ in range(n % 20):
                await asyncio.sleep(0.0001 * (n // 20))
            claiming.cancel()
            await asyncio.wait([claiming])
            await store.put_meta({"n": str(n)})
            assert await table(store, "SELECT count(*) FROM rows") in ([(0,)], [(200,)])
        assert await answered(store, *range(200)) == [False] * 200
    async with await Store.open_readonly(path) as store:
        assert await store.meta() == {"n": "39"}


async def test_a_claim_that_is_cancelled_moves_all_failures_to_the_ledger_or_none(path: Path) -> None:
    async with await Store.open(path) as store:
        await claim(store, *range(50))
        for n in range(50):
            await save(store, n, failure(n))
        await store.flush()
        for n in range(60):
            claiming = asyncio.create_task(claim(store, *range(50)))
            for _ in range(n % 15):
                await asyncio.sleep(0.0001 * (n // 15))
            claiming.cancel()
            await asyncio.wait([claiming])
            await store.put_meta({"n": str(n)})
            moved, left = len(await attempts(store)), len(await answers(store))
            assert (moved, left) in ((0, 50), (50, 0))
            if moved:
                break


async def test_a_note_that_is_cancelled_leaves_the_store_in_order(path: Path) -> None:
    async with await Store.open(path) as store:
        for n in range(40):
            noting = asyncio.create_task(store.note_attempts([(content(n), 0)], ATTEMPT))
            await save(store, n, answer(n, n + 1))
            for _ in range(n % 8):
                await asyncio.sleep(0)
            noting.cancel()
            await asyncio.wait([noting])
            await store.flush()
    async with await Store.open_readonly(path) as store:
        assert len(await answers(store)) == 40
        entered = [name for name, _ in await attempts(store)]
        assert len(entered) == len(set(entered))


async def test_text_that_is_no_unicode_spoils_neither_its_row_nor_the_others(path: Path) -> None:
    async with await Store.open(path) as store:
        await claim(store, "a", "b", "c")
        await save(store, 0, answer("a"))
        await save(store, 1, answer("b", output_text="half a pair: \ud83d", request_id="\udcff"))
        await save(store, 2, failure("c", error_message="\ud800"))
        await store.note_attempts([(content("d"), 0)], replace(ATTEMPT, message="\udfff"))
    async with await Store.open_readonly(path) as store:
        texts = dict(await answers(store))
        assert texts["a"] == "answer to a"
        assert (texts["b"] or "").startswith("half a pair: ")
        assert len(texts) == 3
        assert len(await attempts(store)) == 1


async def test_a_bug_in_on_commit_is_not_swallowed(path: Path) -> None:
    def broken(outcomes: Sequence[Outcome]) -> None:
        raise ZeroDivisionError

    store = await Store.open(path, on_commit=broken)
    await save(store, 0, answer("a", 1))
    await asyncio.sleep(0.1)
    with pytest.raises(ZeroDivisionError):
        await save(store, 1, answer("b", 2))
    await store.aclose()
    async with await Store.open_readonly(path) as store:
        assert ("a", "answer to a") in await answers(store)


# One process, our files


async def test_a_store_in_use_is_refused_and_its_user_named(path: Path) -> None:
    async with await Store.open(path):
        with pytest.raises(StoreError, match=rf"{path.parent} is in use by another process \(pid {os.getpid()}\)"):
            await Store.open(path)
    async with await Store.open(path):
        pass


async def test_a_second_process_is_refused_until_the_first_one_is_gone(path: Path) -> None:
    script = "store = await Store.open(path); print('open', flush=True); await asyncio.sleep(60)"
    async with victim(script, path) as process:
        assert await line(process) == "open"
        with pytest.raises(StoreError, match=rf"in use by another process \(pid {process.pid}\).*name="):
            await Store.open(path)
        async with await Store.open_readonly(path) as reader:
            assert await reader.meta() == {}
        process.kill()
        await process.wait()
        async with await Store.open(path) as store:
            assert await answered(store, "a") == [False]


async def test_a_store_can_be_read_while_it_is_written(path: Path) -> None:
    async with await Store.open(path) as store:
        await claim(store, "a", "b")
        await save(store, 0, answer("a"))
        await store.flush()
        async with await Store.open_readonly(path) as reader:
            assert len(await answers(reader)) == 1
            await save(store, 1, answer("b"))
            await store.flush()
            assert len(await answers(reader)) == 2


async def test_only_what_exists_can_be_read(path: Path) -> None:
    with pytest.raises(StoreError, match=f"{path}: no such file"):
        await Store.open_readonly(path)
    assert not path.parent.exists()


async def test_a_foreign_database_is_refused_and_left_alone(path: Path) -> None:
    path.parent.mkdir()
    foreign = sqlite3.connect(path)
    foreign.execute("CREATE TABLE diary (entry TEXT)")
    foreign.commit()
    foreign.close()
    before = path.read_bytes()
    for opening in (Store.open, Store.open_readonly):
        with pytest.raises(StoreError, match=f"{path} is no results database of runner"):
            await opening(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("version", [0, SCHEMA_VERSION + 1])
async def test_another_versions_database_is_refused_and_left_alone(path: Path, version: int) -> None:
    async with await Store.open(path) as store:
        await store.put_meta({"kept": "yes"})
    other = sqlite3.connect(path)
    other.execute(f"PRAGMA user_version = {version}")
    other.close()
    before = path.read_bytes()
    for opening in (Store.open, Store.open_readonly):
        with pytest.raises(StoreError, match=f"{path} has schema version {version}"):
            await opening(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "text", [b"Dear diary, nothing happened today.\n" * 50, b"x", b"SQLite format 3\x00" + b"?" * 500]
)
async def test_a_file_that_is_no_database_is_refused_and_left_alone(path: Path, text: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(text)
    for opening in (Store.open, Store.open_readonly):
        with pytest.raises(StoreError, match=str(path)):
            await opening(path)
    assert path.read_bytes() == text


async def test_an_empty_file_becomes_a_store(path: Path) -> None:
    path.parent.mkdir()
    path.touch()
    async with await Store.open(path) as store:
        assert await answered(store, "a") == [False]


async def test_a_store_whose_making_was_interrupted_is_made(path: Path) -> None:
    path.parent.mkdir()
    begun = sqlite3.connect(path)
    begun.execute("PRAGMA journal_mode = WAL")
    begun.close()
    assert path.stat().st_size > 0
    async with await Store.open(path) as store:
        assert await answered(store, "a") == [False]


async def filled(path: Path, rows: int = 2_000) -> None:
    async with await Store.open(path) as store:
        for first in range(0, rows, 250):
            known = await claim(store, *range(first, first + 250), first=first)
            for n, each in enumerate(known, first):
                await save(store, n, answer(n, each.ticket))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
async def test_a_database_that_was_cut_short_is_a_store_error(path: Path, share: float) -> None:
    await filled(path)
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(StoreError, match=str(path)):
        await read_whole(path)


async def test_a_database_with_damaged_pages_is_a_store_error(path: Path) -> None:
    await filled(path)
    whole = bytearray(path.read_bytes())
    whole[4_096:] = os.urandom(len(whole) - 4_096)
    path.write_bytes(whole)
    with pytest.raises(StoreError, match=str(path)):
        await read_whole(path)


async def test_text_that_is_none_any_more_is_a_store_error(path: Path) -> None:
    await filled(path)
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE answers SET output_text = CAST(x'fffe41' AS TEXT)")
    with pytest.raises(StoreError, match=f"{path} is damaged .*move it away"):
        async with await Store.open_readonly(path) as store:
            await answers(store)


async def read_whole(path: Path) -> None:
    async with await Store.open(path) as store:
        for first in range(0, 2_000, 250):
            await claim(store, *range(first, first + 250), first=first)
        await answers(store)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
async def test_a_folder_that_cannot_be_written_is_a_store_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match="cannot write there"):
        await Store.open(tmp_path / "run" / "results.sqlite")


async def test_a_folder_that_cannot_be_made_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    path = tmp_path / "file" / "results.sqlite"
    with pytest.raises(StoreError, match=r"file: cannot write there .*choose another runs_dir"):
        await Store.open(path)


async def test_a_database_that_is_a_folder_is_a_store_error(path: Path) -> None:
    path.mkdir(parents=True)
    with pytest.raises(StoreError, match=str(path)):
        await Store.open(path)


async def test_names_with_special_characters_are_paths_like_others(tmp_path: Path) -> None:
    path = tmp_path / "50% off? #1 &mode=ro ü" / "results.sqlite"
    async with await Store.open(path) as store:
        await store.put_meta({"a": "b"})
    assert path.is_file()
    async with await Store.open_readonly(path) as store:
        assert await store.meta() == {"a": "b"}


# A full disk


FULL_DISK = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
reported = []
store = await Store.open(path, on_commit=reported.extend)
await store.claim([Claim(position=n, content=b"%016d" % n, metadata=None) for n in range(500)],
                  Terms())
for n in range(100):
    await store.save_all([(n, Outcome(ticket=n + 1, content=b"%016d" % n, settled_at=1.0, output_text="safe"), None)])
await store.flush()
size = max(os.path.getsize(each) for each in (str(path), str(path) + "-wal"))
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20_000, resource.RLIM_INFINITY))

async def work(start):
    for n in range(start, 100_000, 50):
        outcome = Outcome(ticket=n + 1, content=b"%016d" % n, settled_at=1.0, output_text="x" * 1000)
        await store.save_all([(n, outcome, None)])

results = await asyncio.gather(*(work(n) for n in range(100, 150)), return_exceptions=True)
assert all(isinstance(result, StoreError) for result in results), results
print(results[0], flush=True)
try:
    await store.save_all([(0, Outcome(ticket=1, content=b"%016d" % 0, settled_at=1.0), None)])
    print("saved", flush=True)
except StoreError as error:
    print("refused", flush=True)
print(len(reported), flush=True)
if roomy:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
try:
    await store.aclose()
    print("closed", flush=True)
except StoreError as error:
    print("not closed:", error, flush=True)
print(len(reported), flush=True)
"""


async def test_a_full_disk_is_a_store_error_and_what_was_settled_stays(path: Path) -> None:
    async with victim("roomy = False" + FULL_DISK, path) as process:
        out, err = await process.communicate()
    assert (process.returncode, err) == (0, b"")
    error, saved, reported, closed, reported_at_last = out.decode().splitlines()
    assert str(path) in error
    assert saved == "refused"
    assert reported == reported_at_last
    assert closed.startswith("not closed:")
    assert str(path) in closed
    async with await Store.open(path) as store:
        texts = await answers(store)
        assert sum(text == "safe" for _, text in texts) == 100
        assert len(texts) == int(reported)
        known = await store.claim(
            [Claim(position=n, content=b"%016d" % n, metadata=None) for n in range(100)],
            Terms(),
        )
        assert all(each.answered for each in known)


async def test_what_a_full_disk_held_up_is_written_at_the_end_where_there_is_room_again(path: Path) -> None:
    async with victim("roomy = True" + FULL_DISK, path) as process:
        out, err = await process.communicate()
    assert (process.returncode, err) == (0, b"")
    _, saved, reported, closed, reported_at_last = out.decode().splitlines()
    assert (saved, closed) == ("refused", "closed")
    assert int(reported_at_last) > int(reported)
    async with await Store.open_readonly(path) as store:
        assert len(await answers(store)) == int(reported_at_last)


# A killed process


KILLED = """
def report(outcomes):
    os.write(1, b"".join(b"kept %s\\n" % outcome.content for outcome in outcomes))

async with await Store.open(path, on_commit=report) as store:
    os.write(1, b"open\\n")
    for first in range(0, 2_000, 20):
        rows = [Claim(position=n, content=b"%016d" % n, metadata=None) for n in range(first, first + 20)]
        known = await store.claim(rows, Terms())
        os.write(1, b"".join(b"taken %s\\n" % row.content
                             for row, fact in zip(rows, known) if not fact.answered))
        for row, fact in zip(rows, known):
            if not fact.answered:
                outcome = Outcome(
                    ticket=fact.ticket, content=row.content, settled_at=1.0, output_text="kept")
                await store.save_all([(row.position, outcome, None)])
                await asyncio.sleep(0.0005)
"""


async def test_what_was_reported_survives_a_kill_and_what_was_in_flight_is_entered_as_lost_once(path: Path) -> None:
    chance = random.Random(5)
    kept: set[str] = set()
    lost_before: Counter[str] = Counter()
    for _ in range(6):
        taken: set[str] = set()
        async with victim(KILLED, path) as process:
            for _ in range(chance.randrange(1, 150)):
                words = (await line(process)).split()
                if words[0] == "kept":
                    kept.add(words[1])
                elif words[0] == "taken":
                    taken.add(words[1])
            await asyncio.sleep(chance.random() * 0.01)
            process.kill()
            for words in map(str.split, (await process.communicate())[0].decode().split("\n")[:-1]):
                (kept if words[0] == "kept" else taken).add(words[1])
        async with await Store.open(path) as store:
            there = {name for name, _ in await answers(store)}
            lost = Counter(name for name, kind in await attempts(store) if kind == "Lost")
            asked = {row[0].decode() for row in await table(store, "SELECT content FROM rows")}
        assert kept <= there
        new = lost - lost_before
        assert set(new.values()) <= {1}
        assert not set(new) & there
        assert taken <= set(new) | there
        assert set(new) <= asked
        async with await Store.open(path) as store:
            assert Counter(name for name, _ in await attempts(store)) == lost
        lost_before = lost
    assert kept
    assert lost_before


async def test_a_kill_before_anything_was_taken_up_loses_nothing_more(path: Path, tmp_path: Path) -> None:
    async with await Store.open(path) as store:
        await claim(store, "a", "b")
        first = as_killed(path, tmp_path / "first")
    async with await Store.open(first) as store:
        assert await attempts(store) == [("a", "Lost"), ("b", "Lost")]
        second = as_killed(first, tmp_path / "second")
    async with await Store.open(second) as store:
        assert len(await attempts(store)) == 2
        await claim(store, "a")
        third = as_killed(second, tmp_path / "third")
    async with await Store.open(third) as store:
        assert await attempts(store) == [("a", "Lost"), ("b", "Lost"), ("a", "Lost")]


def as_killed(path: Path, folder: Path) -> Path:
    """A copy of a store in use: the files are as they would be if its process were killed now."""
    shutil.copytree(path.parent, folder, ignore=shutil.ignore_patterns(".lock", "*-shm"))
    return folder / path.name


async def test_a_run_that_ended_in_order_lost_nothing(path: Path) -> None:
    async with await Store.open(path) as store:
        await claim(store, "a", "b")
    async with await Store.open(path) as store:
        assert await attempts(store) == []


async def line(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    return (await asyncio.wait_for(process.stdout.readline(), 30)).decode().strip()


@asynccontextmanager
async def victim(script: str, path: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """Another process that does this to the store at ``path``; it is killed if it is left running."""
    body = "\n    ".join(script.strip().splitlines())
    program = (
        "import asyncio, os, sys\n"
        "from pathlib import Path\n"
        "from runner.errors import StoreError\n"
        "from runner.store import Claim, Outcome, Store, Terms\n"
        "path = Path(sys.argv[1])\n"
        f"async def main():\n    {body}\n"
        "asyncio.run(main())\n"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        program,
        str(path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(SOURCES)},
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGKILL)
            await process.communicate()


# Any sequence of sessions


@dataclass(eq=False)
class Slot:
    """The place of an answer."""

    name: str  # what is asked
    succeeded: bool | None = None  # None: it is not there
    session: int = 0  # in which it was answered


@dataclass
class Row:
    slot: Slot
    metadata: int
    scores: str | None = None
    asked: int = -1  # session in which it was taken up


@dataclass
class Model:
    """What a store should hold, as objects."""

    rows: dict[int, Row] = field(default_factory=dict)
    spare: list[Slot] = field(default_factory=list)  # with answers, and without a row
    ledger: Counter[tuple[str, str]] = field(default_factory=Counter)

    def claim(
        self,
        session: int,
        part: list[tuple[str, int]],
        first: int,
        *,
        retry_failed: bool,
        scored: bool,
        dedupe: bool,
    ) -> list[tuple[bool, bool, str | None]]:
        """As `Known`: whether each is answered, whether it shares, and the text that has no scores."""
        held = 0
        while held < len(part) and first + held in self.rows and self.rows[first + held].slot.name == part[held][0]:
            held += 1
        self.truncate(first + held, unless=held == len(part))
        before = {row.slot.name: row.slot for row in self.rows.values()} if dedupe else {}
        asked = {row.slot.name for row in self.rows.values() if row.asked == session}
        known = []
        for position, (name, metadata) in enumerate(part, first):
            row = self.rows.get(position)
            is_new, moved = row is None, False
            if row is None:
                slot = before.get(name) or self.take(name, session, fails=True) or Slot(name)
                before |= {name: slot} if dedupe else {}
                row = self.rows[position] = Row(slot, metadata)
            slot = row.slot
            todo = slot.succeeded is None or (not slot.succeeded and retry_failed)
            shared = todo and dedupe and name in asked
            taken = todo and not shared
            if taken and slot.succeeded is False:
                self.ledger[name, "Timeout"] += 1
                slot.succeeded = None
            if taken and not dedupe and not is_new:
                moved = self.move(slot, session, first + len(part))
                taken = not moved
            if taken or moved or row.metadata != metadata:
                row.metadata, row.scores, row.asked = metadata, None, session if taken else -1
            asked |= {name} if taken else set()
            unscored = scored and slot.succeeded is True and row.scores is None
            known.append((not (taken or shared), shared, f"answer to {name}" if unscored else None))
        return known

    def take(self, name: str, session: int, *, fails: bool) -> Slot | None:
        """The slot of an earlier answer that no row has."""
        for succeeded in (True, False) if fails else (True,):
            for slot in self.spare:
                if (slot.name, slot.succeeded) == (name, succeeded) and slot.session < session:
                    self.spare.remove(slot)
                    return slot
        return None

    def move(self, slot: Slot, session: int, beyond: int) -> bool:
        """Move an earlier answer into a slot, from no row or from the last of the later ones."""
        if found := self.take(slot.name, session, fails=False):
            slot.succeeded, slot.session = True, found.session
            return True
        for position in sorted(self.rows, reverse=True):
            other = self.rows[position].slot
            if position >= beyond and other.name == slot.name and other.succeeded and other.session < session:
                slot.succeeded, slot.session, other.succeeded = True, other.session, None
                return True
        return False

    def save(self, position: int, session: int, *, success: bool, scores: str | None) -> None:
        row = self.rows[position]
        row.slot.succeeded, row.slot.session = success, session
        row.scores = scores or row.scores

    def crash(self, session: int) -> None:
        for row in self.rows.values():
            if row.asked == session and row.slot.succeeded is None:
                self.ledger[row.slot.name, "Lost"] += 1

    def truncate(self, length: int, *, unless: bool = False) -> None:
        gone = [] if unless else [self.rows.pop(position) for position in sorted(self.rows) if position >= length]
        held = [row.slot for row in self.rows.values()]
        for row in gone:
            if row.slot.succeeded is not None and row.slot not in [*held, *self.spare]:
                self.spare.append(row.slot)


@dataclass(frozen=True)
class Session:
    """One run of the program over a dataset as it is then."""

    dataset: list[tuple[str, int]]  # what is asked, metadata
    chunk: int
    stops_after: int  # rows
    settles: list[bool | None]  # by position, cyclic: answered, failed, or not at all
    retry_failed: bool
    scored: bool
    dedupe: bool
    forgets_scores: bool
    crashes: bool


SESSIONS = st.lists(
    st.builds(
        Session,
        dataset=st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from([0, 0, 1])), max_size=9),
        chunk=st.integers(1, 5),
        stops_after=st.sampled_from([3, 99, 99]),
        settles=st.lists(st.sampled_from([True, True, False, None]), min_size=1, max_size=5),
        retry_failed=st.booleans(),
        scored=st.booleans(),
        dedupe=st.sampled_from([False, False, True]),
        forgets_scores=st.sampled_from([False, False, True]),
        crashes=st.booleans(),
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=60, deadline=None)
@given(sessions=SESSIONS)
def test_any_sequence_of_sessions_leaves_what_a_dict_would(sessions: list[Session]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(play(sessions, Path(folder)))


async def play(sessions: list[Session], folder: Path) -> None:
    model = Model()
    path = folder / "0" / "results.sqlite"
    for number, session in enumerate(sessions):
        store = await Store.open(path)
        assert Counter(await attempts(store)) == model.ledger
        if number and session.dedupe != sessions[number - 1].dedupe:
            await store.truncate(0)
            model.truncate(0)
        if session.forgets_scores:
            await store.forget_scores()
            for row in model.rows.values():
                row.scores = None
        await run_session(store, model, session, number)
        await compare(store, model)
        if session.crashes:
            model.crash(number)
            path = as_killed(path, folder / str(number + 1))
        await store.aclose()


async def run_session(store: Store, model: Model, session: Session, number: int) -> None:
    options: dict[str, Any] = {
        "retry_failed": session.retry_failed,
        "scored": session.scored,
        "dedupe": session.dedupe,
    }
    for first in range(0, min(len(session.dataset), session.stops_after), session.chunk):
        part = session.dataset[first : first + session.chunk]
        await store.flush()  # so that it is certain what a row that shares an answer finds
        known = await store.claim(
            [
                Claim(position=first + n, content=content(name), metadata=str(metadata))
                for n, (name, metadata) in enumerate(part)
            ],
            Terms(**options),
        )
        expected = model.claim(number, part, first, **options)
        assert [(each.answered, each.shared, each.unscored_text) for each in known] == expected
        for position, fact in enumerate(known, start=first):
            if fact.unscored_text is not None:
                await store.put_scores([(position, '{"late":1}')])
                model.rows[position].scores = '{"late":1}'
            success = session.settles[position % len(session.settles)]
            if fact.answered or fact.shared or success is None:
                continue
            scores = '{"exact":1}' if success and session.scored else None
            name, _ = part[position - first]
            outcome = answer(name, fact.ticket) if success else failure(name, fact.ticket)
            await save(store, position, outcome, scores)
            model.save(position, number, success=success, scores=scores)
    if len(session.dataset) <= session.stops_after:
        await store.truncate(len(session.dataset))
        model.truncate(len(session.dataset))
    await store.flush()


async def compare(store: Store, model: Model) -> None:
    rows = await table(
        store,
        """
        SELECT rows.position, rows.content, metadata, scores, ticket, answers.content, error_type IS NULL
        FROM rows
        LEFT JOIN answers USING (ticket)
        ORDER BY position
        """,
    )
    assert [(position, name, metadata, scores) for position, name, metadata, scores, *_ in rows] == [
        (position, content(row.slot.name), str(row.metadata), row.scores)
        for position, row in sorted(model.rows.items())
    ]
    slots = [model.rows[position].slot for position in sorted(model.rows)]
    assert [(name, bool(succeeded)) if name else None for *_, name, succeeded in rows] == [
        None if slot.succeeded is None else (content(slot.name), slot.succeeded) for slot in slots
    ]
    tickets = [ticket for *_, ticket, _, _ in rows]
    assert [tickets.index(ticket) for ticket in tickets] == [slots.index(slot) for slot in slots]
    spare = await table(
        store, "SELECT content, error_type IS NULL FROM answers WHERE ticket NOT IN (SELECT ticket FROM rows)"
    )
    assert Counter(spare) == Counter((content(slot.name), slot.succeeded) for slot in model.spare)
    assert Counter(await attempts(store)) == model.ledger
