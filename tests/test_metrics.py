from __future__ import annotations

import random
from math import inf
from statistics import quantiles

import pytest

from runner.metrics import RECENT_ANSWERS, DeploymentSnapshot, Meter, percentile
from runner.types import TokenUsage


class Clock:
    """Time that passes when the test says so. Starts late, as a monotonic clock does."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def meter(clock: Clock) -> Meter:
    return Meter(clock=clock)


def answer(
    meter: Meter, *, tokens: int = 10, cost_usd: float | None = 0.0, latency_s: float = 1.0, wait_s: float = 0.0
) -> None:
    usage = TokenUsage(prompt_tokens=tokens - 4, completion_tokens=4, total_tokens=tokens)
    meter.answered(usage, cost_usd=cost_usd, latency_s=latency_s, queue_wait_s=wait_s)


def test_a_percentile_lies_between_its_neighbours_in_proportion() -> None:
    assert percentile([1.0, 2.0, 3.0, 4.0], 50) == 2.5
    assert percentile([10.0, 20.0], 95) == pytest.approx(19.5)
    assert percentile([15.0, 20.0, 35.0, 40.0, 50.0], 40) == pytest.approx(29.0)


def test_the_ends_are_the_smallest_and_the_largest_value() -> None:
    assert percentile([3.0, 5.0, 9.0], 0) == 3.0
    assert percentile([3.0, 5.0, 9.0], 100) == 9.0
    assert percentile([7.0], 99) == 7.0


def test_percentiles_agree_with_the_inclusive_method_of_the_standard_library() -> None:
    values = sorted(random.Random(1).expovariate(1) for _ in range(501))
    expected = quantiles(values, n=100, method="inclusive")
    assert [percentile(values, q) for q in range(1, 100)] == pytest.approx(expected)


def test_nothing_has_no_percentile() -> None:
    assert percentile([], 50) is None


def test_infinite_latencies_yield_infinity_and_never_nan() -> None:
    assert percentile([1.0, 2.0, inf], 50) == 2.0
    assert percentile([1.0, 2.0, inf], 75) == inf
    assert percentile([1.0, inf, inf], 75) == inf


@pytest.mark.parametrize("q", [-1, 100.1])
def test_a_percentile_outside_0_to_100_is_refused(q: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 100"):
        percentile([1.0], q)


def test_a_new_meter_shows_zeros_and_unknowns(meter: Meter) -> None:
    snapshot = meter.snapshot(total=10)
    assert (snapshot.done, snapshot.failed, snapshot.reused, snapshot.retries) == (0, 0, 0, 0)
    assert (snapshot.requests_per_s, snapshot.tokens_per_s, snapshot.cost_usd) == (0.0, 0.0, 0.0)
    assert snapshot.latency_p50_s is None
    assert snapshot.eta_s is None
    assert snapshot.errors == snapshot.scores == {}


def test_answered_failed_and_reused_rows_are_done(meter: Meter) -> None:
    answer(meter)
    meter.failed("Timeout")
    meter.failed("Timeout")
    meter.failed("RowError")
    meter.retried()
    meter.retried(5)
    meter.reused()
    meter.reused(5)
    snapshot = meter.snapshot(total=20, in_flight=3, window=8)
    assert (snapshot.done, snapshot.failed, snapshot.reused) == (10, 3, 6)
    assert snapshot.retries == 6
    assert snapshot.errors == {"Timeout": 2, "RowError": 1}
    assert (snapshot.total, snapshot.in_flight, snapshot.window) == (20, 3, 8)


def test_a_snapshot_does_not_change_when_the_run_goes_on(meter: Meter) -> None:
    meter.failed("Timeout")
    before = meter.snapshot()
    meter.failed("Timeout")
    assert before.errors == {"Timeout": 1}
    assert before.done == 1


def test_tokens_are_added_up_by_kind(meter: Meter) -> None:
    usage = TokenUsage(prompt_tokens=100, completion_tokens=20, total_tokens=120, cached_tokens=64, reasoning_tokens=12)
    for reported in (usage, usage, None, TokenUsage(prompt_tokens=1, completion_tokens=2, total_tokens=3)):
        meter.answered(reported, cost_usd=None, latency_s=1, queue_wait_s=0)
    snapshot = meter.snapshot()
    assert (snapshot.prompt_tokens, snapshot.completion_tokens) == (201, 42)
    assert (snapshot.cached_tokens, snapshot.reasoning_tokens) == (128, 24)


def test_answers_without_a_price_are_counted_beside_the_cost(meter: Meter) -> None:
    answer(meter, cost_usd=0.25)
    answer(meter, cost_usd=None)
    answer(meter, cost_usd=0.5)
    snapshot = meter.snapshot()
    assert snapshot.cost_usd == 0.75
    assert snapshot.cost_unknown == 1


def test_the_rate_of_a_young_run_is_over_its_whole_life(meter: Meter, clock: Clock) -> None:
    clock.now += 4
    for _ in range(20):
        answer(meter, tokens=100)
    snapshot = meter.snapshot()
    assert snapshot.elapsed_s == 4
    assert snapshot.requests_per_s == 5
    assert snapshot.tokens_per_s == 500


def test_the_rate_forgets_what_is_longer_ago_than_the_window(meter: Meter, clock: Clock) -> None:
    for _ in range(1_000):
        answer(meter)
    for _ in range(600):
        clock.now += 0.1
        answer(meter)
    assert meter.snapshot().requests_per_s == pytest.approx(10, rel=0.02)
    clock.now += 30
    assert meter.snapshot().requests_per_s == 0


def test_a_steady_rate_looks_steady_whenever_it_is_read(meter: Meter, clock: Clock) -> None:
    readings = []
    for _ in range(3_000):
        clock.now += 0.01
        answer(meter)
        readings.append(meter.snapshot().requests_per_s)
    assert min(readings[100:]) == pytest.approx(100, rel=0.02)
    assert max(readings[100:]) == pytest.approx(100, rel=0.02)


def test_reused_rows_do_not_flatter_the_rate(meter: Meter, clock: Clock) -> None:
    meter.reused(1_000)
    clock.now += 1
    answer(meter)
    assert meter.snapshot().requests_per_s == 1


def test_rows_that_share_an_answer_count_for_the_rate_of_rows_and_for_the_time_that_is_left(
    meter: Meter, clock: Clock
) -> None:
    clock.now += 2
    for _ in range(4):
        answer(meter)
        meter.deduplicated(9)
    snapshot = meter.snapshot(total=140)
    assert (snapshot.requests_per_s, snapshot.rows_per_s, snapshot.eta_s) == (2, 20, 5)


def test_the_snapshot_is_of_the_moment_that_is_given(meter: Meter, clock: Clock) -> None:
    answer(meter)
    snapshot = meter.snapshot(clock.now + 2)
    assert snapshot.elapsed_s == 2
    assert snapshot.requests_per_s == 0.5


def test_eta_follows_the_recent_rate(meter: Meter, clock: Clock) -> None:
    clock.now += 2
    for _ in range(20):
        answer(meter)
    assert meter.snapshot(total=120).eta_s == pytest.approx(10)


@pytest.mark.parametrize(
    ("limits", "eta_s"),
    [
        pytest.param({"most_requests_per_s": 5}, 20, id="requests"),
        pytest.param({"most_tokens_per_s": 40}, 25, id="tokens"),
        pytest.param({"most_requests_per_s": 5, "most_tokens_per_s": 40}, 25, id="the stricter one"),
        pytest.param({"most_requests_per_s": 11, "most_tokens_per_s": 110}, 10, id="limits that are not reached"),
    ],
)
def test_eta_does_not_go_by_a_burst_that_the_limits_end(clock: Clock, limits: dict[str, float], eta_s: float) -> None:
    meter = Meter(clock=clock, **limits)
    clock.now += 2
    for _ in range(20):
        answer(meter, tokens=10)
    snapshot = meter.snapshot(total=120)
    assert snapshot.rows_per_s == 10
    assert snapshot.eta_s == pytest.approx(eta_s)


def test_eta_under_a_limit_counts_the_rows_that_share_an_answer(clock: Clock) -> None:
    meter = Meter(clock=clock, most_requests_per_s=1)
    clock.now += 2
    for _ in range(4):
        answer(meter)
        meter.deduplicated(9)
    assert meter.snapshot(total=140).eta_s == pytest.approx(10)


def test_eta_of_requests_slower_than_the_window_follows_the_whole_run(meter: Meter, clock: Clock) -> None:
    clock.now += 20
    answer(meter)
    clock.now += 12
    assert meter.snapshot(total=3).eta_s == pytest.approx(64)


def test_eta_is_unknown_without_a_total_and_zero_at_the_end(meter: Meter, clock: Clock) -> None:
    clock.now += 1
    answer(meter)
    assert meter.snapshot().eta_s is None
    assert meter.snapshot(total=1).eta_s == 0


def test_nothing_is_left_where_everything_was_reused(meter: Meter, clock: Clock) -> None:
    clock.now += 1
    meter.reused(5)
    assert meter.snapshot(total=5).eta_s == 0


def test_failures_that_are_left_alone_are_failed_and_not_reused(meter: Meter, clock: Clock) -> None:
    clock.now += 1
    answer(meter)
    meter.stands_at(10, reused=6, left_alone=2)
    snapshot = meter.snapshot(total=10)
    assert (snapshot.done, snapshot.failed, snapshot.reused, snapshot.deduplicated, snapshot.asked) == (10, 2, 6, 1, 1)


def test_latencies_are_those_of_the_last_answers(meter: Meter) -> None:
    for _ in range(500):
        answer(meter, latency_s=1_000, wait_s=1_000)
    for i in range(RECENT_ANSWERS):
        answer(meter, latency_s=i, wait_s=i / 10)
    snapshot = meter.snapshot()
    last = RECENT_ANSWERS - 1
    assert snapshot.latency_p50_s == pytest.approx(0.50 * last)
    assert snapshot.latency_p95_s == pytest.approx(0.95 * last)
    assert snapshot.latency_p99_s == pytest.approx(0.99 * last)
    assert snapshot.queue_wait_p95_s == pytest.approx(0.095 * last)


def test_scores_are_running_means_of_what_was_scored(meter: Meter) -> None:
    meter.scored({"accuracy": 1.0, "length": 3.0})
    meter.scored({"accuracy": 0.0, "length": None})
    meter.scored({"never": None})
    assert meter.snapshot().scores == {"accuracy": 0.5, "length": 3.0}


def test_the_series_holds_numbers_under_ts_and_leaves_out_what_is_unknown(meter: Meter, clock: Clock) -> None:
    clock.now += 2
    assert "ts/latency_p50_s" not in meter.snapshot().as_series()
    answer(meter, cost_usd=0.5, latency_s=0.25)
    meter.failed("Timeout")
    meter.retried(3)
    meter.scored({"exact": 1.0})
    series = meter.snapshot(total=9, in_flight=4, window=8).as_series()
    expected = {
        "ts/elapsed_s": 2.0,
        "ts/done": 2,
        "ts/failed": 1,
        "ts/requests_per_s": 1.0,
        "ts/tokens_per_s": 5.0,
        "ts/cost_usd": 0.5,
        "ts/in_flight": 4,
        "ts/window": 8,
        "ts/latency_p50_s": 0.25,
        "ts/latency_p95_s": 0.25,
        "ts/latency_p99_s": 0.25,
        "ts/queue_wait_p95_s": 0.0,
        "ts/retries": 3,
        "ts/score/exact": 1.0,
    }
    assert expected.items() <= series.items()
    assert all(type(value) in (int, float) for value in series.values())


def test_deployments_have_a_series_each(meter: Meter) -> None:
    east = DeploymentSnapshot(
        state="out",
        answered=30,
        failed=2,
        share=0.75,
        in_flight=1,
        requests_per_s=1.5,
        latency_p50_s=0.1,
        latency_p95_s=None,
        errors={"Timeout": 2},
    )
    series = meter.snapshot(deployments={"east": east}).as_series()
    assert {name: value for name, value in series.items() if "/east/" in name} == {
        "ts/deployment/east/up": 0.0,
        "ts/deployment/east/share": 0.75,
        "ts/deployment/east/in_flight": 1,
        "ts/deployment/east/requests_per_s": 1.5,
        "ts/deployment/east/latency_p50_s": 0.1,
        "ts/deployment/east/failed": 2,
    }


def test_at_the_end_rows_that_were_neither_asked_nor_there_are_shared(meter: Meter) -> None:
    answer(meter)
    meter.reused(3)
    meter.deduplicated(4)
    meter.stands_at(11, reused=4)
    snapshot = meter.snapshot()

    assert (snapshot.done, snapshot.reused, snapshot.deduplicated, snapshot.asked) == (11, 4, 6, 1)
