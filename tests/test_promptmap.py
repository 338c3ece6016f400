from __future__ import annotations

import asyncio
import inspect
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from pydantic import BaseModel

from harness import Asked, refusal, serving, shout
from runner import prompt_map
from runner.config import SimulatorConfig
from runner.errors import ConfigError, StoreError, SystemicError
from runner.store import Store

FAST = SimulatorConfig(latency_s=0.001, latency_spread=0.0)
DATABASE = Path(".llm_batch_cache/runs.db")
RESULTS = Path(".llm_batch_cache/runs-results.db")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for variable in ("MODEL", "OPENROUTER_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(variable, raising=False)


JOB = """
import asyncio
import sys
from runner import prompt_map

count, seconds = int(sys.argv[1]), float(sys.argv[2])

async def worker(prompt):
    with open("asked", "a") as file:
        file.write(f"{prompt}\\n")
    await asyncio.sleep(seconds)
    return prompt.upper()

async def main():
    prompts = [f"prompt {n}" for n in range(count)]
    rows = await prompt_map(prompts, worker, concurrency=4, progress_update_every=20)
    print(len(rows), "rows", {row["status"] for row in rows})

asyncio.run(main())
"""
"""A script that asks so many prompts, each for so many seconds, and notes which."""


class Worker:
    """Answers in capitals, save what ``fails`` says, and remembers what it was asked."""

    def __init__(self, fails: Callable[[str], bool] = lambda prompt: False) -> None:
        self.asked: list[str] = []
        self.fails = fails

    async def __call__(self, prompt: str) -> str:
        self.asked.append(prompt)
        await asyncio.sleep(0)
        if self.fails(prompt):
            raise ValueError(f"no answer to {prompt}")
        return prompt.upper()


async def ask(prompts: Any, worker: Any = None, **options: Any) -> Any:
    return await prompt_map(prompts, worker, **{"verbose": False, "max_attempts": 1, **options})


def stored(path: Path = RESULTS) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(path)) as database:
        return database.execute("SELECT idx, prompt, status, result, error FROM results ORDER BY idx").fetchall()


# What comes back


async def test_rows_come_in_the_order_of_the_prompts() -> None:
    prompts = [f"prompt {n}" for n in range(300)]

    rows = await ask(prompts, Worker())

    assert [row["idx"] for row in rows] == list(range(300))
    assert [row["prompt"] for row in rows] == prompts
    assert [row["result"] for row in rows] == [prompt.upper() for prompt in prompts]
    assert {row["status"] for row in rows} == {"done"}
    assert list(rows[0]) == ["idx", "key", "prompt", "status", "result"]
    assert len({row["key"] for row in rows}) == 300


async def test_equal_prompts_are_asked_once() -> None:
    worker = Worker()

    rows = await ask(["b", "a", "b"], worker)

    assert sorted(worker.asked) == ["a", "b"]
    assert [(row["idx"], row["result"]) for row in rows] == [(0, "B"), (1, "A"), (2, "B")]
    assert rows[0]["key"] == rows[2]["key"] != rows[1]["key"]


async def test_unique_rows_come_by_the_first_place_of_their_prompt() -> None:
    rows = await ask(["b", "a", "b", "c"], Worker(), output_shape="unique")

    assert [(row["idx"], row["prompt"]) for row in rows] == [(0, "b"), (1, "a"), (3, "c")]


async def test_a_prompt_without_an_answer_is_missing(caplog: pytest.LogCaptureFixture) -> None:
    worker = Worker(fails=lambda prompt: prompt == "b")

    rows = await ask(["a", "b", "b"], worker, teardown=False)
    unique = await ask(["a", "b", "b"], worker, output_shape="unique")

    assert [(row["status"], row["result"]) for row in rows] == [("done", "A"), ("missing", None), ("missing", None)]
    assert ["error" in row for row in rows] == [False, True, True]
    assert rows[1]["error"] == "WorkerError: the worker raised ValueError: no answer to b"
    assert [row["prompt"] for row in unique] == ["a"]
    assert "1 of 2 prompts have no answer, for example: WorkerError: the worker raised ValueError" in caplog.text


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("list[str]", ["A", "B", None]),
        ("list[tuple[str,str]]", [("a", "A"), ("b", "B"), ("bad", None)]),
    ],
)
async def test_results_alone_or_beside_their_prompts(dtype: str, expected: list[Any]) -> None:
    assert await ask(["a", "b", "bad"], Worker(fails=lambda prompt: prompt == "bad"), return_dtype=dtype) == expected


