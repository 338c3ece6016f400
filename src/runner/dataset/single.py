"""The dataset of a run without one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from runner.config import DatasetConfig


class Single:
    """One row without fields: the prompt is all there is."""

    name = "single"

    def __init__(self, config: DatasetConfig) -> None: ...

    def records(self) -> Iterator[tuple[int, None]]:
        yield 1, None

    def count(self) -> int:
        return 1

    def fields(self, record: None) -> dict[str, Any]:
        return {}
