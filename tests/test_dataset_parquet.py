from __future__ import annotations

import sys
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from runner.config import DatasetConfig, DatasetKind, ShardConfig
from runner.dataset import Row, count_rows, open_dataset
from runner.errors import ConfigError, DatasetError
from runner.identity import dump_text


def written(folder: Path, columns: dict[str, Any], *, row_group_size: int = 4) -> Path:
    path = folder / "rows.parquet"
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


def dataset(path: Path, **options: Any) -> DatasetConfig:
    return DatasetConfig(kind=DatasetKind.parquet, path=str(path), **options)


def test_each_row_has_its_columns_and_its_place(tmp_path: Path) -> None:
    path = written(tmp_path, {"n": [1, 2], "text": ["one", None]})

    assert list(open_dataset(dataset(path))) == [
        Row(index=0, fields={"n": 1, "text": "one"}, source="rows.parquet:1"),
        Row(index=1, fields={"n": 2, "text": None}, source="rows.parquet:2"),
    ]


@pytest.mark.parametrize(
    ("values", "plain"),
    [
        (pa.array([2**63 - 1]), 2**63 - 1),
        (pa.array([0.1]), 0.1),
        (pa.array([float("nan")]), None),
        (pa.array([float("inf")]), None),
        (pa.array([True]), True),
        (pa.array([Decimal("1.10")]), "1.10"),
        (pa.array([date(2025, 2, 1)]), "2025-02-01"),
        (pa.array([time(12, 30)]), "12:30:00"),
        (pa.array([datetime(2025, 2, 1, 12, tzinfo=UTC)]), "2025-02-01T12:00:00+00:00"),
        (pa.array([timedelta(minutes=1.5)]), 90.0),
        (pa.array([b"\xff\x00"]), "/wA="),
        (pa.array(["a"]).dictionary_encode(), "a"),
        (pa.array([[1.5, None]]), [1.5, None]),
        (pa.array([{"a": [{"b": date(2025, 2, 1)}]}]), {"a": [{"b": "2025-02-01"}]}),
        (pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())), {"k": 1}),
        (pa.array([None]), None),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
def test_every_type_becomes_what_json_can_hold(tmp_path: Path, values: Any, plain: Any) -> None:
    [row] = open_dataset(dataset(written(tmp_path, {"value": values})))

    assert row.fields == {"value": plain}
    assert dump_text(row.fields)


def test_limit_and_shard_cross_the_borders_of_row_groups(tmp_path: Path) -> None:
    path = written(tmp_path, {"n": list(range(10_000))}, row_group_size=1_000)
    shard = ShardConfig(index=3, count=7)

    wanted = list(open_dataset(dataset(path, limit=5_000, shard=shard)))

    assert [row.fields["n"] for row in wanted] == [row.index for row in wanted] == list(range(3, 5_000, 7))
    assert count_rows(dataset(path, limit=5_000, shard=shard)) == len(wanted)
    assert count_rows(dataset(path)) == 10_000


def test_one_row_group_at_a_time_is_in_memory(tmp_path: Path) -> None:
    path = written(tmp_path, {"text": [f"{n} " + "x" * 1000 for n in range(20_000)]}, row_group_size=500)
    before = pa.total_allocated_bytes()

    highest = max(pa.total_allocated_bytes() - before for _ in open_dataset(dataset(path)))

    assert highest < 20_000 * 1000 / 5


def test_a_file_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"rows\.parquet holds no rows"):
        open_dataset(dataset(written(tmp_path, {"n": pa.array([], pa.int64())})))


@pytest.mark.parametrize("content", [b"", b'{"n": 1}\n', b"PAR1 cut short"])
def test_what_is_no_parquet_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(content)

    with pytest.raises(DatasetError, match=r"rows\.parquet is no Parquet file, or not a whole one"):
        open_dataset(dataset(path))


def test_a_missing_file_is_named_with_the_one_that_is_there(tmp_path: Path) -> None:
    written(tmp_path, {"n": [1]})

    with pytest.raises(DatasetError, match=r"there is no such file\. Did you mean .*rows\.parquet"):
        open_dataset(dataset(tmp_path / "row.parquet"))


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, {"n": [1]})
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)

    with pytest.raises(ConfigError, match=r"dataset=parquet needs an extra: pip install -e '\.\[parquet\]'"):
        open_dataset(dataset(path))
