from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from runner.charts import Bar, Bars, Lines, Series
from runner.config import TrackerConfig, TrackerKind, TrackerMode
from runner.tracker import PENDING_POINTS, TABLE_TEXT, Ending, Identity, Tracker, open_tracker
from wandb_fake import FakeRun, FakeWandb
from wandb_offline import everything_below, offline_runs

CANARY = "sk-canary-5f1d0c9ab7e2"
WANDB_KEY = "5eed" * 10

SUMMARY: dict[str, Any] = {
    "rows": 3,
    "succeeded": 2,
    "failed": 1,
    "reused": 0,
    "tokens": {"prompt": 30, "completion": 12, "total": 42, "cached": 8, "reasoning": None},
    "cost_usd": 0.0031,
    "cost_usd_upper_bound": 0.0052,
    "elapsed_s": 7.5,
    "requests_per_s": 0.4,
    "tokens_per_s": 5.6,
    "latency_s": {"p50": 0.1, "p95": 0.2, "p99": 0.3},
    "queue_wait_s": {"p50": 0.0, "p95": 0.01, "p99": 0.02},
    "retries": 2,
    "errors": {"Timeout": 1},
    "scores": {"exact": {"mean": 0.5, "n": 2}, "words": 37.5},
    "stopped": None,
}

ROW: dict[str, Any] = {
    "_index": 0,
    "output_text": "Paris",
    "output_parsed": None,
    "token_usage": {"prompt_tokens": 10, "completion_tokens": 4, "total_tokens": 14},
    "request_id": "r-1",
    "finish_reason": "stop",
    "tool_calls": [],
    "error": None,
    "metadata": {"question": "Capital of France?", "id": 7},
    "scores": {"exact": 1.0},
    "metrics": {"queue_wait_s": 0.0, "service_time_s": 0.1, "end_to_end_s": 0.12, "retries": 0, "cost_usd": 0.001},
}

FAILED_ROW = ROW | {
    "_index": 1,
    "output_text": None,
    "token_usage": None,
    "error": {"type": "Timeout", "message": "no answer in 60 s", "status": None},
    "scores": {},
}


pytestmark = pytest.mark.usefixtures("no_wandb_account")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    path.mkdir()
    return path


def track(
    folder: Path,
    *,
    run_id: str = "abc123",
    name: str = "quickstart",
    settings: dict[str, Any] | None = None,
    **config: Any,
) -> Tracker:
    identity = Identity(run_id=run_id, name=name)
    return open_tracker(TrackerConfig(**config), folder=folder, identity=identity, settings=settings or {})


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_bytes().splitlines()]


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Holds W&B's thread wherever it waits for it, until the test is over at the latest."""
    event = threading.Event()
    yield event
    event.set()


# The local file


def test_a_logged_point_is_in_the_file_at_once(folder: Path) -> None:
    tracker = track(folder, kind=TrackerKind.none)

    tracker.log({"ts/elapsed_s": 1.0, "ts/done": 5})

    assert lines(folder) == [{"ts/elapsed_s": 1.0, "ts/done": 5}]


async def test_the_summary_is_the_last_line(folder: Path) -> None:
    tracker = track(folder, kind=TrackerKind.none)
    tracker.log({"ts/elapsed_s": 1.0})

    await tracker.finish(Ending(summary=SUMMARY, exit_code=0))

    assert lines(folder) == [{"ts/elapsed_s": 1.0}, {"summary": SUMMARY}]


def test_a_resumed_run_goes_on_in_the_same_file(folder: Path) -> None:
    track(folder, kind=TrackerKind.none).log({"ts/elapsed_s": 1.0})
    track(folder, kind=TrackerKind.none).log({"ts/elapsed_s": 2.0})

    assert [line["ts/elapsed_s"] for line in lines(folder)] == [1.0, 2.0]


