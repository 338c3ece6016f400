"""What the acceptance tests share: the command in a clean environment, and a provider that does as it is told."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from aiohttp import ClientSession, web

from runner.config import DatasetConfig, DatasetKind, RetryConfig, RunnerConfig, TrackerConfig, TrackerKind
from runner.database import APPLICATION_ID
from runner.experiment import Report, run_experiment
from runner.plan import Plan, make_plan
from runner.simulator.body import read_form
from runner.store import Key, Outcome, Store

TOP = Path(__file__).resolve().parents[1]
SOURCES = TOP / "src"

Json: TypeAlias = dict[str, Any]


def shipped(folder: str) -> list[Path]:
    """The files below a folder of the checkout, without those that its user has added, as the README has it."""
    git = ("git", "ls-files", "-z", folder)
    try:
        listed = subprocess.run(git, cwd=TOP, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return [path for path in (TOP / folder).rglob("*") if path.is_file()]
    return [path for name in listed.split("\0") if name and (path := TOP / name).exists()]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """How a command ended. A negative exit code is the signal that killed it."""

    exit_code: int
    out: str
    err: str


class Command:
    """``python -m runner`` in a folder of its own, with nothing of ours in its environment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "PYTHONPATH": str(SOURCES),
            "PYTHONWARNINGS": "error::ResourceWarning",
            "COLUMNS": "120",
        }

    async def __call__(self, *arguments: str, **environment: str) -> Finished:
        """Run it to its end."""
        async with self.running(*arguments, **environment) as process:
            async with asyncio.timeout(60):
                out, err = await process.communicate()
        assert process.returncode is not None
        return Finished(exit_code=process.returncode, out=out.decode(), err=err.decode())

    @asynccontextmanager
    async def running(self, *arguments: str, **environment: str) -> AsyncIterator[asyncio.subprocess.Process]:
        """Start it; kill it if it is left running."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "runner",
            *arguments,
            cwd=self.folder,
            env={**self.environment, **environment},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            yield process
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGKILL)
                await process.communicate()

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def write_rows(self, name: str, rows: Iterable[Any]) -> Path:
        return self.write(name, "".join(f"{json.dumps(row)}\n" for row in rows))

    def runs(self) -> list[Path]:
        """The run folders that were made."""
        return sorted(path.parent for path in self.folder.glob("runs/*/*/runner.log"))

    def run(self) -> Path:
        """The only one."""
        [folder] = self.runs()
        return folder


class Experiment:
    """A configuration that is run again and again in one folder, with changes."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder = folder / "run"
        self._rows = folder / "rows.jsonl"
        self._settings = settings

    async def __call__(self, rows: list[Json] | None = None, **changes: Any) -> Report:
        return await run_experiment(self._configured(rows, changes), self.folder)

    async def plan(self, rows: list[Json] | None = None, **changes: Any) -> Plan:
        return await make_plan(self._configured(rows, changes), self.folder)

    def _configured(self, rows: list[Json] | None, changes: Mapping[str, Any]) -> RunnerConfig:
        if rows is not None:
            self._rows.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        settings: dict[str, Any] = {
            "model": "openai_like/m",
            "dataset": DatasetConfig(kind=DatasetKind.jsonl, path=str(self._rows)),
            "tracker": TrackerConfig(kind=TrackerKind.none),
            "retry": RetryConfig(base_s=0.01),
        }
        return RunnerConfig(**{**settings, **self._settings, **changes})

    def texts(self) -> list[str | None]:
        return [row["output_text"] for row in read_rows(self.folder)]


async def save(store: Store, position: int, outcome: Outcome, scores: str | None = None) -> None:
    """Hand in what came of one row. Where the outcome has no ticket (0), it gets the row's."""
    if not outcome.ticket:
        outcome = outcome._replace(ticket=(await key_of(store, position))[1])
    await store.save_all([(position, outcome, scores)])


async def key_of(store: Store, position: int) -> Key:
    """What a claimed row is called in the books."""
    [row] = [row async for row in store.query("SELECT content, ticket FROM rows WHERE position = ?", (position,))]
    return row["content"], row["ticket"]