async def test_a_polars_frame_is_typed_even_without_an_answer() -> None:
    polars = pytest.importorskip("polars")

    frame = await ask(["a"], Worker(fails=lambda prompt: True), return_dtype="polars")
    empty = await ask([], Worker(), return_dtype="polars")

    assert frame.schema == {**empty.schema, "error": polars.String}
    assert frame.schema["result"] == polars.String
    assert frame.rows() == [(0, frame["key"][0], "a", "missing", None, frame["error"][0])]


async def test_a_polars_frame_says_why_a_prompt_has_no_answer() -> None:
    pytest.importorskip("polars")

    frame = await ask(["a", "bad"], Worker(fails=lambda prompt: prompt == "bad"), return_dtype="polars")

    assert frame["error"][0] is None
    assert "WorkerError" in frame["error"][1]


async def test_no_prompts_give_no_rows() -> None:
    assert await ask([], Worker()) == []


async def test_a_generator_of_prompts_is_a_list_of_them() -> None:
    assert await ask((str(n) for n in range(3)), Worker(), return_dtype="list[str]") == ["0", "1", "2"]


async def test_odd_texts_are_prompts_too() -> None:
    odd = ["", "\ud83d", "\x00", "{{ braces }}", "a" * 100_000]

    rows = await ask(odd, Worker())

    assert [row["prompt"] for row in rows] == odd
    assert {row["status"] for row in rows} == {"done"}


@pytest.mark.parametrize("shape", ["original", "unique"])
async def test_the_results_database_mirrors_what_comes_back(shape: str) -> None:
    worker = Worker(fails=lambda prompt: prompt == "c")
    await ask(["from before"], worker)

    rows = await ask(["b", "a", "b", "c"], worker, output_shape=shape)

    assert [row[:4] for row in stored()] == [(row["idx"], row["prompt"], row["status"], row["result"]) for row in rows]
    if shape == "original":
        assert stored()[3][4] == "WorkerError: the worker raised ValueError: no answer to c"


async def test_databases_are_where_they_are_said_to_be() -> None:
    url = "sqlite+aiosqlite:///deep/my_runs.db"

    await ask(["a"], Worker(), cache_db_url=url, teardown=False)
    await ask(["b"], Worker(), cache_db_url=url, results_db_url="sqlite:///other.db", teardown=False)
    await ask(["c"], Worker(), cache_db_url=url, teardown=False, teardown_results=True)

    assert Path("deep/my_runs.db").exists()
    assert stored(Path("other.db"))[0][1] == "b"
    assert not Path("deep/my_runs-results.db").exists()
    assert not DATABASE.parent.exists()


async def test_results_that_would_replace_the_cache_go_beside_it(caplog: pytest.LogCaptureFixture) -> None:
    await ask(["a"], Worker(), cache_db_url="runs.db", results_db_url="sqlite:///runs.db", teardown=False)

    assert stored(Path("runs-results.db"))[0][1] == "a"
    assert "the results go to runs-results.db" in caplog.text


# Never asked twice


async def test_the_next_call_asks_only_what_failed() -> None:
    worker = Worker(fails=lambda prompt: prompt == "b" and worker.asked.count("b") == 1)

    await ask(["a", "b", "c"], worker)
    rows = await ask(["c", "new", "b", "a"], worker, return_dtype="list[str]")

    assert rows == ["C", "NEW", "B", "A"]
    assert Counter(worker.asked) == {"a": 1, "b": 2, "c": 1, "new": 1}


async def test_teardown_removes_what_was_answered_and_keeps_what_was_not() -> None:
    worker = Worker(fails=lambda prompt: prompt == "bad")

    await ask(["good"], worker)
    assert not DATABASE.exists()
    assert RESULTS.exists()

    await ask(["good", "bad"], worker)
    assert DATABASE.exists()


