from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from runner.recorded import folder_of, labels_of, overrides_of, settings_of


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(folder: str, *overrides: str) -> Path:
    path = Path(folder)
    (path / ".hydra").mkdir(parents=True)
    (path / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(list(overrides)))
    return path


def test_runs_of_one_name_are_called_by_what_differs() -> None:
    first = run("runs/a/1", "dataset=jsonl", "model=x/one", "request.temperature=0", "tracker=none")
    second = run("runs/a/2", "dataset=jsonl", "model=x/two", "request.temperature=0", "resume=fresh")

    assert labels_of([first, second]) == ["model=x/one", "model=x/two"]


def test_a_run_that_goes_without_what_others_set_is_called_by_its_name_and_id() -> None:
    assert labels_of([run("runs/a/1"), run("runs/a/2", "+request.seed=1")]) == ["a/1", "request.seed=1"]


@pytest.mark.parametrize(
    "folders",
    [
        [("runs/a/1", "model=x"), ("runs/b/2", "model=y")],  # of different names
        [("runs/a/1", "model=x"), ("runs/a/2", "model=x")],  # nothing differs that is recorded
        [("runs/a/1", "prompt=" + "long " * 20), ("runs/a/2", "prompt=short")],
        [("runs/a/1", "model=x")],
    ],
)
def test_otherwise_they_are_called_by_their_names_and_ids(folders: list[tuple[str, str]]) -> None:
    runs = [run(folder, override) for folder, override in folders]

    assert labels_of(runs) == [f"{each.parent.name}/{each.name}" for each in runs]


@pytest.mark.parametrize("name", ["results.sqlite", "results.jsonl", "summary.json"])
def test_a_file_of_a_run_leads_to_its_folder(here: Path, name: str) -> None:
    assert folder_of(here / name) == here / name
    (here / name).touch()
    assert folder_of(here / name) == here
    assert folder_of(here) == here


def test_what_is_not_recorded_is_nothing(here: Path) -> None:
    assert (settings_of(here), overrides_of(here), labels_of([])) == ({}, {}, [])
