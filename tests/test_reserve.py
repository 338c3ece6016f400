from __future__ import annotations

from pathlib import Path

from runner.reserve import RESERVE_BYTES, Reserve


def test_room_is_held_back_until_it_is_given_up_once(tmp_path: Path) -> None:
    path = tmp_path / ".reserve"
    reserve = Reserve(path)
    assert path.stat().st_size == RESERVE_BYTES
    assert path.stat().st_blocks * 512 >= RESERVE_BYTES
    assert reserve.give_up()
    assert not path.exists()
    assert not reserve.give_up()


def test_what_is_not_needed_is_released(tmp_path: Path) -> None:
    reserve = Reserve(tmp_path / ".reserve")
    reserve.release()
    assert list(tmp_path.iterdir()) == []
    assert not reserve.give_up()


def test_the_reserve_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / ".reserve"
    Reserve(path)
    assert Reserve(path).give_up()
    assert not path.exists()


def test_where_nothing_can_be_held_back_there_is_no_reserve(tmp_path: Path) -> None:
    assert not Reserve(tmp_path / "no such folder" / ".reserve").give_up()
