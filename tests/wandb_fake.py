"""A W&B that remembers what it is told, in place of the package."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any


class FakeRun:
    offline = False
    url = "https://wandb.test/run"

    def __init__(self, folder: str) -> None:
        self.dir = f"{folder}/wandb/run-1/files"
        self.logged: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.exit_code: int | None = None

    def define_metric(self, *_: Any, **__: Any) -> None: ...

    def log(self, data: dict[str, Any]) -> None:
        self.logged.append(data)

    def log_artifact(self, artifact: Any) -> None: ...

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


class FakeWandb(SimpleNamespace):
    """Stands in for the package; ``init`` is the test's."""

    def __init__(self, *, has_key: bool = True, init: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.has_key = has_key
        self.calls: list[dict[str, Any]] = []
        self.runs: list[FakeRun] = []
        self.threads: set[str] = set()
        self.order: list[str] = []
        self._init = init

    def login(self, *, verify: bool, prompt: bool) -> bool:
        assert not verify
        assert not prompt
        return self.has_key

    def init(self, **arguments: Any) -> Any:
        self.threads.add(threading.current_thread().name)
        self.calls.append(arguments)
        self.order.append(arguments["mode"])
        if self._init is not None:
            self._init(**arguments)
        self.runs.append(FakeRun(arguments["dir"]))
        return self.runs[-1]

    def teardown(self) -> None:
        self.order.append("teardown")

    def Table(self, **arguments: Any) -> Any:  # noqa: N802
        return SimpleNamespace(**arguments)

    def Artifact(self, *_: Any, **__: Any) -> Any:  # noqa: N802
        return SimpleNamespace(add_file=lambda *_, **__: None)
