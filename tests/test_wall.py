from __future__ import annotations

import math

from runner.wall import Wall


def refused(wall: Wall, *refusals: tuple[float, int]) -> list[bool]:
    """Whether each refusal, given as (when, how many in flight), is taken for a wall."""
    return [wall.stands(in_flight, now) for now, in_flight in refusals]


def test_where_nothing_was_refused_there_is_no_wall() -> None:
    wall = Wall()
    assert not wall.is_known
    assert wall.top(0.0) == math.inf
    assert not wall.holds(1_000)


def test_a_wall_is_below_the_number_that_was_refused() -> None:
    wall = Wall()
    assert refused(wall, (0.0, 51)) == [True]
    assert wall.top(1.0) == 50
    assert wall.holds(50)
    assert not wall.holds(40)


def test_a_wall_is_held_for_longer_each_time_it_is_still_there() -> None:
    wall = Wall()
    for held_s in (5.0, 15.0, 45.0, 120.0, 120.0):
        assert refused(wall, (0.0, 51)) == [True]
        assert wall.top(held_s - 0.01) == 50
        assert wall.top(held_s + 0.01) == math.inf
        assert wall.is_known


def test_a_wall_somewhere_else_is_a_new_one() -> None:
    wall = Wall()
    assert refused(wall, (0.0, 51), (6.0, 51), (30.0, 21)) == [True, True, True]
    assert wall.top(34.9) == 20
    assert wall.top(35.1) == math.inf


def test_a_refusal_just_below_a_wall_moves_it_and_one_far_below_refutes_it() -> None:
    wall = Wall()
    assert refused(wall, (0.0, 51), (1.0, 50)) == [True, True]
    assert wall.top(2.0) == 49
    assert refused(wall, (2.0, 30)) == [False]
    assert wall.top(2.0) == math.inf


def test_a_small_wall_is_refuted_by_any_refusal_within_it() -> None:
    assert refused(Wall(), (0.0, 5), (1.0, 4)) == [True, False]
    assert refused(Wall(), (0.0, 2), (1.0, 1)) == [True, False]


def test_after_a_refutation_refusals_are_no_walls_for_a_while() -> None:
    wall = Wall()
    assert refused(wall, (0.0, 51), (1.0, 30), (2.0, 51), (60.0, 51), (62.0, 51)) == [True, False, False, False, True]


def test_a_refutation_can_be_reconsidered() -> None:
    wall = Wall()
    refused(wall, (0.0, 51), (1.0, 30))
    wall.reconsider()
    assert refused(wall, (2.0, 31)) == [True]
