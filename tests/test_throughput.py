from __future__ import annotations

import random

import pytest

from runner.throughput import Round, Sample


def round_of(*answers: tuple[float, float, float], in_flight: int = 10) -> Round:
    """A round of answers, each given as (when it came, how long it took, its work)."""
    round_ = Round()
    for now, seconds, work in answers:
        round_.done += work
        round_.add(in_flight=in_flight, work=work, seconds=seconds, now=now)
    return round_


def steady(rate: float, *, in_flight: int = 10, answers: int = 40) -> Round:
    """A round of a server that does ``rate`` of work a second, in answers of one each."""
    gap = 1 / rate
    return round_of(*((number * gap, in_flight * gap, 1.0) for number in range(answers)), in_flight=in_flight)


def sample(*rates: float, infer: bool = True) -> Sample:
    made = Sample(infer=infer)
    for rate in rates:
        made.add(steady(rate))
    return made


def test_a_steady_server_is_measured_alike_by_counting_and_by_littles_law() -> None:
    round_ = steady(20.0)
    assert round_.is_whole
    assert round_.counted == pytest.approx(20.0)
    assert round_.inferred == pytest.approx(20.0)
    assert round_.in_flight == 10


def test_a_round_is_whole_when_it_lasted_as_long_as_its_requests() -> None:
    quick = round_of((0.0, 2.0, 1.0), (0.9, 2.0, 1.0))
    assert not quick.is_whole
    quick.add(in_flight=10, work=1.0, seconds=2.0, now=2.0)
    assert quick.is_whole


def test_a_wave_of_answers_counts_once() -> None:
    """Ten that come together, every second: ten a second, wherever the round begins."""
    waves = [(float(second), 1.0, 1.0) for second in range(4) for _ in range(10)]
    assert round_of(*waves[:31]).counted == pytest.approx(10.0, rel=0.05)


def test_answers_to_requests_of_another_window_are_counted_as_work_alone() -> None:
    round_ = round_of((0.0, 1.0, 1.0))
    round_.done += 5
    round_.add(in_flight=10, work=0.0, seconds=1.0, now=2.0)
    assert round_.counted == 2.5
    assert round_.answers == 2


def test_before_a_round_is_whole_littles_law_alone_speaks() -> None:
    assert round_of((0.0, 0.5, 3.0), in_flight=4).rate == 24.0


def test_a_gain_is_relative() -> None:
    assert steady(30.0).gain(steady(20.0)) == pytest.approx(0.5)


def test_equal_samples_do_not_differ_by_more_than_the_error() -> None:
    gain, error = sample(20, 21, 19, 20).against(sample(20, 19, 21, 20))
    assert abs(gain) < error < 0.05


def test_the_error_is_small_where_rounds_agree_and_large_where_they_do_not() -> None:
    _, quiet = sample(30, 30, 30).against(sample(20, 20, 20))
    _, loud = sample(30, 45, 15).against(sample(20, 10, 30))
    assert quiet == 0.01
    assert loud > 0.3


def test_a_round_is_odd_where_it_leaves_the_range_of_chance() -> None:
    seen = sample(20, 21, 19, 20)
    assert not seen.is_odd(steady(22.0))
    assert seen.is_odd(steady(26.0))
    assert seen.is_odd(steady(10.0))
    assert seen.change(steady(10.0)) == pytest.approx(-0.5)
    assert not sample(20, 30, 10, 20).is_odd(steady(26.0))


def test_only_recent_rounds_are_remembered() -> None:
    seen = sample(*[10] * 20, *[20] * 12)
    assert len(seen) == 12
    assert seen.change(steady(20.0)) == pytest.approx(0.0)


def late(*, counted: float, inferred: float, rounds: int = 4, noise: float = 0.0) -> Sample:
    """A sample whose two measures disagree."""
    draw = random.Random(1)
    made = Sample(infer=True)
    for _ in range(rounds):
        round_ = steady(inferred)
        seconds = round_.ended - round_.started
        round_.done = counted * (1 + noise * draw.uniform(-1, 1)) * seconds
        made.add(round_)
    return made


def test_the_quiet_measure_is_trusted_unless_the_other_is_clearly_higher() -> None:
    base = sample(20, 20, 20, 20)
    noisy, _ = late(counted=21.0, inferred=20.0, noise=0.5).against(base)
    higher, _ = late(counted=40.0, inferred=20.0).against(base)
    assert noisy == pytest.approx(0.0)
    assert higher == pytest.approx(1.0)


def test_where_work_does_not_explain_time_only_counting_is_trusted() -> None:
    base = sample(20, 20, 20, infer=False)
    trusting, _ = sample(20, 20, 20).against(base)
    assert trusting == pytest.approx(0.0)
    made = Sample(infer=False)
    round_ = steady(60.0)
    round_.done = 20.0 * (round_.ended - round_.started)
    made.add(round_)
    gain, _ = made.against(base)
    assert gain == pytest.approx(0.0)
