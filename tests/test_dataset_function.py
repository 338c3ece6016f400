from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from itertools import count
from typing import Any

import pytest

from runner.config import DatasetConfig, DatasetKind, ShardConfig
from runner.dataset import Row, count_rows, open_dataset
from runner.errors import ConfigError, DatasetError


def questions(start: int = 0) -> Iterator[dict[str, Any]]:
    for number in count(start):
        yield {"question": f"{number}?"}


def table() -> list[Any]:
    return [{"a": 1}, "text", {"a": 3}]


def broken() -> Iterator[dict[str, Any]]:
    yield {"a": 1}
    raise KeyError("lost")


def failing() -> list[Any]:
    raise OSError("no network")


def empty() -> list[Any]:
    return []


def number() -> int:
    return 7


def text() -> str:
    return "rows"


async def asynchronous() -> AsyncIterator[dict[str, Any]]:
    yield {}


def dataset(function: str, **options: Any) -> DatasetConfig:
    return DatasetConfig(kind=DatasetKind.python, function=f"{__name__}:{function}", **options)


def test_what_the_function_yields_are_the_rows_and_no_more_is_asked_of_it() -> None:
    assert list(open_dataset(dataset("questions", limit=2))) == [
        Row(index=0, fields={"question": "0?"}, source=f"{__name__}:questions:1"),
        Row(index=1, fields={"question": "1?"}, source=f"{__name__}:questions:2"),
    ]


def test_the_function_gets_its_arguments_and_is_called_for_each_pass() -> None:
    config = dataset("questions", arguments={"start": 5}, limit=1, shard=ShardConfig())

    assert [row.fields for row in open_dataset(config)] == [{"question": "5?"}]
    assert [row.fields for row in open_dataset(config)] == [{"question": "5?"}]


def test_how_many_rows_there_are_is_not_known_beforehand() -> None:
    assert count_rows(dataset("table")) is None


def test_what_is_no_dictionary_fails_alone() -> None:
    first, bad, last = open_dataset(dataset("table"))

    assert (first.fields, last.fields) == ({"a": 1}, {"a": 3})
    assert str(bad.error) == f"{__name__}:table:2: a str, not a dictionary"


def test_a_function_that_breaks_off_ends_the_reading() -> None:
    rows = open_dataset(dataset("broken"))
    next(rows)

    with pytest.raises(DatasetError, match=r"dataset.function=.*:broken raised after row 1: KeyError: 'lost'"):
        next(rows)


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        ("failing", "raised before its first row: OSError: no network"),
        ("empty", "yields no rows"),
        ("number", "returned a int: yield the rows"),
        ("text", "returned a str: yield the rows"),
    ],
)
def test_a_function_without_rows_is_refused(function: str, problem: str) -> None:
    with pytest.raises(DatasetError, match=problem):
        open_dataset(dataset(function))


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (DatasetConfig(kind=DatasetKind.python), "dataset.function is not set"),
        (dataset("asynchronous"), "is no function that can be called without await"),
        (dataset("__name__"), "is no function that can be called without await"),
        (dataset("question"), "Did you mean 'questions'"),
        (dataset("questions", arguments={"begin": 1}), "dataset.arguments do not fit .*'begin'"),
    ],
)
def test_what_cannot_be_called_is_refused(config: DatasetConfig, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        open_dataset(config)
