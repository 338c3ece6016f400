"""A stand-in of W&B's API in a process of its own: keeps what it is sent, and shows it under ``/state``.

It knows what the client asks when runs are logged and synced and a report is saved, and nothing else: what it has no
answer for is among ``unknown``.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias
from urllib.parse import quote
from urllib.request import urlopen

from aiohttp import web

Json: TypeAlias = dict[str, Any]

KEY = "5eed" * 10
"""An API key: it takes any."""

ENTITY = "somebody"


@dataclass(slots=True)
class Run:
    """A run, as it was sent."""

    group: str | None = None
    job_type: str | None = None
    name: str | None = None
    tags: list[str] = field(default_factory=list)
    config: Json = field(default_factory=dict)
    history: list[Json] = field(default_factory=list)
    summary: Json = field(default_factory=dict)
    exit_code: int | None = None
    begun: int = 0  # how often
    resumed: int = 0  # how often it was asked where it had stopped, and there was something


@dataclass(slots=True)
class State:
    """All that the server has."""

    runs: dict[str, Run] = field(default_factory=dict)
    artifacts: dict[str, list[str]] = field(default_factory=dict)  # paths in them, by name
    files: dict[str, str] = field(default_factory=dict)  # contents, by place
    reports: list[Json] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


@contextmanager
def wandb_server() -> Iterator[StandIn]:
    """The server at work, until the block ends."""
    process = subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield StandIn(url=process.stdout.readline().strip(), process=process)
    finally:
        process.kill()
        process.communicate()


@dataclass(frozen=True, slots=True, kw_only=True)
class StandIn:
    """The server, as a test sees it."""

    url: str
    process: subprocess.Popen[str]

    @property
    def environment(self) -> dict[str, str]:
        """What leads the client here."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY}

    def pause(self) -> None:
        """Go on listening, and answer nothing."""
        self.process.send_signal(signal.SIGSTOP)

    def wait_for_run(self) -> None:
        """Until a run has begun here."""
        while not self.state().runs:
            time.sleep(0.05)

    def state(self) -> State:
        """All that it has been sent."""
        with urlopen(f"{self.url}/state", timeout=10) as response:
            stored = json.load(response)
        return State(**{**stored, "runs": {name: Run(**run) for name, run in stored["runs"].items()}})


