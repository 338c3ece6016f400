from __future__ import annotations

import asyncio
import csv
import json
import os
import signal
import sqlite3
import stat
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from harness import Command, save
from runner import DB_URL_DEFAULT, export_jsonl, prompt_map
from runner.errors import ConfigError, StoreError
from runner.export import main
from runner.identity import dump_text
from runner.store import Claim, Outcome, Store, Terms


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


async def settle(store: Store, first: int, count: int, **columns: Any) -> None:
    """Enter rows and an answer to each."""
    keys = [b"%016d" % position for position in range(first, first + count)]
    claims = [
        Claim(position=position, content=key, metadata=dump_text({"id": position}))
        for position, key in enumerate(keys, first)
    ]
    await store.claim(claims, Terms(retry_failed=False, scored=False))
    for position, key in enumerate(keys, first):
        text = {"output_text": f"answer {position}", **columns}
        await save(store, position, Outcome(ticket=0, content=key, settled_at=1.0, **text))
    await store.flush()


async def make_run(folder: str, count: int = 3, **columns: Any) -> Path:
    path = Path(folder)
    async with await Store.open(path / "results.sqlite") as store:
        await settle(store, 0, count, **columns)
    return path


def export(*arguments: object) -> int:
    """The command, which has an event loop of its own."""
    return main([str(argument) for argument in arguments])


async def exported(*arguments: object) -> int:
    return await asyncio.to_thread(export, *arguments)