def test_half_a_line_of_a_crashed_machine_spoils_no_other(folder: Path) -> None:
    (folder / "metrics.jsonl").write_text('{"ts/elapsed_s": 1.0}\n{"ts/ela')

    track(folder, kind=TrackerKind.none).log({"ts/elapsed_s": 2.0})

    assert (folder / "metrics.jsonl").read_text().splitlines()[2] == '{"ts/elapsed_s":2.0}'


async def test_a_file_that_cannot_be_written_is_told_once_and_harms_nothing(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "metrics.jsonl").mkdir()
    tracker = track(folder, kind=TrackerKind.none)

    tracker.log({"ts/elapsed_s": 1.0})
    tracker.log({"ts/elapsed_s": 2.0})
    await tracker.finish(Ending(summary=SUMMARY, exit_code=0))

    assert len(caplog.records) == 1
    assert "metrics.jsonl cannot be written" in caplog.text


@pytest.mark.parametrize("environment", [{}, {"WANDB_MODE": "disabled"}], ids=["tracker=none", "WANDB_MODE=disabled"])
def test_wandb_is_not_even_imported_where_it_is_not_wanted(folder: Path, environment: dict[str, str]) -> None:
    kind = "wandb" if environment else "none"
    code = f"""
import asyncio, sys
from pathlib import Path
from runner.config import TrackerConfig, TrackerKind
from runner.tracker import Ending, Identity, open_tracker
config = TrackerConfig(kind=TrackerKind.{kind})
tracker = open_tracker(config, folder=Path(sys.argv[1]), identity=Identity(run_id="i", name="n"), settings={{}})
tracker.log({{"ts/elapsed_s": 1.0}})
asyncio.run(tracker.finish(Ending(summary={{}}, exit_code=0)))
assert "wandb" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, env={**os.environ, **environment})

    assert [path.name for path in folder.iterdir()] == ["metrics.jsonl"]


# Weights & Biases itself, offline


async def test_an_offline_run_holds_everything_that_was_tracked(folder: Path) -> None:
    results = folder / "results.jsonl"
    results.write_text('{"_index": 0}\n')
    tracker = track(
        folder,
        group="sweep",
        tags=["a", "b"],
        project="my-project",
        settings={"model": "openai/gpt", "limits": {"rpm": None, "concurrency": 8}},
    )
    for second in range(3):
        tracker.log({"ts/elapsed_s": float(second), "done": second * 2})

    await tracker.finish(Ending(summary=SUMMARY, samples=[ROW, FAILED_ROW], artifacts=[results], exit_code=3))

    (run,) = offline_runs(folder)
    assert (run.id, run.name, run.project, run.group, run.tags) == (
        "abc123",
        "quickstart",
        "my-project",
        "sweep",
        ["a", "b"],
    )
    assert run.config["model"] == "openai/gpt"
    assert run.config["limits"] == {"rpm": None, "concurrency": 8}
    points = [point for point in run.history if "ts/done" in point]
    assert [(point["ts/elapsed_s"], point["ts/done"]) for point in points] == [(0.0, 0), (1.0, 2), (2.0, 4)]
    assert run.step_metrics == {"ts/*": "ts/elapsed_s"}
    assert run.artifacts["results-abc123"] == ["results.jsonl"]
    assert run.exit_code == 3


async def test_the_summary_has_the_keys_that_wandb_users_look_for(folder: Path) -> None:
    tracker = track(folder)

    await tracker.finish(Ending(summary=SUMMARY, exit_code=0))

    (run,) = offline_runs(folder)
    assert {key: value for key, value in run.summary.items() if not key.startswith("_")} == {
        "rows": 3,
        "succeeded": 2,
        "failed": 1,
        "reused": 0,
        "tokens/prompt": 30,
        "tokens/completion": 12,
        "tokens/total": 42,
        "tokens/cached": 8,
        "cost/usd": 0.0031,
        "cost/usd_upper_bound": 0.0052,
        "elapsed_s": 7.5,
        "requests_per_s": 0.4,
        "tokens_per_s": 5.6,
        "latency/p50": 0.1,
        "latency/p95": 0.2,
        "latency/p99": 0.3,
        "queue_wait/p50": 0.0,
        "queue_wait/p95": 0.01,
        "queue_wait/p99": 0.02,
        "retries": 2,
        "errors/Timeout": 1,
        "scores/exact": 0.5,
        "scores/exact/n": 2,
        "scores/words": 37.5,
    }


async def test_the_sample_table_shows_rows_with_their_texts_cut(folder: Path) -> None:
    long = ROW | {"_index": 2, "output_text": "x" * (TABLE_TEXT + 1), "metadata": orjson.Fragment('{"id": 9}')}
    tracker = track(folder)

    await tracker.finish(Ending(summary=SUMMARY, samples=[ROW, FAILED_ROW, long], exit_code=0))

    (run,) = offline_runs(folder)
    table = run.tables["samples"]
    first, failed, cut = (dict(zip(table["columns"], row, strict=True)) for row in table["data"])
    assert first == {
        "_index": 0,
        "metadata": '{"question": "Capital of France?", "id": 7}',
        "output_text": "Paris",
        "error": None,
        "scores/exact": 1.0,
        "prompt_tokens": 10,
        "completion_tokens": 4,
        "total_tokens": 14,
        "service_time_s": 0.1,
        "end_to_end_s": 0.12,
        "cost_usd": 0.001,
    }
    assert (failed["output_text"], failed["error"], failed["scores/exact"]) == (
        None,
        "Timeout: no answer in 60 s",
        None,
    )
    assert cut["output_text"] == "x" * TABLE_TEXT + "…"
    assert cut["metadata"] == '{"id": 9}'


async def test_lines_and_bars_of_names_that_begin_alike_are_told_apart(tmp_path: Path) -> None:
    names = [f"{'the same ' * 10}{end} {CANARY}" for end in ("left", "right")]
    lines = Lines(title="l", note="", x="x", y="y", series=[Series(name=name, points=[(1.0, 1.0)]) for name in names])
    bars = Bars(title="b", note="", x="x", values=[Bar(name=name, value=1.0, text="1") for name in names])
    tracker = track(tmp_path, settings={"api_key": CANARY})
    await tracker.finish(Ending(summary={}, charts=[lines, bars], exit_code=0))

    [run] = offline_runs(tmp_path)
    of_lines = [row[1] for row in run.tables["charts/l_table"]["data"]]
    of_bars = [row[0] for row in run.tables["charts/b_table"]["data"]]
    assert of_lines == of_bars
    assert [label.rpartition("…")[2] for label in of_lines] == ["left ***", "right ***"]


async def test_two_runs_in_one_process_stay_apart(tmp_path: Path) -> None:
    for name in ("first", "second"):
        folder = tmp_path / name
        folder.mkdir()
        tracker = track(folder, run_id=name, settings={"cell": name})
        tracker.log({"ts/elapsed_s": 1.0, f"ts/{name}": 1})
        await tracker.finish(Ending(summary={"rows": 1}, samples=[ROW], exit_code=0))

    for name, other in (("first", "second"), ("second", "first")):
        (run,) = offline_runs(tmp_path / name)
        assert (run.id, run.config["cell"], run.exit_code) == (name, name, 0)
        assert any(f"ts/{name}" in point for point in run.history)
        assert not any(f"ts/{other}" in point for point in run.history)
        assert list(
            (tmp_path / name / "wandb" / "data").rglob("tmp*")
        )  # what `wandb sync` needs is in the run's folder


async def test_a_resumed_run_keeps_its_identity(folder: Path) -> None:
    for _ in range(2):
        await track(folder, run_id="cell:1/rate#2").finish(Ending(summary={}, exit_code=0))

    assert [run.id for run in offline_runs(folder)] == ["cell-1-rate-2", "cell-1-rate-2"]


def test_long_names_keep_what_tells_runs_apart() -> None:
    first, second = (Identity(run_id=f"{'long ' * 20}-{end}", name="").wandb_id for end in ("0a1b", "2c3d"))

    assert (first[-5:], second[-5:], len(first)) == ("-0a1b", "-2c3d", 64)


async def test_environment_and_home_are_left_as_they_were(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_CACHE_DIR", "/elsewhere")
    monkeypatch.setenv("WANDB_SERVICE", "3-1-unix-/gone")
    before = dict(os.environ)

    await track(folder).finish(Ending(summary=SUMMARY, samples=[ROW], exit_code=0))

    assert len(offline_runs(folder)) == 1
    assert dict(os.environ) == before
    assert list((tmp_path / "home").iterdir()) == []


def test_wandb_prints_nothing_takes_no_output_and_lets_the_process_exit(tmp_path: Path, folder: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("""
import asyncio, sys, time
from pathlib import Path
from runner.config import TrackerConfig
from runner.tracker import Ending, Identity, open_tracker
tracker = open_tracker(TrackerConfig(), folder=Path(sys.argv[1]), identity=Identity(run_id="i", name="n"), settings={})
while not list(Path(sys.argv[1]).glob("wandb/offline-run-*/*.wandb")):
    time.sleep(0.02)
