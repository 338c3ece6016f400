from __future__ import annotations

import pytest

from runner.figures import dollars_apart, small_dollars


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([0.00016, 0.00024], ["$0.000160", "$0.000240"]),
        ([0.00011, 0.00024], ["$0.0001", "$0.0002"]),
        ([12.3, 45.6], ["$12.30", "$45.60"]),
        ([0.5, 0.01230, 0.01231], ["$0.5000", "$0.0123", "$0.0123"]),
        ([3e-7, 0.0, 9e-7], ["$0.000000300", "$0", "$0.000000900"]),
        ([0.0, 0.0], ["$0", "$0"]),
        ([], []),
    ],
)
def test_costs_side_by_side_look_different_where_they_differ_visibly(values: list[float], shown: list[str]) -> None:
    assert dollars_apart(values) == shown


@pytest.mark.parametrize(
    ("value", "shown"), [(0.0, "$0"), (2.6254e-7, "$2.63e-07"), (0.01234, "$0.0123"), (3, "$3.00")]
)
def test_the_cost_of_one_request_has_three_digits(value: float, shown: str) -> None:
    assert small_dollars(value) == shown