def lines(path: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def cells(path: str | Path) -> list[dict[str, str]]:
    with Path(path).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# The command


async def test_a_run_is_exported_as_its_results_file(command: Command) -> None:
    command.write_rows("rows.jsonl", [{"id": n, "prompt": f"prompt {n}"} for n in range(20)])
    done = await command("dataset=jsonl", "dataset.path=rows.jsonl", "tracker=none", "simulator.latency_s=0.001")
    assert done.exit_code == 0, done.err

    assert await exported(command.run(), "-o", "rows.out.jsonl") == 0
    assert Path("rows.out.jsonl").read_bytes() == (command.run() / "results.jsonl").read_bytes()


async def test_without_an_output_it_is_standard_output(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    run = await make_run("runs/a/1")

    assert await exported(run) == 0
    assert [json.loads(line)["_index"] for line in capfdbinary.readouterr().out.splitlines()] == [0, 1, 2]


@pytest.mark.parametrize("name", ["results.sqlite", "results.jsonl", "summary.json"])
async def test_a_file_of_a_run_stands_for_the_run(name: str, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    run = await make_run("runs/a/1")
    Path(run, name).touch()

    assert await exported(str(Path(run, name))) == 0
    assert [json.loads(line)["_index"] for line in capfdbinary.readouterr().out.splitlines()] == [0, 1, 2]


async def test_the_form_follows_the_name_of_the_file() -> None:
    run = await make_run("runs/a/1")

    assert await exported(run, "-o", "rows.csv") == 0
    assert await exported(run, "-o", "rows.txt", "--format", "csv") == 0
    assert await exported(run, "-o", "rows") == 0
    assert cells("rows.csv") == cells("rows.txt")
    assert [row["output_text"] for row in cells("rows.csv")] == [row["output_text"] for row in lines("rows")]


async def test_a_sweep_is_one_file_with_the_runs_in_a_column() -> None:
    await make_run("runs/a/1", 2)
    await make_run("runs/a/2", 1)
    await make_run("runs/b/3", 1)

    assert await exported("runs/a", "runs/b/3/results.sqlite", "runs/a/2", "-o", "all.csv") == 0
    assert await exported("runs", "-o", "all.jsonl") == 0
    assert [(row["run"], row["_index"]) for row in cells("all.csv")] == [
        *(("a/1", "0"), ("a/1", "1"), ("a/2", "0"), ("b/3", "0"))
    ]
    assert [(row["run"], row["_index"]) for row in lines("all.jsonl")] == [
        *(("a/1", 0), ("a/1", 1), ("a/2", 0), ("b/3", 0))
    ]


async def test_runs_of_one_name_and_id_are_told_apart_by_their_paths() -> None:
    await make_run("one/a/1", 1)
    await make_run("two/a/1", 1)

    assert await exported("one", "two", "-o", "all.jsonl") == 0
    assert [row["run"] for row in lines("all.jsonl")] == ["one/a/1/results.sqlite", "two/a/1/results.sqlite"]


async def test_runs_of_one_name_are_called_by_what_differs(command: Command) -> None:
    for model in ("a", "b"):
        await command("name=mine", f"model=simulated/{model}", "prompt=hi", "tracker=none")
    await command("-m", "name=other", "model=simulated/c,simulated/d", "prompt=hi", "tracker=none")
    [sweep] = command.folder.glob("runs/other/sweep-*")

    assert await exported("runs/mine", sweep, "-o", "all.jsonl") == 0
    assert {row["run"] for row in lines("all.jsonl")} == {f"model=simulated/{model}" for model in "abcd"}

    await command("name=other", "prompt=other", "tracker=none")
    assert await exported("runs/other", "-o", "all.jsonl") == 0
    alone, *cells = sorted({row["run"] for row in lines("all.jsonl")}, key=lambda run: "model=" in run)
    assert alone.startswith("other/")
    assert sorted(cells) == ["model=simulated/c", "model=simulated/d"]


async def test_the_runs_of_a_name_stand_as_in_their_sweep(command: Command) -> None:
    models = ["d", "a", "c", "b"]
    swept = ",".join(f"simulated/{model}" for model in models)
    await command("-m", "name=mine", f"model={swept}", "prompt=hi", "tracker=none")
    assert await exported("runs/mine", "-o", "all.jsonl") == 0
    assert [row["run"] for row in lines("all.jsonl")] == [f"model=simulated/{model}" for model in models]


async def test_columns_that_only_some_run_has_are_there() -> None:
    await make_run("runs/a/1", 1)
    await make_run("runs/a/2", 1, details='{"reasoning":"because","choices":[1]}')

    assert await exported("runs/a", "-o", "all.csv") == 0
    assert [(row["reasoning"], row["choices"]) for row in cells("all.csv")] == [("", ""), ("because", "[1]")]


async def test_columns_that_only_some_rows_have_are_there() -> None:
    await make_run("r")
    async with await Store.open(Path("r/results.sqlite")) as store:
        await store.put_meta({"dedupe": "true"})
        await settle(store, 3, 1, reused_from="other/run")
        same = Claim(position=4, content=b"%016d" % 1, metadata="{}")
        await store.claim([same], Terms(dedupe=True))
    await exported("r", "-o", "r.csv")
    rows = list(csv.DictReader(Path("r.csv").read_text().splitlines()))
    assert [row["reused_from"] for row in rows] == ["", "", "", "other/run", ""]
    assert [row["deduplicated_from"] for row in rows] == ["", "", "", "", "1"]


async def test_a_spreadsheet_has_a_column_for_each_field_of_the_rows() -> None:
    await make_run("runs/a/1", 2)

    assert await exported("runs/a", "-o", "all.csv") == 0
    assert [row["metadata.id"] for row in cells("all.csv")] == ["0", "1"]
    assert "metadata" not in cells("all.csv")[0]


async def test_rows_that_are_nested_deeply_are_told_or_are_in_every_form(command: Command) -> None:
    deep = ['{"a":' * levels + "1" + "}" * levels for levels in (253, 300, 900, 5_000)]
    (command.folder / "deep.jsonl").write_text("".join(f'{{"prompt": "hi", "x": {value}}}\n' for value in deep))
    done = await command("dataset=jsonl", "dataset.path=deep.jsonl", "tracker=none", "simulator.latency_s=0.001")
    assert done.exit_code == 3, done.err

    for form in ("jsonl", "csv"):
        assert await exported(command.run(), "-o", f"rows.{form}") == 0
    first, *others = lines("rows.jsonl")
    assert first["error"] is None
    assert cells("rows.csv")[0]["metadata.x"].count("{") == 253
    assert len(others) == 3
    assert all("nested too deeply" in row["error"]["message"] for row in others)


async def test_a_run_of_a_stranger_that_is_nested_more_deeply_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    run = await make_run("runs/a/1")
    with closing(sqlite3.connect(run / "results.sqlite")) as database, database:
        database.execute("UPDATE rows SET metadata = ?", ('{"a":' * 300 + "1" + "}" * 300,))

    assert await exported(run, "-o", "rows.csv") == 2
    assert "damaged at row 0 (nested too deeply" in capsys.readouterr().err


async def test_parquet_holds_the_same_rows() -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    run = await make_run("runs/a/1", 3, cost_usd=0.5, total_tokens=7)

    assert await exported(run, "-o", "rows.parquet") == 0
    table = parquet.read_table("rows.parquet")
    assert table["output_text"].to_pylist() == ["answer 0", "answer 1", "answer 2"]
    assert table["cost_usd"].to_pylist() == [0.5] * 3
    assert table["metadata"].to_pylist() == ['{"id":0}', '{"id":1}', '{"id":2}']


async def test_a_run_at_work_is_exported_and_not_disturbed() -> None:
    async with await Store.open(Path("runs/a/1/results.sqlite")) as store:
        await settle(store, 0, 5)
        assert await exported("runs/a/1", "-o", "early.jsonl") == 0
        await settle(store, 5, 5)
        assert await exported("runs/a/1", "-o", "late.jsonl") == 0

    assert (len(lines("early.jsonl")), len(lines("late.jsonl"))) == (5, 10)


def test_a_killed_run_is_exported() -> None:
    code = (
        "import asyncio\nfrom pathlib import Path\nfrom test_export import settle\nfrom runner.store import Store\n"
        "async def main():\n"
        "    store = await Store.open(Path('runs/a/1/results.sqlite'))\n"
        "    await settle(store, 0, 5)\n"
        "    import os; os.kill(os.getpid(), 9)\n"
        "asyncio.run(main())\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run([sys.executable, "-c", code], env=environment, check=False, timeout=60)
    assert killed.returncode == -signal.SIGKILL

    assert export("runs/a/1", "-o", "rows.jsonl") == 0
    assert len(lines("rows.jsonl")) == 5


async def test_a_file_is_replaced_as_a_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    run = await make_run("runs/a/1")
    Path("rows.jsonl").write_text("before")

    class Broken:
        def __init__(self, file: object) -> None: ...
        def write(self, row: object) -> None:
            raise OSError(28, "No space left on device")

        def close(self) -> None: ...

    with monkeypatch.context() as patch:
        patch.setattr("runner.export.JsonLines", Broken)
        assert await exported(run, "-o", "rows.jsonl") == 2
    assert Path("rows.jsonl").read_text() == "before"
    assert sorted(os.listdir()) == ["rows.jsonl", "runs"]


async def test_a_link_stays_a_link_and_a_pipe_a_pipe() -> None:
    run = await make_run("runs/a/1")
    Path("target.jsonl").touch()
    Path("link.jsonl").symlink_to("target.jsonl")

    assert await exported(run, "-o", "link.jsonl") == 0
    assert await exported(run, "-o", "/dev/null") == 0
    assert Path("link.jsonl").is_symlink()
    assert len(lines("target.jsonl")) == 3
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_reader_that_has_seen_enough_ends_it_quietly() -> None:
    asyncio.run(make_run("runs/a/1", 3000))

    done = subprocess.run(
        f"{sys.executable} -m runner.export runs/a/1 | head -1",
        shell=True,
        capture_output=True,
        check=False,
        timeout=60,
    )

    assert json.loads(done.stdout)["_index"] == 0
    assert done.stderr == b""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "nowhere: no run is there"),
        (["."], r".: no run is there"),
        (["runz"], "Did you mean 'runs'?"),
        (["runs/a/1", "rows.csv"], "rows.csv: no run is there; name a run's folder (runs/NAME/RUN_ID), a sweep's"),
        (["runs/a/1", "rows.csv"], "Did you mean -o rows.csv?"),
        (["text.sqlite"], "text.sqlite is damaged or no database"),
        (["runs/a/1", "--format", "parquet"], "needs a file"),
        (["runs/a/1", "-o", "no/such/folder/rows.csv"], "there is no folder"),
        (["runs/a/1", "-o", "runs/a/1/results.sqlite", "--format", "csv"], "the run's own database"),
        (["runs/a/1", "-o", "rows.xlsx"], ".csv (spreadsheets open it)"),
        (["runs/a/1", "-o", "runs"], "runs: it cannot be written"),
    ],
)
def test_what_cannot_be_exported_is_told_in_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("text.sqlite").write_text("no database at all" * 100)
    if arguments != ["."]:
        asyncio.run(make_run("runs/a/1", 1))

    assert export(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("runner.export: ")
    assert err.count("\n") == 1
    assert words in err


async def test_the_dataset_of_a_run_is_not_written_over(capsys: pytest.CaptureFixture[str]) -> None:
    run = await make_run("runs/a/1")
    (run / ".hydra").mkdir()
    (run / ".hydra" / "config.yaml").write_text("dataset: {kind: csv, path: tickets.csv}\n", encoding="utf-8")
    Path("tickets.csv").write_text("id,text\n", encoding="utf-8")
    assert await exported("runs/a", "-o", "./tickets.csv") == 2
    assert "is the dataset that the run asked about" in capsys.readouterr().err
    assert Path("tickets.csv").read_text(encoding="utf-8") == "id,text\n"
    assert await exported("runs/a", "-o", "answers.csv") == 0


def test_pyarrow_is_missed_in_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asyncio.run(make_run("runs/a/1", 1))
    monkeypatch.setitem(sys.modules, "pyarrow", None)

    assert export("runs/a/1", "-o", "rows.parquet") == 2
    assert "pip install -e '.[parquet]'" in capsys.readouterr().err
    assert not Path("rows.parquet").exists()


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(SystemExit) as caught:
        export("runs", "--format", "xlsx")
    assert caught.value.code == 2


# The function


async def answers(prompts: list[str], **options: Any) -> None:
    async def worker(prompt: str) -> str:
        if prompt == "bad":
            raise ValueError("bad")
        return prompt.upper()

    await prompt_map(prompts, worker, verbose=False, max_attempts=1, **options)


@pytest.mark.parametrize("teardown", [True, False])
async def test_the_answers_of_prompt_map_are_there_with_and_without_its_cache(teardown: bool) -> None:
    await answers(["b", "a"], teardown=teardown)

    assert await export_jsonl(DB_URL_DEFAULT, out="results.jsonl") == 2
    assert lines("results.jsonl") == [
        {"idx": 0, "prompt": "b", "result": "B"},
        {"idx": 1, "prompt": "a", "result": "A"},
    ]


async def test_prompts_without_an_answer_are_left_out() -> None:
    await answers(["b", "bad", "a"])

    assert await export_jsonl(DB_URL_DEFAULT) == 2
    assert await export_jsonl(".llm_batch_cache/runs-results.db", out="table.jsonl") == 2
    assert [row["idx"] for row in lines("results.jsonl")] == [row["idx"] for row in lines("table.jsonl")] == [0, 2]


async def test_a_run_is_exported_by_its_folder_or_its_database() -> None:
    run = await make_run("runs/a/1")

    assert await export_jsonl(run, out="one.jsonl") == 3
    assert await export_jsonl("sqlite:///runs/a/1/results.sqlite", out="other.jsonl") == 3
    assert lines("one.jsonl") == lines("other.jsonl")
    assert lines("one.jsonl")[0]["metadata"] == {"id": 0}


async def test_what_is_no_database_of_ours_is_refused_and_no_file_is_left() -> None:
    with closing(sqlite3.connect("theirs.db")) as database:
        database.execute("CREATE TABLE jobs (key TEXT)")

    for url in ("missing.db", "theirs.db"):
        with pytest.raises(StoreError, match=url):
            await export_jsonl(url)
    with pytest.raises(ConfigError, match="db_url=postgresql"):
        await export_jsonl("postgresql://host/db")
    assert os.listdir() == ["theirs.db"]