for _ in range(20):
    time.sleep(0.02)
    print(sys.argv[3])
asyncio.run(tracker.finish(Ending(summary={"rows": 1}, exit_code=0)))
Path(sys.argv[1], "finished").write_text(str(time.time()))
""")
    done = subprocess.run(
        [sys.executable, str(program), str(folder), "--api-key", CANARY], capture_output=True, text=True
    )

    exited_after_s = time.time() - float((folder / "finished").read_text())
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{CANARY}\n" * 20, "")
    assert exited_after_s < 5
    assert len(offline_runs(folder)) == 1
    assert CANARY.encode() not in everything_below(folder)


def test_a_killed_run_keeps_its_points(folder: Path) -> None:
    code = """
import os, signal, sys
from pathlib import Path
from runner.config import TrackerConfig
from runner.tracker import Identity, open_tracker
tracker = open_tracker(TrackerConfig(), folder=Path(sys.argv[1]), identity=Identity(run_id="i", name="n"), settings={})
for second in range(100):
    tracker.log({"ts/elapsed_s": second})
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code, str(folder)], check=False)

    assert [line["ts/elapsed_s"] for line in lines(folder)] == list(range(100))


# Trouble with W&B


async def test_a_wandb_that_does_not_start_costs_one_warning(
    folder: Path, fake: Callable[..., FakeWandb], caplog: pytest.LogCaptureFixture
) -> None:
    def broken(**_: Any) -> None:
        raise RuntimeError("no disk")

    fake(has_key=False, init=broken)
    tracker = track(folder)
    tracker.log({"ts/elapsed_s": 1.0})

    await tracker.finish(Ending(summary=SUMMARY, exit_code=0))

    assert [record.getMessage() for record in caplog.records] == [
        "W&B does not track this run, metrics.jsonl does: RuntimeError: no disk"
    ]
    assert len(lines(folder)) == 2


