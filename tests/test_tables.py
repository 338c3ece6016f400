from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
import pytest

from runner.errors import StoreError
from runner.tables import COLUMNS, Columns, Csv, JsonLines, Parquet

ROW: dict[str, Any] = {
    "_index": 3,
    "output_text": 'Grüße, "du"\n',
    "output_parsed": {"x": [1]},
    "token_usage": {
        "prompt_tokens": 1,
        "completion_tokens": 2,
        "total_tokens": 3,
        "reasoning_tokens": None,
        "cached_tokens": 0,
    },
    "request_id": "r-1",
    "model_id": "m-1",
    "finish_reason": "stop",
    "tool_calls": [],
    "error": None,
    "metadata": orjson.Fragment('{"id":"a"}'),
    "scores": orjson.Fragment("{}"),
    "metrics": {
        "queue_wait_s": 0.5,
        "service_time_s": 1.5,
        "end_to_end_s": 2.0,
        "deployment": "east",
        "retries": 0,
        "cost_usd": None,
        "ttft_s": None,
    },
}
FAILED = ROW | {
    "_index": 4,
    "output_text": None,
    "output_parsed": None,
    "token_usage": None,
    "error": {"type": "Timeout", "message": "slow", "status": 408},
}


def written(kind: type[Csv] | type[Parquet], rows: Sequence[Mapping[str, Any]], fields: Sequence[str] = ()) -> bytes:
    file = io.BytesIO()
    writer = kind(file, Columns([*(rows[0] if rows else ()), *fields]))
    for row in rows:
        writer.write(row)
    writer.close()
    return file.getvalue()


def parsed(content: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(content.decode(), newline="")))


def test_a_line_is_the_row_as_it_is() -> None:
    file = io.BytesIO()
    JsonLines(file).write(ROW)

    assert orjson.loads(file.getvalue()) == ROW | {"metadata": {"id": "a"}, "scores": {}}
    assert file.getvalue().endswith(b"}\n")


def test_records_are_columns_and_what_else_is_nested_is_json() -> None:
    [row, failed] = parsed(written(Csv, [ROW, FAILED]))

    assert row["_index"] == "3"
    assert row["output_text"] == ROW["output_text"]
    assert row["output_parsed"] == '{"x":[1]}'
    assert (row["prompt_tokens"], row["cached_tokens"], row["reasoning_tokens"]) == ("1", "0", "")
    assert (row["metadata"], row["tool_calls"], row["error_type"]) == ('{"id":"a"}', "[]", "")
    assert (row["end_to_end_s"], row["deployment"], row["cost_usd"]) == ("2.0", "east", "")
    assert (failed["error_type"], failed["error_message"], failed["error_status"]) == ("Timeout", "slow", "408")
    assert (failed["output_text"], failed["total_tokens"], failed["output_parsed"]) == ("", "", "")


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "＝1"])
def test_a_cell_is_no_formula(text: str) -> None:
    [row] = parsed(written(Csv, [ROW | {"output_text": text, "model_id": text}]))

    assert row["output_text"] == row["model_id"] == f"'{text}"


def test_a_negative_number_is_a_number() -> None:
    [row] = parsed(written(Csv, [ROW | {"_index": -1}]))

    assert row["_index"] == "-1"


def test_columns_are_those_that_some_row_has() -> None:
    columns = Columns([*ROW, "reasoning", "zoo"]).names

    assert "reasoning" in columns
    assert "choices" not in columns
    assert "token_usage" not in columns
    assert columns[-1] == "zoo"
    assert [name for name in columns if name in COLUMNS] == [name for name in COLUMNS if name in columns]


def test_a_table_without_rows_has_the_usual_columns() -> None:
    assert written(Csv, []).decode().split(",")[:2] == ["_index", "output_text"]
    assert set(Columns([]).names) == set(Columns(ROW).names)


def test_a_field_that_has_no_column_is_not_dropped_silently() -> None:
    with pytest.raises(StoreError, match=r"new columns \(reasoning\): export again"):
        Columns(ROW).values(ROW | {"reasoning": "because"})


def test_a_parquet_table_is_typed() -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [ROW | {"embedding": [0.5, -1.0]}, FAILED | {"embedding": None}]

    table = parquet.read_table(io.BytesIO(written(Parquet, rows)))

    assert table["_index"].to_pylist() == [3, 4]
    assert table["embedding"].to_pylist() == [[0.5, -1.0], None]
    assert table["metadata"].to_pylist() == ['{"id":"a"}', '{"id":"a"}']
    assert table["error_status"].to_pylist() == [None, 408]
    assert {str(table.schema.field(name).type) for name in ("_index", "error_status", "retries")} == {"int64"}
    assert str(table.schema.field("cost_usd").type) == "double"


def test_an_embedding_is_json_in_csv() -> None:
    [row] = parsed(written(Csv, [ROW | {"embedding": [0.5, -1.0]}]))

    assert row["embedding"] == "[0.5,-1.0]"


def test_a_parquet_table_is_written_in_row_groups() -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [ROW | {"_index": index} for index in range(25_000)]
    long = [ROW | {"_index": index, "output_text": "x" * 1_000_000} for index in range(40)]

    assert parquet.ParquetFile(io.BytesIO(written(Parquet, rows))).num_row_groups == 3
    assert parquet.ParquetFile(io.BytesIO(written(Parquet, long))).num_row_groups == 3
    assert parquet.ParquetFile(io.BytesIO(written(Parquet, []))).metadata.num_rows == 0
