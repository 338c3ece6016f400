"""The simulated provider in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Json = dict[str, Any]


class Server:
    """A simulator in a process of its own, at one address for all its lives."""

    def __init__(self, label: str, settings: Mapping[str, float | str], *, log: Path) -> None:
        self.label = label
        self.url = ""
        self.answered_before = 0
        self._settings = settings
        self._log = log
        self._process: subprocess.Popen[str] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @contextmanager
    def running(self) -> Iterator[None]:
        self.start()
        try:
            yield
        finally:
            self.signal(signal.SIGCONT)
            self.kill()

    def start(self) -> None:
        port = self.url.removesuffix("/v1").rpartition(":")[2] or "0"
        options = [f"--{name.replace('_', '-')}={value}" for name, value in self._settings.items()]
        command = [sys.executable, "-m", "runner.simulator", f"--port={port}", *options]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().split()[-1]

    def kill(self) -> None:
        assert self._process is not None
        with self._process:
            self._process.kill()

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def set(self, **settings: Any) -> None:
        self.post("/settings", settings)

    def ledger(self) -> Json:
        ledger: Json = self.get("/ledger")
        return ledger

    def idle(self) -> None:
        """Wait until it has noticed that nobody waits for it any more."""
        while self.ledger()["in_flight"]:
            time.sleep(0.01)

    def get(self, path: str) -> Any:
        return self._ask(path)

    def post(self, path: str, body: Json | None = None) -> None:
        self._ask(path, json.dumps(body or {}).encode())

    def _ask(self, path: str, body: bytes | None = None) -> Any:
        with urllib.request.urlopen(self.url.removesuffix("/v1") + path, data=body, timeout=20) as response:
            return json.load(response)