async def test_a_wandb_that_is_not_installed_costs_one_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)

    await track(folder, mode=TrackerMode.offline).finish(Ending(summary=SUMMARY, exit_code=0))

    assert len(caplog.records) == 1
    assert "W&B does not track this run" in caplog.text


async def test_a_run_that_cannot_begin_online_is_kept_offline(
    folder: Path, fake: Callable[..., FakeWandb], caplog: pytest.LogCaptureFixture
) -> None:
    def unreachable(*, mode: str, **_: Any) -> None:
        if mode == "online":
            raise ConnectionError("host unreachable")

    wandb = fake(init=unreachable)
    tracker = track(folder)
    tracker.log({"ts/elapsed_s": 1.0})

    await tracker.finish(Ending(summary={"rows": 1}, exit_code=0))

    assert wandb.order == ["online", "teardown", "offline", "teardown"]
    assert wandb.runs[0].logged == [{"ts/elapsed_s": 1.0}]
    assert wandb.runs[0].summary == {"rows": 1}
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "kept offline: ConnectionError: host unreachable" in caplog.text


async def test_a_real_server_that_refuses_leaves_a_whole_offline_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    monkeypatch.setenv("WANDB_API_KEY", WANDB_KEY)
    async with server:
        tracker = track(folder)
        tracker.log({"ts/elapsed_s": 1.0})
        await tracker.finish(Ending(summary={"rows": 1}, exit_code=0))

    (run,) = offline_runs(folder)
    assert [point["ts/elapsed_s"] for point in run.history] == [1.0]
    assert (run.summary["rows"], run.exit_code) == (1, 0)
    assert "W&B cannot be used online, so the run is kept offline: CommError" in caplog.text
    assert WANDB_KEY.encode() not in everything_below(folder)


