from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from runner.sweep import Cell, Sweep, sweep_id


def test_cells_come_back_in_their_order_with_their_last_note(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path / "sweep-1")
    cells = [Cell(number=number, name=f"model=m{number}", folder=f"/runs/{number}") for number in range(12)]
    for cell in reversed(cells):
        sweep.note(cell)
    ended = replace(cells[3], exit_code=3, summary={"rows": 5})
    sweep.note(ended)

    assert Sweep(tmp_path / "sweep-1").cells() == [*cells[:3], ended, *cells[4:]]


def test_a_cell_that_began_and_did_not_end_has_no_exit_code(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    sweep.note(Cell(number=0, name="", folder=""))

    assert [cell.exit_code for cell in sweep.cells()] == [None]


def test_a_sweep_begun_anew_knows_where_its_cells_are_and_not_how_they_ended(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    first, second = (Cell(number=n, name="", folder=f"runs/{n}", exit_code=0, summary={"rows": 1}) for n in range(2))
    sweep.note(first)
    sweep.note(second)
    sweep.begin()
    sweep.note(first)

    again, waiting = sweep.cells()
    assert again == first
    assert (waiting.folder, waiting.exit_code, waiting.summary) == ("runs/1", None, {})


def test_cells_that_are_none_any_more_are_forgotten_in_the_end(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    cells = [Cell(number=n, name="", folder="", exit_code=0) for n in range(2)]
    for cell in cells:
        sweep.note(cell)
    sweep.begin()
    sweep.note(cells[0])
    sweep.end()

    assert sweep.cells() == cells[:1]


def test_the_same_cells_are_the_same_sweep_wherever_they_run() -> None:
    cells = ["+experiment=quickstart", "model=a,b"]

    assert sweep_id(["-m", *cells]) == sweep_id(["--multirun", *reversed(cells), "hydra/launcher=joblib", "+scale=ray"])
    assert sweep_id(cells) != sweep_id([*cells, "request.seed=1,2"])
