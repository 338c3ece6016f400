"""Names that lead elsewhere, and folders from someone else: nothing in them is run, followed or unfolded."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from harness import SOURCES, Asked, Command, serving
from runner.errors import StoreError
from runner.export import main as export
from runner.private import check_folder
from runner.prompt_rows import PromptRow, write_rows
from runner.report.__main__ import main as report
from runner.results import replace_file

KEY = "sk-0123456789abcdefghij"


def sql(*statements: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        with closing(sqlite3.connect(folder / "results.sqlite")) as database, database:
            for statement in statements:
                database.execute(statement)

    return change


def file(name: str, content: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")

    return change


BOMB = "a0: &a0 x\n" + "".join(f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 10)}]\n" for n in range(10))
TAG = "name: !!python/object/apply:os.system ['touch owned']\n"
NONSENSE = {"rows": "<b>", "latency_s": [1], "cost_usd": "x", "tokens": "x", "errors": 3, "deployments": 7}

FOLDERS: dict[str, tuple[Callable[[Path], None], str | None]] = {
    "a newer schema": (sql("PRAGMA user_version = 99"), "schema version 99"),
    "another program's database": (sql("PRAGMA application_id = 7"), "no results database"),
    "a view that never ends": (
        sql(
            "ALTER TABLE answers RENAME TO old",
            "CREATE VIEW answers AS WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)"
            " SELECT old.* FROM old, n",
        ),
        "views",
    ),
    "a trigger": (sql("CREATE TRIGGER t AFTER INSERT ON sessions BEGIN DELETE FROM answers; END"), "triggers"),
    "a missing table": (sql("DROP TABLE answers"), "no such table"),
    "bytes for a text": (sql("UPDATE answers SET output_text = x'ff00'"), "output_text"),
    "a text for a number": (sql("UPDATE answers SET service_time_s = 'soon'"), "service_time_s"),
    "half a document": (sql("UPDATE answers SET details = '{'"), "damaged"),
    "a list for an object": (sql("UPDATE answers SET details = '[1]'"), "damaged"),
    "metadata that is no JSON": (sql("UPDATE rows SET metadata = '}\n{\"_index\": 7'"), "JSON"),
    "a pickle for details": (sql("UPDATE answers SET details = x'8004952e'"), "details"),
    "an odd number of samples": (sql("INSERT OR REPLACE INTO meta VALUES ('samples', '-0x1')"), None),
    "a summary of nonsense": (file("summary.json", json.dumps(NONSENSE)), None),
    "a summary that is a list": (file("summary.json", "[1]"), None),
    "a summary nested beyond measure": (file("summary.json", "[" * 100_000), None),
    "settings that unfold": (file(".hydra/config.yaml", BOMB), None),
    "settings nested beyond measure": (file(".hydra/config.yaml", "[" * 20_000), None),
    "settings that run": (file(".hydra/config.yaml", TAG), None),
    "settings with interpolations": (file(".hydra/config.yaml", "name: ${oc.env:SECRET_THING}\nrun: ${run_id:}"), None),
    "overrides of nonsense": (file(".hydra/overrides.yaml", "- [1]\n- {a: 1}\n- 7\n"), None),
    "a cell of nonsense": (file("cells/0.json", '{"x": 1}'), "no note of a sweep's cell"),
    "a cell of odd types": (file("cells/0.json", '{"number": "1", "name": 3, "folder": []}'), "no note"),
}
"""What is wrong with a run's folder, and what a reader says of it; None: it is read all the same."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that someone else made."""
    here = tmp_path_factory.mktemp("other")
    environment = {"PATH": os.environ["PATH"], "HOME": str(here), "PYTHONPATH": str(SOURCES)}
    command = [sys.executable, "-m", "runner", "prompt=Say hello.", "name=theirs", "tracker=none"]
    subprocess.run(command, cwd=here, env=environment, check=True, capture_output=True)
    return Command(here).run()


@pytest.mark.parametrize("name", FOLDERS)
def test_a_hostile_folder_is_read_or_refused_in_one_line(
    name: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SECRET_THING", "the-value-of-the-variable")
    folder = tmp_path / "theirs" / "run"
    shutil.copytree(finished, folder)
    change, words = FOLDERS[name]
    change(folder)
    codes = {report([str(folder), "--output", "report.html"]), export([str(folder), "-o", "rows.jsonl"])}
    err = capsys.readouterr().err
    if words is None:
        assert codes == {0}
        page = Path("report.html").read_text(encoding="utf-8")
        assert "the-value-of-the-variable" not in page
    else:
        assert codes <= {0, 2}
        assert words in err
        assert all(line.startswith(("report: ", "runner.export: ")) or "rows of" in line for line in err.splitlines())
    for line in Path("rows.jsonl").read_bytes().splitlines() if Path("rows.jsonl").exists() else ():
        json.loads(line)
    assert not Path("owned").exists()


LINKS = ["runner.log", ".hydra/config.yaml", "results.sqlite", ".lock", "metrics.jsonl", "summary.json", "wandb"]


@pytest.mark.parametrize("name", LINKS)
def test_a_runs_folder_with_a_link_in_it_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / ".hydra").mkdir()
    check_folder(tmp_path)
    (tmp_path / name).symlink_to("/etc/passwd")
    with pytest.raises(StoreError, match=f"{name} is a link"):
        check_folder(tmp_path)


