from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

from runner.config import DatasetConfig, DatasetKind, ShardConfig
from runner.dataset import Row, count_rows, open_dataset
from runner.errors import ConfigError, DatasetError


def dataset(path: Path, **options: Any) -> DatasetConfig:
    return DatasetConfig(kind=DatasetKind.huggingface, path=str(path), **options)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """What ``save_to_disk`` wrote, of one split."""
    rows = datasets.Dataset.from_dict({"n": range(100)}, split="train")
    rows.save_to_disk(str(tmp_path / "saved"))
    return tmp_path / "saved"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Data files as one downloads them, of two splits."""
    for split, count in (("train", 20), ("test", 5)):
        lines = "".join(json.dumps({"q": f"{split} {n}"}) + "\n" for n in range(count))
        (tmp_path / "folder").mkdir(exist_ok=True)
        (tmp_path / "folder" / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return tmp_path / "folder"


def test_a_saved_dataset_is_read_in_its_order(saved: Path) -> None:
    first, *_, last = open_dataset(dataset(saved))

    assert first == Row(index=0, fields={"n": 0}, source=f"{saved}:1")
    assert (last.index, last.fields) == (99, {"n": 99})
    assert count_rows(dataset(saved, limit=50, shard=ShardConfig(index=1, count=3))) == 17


def test_a_split_is_chosen_among_several(folder: Path) -> None:
    rows = list(open_dataset(dataset(folder, split="test", streaming=True)))

    assert [row.fields["q"] for row in rows] == [f"test {n}" for n in range(5)]
    assert rows[0].source == "folder[test]:1"


def test_a_streamed_split_has_no_length_and_can_be_sharded(folder: Path) -> None:
    config = dataset(folder, split="train", streaming=True, shard=ShardConfig(index=1, count=8))

    assert [row.index for row in open_dataset(config)] == [1, 9, 17]
    assert count_rows(config) is None


def test_with_several_splits_one_must_be_named(folder: Path, tmp_path: Path) -> None:
    both = datasets.DatasetDict({name: datasets.Dataset.from_dict({"n": [1]}) for name in ("train", "test")})
    both.save_to_disk(str(tmp_path / "both"))

    with pytest.raises(DatasetError, match=r"dataset.split is not set: .*folder has the splits train, test"):
        open_dataset(dataset(folder, streaming=True))
    with pytest.raises(DatasetError, match=r"dataset.split is not set: .*both has the splits train, test"):
        open_dataset(dataset(tmp_path / "both"))
    with pytest.raises(DatasetError, match=r"dataset.split dev does not exist: .*both has the splits train, test"):
        open_dataset(dataset(tmp_path / "both", split="dev"))
    with pytest.raises(DatasetError, match=r"folder: ValueError: .*train"):
        open_dataset(dataset(folder, split="dev", streaming=True))


def test_images_and_audio_stay_as_they_are_stored(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"picture": [{"bytes": b"\x89PNG", "path": "a.png"}]})
    rows.cast_column("picture", datasets.Image(decode=False)).save_to_disk(str(tmp_path / "pictures"))

    [row] = open_dataset(dataset(tmp_path / "pictures"))

    assert row.fields == {"picture": {"bytes": "iVBORw==", "path": "a.png"}}


def test_what_the_library_cannot_read_is_a_dataset_error(folder: Path) -> None:
    (folder / "train.jsonl").write_text("no JSON", encoding="utf-8")

    with pytest.raises(DatasetError, match=r"dataset\.path=.*folder: \w+: "):
        open_dataset(dataset(folder, split="train", streaming=True))


def test_without_the_library_the_extra_is_named(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)

    with pytest.raises(ConfigError, match=r"dataset=huggingface needs an extra: pip install -e '\.\[huggingface\]'"):
        open_dataset(dataset(saved))
