"""One bucket, whatever is done to it."""

from __future__ import annotations

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.bucket import Bucket, Limit
from runner.quota import Reading

WINDOW_S = 60.0
LIMIT = 100.0

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("wait"), st.sampled_from([0.01, 0.3, 2.0, 29.0, 61.0])),
        st.tuples(st.just("take"), st.sampled_from([0.0, 1.0, 7.5, 60.0, 100.0])),
        st.tuples(st.just("save up"), st.sampled_from([20.0, 100.0])),
        st.tuples(st.just("settle"), st.sampled_from([-500.0, -3.0, 0.0, 0.5, 1.0])),  # share that comes back
        st.tuples(st.just("refund"), st.just(1.0)),
        st.tuples(st.just("headers"), st.sampled_from([0.0, 3.0, 50.0, 1e9])),
    ),
    max_size=80,
)


@given(steps=STEPS, burst=st.sampled_from([1.0, 20.0, 100.0]), stored=st.booleans())
def test_no_window_holds_more_than_the_limit_and_no_level_more_than_the_bucket(
    steps: list[tuple[str, float]], burst: float, stored: bool
) -> None:
    limit = Limit(name="tpm", amount=LIMIT, window_s=WINDOW_S, burst=burst)
    bucket = Bucket(limit)
    now = 1_000.0
    taken: list[list[float]] = []  # when, how much of it counts, what was in the window

    def take(cost: float) -> None:
        bucket.take(cost, now)
        taken.append([now, cost, bucket.charged])
        assert sum(amount for at, amount, _ in taken if now - at < WINDOW_S) <= LIMIT + 1e-6

    for step, value in steps:
        if step == "wait":
            now += value
        elif step == "take" and bucket.wait_s(value, now) <= 0:
            take(value)
        elif step == "save up":
            while (wait_s := bucket.wait_s(value, now)) > 0:
                now += max(wait_s, 0.01)
            take(value)
        elif step in ("settle", "refund") and taken:
            at, cost, _ = taken.pop()
            bucket.give_back(cost, cost * value, at, now, sent=step == "settle")
            if value < 0:  # a debt: more than the limit may be in the window, and nothing is granted meanwhile
                return
            taken.append([at, cost * (1 - value), bucket.charged])
        elif step == "headers" and taken:
            at, _, charged = taken[-1]
            bucket.sync(Reading(kind="tokens", remaining=value, limit=None, reset_s=20.0), charged, at, now)
        if stored:
            state = bucket.dump()
            bucket = Bucket(limit)
            bucket.load(orjson.loads(orjson.dumps(state)))
        assert bucket.level <= LIMIT + 1e-6
        assert 0 <= bucket.foreign(now) <= LIMIT


def test_a_bucket_that_is_exhausted_is_empty_for_a_whole_window() -> None:
    bucket = Bucket(Limit(name="rpm", amount=10, window_s=WINDOW_S, burst=10))
    bucket.exhaust(5.0)
    assert bucket.wait_s(1, 5.0) == pytest.approx(WINDOW_S, rel=0.02)
    assert bucket.wait_s(1, 70.0) <= 0


def test_what_is_leased_counts_from_when_it_may_be_used_last() -> None:
    bucket = Bucket(Limit(name="rpm", amount=10, window_s=WINDOW_S, burst=10), lease_s=5.0)
    bucket.take(10, 0.0)
    assert bucket.wait_s(1, 64.9) > 0
    assert bucket.wait_s(1, 66.0) == 0