async def test_nothing_is_written_through_a_link_in_a_runs_folder(command: Command) -> None:
    arguments = ("prompt=Say hello.", "name=t", "tracker=none")
    folder = command.folder / (await command(*arguments, "plan=true")).out.splitlines()[0]
    precious = command.write("precious", "as it was")
    folder.mkdir(parents=True)
    (folder / "runner.log").symlink_to(precious)
    done = await command(*arguments)
    assert done.exit_code == 2, done.err
    assert "runner.log is a link" in done.err
    assert precious.read_text(encoding="utf-8") == "as it was"


def test_a_file_that_is_replaced_is_not_written_through_a_link(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_bytes(b"as it was")
    for name in ("summary.json", ".summary.json.partial"):
        (tmp_path / name).symlink_to(precious)
    replace_file(tmp_path / "summary.json", b"new")
    assert precious.read_bytes() == b"as it was"
    assert (tmp_path / "summary.json").read_bytes() == b"new"


@pytest.mark.parametrize(
    "arguments",
    [
        ("name=../../out",),
        ("-m", "name=../../out", "request.seed=1,2"),
        ("-m", "name=in,../../out"),
        ("name='a\x1b[31m'",),
    ],
    ids=" ".join,
)
async def test_a_name_does_not_lead_out_of_the_runs(command: Command, arguments: tuple[str, ...]) -> None:
    command.folder /= "home"
    command.folder.mkdir()
    done = await command(*arguments, "prompt=Hi", "tracker=none")
    assert "becomes a folder's name" in done.err, done.err
    assert done.exit_code in (1, 2)
    assert [path.name for path in command.folder.parent.iterdir()] == ["home"]


async def test_whatever_the_umask_what_holds_answers_is_its_owners(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = os.umask(0)
    try:
        await command("prompt=Say hello.", "name=t", "tracker.mode=offline")
        await command("-m", "prompt=a,b", "name=t", "tracker=none")
        monkeypatch.chdir(command.folder)
        await asyncio.to_thread(report, [str(command.runs()[0]), "--output", "report.html"])
        await asyncio.to_thread(export, [str(command.runs()[0]), "-o", "rows.csv"])
        row = PromptRow(idx=0, key="k", prompt="Hi", status="done", result="Hello.", error=None)
        write_rows(Path("results.db"), [row])
    finally:
        os.umask(before)
    open_to_others = [
        str(path.relative_to(command.folder))
        for path in everything(command.folder)
        if path.lstat().st_mode & 0o077 and not path.is_symlink()
    ]
    assert open_to_others == []
    assert len(command.runs()) == 3


def everything(folder: Path) -> Iterator[Path]:
    return (path for name in ("runs", "report.html", "rows.csv", "results.db") for path in walk(folder / name))


def walk(path: Path) -> Iterator[Path]:
    yield path
    if path.is_dir() and not path.is_symlink():
        for each in path.iterdir():
            yield from walk(each)


async def test_a_key_is_in_no_file_no_output_and_no_command_line(command: Command) -> None:
    """Also where a server repeats it in every place that it can, and W&B's process runs beside."""
    command_lines: list[str] = []

    def answer(asked: Asked) -> web.Response:
        command_lines.extend(map(text_of, Path("/proc").glob("[0-9]*/cmdline")))
        message = f"no such key: {KEY}, {asked.headers['authorization']}\r\n{KEY}"
        headers = {"x-request-id": KEY, "location": f"http://{KEY}@evil.example/{KEY}?key={KEY}"}
        status = (401, 500, 307)[len(provider.requests) % 3]
        return web.json_response({"error": {"message": message, "code": KEY}}, status=status, headers=headers)

    command.write_rows("rows.jsonl", [{"prompt": f"row {index}"} for index in range(6)])
    arguments: tuple[Any, ...] = ("name=t", "dataset=jsonl", "dataset.path=rows.jsonl", "api_key_env=MY_KEY")
    async with serving(answer) as provider:
        arguments += ("model=openai_like/m", f"api_base={provider.url}", "retry.base_s=0.01", "tracker.mode=offline")
        done = await command(*arguments, MY_KEY=KEY)
        shown = await command(*arguments, "--cfg", "job", MY_KEY=KEY)
    assert provider.requests
    assert done.exit_code != 0
    assert KEY not in "".join((done.out, done.err, shown.out, shown.err, *command_lines))
    for path in command.folder.rglob("*"):
        if path.is_file():
            assert KEY.encode() not in path.read_bytes(), path


def text_of(path: Path) -> str:
    try:
        return path.read_bytes().decode(errors="replace")
    except OSError:  # its process has ended
        return ""