async def test_teardown_leaves_the_answers_to_other_prompts() -> None:
    worker = Worker(fails=lambda prompt: prompt == "bad")

    await ask(["a", "bad"], worker)
    await ask(["b"], worker)
    await ask(["a", "b"], worker)

    assert Counter(worker.asked) == {"a": 1, "bad": 1, "b": 2}
    assert DATABASE.exists()


async def test_without_teardown_nothing_is_asked_again() -> None:
    worker = Worker()

    first = await ask(["a", "b"], worker, teardown=False)
    second = await ask(["a", "b"], worker, teardown=False)

    assert sorted(worker.asked) == ["a", "b"]
    assert first == second


async def test_another_worker_is_another_question() -> None:
    async def lower(prompt: str) -> str:
        return prompt.lower()

    assert await ask(["Aa"], Worker(), return_dtype="list[str]", teardown=False) == ["AA"]
    assert await ask(["Aa"], lower, return_dtype="list[str]", teardown=False) == ["aa"]
    assert await ask(["Aa"], lower, return_dtype="list[str]", teardown=False, cache_key="v2") == ["aa"]


async def test_a_cache_key_stands_for_the_worker() -> None:
    worker = Worker()

    await ask(["a"], worker, teardown=False, cache_key="shouting")
    rows = await ask(["a"], lambda prompt: "never asked", cache_key="shouting", return_dtype="list[str]")

    assert rows == ["A"]


async def test_the_key_covers_model_temperature_and_schema() -> None:
    class Answer(BaseModel):
        text: str

    async with serving() as provider:

        async def again(model: str = "hosted_vllm/m", **options: Any) -> None:
            await ask(["a"], model=model, api_base=provider.url, teardown=False, **options)

        await again()
        await again()
        assert len(provider.requests) == 1
        await again(model="hosted_vllm/n")
        assert len(provider.requests) == 2
        await again(temperature=0.7)
        assert len(provider.requests) == 3
        await again(response_model=Answer)
        assert len(provider.requests) == 4


