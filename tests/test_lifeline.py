from __future__ import annotations

import asyncio
import os
import sys

import pytest

from harness import SOURCES

_LAUNCHER = """
import subprocess, sys, time
from runner.lifeline import tie_workers

if sys.argv[1] == "tied":
    tie_workers()
subprocess.Popen([sys.executable, "-c", sys.argv[2]])
time.sleep(60)
"""

_WORKER = """
import time
from runner.lifeline import end_with_launcher

end_with_launcher()
print("at work", flush=True)
time.sleep({seconds})
print("done", flush=True)
"""


@pytest.mark.parametrize(("how", "seconds", "said"), [("tied", 60, b""), ("loose", 1, b"done\n")])
async def test_a_worker_ends_with_the_launcher_that_it_is_tied_to(how: str, seconds: int, said: bytes) -> None:
    launcher = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _LAUNCHER, how, _WORKER.format(seconds=seconds)),
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(SOURCES)},
        stdout=asyncio.subprocess.PIPE,
    )
    assert launcher.stdout is not None
    async with asyncio.timeout(30):
        assert await launcher.stdout.readline() == b"at work\n"
        launcher.kill()
        left = await launcher.stdout.read()  # until the worker has closed it too
        await launcher.wait()

    assert left == said
