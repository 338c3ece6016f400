"""Rows that a function of the user's yields."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from runner.config import DatasetConfig
from runner.errors import ConfigError, DatasetError
from runner.names import import_name


class Function:
    """What ``package.module:function`` yields: a dictionary a row.

    It is called with ``dataset.arguments``, anew for each pass over the dataset, on the event loop's thread: it should
    yield the same rows each time, and each of them soon.
    """

    def __init__(self, config: DatasetConfig) -> None:
        if not config.function:
            raise ConfigError("dataset.function is not set: dataset.function=package.module:function")
        self.name = config.function
        self._function = import_name(config.function, key="dataset.function")
        self._arguments = {str(name): value for name, value in config.arguments.items()}
        if not callable(self._function) or _is_asynchronous(self._function):
            raise ConfigError(f"dataset.function={self.name!r} is no function that can be called without await")
        try:
            inspect.signature(self._function).bind(**self._arguments)
        except TypeError as error:
            raise ConfigError(f"dataset.arguments do not fit {self.name}: {error}") from None
        except ValueError:  # written in C: only calling it will tell
            pass
        if next(self.records(), None) is None:
            raise DatasetError(f"dataset.function={self.name} yields no rows")

    def records(self) -> Iterator[tuple[int, Any]]:
        number = 0
        try:
            rows = self._function(**self._arguments)
            if isinstance(rows, str | Mapping) or not isinstance(rows, Iterable):
                raise DatasetError(f"dataset.function={self.name} returned a {type(rows).__name__}: yield the rows")
            for number, record in enumerate(rows, 1):
                yield number, record
        except DatasetError:
            raise
        except Exception as error:  # the user's code
            where = f"after row {number}" if number else "before its first row"
            raise DatasetError(
                f"dataset.function={self.name} raised {where}: {type(error).__name__}: {error}"
            ) from error

    def count(self) -> None:
        return None

    def fields(self, record: Any) -> dict[str, Any]:
        if not isinstance(record, Mapping):
            raise ValueError(f"a {type(record).__name__}, not a dictionary")
        return {str(name): value for name, value in record.items()}


def _is_asynchronous(function: Any) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)
