from __future__ import annotations

import random
from itertools import product

import pytest

from runner.intervals import (
    Interval,
    clustered_mean_interval,
    effective_size,
    mean_interval,
    mean_of,
    paired_shares_interval,
    quantile_interval,
    samples_for,
    share_interval,
    student_t,
)


@pytest.mark.parametrize(("q", "needed"), [(0.5, 6), (0.95, 72), (0.99, 368)])
def test_a_percentile_needs_its_samples(q: float, needed: int) -> None:
    assert samples_for(q) == needed
    assert quantile_interval(range(needed - 1), q) is None
    assert quantile_interval(range(needed), q) is not None


@pytest.mark.parametrize("q", [0.5, 0.95, 0.99])
def test_a_percentile_lies_in_its_interval_as_often_as_is_said(q: float) -> None:
    draw = random.Random(1)
    samples = [sorted(draw.random() for _ in range(500)) for _ in range(600)]
    covered = sum(q in (quantile_interval(sample, q) or Interval(low=2, high=2)) for sample in samples)

    assert 0.94 <= covered / len(samples) <= 0.99


def test_a_percentile_of_a_million_values_has_a_narrow_interval() -> None:
    interval = quantile_interval(range(1_000_000), 0.5)

    assert interval is not None
    assert interval.low == pytest.approx(500_000 - 980, abs=2)
    assert interval.high == pytest.approx(500_000 + 980, abs=2)


@pytest.mark.parametrize(("freedom", "value"), [(3, 3.1824), (9, 2.2622), (29, 2.0452), (1000, 1.9623)])
def test_student_s_t_is_that_of_the_tables(freedom: int, value: float) -> None:
    assert student_t(freedom) == pytest.approx(value, rel=0.002)


def test_a_mean_of_three_has_no_interval() -> None:
    assert mean_interval(1.0, 1.0, 3) is None
    assert mean_of([2.0]) == (2.0, None)
    assert mean_of([2.0, 2.0, 2.0, 2.0]) == (2.0, Interval(low=2.0, high=2.0))


def test_a_share_of_none_is_not_certain_to_be_zero() -> None:
    assert share_interval(0, 0) == Interval(low=0.0, high=1.0)
    assert share_interval(0, 50).low == 0.0
    assert share_interval(0, 50).high == pytest.approx(0.0713, abs=0.0005)


def test_paired_shares_agree_with_newcombe_s_example() -> None:
    """Method 10 on the table 36, 12, 2, 0 in https://pubmed.ncbi.nlm.nih.gov/9839354/: 0.0569 to 0.3404."""
    interval = paired_shares_interval(both=36, first=2, second=12, neither=0)

    assert interval.low == pytest.approx(0.0569, abs=5e-5)
    assert interval.high == pytest.approx(0.3404, abs=5e-5)


@pytest.mark.parametrize(("n", "shares"), list(product([50, 400], [(0.7, 0.75), (0.97, 0.99), (0.5, 0.5)])))
def test_a_difference_of_paired_shares_lies_in_its_interval_as_often_as_is_said(
    n: int, shares: tuple[float, float]
) -> None:
    draw = random.Random(7)
    covered = 0
    for _ in range(600):
        outcomes = [(draw.random() < shares[0], draw.random() < shares[1]) for _ in range(n)]
        interval = paired_shares_interval(
            both=outcomes.count((True, True)),
            first=outcomes.count((True, False)),
            second=outcomes.count((False, True)),
            neither=outcomes.count((False, False)),
        )
        covered += shares[1] - shares[0] in interval

    assert covered / 600 >= 0.925


@pytest.mark.parametrize("size", [1, 50])
def test_the_mean_of_clusters_is_as_certain_as_that_of_one_value_of_each(size: int) -> None:
    values = [0.1, 0.5, 0.6, 0.9, 0.2]
    mean, alone = mean_of(values)
    squares = sum((each - mean) ** 2 for each in values)
    n = size * len(values)
    together = clustered_mean_interval(mean, size * squares, n, effective_size(n, n * size))

    assert alone is not None
    assert together is not None
    assert [together.low, together.high] == pytest.approx([alone.low, alone.high])