def test_answers_survive_a_kill(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(JOB)

    with subprocess.Popen([sys.executable, "job.py", "200", "0.02"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while not (progress := re.search("'done': ([0-9]+)", process.stdout.readline())):
            pass
        process.kill()
    before = (tmp_path / "asked").read_text().splitlines()
    done = subprocess.run(
        [sys.executable, "job.py", "200", "0"], capture_output=True, text=True, check=True, timeout=60
    )

    assert "200 rows {'done'}" in done.stdout
    asked = (tmp_path / "asked").read_text().splitlines()
    assert 20 <= int(progress[1]) <= len(before) < 200
    assert len(set(asked)) == 200
    assert len(asked) - len(before) <= 200 - int(progress[1]), "what was told to be done is not asked again"


def test_ctrl_c_keeps_what_is_on_its_way(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(JOB)

    with subprocess.Popen(
        [sys.executable, "job.py", "8", "0.5"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        while len((tmp_path / "asked").read_text() if (tmp_path / "asked").exists() else "") < len("prompt 0\n") * 4:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT
    assert "interrupted: waiting 10 s at most" in out
    assert err.rstrip().endswith("KeyboardInterrupt")
    subprocess.run([sys.executable, "job.py", "8", "0"], check=True, timeout=60, stdout=subprocess.DEVNULL)

    assert sorted((tmp_path / "asked").read_text().splitlines()) == [f"prompt {n}" for n in range(8)]


async def test_cancelling_twice_ends_it_at_once() -> None:
    started = asyncio.Event()

    async def worker(prompt: str) -> str:
        started.set()
        await asyncio.sleep(3600)
        return prompt

    task = asyncio.create_task(ask(["a"], worker))
    await started.wait()
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        async with asyncio.timeout(5):
            await task
    assert DATABASE.exists()


# Asking


async def test_what_fails_is_tried_again_up_to_the_number_of_attempts() -> None:
    worker = Worker(fails=lambda prompt: len(worker.asked) < 2)
    hopeless = Worker(fails=lambda prompt: True)

    assert await ask(["a"], worker, max_attempts=2, return_dtype="list[str]") == ["A"]
    assert await ask(["a"], hopeless, max_attempts=2, return_dtype="list[str]") == [None]
    assert len(worker.asked) == len(hopeless.asked) == 2


async def test_no_more_prompts_are_at_work_than_said() -> None:
    at_work, most = 0, 0

    async def worker(prompt: str) -> str:
        nonlocal at_work, most
        at_work += 1
        most = max(most, at_work)
        await asyncio.sleep(0.001)
        at_work -= 1
        return prompt

    await ask([str(n) for n in range(50)], worker, concurrency=5)

    assert most == 5


async def test_a_plain_function_is_at_work_in_as_many_threads() -> None:
    together = threading.Barrier(3, timeout=10)

    def worker(prompt: str) -> str:
        together.wait()
        return prompt

    assert await ask(list("abcdef"), worker, concurrency=3, return_dtype="list[str]") == list("abcdef")


async def test_requests_are_paced_evenly() -> None:
    starts: list[float] = []

    async def worker(prompt: str) -> str:
        starts.append(time.monotonic())
        return prompt

    await ask([str(n) for n in range(11)], worker, rpm_limit=1200)

    assert starts[-1] - starts[0] >= 0.3, "ten pauses of 60 / 1200 s; the first few may come together"


def test_it_works_where_an_event_loop_does_not_run_yet() -> None:
    assert asyncio.run(ask(["a"], Worker(), return_dtype="list[str]")) == ["A"]


async def test_a_simulated_model_answers() -> None:
    rows = await ask(["hello"], model_name="simulated/echo", simulator=FAST, return_dtype="list[str]")

    assert rows == ["echo: hello"]


async def test_the_temperature_goes_to_the_model() -> None:
    async with serving() as provider:
        for temperature in (0.0, 0.5, None):
            await ask(["a"], model="hosted_vllm/m", api_base=provider.url, temperature=temperature)

    assert [asked.body.get("temperature") for asked in provider.requests] == [0.0, 0.5, None]


async def test_an_answer_in_another_form_is_asked_again() -> None:
    class Bullets(BaseModel):
        points: list[str]

    texts = {"good": ["no JSON", '{ "points": ["a"] }'], "bad": ['{"POINTS": []}', '{"points": 1}']}

    def answer(asked: Asked) -> web.Response:
        message = {"role": "assistant", "content": texts[asked.text].pop(0)}
        return web.json_response({"choices": [{"message": message, "finish_reason": "stop"}]})

    async with serving(answer) as provider:
        rows = await ask(
            ["good", "bad"],
            model="hosted_vllm/m",
            api_base=provider.url,
            response_model=Bullets,
            max_attempts=2,
            concurrency=1,
        )

    assert [(row["status"], row["result"]) for row in rows] == [("done", '{"points":["a"]}'), ("missing", None)]
    assert provider.requests[0].body["response_format"]["json_schema"]["name"] == "Bullets"
    assert "does not fit Bullets" in stored()[1][4]


async def test_a_wrong_key_ends_it_and_keeps_the_answers() -> None:
    def answer(asked: Asked) -> Any:
        return shout(asked) if asked.text == "good" else refusal(401, "invalid_api_key")

    async with serving(answer) as provider:
        options: dict[str, Any] = {"model": "hosted_vllm/m", "api_base": provider.url, "concurrency": 1}
        with pytest.raises(SystemicError, match=r"AuthenticationError.*HOSTED_VLLM_API_KEY.*kept in .*runs\.db"):
            await ask(["good", *(f"bad {n}" for n in range(100))], **options)
        asked = len(provider.requests)
        rows = await ask(["good"], **options, return_dtype="list[str]")

    assert asked < 10
    assert len(provider.requests) == asked
    assert rows == ["GOOD"]


# Models by name


async def routed(monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[Asked]:
    """What an OpenRouter of ours was asked."""
    async with serving() as provider:
        monkeypatch.setenv("OPENROUTER_API_BASE", provider.url)
        assert await ask(["hello"], return_dtype="list[str]", **options) == ["HELLO"]
    return provider.requests


async def test_with_an_openrouter_key_a_model_is_openrouters(monkeypatch: pytest.MonkeyPatch) -> None:
    [asked] = await routed(monkeypatch, model_name="openai/gpt-4o-mini", openrouter_api_key="sk-or-1")

    assert asked.body["model"] == "openai/gpt-4o-mini"
    assert asked.headers["Authorization"] == "Bearer sk-or-1"


async def test_model_and_key_may_come_from_the_environment_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".env").write_text("MODEL=openai/gpt-4o-mini\nOPENROUTER_API_KEY=sk-or-2\n")
    monkeypatch.setenv("MODEL", "google/gemini-flash")  # before the file

    [asked] = await routed(monkeypatch)

    assert asked.body["model"] == "google/gemini-flash"
    assert asked.headers["Authorization"] == "Bearer sk-or-2"


async def test_a_model_string_of_litellms_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENROUTER_API_KEY", "sk-or-3")
    async with serving() as provider:
        await ask(["a"], model="hosted_vllm/m", api_base=provider.url)

    assert provider.requests[0].body["model"] == "m"
    assert "sk-or-3" not in provider.requests[0].headers.get("Authorization", "")


# What cannot be done


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "needs something that answers"),
        ({"model": "gpt-4o"}, "has no provider"),
        ({"worker": Worker(), "concurrency": 0}, "concurrency=0"),
        ({"worker": Worker(), "max_attempts": 0}, "max_attempts=0"),
        ({"worker": Worker(), "rpm_limit": 0}, "rpm_limit=0"),
        ({"worker": Worker(), "progress_update_every": 0}, "progress_update_every=0"),
        ({"worker": Worker(), "return_dtype": "pandas"}, "return_dtype='pandas'"),
        ({"worker": Worker(), "output_shape": "odd"}, "output_shape='odd'"),
        ({"worker": Worker(), "prompts": "one text"}, "give a list"),
        ({"worker": Worker(), "prompts": ["a", 1]}, r"prompts\[1\] is of type int"),
        ({"worker": Worker(), "cache_db_url": "postgresql://host/db"}, "cache_db_url=postgresql"),
        ({"worker": Worker(), "results_db_url": "sqlite://"}, "results_db_url='sqlite://'"),
        ({"worker": Worker(), "response_model": 7}, "response_model is of type int"),
        ({"worker": Worker(), "prompts": None}, "prompts is of type NoneType: give a list"),
        ({"worker": Worker(), "prompts": {"a": 1}}, "prompts is of type dict: give a list"),
        ({"worker": Worker(), "concurrency": "5"}, "concurrency='5': a whole number of at least 1"),
        ({"worker": Worker(), "rpm_limit": "5"}, "rpm_limit='5': a number of at least 1, or None for no limit"),
        ({"worker": Worker(), "cache_db_url": 5}, "cache_db_url is of type int"),
        ({"worker": "me"}, "worker is of type str, and not a function"),
        ({"model": "simulated/echo", "temperature": "hot"}, "temperature='hot': a number"),
        ({"model": "simulated/echo", "cache_key": "mine"}, "cache_key names a worker"),
    ],
)
async def test_an_argument_that_cannot_be_used_is_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        await ask(**{"prompts": ["a"], **options})
    assert not DATABASE.exists()


async def test_polars_is_missed_before_anything_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.prompt_rows.find_spec", lambda name: None)
    worker = Worker()

    with pytest.raises(ConfigError, match=r"pip install -e '\.\[polars\]'"):
        await ask(["a"], worker, return_dtype="polars")
    assert worker.asked == []


async def test_a_foreign_database_is_left_alone() -> None:
    with closing(sqlite3.connect("theirs.db")) as database:
        database.execute("CREATE TABLE jobs (key TEXT)")
    before = Path("theirs.db").read_bytes()

    with pytest.raises(StoreError, match=r"cache_db_url: .*nothing was changed.*name another cache_db_url"):
        await ask(["a"], Worker(), cache_db_url="theirs.db")
    assert Path("theirs.db").read_bytes() == before


async def test_the_database_of_a_run_is_left_alone() -> None:
    async with await Store.open(Path("run/results.sqlite")) as store:
        await store.put_meta({"samples": "1"})

    with pytest.raises(StoreError, match="belongs to a run"):
        await ask(["a"], Worker(), cache_db_url="run/results.sqlite")


@pytest.mark.parametrize("table", ["results (mine TEXT)", "users (name TEXT)"])
async def test_results_never_take_the_place_of_what_is_somebody_elses(table: str) -> None:
    with closing(sqlite3.connect("theirs.db")) as database:
        database.execute(f"CREATE TABLE {table}")
    before, worker = Path("theirs.db").read_bytes(), Worker()

    with pytest.raises(StoreError, match=r"theirs\.db holds other tables .*name another results_db_url"):
        await ask(["a"], worker, results_db_url="theirs.db", teardown_results=True)
    assert (Path("theirs.db").read_bytes(), worker.asked) == (before, [])


async def test_results_of_the_library_that_was_used_before_are_replaced() -> None:
    with closing(sqlite3.connect("results.db")) as database, database:
        database.execute("CREATE TABLE results (idx INT, key TEXT, prompt TEXT, status TEXT, result TEXT)")
        database.execute("INSERT INTO results VALUES (0, 'k', 'old', 'done', 'OLD')")
    await ask(["a"], Worker(), results_db_url="results.db")
    assert stored(Path("results.db")) == [(0, "a", "done", "A", None)]


async def test_databases_side_by_side_do_not_meet() -> None:
    await asyncio.gather(*(ask(["a"], Worker(), cache_db_url=f"{name}.db") for name in "abc"))

    assert {stored(Path(f"{name}-results.db"))[0][3] for name in "abc"} == {"A"}


async def test_a_database_in_use_is_refused() -> None:
    async def worker(prompt: str) -> str:
        with pytest.raises(StoreError, match="in use"):
            await ask(["b"], Worker())
        return prompt

    assert await ask(["a"], worker, return_dtype="list[str]") == ["a"]


async def test_results_that_cannot_be_written_leave_the_answers_in_the_cache() -> None:
    def in_the_way(prompt: str) -> bool:
        Path("results.db").mkdir()
        return False

    worker = Worker(fails=in_the_way)
    with pytest.raises(StoreError, match=r"results\.db: the results cannot be written"):
        await ask(["a"], worker, results_db_url="results.db")
    worker.fails = lambda prompt: False
    await ask(["a"], worker)

    assert worker.asked == ["a"]


# Progress


async def test_progress_tells_states_and_the_rolling_rate(capsys: pytest.CaptureFixture[str]) -> None:
    await ask([f"{n % 30}" for n in range(40)], Worker(), progress_update_every=10, concurrency=2, verbose=True)

    first, *lines, last = capsys.readouterr().out.splitlines()
    assert first == "Total: 40 | unique: 30"
    assert last == "Batch complete: 30 done, 0 failed"
    assert lines
    assert all("'done':" in line and "rolling RPM:" in line for line in lines)


async def test_what_was_there_already_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    await ask(["a", "b"], Worker(), teardown=False)
    await ask(["a", "b", "c"], Worker(), verbose=True)

    assert capsys.readouterr().out.splitlines()[-1] == "Batch complete: 3 done (2 were there already), 0 failed"


async def test_it_can_be_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    await ask(["a"], Worker(), verbose=False)

    assert capsys.readouterr() == ("", "")


def test_the_first_arguments_are_where_they_were() -> None:
    names = list(inspect.signature(prompt_map).parameters)

    assert names[:5] == ["prompts", "worker", "model_name", "openrouter_api_key", "response_model"]


async def test_a_misspelt_argument_is_named_with_the_right_one() -> None:
    with pytest.raises(TypeError, match=r"prompt_map\(\) got .* 'modle'\. Did you mean 'model'\?"):
        await prompt_map(["a"], modle="simulated/echo")  # type: ignore[call-arg]
