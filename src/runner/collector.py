"""The collector of a batch: outcomes in any order in, a `BatchResult` in the order of the inputs out."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Mapping, Sequence, Sized
from typing import Any, Generic, TypeAlias, TypeVar

from runner.batch import chunked
from runner.errors import ConfigError, ItemError
from runner.types import BatchResult

R = TypeVar("R")
T = TypeVar("T")

OnResult: TypeAlias = Callable[[int, R | None, BaseException | None], None]
"""Called with (index, result, None) or (index, None, error)."""

OnProgress: TypeAlias = Callable[[int, int], None]
"""Called with (settled, total)."""


class Collector(Generic[T, R]):
    """Numbers the inputs of a batch, and puts what comes of them in its place. Holds results, and no inputs.

    Args:
        inputs: Read as they are needed.
        return_exceptions: False: a failure is raised, once it was told.
        on_result: Told of each outcome as it comes.
        on_progress: Likewise. The total is what was read so far where ``inputs`` have no length.

    Raises:
        ConfigError: ``inputs`` are one input, and not many, or a callback cannot be called.
    """

    def __init__(
        self,
        inputs: Iterable[T] | AsyncIterable[T],
        *,
        return_exceptions: bool,
        on_result: OnResult[R] | None,
        on_progress: OnProgress | None,
    ) -> None:
        if isinstance(inputs, str | bytes | Mapping) or not isinstance(inputs, Iterable | AsyncIterable):
            raise ConfigError(f"a batch of type {type(inputs).__name__}: pass a list, or any iterable of inputs")
        for name, callback in (("on_result", on_result), ("on_progress", on_progress)):
            if callback is not None and not callable(callback):
                raise ConfigError(f"{name} is of type {type(callback).__name__}, and not a function")
        self._inputs = inputs
        self._return_exceptions = return_exceptions
        self._on_result = on_result
        self._on_progress = on_progress
        self._results: list[R | None] = []
        self._errors: list[BaseException | None] = []
        self._settled = 0

    async def chunks(self, size: int) -> AsyncIterator[Sequence[tuple[int, T]]]:
        """The inputs with their numbers, in lists of ``size``."""
        async for chunk in chunked(self._inputs, size):
            first = len(self._results)
            self._results.extend([None] * len(chunk))
            self._errors.extend([None] * len(chunk))
            yield list(enumerate(chunk, first))

    def answered(self, index: int, result: R) -> None:
        """Input ``index`` has its result."""
        self._results[index] = result
        self._tell(index, result, None)

    def failed(self, index: int, error: ItemError) -> None:
        """Input ``index`` has none.

        Raises:
            ItemError: The error, where exceptions are not returned.
        """
        self._errors[index] = error
        self._tell(index, None, error)
        if not self._return_exceptions:
            raise error

    def batch(self) -> BatchResult[R]:
        """What there is so far."""
        return BatchResult(results=self._results, errors=self._errors)

    def _tell(self, index: int, result: R | None, error: ItemError | None) -> None:
        self._settled += 1
        if self._on_result is not None:
            self._on_result(index, result, error)
        if self._on_progress is not None:
            self._on_progress(self._settled, self._total())

    def _total(self) -> int:
        inputs: Any = self._inputs
        return len(inputs) if isinstance(inputs, Sized) else len(self._results)
