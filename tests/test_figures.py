from __future__ import annotations

import pytest

from runner.figures import dollars_apart, plain, small_dollars


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
    ("value", "shown"),
    [(0.0, "$0"), (2.6254e-7, "$0.000000263"), (1.7e-21, "$1.7e-21"), (0.01234, "$0.0123"), (3, "$3.00")],
)
def test_the_cost_of_one_request_has_three_digits(value: float, shown: str) -> None:
    assert small_dollars(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"), [(2e-05, "0.00002"), (2e6, "2000000"), (2.0, "2"), (2.5, "2.5"), (100, "100"), (0.1, "0.1")]
)
def test_a_number_of_a_configuration_is_written_without_exponent(value: float, shown: str) -> None:
    assert plain(value) == shown