async def test_a_hanging_wandb_neither_blocks_a_point_nor_the_end(
    folder: Path, fake: Callable[..., FakeWandb], gate: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    wandb = fake(init=lambda **_: gate.wait())
    tracker = track(folder, finish_timeout_s=0.05)

    began = time.perf_counter()
    for second in range(1_000):
        tracker.log({"ts/elapsed_s": second})
    await tracker.finish(Ending(summary=SUMMARY, exit_code=0))

    assert time.perf_counter() - began < 2
    assert len(lines(folder)) == 1_001
    assert "did not end within 0.05 s" in caplog.text
    assert f"wandb sync {folder}/wandb" in caplog.text
    assert wandb.order == ["online", "teardown"]


def test_a_hanging_wandb_does_not_keep_the_process_alive(folder: Path) -> None:
    code = """
import asyncio, sys, threading
from pathlib import Path
from types import SimpleNamespace
from runner.config import TrackerConfig, TrackerMode
from runner.tracker import Ending, Identity, open_tracker
hang = lambda **_: threading.Event().wait()
sys.modules["wandb"] = SimpleNamespace(init=hang, teardown=hang)
config = TrackerConfig(mode=TrackerMode.offline, finish_timeout_s=0.05)
tracker = open_tracker(config, folder=Path(sys.argv[1]), identity=Identity(run_id="i", name="n"), settings={})
asyncio.run(tracker.finish(Ending(summary={}, exit_code=0)))
"""
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, timeout=20)