def version_1(path: Path) -> None:
    """A store as the first version left it: killed, with three rows answered, one failed and one in flight.

    Two of the rows ask the same.
    """
    schema = (Path(__file__).parent / "data" / "schema_1.sql").read_text(encoding="utf-8")
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as database:
        database.executescript(f"PRAGMA journal_mode = WAL; {schema}")
        database.executescript(f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = 1")
        database.executescript(
            """
            INSERT INTO meta VALUES ('samples', '1'), ('scorers', 'x');
            INSERT INTO sessions VALUES (1, 100.0, 110.0, 111.0), (2, 200.0, 210.0, NULL);
            INSERT INTO rows VALUES (0, x'00', 0, '{"n":0}', '{"exact":1}', 101.0),
                (1, x'01', 0, '{"n":1}', NULL, 102.0), (2, x'02', 0, '{"n":2}', NULL, 103.0),
                (3, x'03', 0, '{"n":3}', NULL, 201.0), (4, x'00', 1, '{"n":4}', NULL, 104.0);
            INSERT INTO answers (content, occurrence, settled_at, output_text, error_type, retries, queue_wait_s,
                service_time_s, end_to_end_s, cost_usd)
            VALUES (x'00', 0, 105.0, 'zero', NULL, 0, 0, 1, 1, 0.25), (x'01', 0, 105.0, 'one', NULL, 0, 0, 1, 1, 0.25),
                (x'02', 0, 105.0, NULL, 'Timeout', 2, 0, 1, 1, NULL), (x'00', 1, 105.0, 'more', NULL, 0, 0, 1, 1, 0.25);
            INSERT INTO attempts (content, occurrence, error_type) VALUES (x'02', 0, 'Timeout');
            """
        )


def numbered(count: int) -> list[Json]:
    return [{"prompt": f"row {index}"} for index in range(count)]


async def progress_of(process: asyncio.subprocess.Process) -> bytes:
    """The next line of a run's progress; notes are passed over."""
    assert process.stderr is not None
    while b"rows/s" not in (line := await process.stderr.readline()):
        assert line, "the run ended"
    return line


def read_rows(folder: Path) -> list[Json]:
    lines = (folder / "results.jsonl").read_bytes().splitlines()
    return [json.loads(line) for line in lines]


def read_summary(folder: Path) -> Json:
    summary: Json = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return summary


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request as a provider got it."""

    path: str
    headers: Mapping[str, str]
    body: Json

    @property
    def text(self) -> str:
        """The last message, or the input as it is."""
        messages = self.body.get("messages")
        asked = messages[-1]["content"] if messages else self.body.get("prompt", self.body.get("input"))
        return str(asked)


@dataclass(slots=True)
class Provider:
    """An OpenAI-compatible server that remembers what it was asked, and answers as ``answer`` says, or so late."""

    answer: Callable[[Asked], web.Response | float]
    requests: list[Asked] = field(default_factory=list)
    url: str = ""

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        asked = Asked(path=request.path, headers=request.headers, body=await _body(request))
        self.requests.append(asked)
        await asyncio.sleep(0.001 * (len(self.requests) * 7 % 5))  # answers overtake each other
        answer = self.answer(asked)
        if isinstance(answer, float):
            await asyncio.sleep(answer)
            answer = shout(asked)
        return answer


async def _body(request: web.BaseRequest) -> Json:
    """The fields of a request, be it JSON or a form; a file in a form is (name, content)."""
    raw = await request.read()
    boundary = re.search("boundary=(.*)", request.headers.get("content-type", ""))
    body: Json = read_form(raw, boundary[1].encode()) if boundary else json.loads(raw or b"{}")
    return body


def shout(asked: Asked) -> web.Response:
    """The answer to anything: the same in capitals; a vector of its length, or a file's name and content."""
    if asked.path == "/v1/embeddings":
        texts = asked.body["input"]
        data = [{"index": place, "embedding": [float(len(text)), 0.5]} for place, text in enumerate(texts)]
        words = sum(len(text.split()) for text in texts)
        return web.json_response(
            {"data": data, "model": "m-1", "usage": {"prompt_tokens": words, "total_tokens": words}}
        )
    if asked.path == "/v1/audio/transcriptions":
        name, content = asked.body["file"]
        return web.json_response({"text": f"{name}: {content.decode()}", "language": "english", "duration": 1.5})
    text = asked.text.upper()
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    if asked.path == "/v1/responses":
        message = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}]}
        counts = {"input_tokens": 3, "output_tokens": 2, "total_tokens": 5}
        return web.json_response(
            {"id": "resp_1", "model": "m-1", "status": "completed", "output": [message], "usage": counts}
        )
    if asked.path == "/v1/completions":
        choice: Json = {"index": 0, "text": text, "finish_reason": "stop"}
    else:
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return web.json_response({"id": "chat-1", "model": "m-1", "choices": [choice], "usage": usage})


def refusal(status: int, code: str, message: str = "no") -> web.Response:
    """An error in OpenAI's form."""
    return web.json_response({"error": {"message": message, "type": "error", "code": code}}, status=status)


@asynccontextmanager
async def serving(answer: Callable[[Asked], web.Response | float] = shout) -> AsyncIterator[Provider]:
    """A provider that listens on a free port of this host."""
    provider = Provider(answer)
    server = web.Server(provider.handle, access_log=None)
    listener = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
    provider.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/v1"
    try:
        yield provider
    finally:
        listener.close()
        await server.shutdown(timeout=0.1)
        await listener.wait_closed()


async def get(url: str) -> Json:
    """The JSON at ``url``."""
    async with ClientSession() as session, session.get(url) as response:
        document: Json = await response.json()
        return document
