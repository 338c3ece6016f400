"""What surrounds a run, and may go away: Redis, a disk, W&B's API, the clock."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path


class Redis:
    """A Redis server on a socket of its own. It stores nothing: killed, it forgets everything."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="redis-"))  # a socket's path may not be long
        self.url = f"unix://{self._folder}/socket?db=0"
        self._process: subprocess.Popen[bytes] | None = None

    @staticmethod
    def is_there() -> bool:
        return shutil.which("redis-server") is not None

    @contextmanager
    def running(self) -> Iterator[Redis]:
        self.start()
        try:
            yield self
        finally:
            self.kill()
            shutil.rmtree(self._folder)

    def start(self) -> None:
        options = ["--port", "0", "--unixsocket", "socket", "--save", "", "--appendonly", "no"]
        self._process = subprocess.Popen(["redis-server", *options], cwd=self._folder, stdout=subprocess.DEVNULL)
        while not (self._folder / "socket").exists() and self._process.poll() is None:
            time.sleep(0.01)

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        (self._folder / "socket").unlink(missing_ok=True)


class SmallDisk:
    """A disk in memory, which takes root to mount, that can be filled and freed."""

    def __init__(self, folder: Path, *, megabytes: int) -> None:
        self._folder = folder
        self._megabytes = megabytes

    @staticmethod
    def is_possible() -> bool:
        """Whether one can be mounted here."""
        with tempfile.TemporaryDirectory() as folder, contextlib.suppress(OSError):
            disk = SmallDisk(Path(folder, "disk"), megabytes=1)
            with suppress(subprocess.CalledProcessError), disk.mounted():
                return True
        return False

    @contextmanager
    def mounted(self) -> Iterator[SmallDisk]:
        self._folder.mkdir()
        options = ["-t", "tmpfs", "-o", f"size={self._megabytes}m,mode=700"]
        subprocess.run(["mount", *options, "tmpfs", self._folder], check=True, capture_output=True)
        try:
            yield self
        finally:
            subprocess.run(["umount", "--lazy", self._folder], check=True)

    def fill(self) -> None:
        with (self._folder / "filler").open("ab", buffering=0) as file, suppress(OSError):
            while file.write(bytes(2**16)):
                pass

    def free(self) -> None:
        (self._folder / "filler").unlink(missing_ok=True)


class Gone:
    """Where an API was: it hangs, hangs up, or answers 500 to everything."""

    def __init__(self, manner: str) -> None:
        self._manner = manner
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._kept: list[socket.socket] = []
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    @contextmanager
    def listening(self) -> Iterator[Gone]:
        threading.Thread(target=self._serve, daemon=True).start()
        try:
            yield self
        finally:
            with suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            for each in self._kept:
                each.close()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                if self._manner == "hangs":
                    self._kept.append(connection)
                    continue
                with connection, suppress(OSError):
                    if self._manner == "errs":
                        connection.settimeout(1.0)
                        connection.recv(2**16)
                        connection.sendall(b"HTTP/1.1 500 Oh\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")


MANNERS = ("hangs", "hangs up", "errs")


def jumping_clock(folder: Path, jumps: Sequence[tuple[float, float]]) -> Mapping[str, str]:
    """The variables under which a Python process finds its wall clock jump.

    Args:
        folder: Where to put the module that does it.
        jumps: From so many seconds after the start, so many seconds off.
    """
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(_CLOCK, encoding="utf-8")
    return {"PYTHONPATH": str(folder), "TRIAL_CLOCK": json.dumps(jumps)}


_CLOCK = """\
import json, os, time

def jump(real=time.time, steady=time.monotonic, began=time.monotonic(), jumps=json.loads(os.environ["TRIAL_CLOCK"])):
    now = steady() - began
    return real() + sum(off for at, off in jumps if at <= now)

time.time = jump
"""


def processes_marked(mark: str) -> list[int]:
    """The processes in whose environment ``mark`` stands; none where the system does not tell (not Linux)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if mark.encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found