async def test_a_wandb_left_behind_says_no_more(
    folder: Path, fake: Callable[..., FakeWandb], gate: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    ended = threading.Event()

    def hang_and_fail(**_: Any) -> None:
        gate.wait()
        threading.Timer(0.05, ended.set).start()
        raise RuntimeError("service is gone")

    fake(init=hang_and_fail)
    await track(folder, mode=TrackerMode.offline, finish_timeout_s=0.01).finish(Ending(summary=SUMMARY, exit_code=0))
    gate.set()
    ended.wait(5)

    assert len(caplog.records) == 1


async def test_the_oldest_points_are_dropped_where_too_many_wait(
    folder: Path, fake: Callable[..., FakeWandb], gate: threading.Event
) -> None:
    wandb = fake(init=lambda **_: gate.wait())
    tracker = track(folder)
    for second in range(PENDING_POINTS + 5):
        tracker.log({"ts/elapsed_s": second})
    gate.set()

    await tracker.finish(Ending(summary={}, exit_code=0))

    assert [point["ts/elapsed_s"] for point in wandb.runs[0].logged] == list(range(5, PENDING_POINTS + 5))


async def test_what_wandb_refuses_does_not_take_the_rest_along(
    folder: Path,
    fake: Callable[..., FakeWandb],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(_: FakeRun, data: dict[str, Any]) -> None:
        raise ValueError(f"cannot log {', '.join(data)}")

    monkeypatch.setattr(FakeRun, "log", refuse)
    wandb = fake()
    tracker = track(folder)
    tracker.log({"ts/elapsed_s": 1.0})
    tracker.log({"ts/elapsed_s": 2.0})

    await tracker.finish(Ending(summary={"rows": 1}, samples=[ROW], exit_code=3))

    assert wandb.runs[0].summary == {"rows": 1}
    assert wandb.runs[0].exit_code == 3
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "W&B did not take a point: ValueError: cannot log ts/elapsed_s",
        "W&B did not take samples: ValueError: cannot log samples",
    ]


async def test_all_calls_come_from_one_thread(folder: Path, fake: Callable[..., FakeWandb]) -> None:
    wandb = fake()

    await track(folder).finish(Ending(summary={}, exit_code=0))

    assert wandb.threads == {"runner-wandb"}


# Which mode


@pytest.mark.parametrize(
    ("configured", "variable", "has_key", "mode"),
    [
        ("auto", None, True, "online"),
        ("auto", None, False, "offline"),
        ("auto", "", True, "online"),
        ("auto", "offline", True, "offline"),
        ("auto", "dryrun", True, "offline"),
        ("auto", "online", True, "online"),
        ("auto", "online", False, "offline"),
        ("online", None, False, "offline"),
        ("online", "offline", True, "online"),
        ("offline", "online", True, "offline"),
        ("auto", "bogus", True, "online"),
    ],
)
async def test_the_mode_follows_configuration_variable_and_key(
    folder: Path,
    fake: Callable[..., FakeWandb],
    monkeypatch: pytest.MonkeyPatch,
    configured: str,
    variable: str | None,
    has_key: bool,
    mode: str,
) -> None:
    if variable is not None:
        monkeypatch.setenv("WANDB_MODE", variable)
    wandb = fake(has_key=has_key)

    await track(folder, mode=TrackerMode(configured)).finish(Ending(summary={}, exit_code=0))

    assert [call["mode"] for call in wandb.calls] == [mode]


async def test_an_unknown_wandb_mode_is_ignored_with_a_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "bogus")

    await track(folder).finish(Ending(summary={}, exit_code=0))

    assert "WANDB_MODE=bogus is ignored" in caplog.text
    assert len(offline_runs(folder)) == 1


async def test_online_without_a_key_says_what_is_missing(
    folder: Path, fake: Callable[..., FakeWandb], caplog: pytest.LogCaptureFixture
) -> None:
    fake(has_key=False)

    await track(folder, mode=TrackerMode.online).finish(Ending(summary={}, exit_code=0))

    assert "set WANDB_API_KEY" in caplog.text


# Secrets


async def test_a_canary_key_is_in_no_byte_below_the_run_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = "canary-of-an-unsuspicious-variable"
    monkeypatch.setenv("MY_API_KEY", CANARY)
    monkeypatch.setenv("GATEWAY", other)
    monkeypatch.setenv("WANDB_API_KEY", WANDB_KEY)
    settings = {
        "api_base": f"https://user:{CANARY}@host/v1?api_key={CANARY}",
        "deployments": {
            "a": {
                "api_key": CANARY,
                "extra_kwargs": {"extra_headers": {"X-Api-Key": CANARY, "X-Other": f"Bearer {CANARY}"}},
            },
            "b": {"api_key_env": "GATEWAY"},
        },
    }
    echo = f"Incorrect API key provided: {CANARY} or {other}."
    row = ROW | {
        "output_text": echo,
        "metadata": {"note": echo, CANARY: 1},
        "error": {"type": "AuthenticationError", "message": echo, "status": 401},
    }
    tracker = track(
        folder, settings=settings, mode=TrackerMode.offline, tags=[f"key-{CANARY}"], group=echo, name=f"run {CANARY}"
    )
    tracker.log({"ts/elapsed_s": 1.0})

    await tracker.finish(Ending(summary=SUMMARY | {"errors": {echo: 1}, "note": echo}, samples=[row], exit_code=0))

    (run,) = offline_runs(folder)
    assert run.tables["samples"]["data"][0][2] == "Incorrect API key provided: *** or ***."
    assert CANARY.encode() not in everything_below(folder)
    assert other.encode() not in everything_below(folder)
    assert WANDB_KEY.encode() not in everything_below(folder)