class Server:
    """Answers the client."""

    def __init__(self) -> None:
        self.state = State()
        self.url = ""

    def app(self) -> web.Application:
        app = web.Application(client_max_size=2**26)
        app.router.add_post("/graphql", self.graphql)
        app.router.add_post("/files/{entity}/{project}/{run}/file_stream", self.file_stream)
        app.router.add_put("/upload/{place:.*}", self.upload)
        app.router.add_get("/state", self.show)
        return app

    async def graphql(self, request: web.Request) -> web.Response:
        asked = json.loads(await _body(request))
        name = asked.get("operationName") or re.findall(r"(?:query|mutation)\s+(\w+)", asked["query"])[0]
        variables = asked.get("variables") or {}
        try:
            return web.json_response({"data": getattr(self, f"on_{name}")(variables)})
        except (AttributeError, KeyError, TypeError) as error:
            self.state.unknown.append(f"{name}: {error!r} {asked}")
            return web.json_response({"data": {}, "errors": [{"message": f"what is {name}?"}]}, status=400)

    async def file_stream(self, request: web.Request) -> web.Response:
        sent = json.loads(await _body(request))
        run = self.state.runs.setdefault(request.match_info["run"], Run())
        files = sent.get("files") or {}
        for line in files.get("wandb-history.jsonl", {}).get("content", ()):
            run.history.append(json.loads(line))
        for line in files.get("wandb-summary.json", {}).get("content", ()):
            run.summary = json.loads(line)
        if "exitcode" in sent:
            run.exit_code = sent["exitcode"]
        return web.json_response({"exitcode": None, "limits": {}})

    async def upload(self, request: web.Request) -> web.Response:
        self.state.files[request.match_info["place"]] = (await request.read()).decode(errors="replace")
        return web.Response()

    async def show(self, request: web.Request) -> web.Response:
        return web.json_response(asdict(self.state))

    # Runs

    def on_Viewer(self, _: Json) -> Json:  # noqa: N802
        viewer = {"id": "u1", "username": ENTITY, "entity": ENTITY, "flags": "{}", "teams": {"edges": []}}
        return {"viewer": viewer, "serverInfo": {"cliVersionInfo": {"max_cli_version": "99.0.0"}}}

    def on_ServerFeaturesQuery(self, _: Json) -> Json:  # noqa: N802
        return {"serverInfo": {"features": []}}

    def on_RunResumeStatus(self, asked: Json) -> Json:  # noqa: N802
        run = self.state.runs.get(asked["name"])
        if run is not None:
            run.resumed += 1
        bucket = run and {
            "id": asked["name"],
            "name": asked["name"],
            "summaryMetrics": json.dumps(run.summary),
            "displayName": run.name,
            "logLineCount": 0,
            "historyLineCount": len(run.history),
            "eventsLineCount": 0,
            "historyTail": json.dumps([json.dumps(line) for line in run.history[-1:]]),
            "eventsTail": "[]",
            "config": json.dumps(run.config),
            "tags": run.tags,
            "notes": None,
            "wandbConfig": json.dumps({"t": {}}),  # it has begun
        }
        return {"model": {"id": "p1", "name": asked["project"], "entity": _NAMED, "bucket": bucket}}

    def on_UpsertBucket(self, asked: Json) -> Json:  # noqa: N802
        inserted = asked["name"] not in self.state.runs
        run = self.state.runs.setdefault(asked["name"], Run())
        run.begun += asked.get("groupName") is not None or inserted
        run.group = asked.get("groupName") or run.group
        run.job_type = asked.get("jobType") or run.job_type
        run.name = asked.get("displayName") or run.name
        run.tags = asked.get("tags") or run.tags
        run.config |= json.loads(asked.get("config") or "{}")
        bucket = {
            "id": asked["name"],
            "name": asked["name"],
            "displayName": run.name,
            "config": json.dumps(run.config),
            "project": {"id": "p1", "name": asked["project"], "entity": _NAMED},
            "historyLineCount": len(run.history),
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}

    def on_CreateRunFiles(self, asked: Json) -> Json:  # noqa: N802
        files = [{"name": name, "uploadUrl": self._place(f"{asked['run']}/{name}")} for name in asked["files"]]
        return {"createRunFiles": {"runID": asked["run"], "uploadHeaders": [], "files": files}}

    # Artifacts

    def on_CreateArtifact(self, asked: Json) -> Json:  # noqa: N802
        name = asked["input"]["artifactCollectionName"]
        self.state.artifacts[name] = []
        artifact = {"id": name, "state": "PENDING", "artifactSequence": {"id": name, "latestArtifact": None}}
        return {"createArtifact": {"artifact": artifact}}

    def on_CreateArtifactManifest(self, asked: Json) -> Json:  # noqa: N802
        file = {"id": "f", "name": asked["name"], **self._upload(f"{asked['artifactID']}/{asked['name']}")}
        return {"createArtifactManifest": {"artifactManifest": {"id": "m", "file": file}}}

    def on_CreateArtifactFiles(self, asked: Json) -> Json:  # noqa: N802
        nodes = []
        for spec in asked["input"]["artifactFiles"]:
            self.state.artifacts[spec["artifactID"]].append(spec["name"])
            nodes.append(
                {
                    "id": "f",
                    "name": spec["name"],
                    **self._upload(f"{spec['artifactID']}/{spec['name']}"),
                    "storagePath": None,
                    "artifact": {"id": spec["artifactID"]},
                }
            )
        return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}

    def on_ArtifactType(self, _: Json) -> Json:  # noqa: N802
        return {"project": {"artifact": None}}

    def on_CommitArtifact(self, asked: Json) -> Json:  # noqa: N802
        return {"commitArtifact": {"artifact": {"id": asked["artifactID"], "digest": ""}}}

    # Reports

    def on_GetDefaultEntity(self, _: Json) -> Json:  # noqa: N802
        return {"viewer": {"id": "u1", "defaultEntity": _NAMED, "entity": ENTITY}}

    def on_ProjectInternalId(self, asked: Json) -> Json:  # noqa: N802
        return {"project": {"id": "p1", "internalId": "1"}}

    def on_GetProjects(self, _: Json) -> Json:  # noqa: N802
        page = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
        return {"models": {"pageInfo": page, "edges": []}}

    def on_CreateProject(self, asked: Json) -> Json:  # noqa: N802
        project = {"id": "p1", "name": asked["input"]["name"], "entityName": ENTITY}
        blank = {"description": None, "access": None, "views": None}
        return {"result": {"project": {**project, **blank}, "model": {**project, **blank}, "inserted": True}}

    def on_upsertView(self, asked: Json) -> Json:  # noqa: N802
        self.state.reports.append(asked)
        view = {
            "id": "r1",
            "type": asked["type"],
            "name": asked["name"],
            "displayName": asked["displayName"],
            "description": asked["description"],
            "project": {"id": "p1", "name": asked["projectName"], "entityName": asked["entityName"]},
            "spec": asked["spec"],
        }
        return {"upsertView": {"view": view, "inserted": True}}

    def _upload(self, place: str) -> Json:
        return {"displayName": place, "uploadUrl": self._place(place), "uploadHeaders": []}

    def _place(self, place: str) -> str:
        return f"{self.url}/upload/{quote(place)}"


_NAMED = {"id": "e1", "name": ENTITY}


async def _body(request: web.Request) -> bytes:
    raw = await request.read()
    return gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw


async def _serve() -> None:
    """Serve on a free port of this host, whose address is the first line of the output."""
    server = Server()
    runner = web.AppRunner(server.app(), access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    print(server.url, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve())
