"""Every example of the README runs, in its order, in one folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import shipped

TOP = Path(__file__).parents[1]
TEXT = (TOP / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```", TEXT, re.M | re.S)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the examples run: the package and the configuration that is shipped with it."""
    top = tmp_path_factory.mktemp("checkout")
    shutil.copytree(TOP / "src", top / "src", ignore=shutil.ignore_patterns("__pycache__"))
    for path in shipped("conf"):
        copy = top / path.relative_to(TOP)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    return top


@pytest.fixture(scope="module")
def server_url() -> Iterator[str]:
    """A server for the examples that speak to localhost:8000 or to OpenAI."""
    command = [sys.executable, "-m", "runner.simulator", "--port", "0", "--latency-s", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield server.stdout.readline().split()[-1]
        server.terminate()


def test_the_first_block_is_the_two_commands() -> None:
    language, commands = BLOCKS[0]

    assert language == "bash"
    assert commands.split("\n")[:-1] == ["bash scripts/quickstart.sh", "bash scripts/test.sh"]


def test_every_link_within_leads_to_a_heading() -> None:
    prose = re.sub(r"^```.*?^```", "", TEXT, flags=re.M | re.S)
    headings = {_anchor(heading) for heading in re.findall(r"^#+ (.*)$", prose, re.M)}

    assert set(re.findall(r"\]\(#([^)]*)\)", prose)) <= headings


def test_every_experiment_is_in_the_table_of_them() -> None:
    experiments = {path.stem for path in shipped("conf/experiment")}

    table = TEXT[TEXT.index("| `+experiment=` |") :].split("\n\n", 1)[0]

    assert experiments <= set(re.findall(r"`(\w+)`", table))


def _anchor(heading: str) -> str:
    """As GitHub writes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.timeout(400)
def test_every_further_example_runs(tmp_path: Path, checkout: Path, server_url: str) -> None:
    (tmp_path / "scripts").symlink_to(TOP / "scripts")
    environment = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "PYTHONPATH": str(checkout / "src"),
        "OPENAI_API_BASE": server_url,
        "WANDB_MODE": "disabled",  # its start and end would take most of the time
    }
    failures = []
    for language, block in BLOCKS[1:]:
        code = re.sub(r"http://localhost:800\d/v1", server_url, block)
        command = ["bash", "-euc", code] if language == "bash" else [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0 or "Traceback" in done.stderr:
            failures.append(f"{block}\nexit {done.returncode}\n{done.stdout}\n{done.stderr}")

    assert not failures, "\n\n".join(failures)
