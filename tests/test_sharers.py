from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from runner.metrics import Meter
from runner.sharers import Sharers


def done(meter: Meter) -> int:
    return meter.snapshot().deduplicated


def test_a_row_that_shares_an_answer_is_done_once_that_is_there() -> None:
    meter = Meter()
    sharers = Sharers(meter)
    sharers.expect([1, 2])
    sharers.join([1, 1, 2])
    assert (sharers.count, done(meter)) == (3, 0)

    sharers.settle([1])
    assert done(meter) == 2

    sharers.join([1])
    assert (sharers.count, done(meter)) == (4, 3)


@given(st.lists(st.tuples(st.sampled_from(["expect", "join", "settle"]), st.integers(0, 4))))
def test_once_all_answers_are_there_every_row_is_done(events: list[tuple[str, int]]) -> None:
    meter = Meter()
    sharers = Sharers(meter)
    expected: set[int] = set()
    for event, ticket in events:
        if event == "expect":
            if ticket not in expected:
                sharers.expect([ticket])
            expected.add(ticket)
        elif event == "join":
            sharers.join([ticket])
        else:
            sharers.settle([ticket])
    sharers.settle(range(5))

    assert done(meter) == sharers.count
