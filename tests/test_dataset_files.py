from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from runner.config import DatasetConfig, DatasetKind, ShardConfig
from runner.dataset import Row, count_rows, open_dataset
from runner.errors import DatasetError


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four recordings, a note and what is hidden; the working directory."""
    for name in ("talks/b.wav", "talks/a.WAV", "talks/2024/c.mp3", "notes.txt", "talks/.hidden.wav", "[1] x.wav"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def dataset(path: str, **options: Any) -> DatasetConfig:
    return DatasetConfig(kind=DatasetKind.files, path=path, **options)


def paths(path: str, **options: Any) -> list[str]:
    return [row.fields["path"] for row in open_dataset(dataset(path, **options))]


def test_a_row_says_what_file_it_is() -> None:
    assert list(open_dataset(dataset("talks/*"))) == [
        Row(
            index=0,
            fields={"path": "talks/a.WAV", "name": "a.WAV", "stem": "a", "suffix": ".wav", "size": 11},
            source="*:1",
        ),
        Row(
            index=1,
            fields={"path": "talks/b.wav", "name": "b.wav", "stem": "b", "suffix": ".wav", "size": 11},
            source="*:2",
        ),
    ]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("talks/b.wav", ["talks/b.wav"]),
        ("[1] x.wav", ["[1] x.wav"]),
        ("talks", ["talks/2024/c.mp3", "talks/a.WAV", "talks/b.wav"]),
        ("talks/", ["talks/2024/c.mp3", "talks/a.WAV", "talks/b.wav"]),
        ("**/*.mp3", ["talks/2024/c.mp3"]),
        ("talks/*/*", ["talks/2024/c.mp3"]),
    ],
)
def test_a_path_is_a_file_a_folder_or_a_glob(pattern: str, found: list[str]) -> None:
    assert paths(pattern) == found


def test_limit_and_shard_count_files() -> None:
    assert paths("talks", limit=2) == ["talks/2024/c.mp3", "talks/a.WAV"]
    assert paths("talks", shard=ShardConfig(index=1, count=2)) == ["talks/a.WAV"]
    assert count_rows(dataset("talks", shard=ShardConfig(index=0, count=2))) == 2


def test_a_pattern_that_no_file_fits_is_refused() -> None:
    with pytest.raises(DatasetError, match=r"dataset.path=\*\.flac: there is no such file\.$"):
        open_dataset(dataset("*.flac"))
    with pytest.raises(DatasetError, match=r"there is no such file\. Did you mean 'talks/b.wav'\?"):
        open_dataset(dataset("talks/bb.wav"))


def test_a_file_that_goes_away_meanwhile_fails_alone(folder: Path) -> None:
    rows = open_dataset(dataset("talks"))
    next(rows)
    (folder / "talks" / "a.WAV").unlink()

    gone, there = rows

    assert str(gone.error) == "talks:2: talks/a.WAV: No such file or directory"
    assert there.fields["path"] == "talks/b.wav"


def test_a_folder_without_files_is_not_called_missing(folder: Path) -> None:
    (folder / "empty").mkdir()

    with pytest.raises(DatasetError, match=r"dataset.path=empty: this folder holds no files$"):
        open_dataset(dataset("empty"))
