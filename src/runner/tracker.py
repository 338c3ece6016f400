"""Where a run's numbers go: always a local JSON-lines file, and Weights & Biases where it is wanted.

Both are projections of the store, which is the truth: trouble in here costs the run a line in its log, nothing else.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Protocol

import orjson

from runner.config import SECRET_KEYS, TrackerConfig, TrackerKind, TrackerMode
from runner.private import open_private

logger = logging.getLogger(__name__)

PENDING_POINTS = 10_000
"""Points that wait for W&B before the oldest are dropped."""

TABLE_TEXT = 2_000
"""Characters of a text that the sample table shows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """What is tracked when a run has ended."""

    summary: Mapping[str, Any]  # the content of summary.json
    samples: Sequence[Mapping[str, Any]] = ()  # result rows as in results.jsonl, at most tracker.table_rows
    artifacts: Sequence[Path] = ()  # files to keep with the run, as they are
    exit_code: int


class Tracker(Protocol):
    """Takes down what a run does. Neither method raises."""

    def log(self, metrics: Mapping[str, float]) -> None:
        """One point of the time series, with ``elapsed_s`` as its x axis. Returns at once."""
        ...

    async def finish(self, ending: Ending) -> None:
        """The end of the run. Takes ``tracker.finish_timeout_s`` at most."""
        ...


def open_tracker(
    config: TrackerConfig, *, folder: Path, name: str, run_id: str, settings: Mapping[str, Any]
) -> Tracker:
    """Start to track the run in ``folder``. Returns at once: W&B starts on a thread of its own.

    ``WANDB_MODE`` decides what ``tracker.mode=auto`` leaves open, and ``disabled`` there switches W&B off in any case.

    Args:
        name: What people call the run.
        run_id: The identity under which W&B resumes it.
        settings: The whole configuration as plain data; secrets in it are kept from all that is tracked.
    """
    hide = Redactor(settings)
    local = LocalTracker(folder / "metrics.jsonl", hide=hide)
    mode = None if config.kind == TrackerKind.none else _mode(TrackerMode(config.mode))
    if mode is None:
        return local
    return WandbTracker(
        local, config, mode=mode, folder=folder.resolve(), name=name, run_id=run_id, settings=settings, hide=hide
    )


def redact(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of ``settings`` as plain JSON data without its secrets; see `Redactor`."""
    plain: dict[str, Any] = Redactor(settings)(settings)
    return plain


class Redactor:
    """Copies data as plain JSON data, with ``***`` in place of secrets.

    Secret are:

    - what stands under a key that `config.SECRET_KEYS` marks, however it is spelt (``apiKey``, ``X-API-Key``), save
      for a key ``…_env`` that names an existing environment variable;
    - user names, passwords and key parameters in URLs;
    - anywhere in a text, from 8 characters on: the values found under such keys in ``settings``, and those of
      environment variables that such a ``…_env`` names or whose name has KEY, TOKEN, SECRET or PASSWORD in it.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        secrets = {value for name, value in os.environ.items() if _SECRET_VARIABLE.search(name)}
        secrets.update(_secrets_in(settings))
        longest_first = sorted((value for value in secrets if len(value) >= 8), key=len, reverse=True)
        self._secrets = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def __call__(self, value: Any) -> Any:
        if isinstance(value, Enum):
            value = value.value
        if value is None or isinstance(value, bool | int | float):
            return value
        if isinstance(value, Mapping):
            return {self.text(str(key)): self._entry(key, entry) for key, entry in value.items()}
        if isinstance(value, Sequence | Set) and not isinstance(value, str | bytes):
            return [self(entry) for entry in value]
        return self.text(str(value))

    def _entry(self, key: Any, value: Any) -> Any:
        hidden = value and _is_secret_key(key) and not _is_variable(key, value)
        return "***" if hidden else self(value)

    def text(self, text: str) -> str:
        text = _URL_USER.sub("", text)
        text = _URL_KEY.sub(r"\1***", text)
        return self._secrets.sub("***", text) if self._secrets else text


class LocalTracker:
    """Appends each point to a JSON-lines file, and at the end ``{"summary": …}``.

    A line that was logged is in the operating system's hands, so a killed process loses none. A resumed run goes on
    in the same file.
    """

    def __init__(self, path: Path, *, hide: Redactor) -> None:
        self._path = path
        self._hide = hide
        self._start = b""
        self._warned = False
        with suppress(OSError), path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":  # a machine that lost its power may have left half a line
                self._start = b"\n"

    def log(self, metrics: Mapping[str, float]) -> None:
        self._append(metrics)

    async def finish(self, ending: Ending) -> None:
        self._append({"summary": self._hide(ending.summary)})

    def _append(self, line: Mapping[str, Any]) -> None:
        try:
            with open_private(self._path, "a", buffering=0) as file:
                file.write(self._start + orjson.dumps(dict(line), default=str) + b"\n")
            self._start = b""
        except Exception as error:
            if not self._warned:
                logger.warning("%s cannot be written: %s", self._path, error)
            self._warned = True


class WandbTracker:
    """Weights & Biases. One daemon thread makes all its calls.

    To import and start it takes a second or two, and a server may hang: so `log` only queues (`PENDING_POINTS`, then
    the oldest are dropped), and a W&B that does not end in time is left behind. Without credentials, or where
    the server cannot be reached, the run is kept offline for ``wandb sync``.

    At the end it gets the summary, a table of the sample rows, in which texts are cut to `TABLE_TEXT` characters, and
    an artifact of type ``results`` with the given files. Rows and summary are redacted, the files are not.

    Args:
        inner: Gets everything as well.
        folder: The run's folder, absolute. All that W&B writes is under ``wandb`` in it.
    """

    def __init__(
        self,
        inner: Tracker,
        config: TrackerConfig,
        *,
        mode: TrackerMode,
        folder: Path,
        name: str,
        run_id: str,
        settings: Mapping[str, Any],
        hide: Redactor,
    ) -> None:
        self._inner = inner
        self._config = config
        self._mode = mode
        self._folder = folder
        self._name = name
        self._id = re.sub(r"[^\w.-]+", "-", run_id, flags=re.ASCII).strip("-")[:64]
        self._settings = hide(settings)
        self._hide = hide
        self._points: deque[dict[str, Any]] = deque(maxlen=PENDING_POINTS)
        self._ending: Ending | None = None
        self._changed = threading.Condition()  # guards the two above
        self._path = folder / "wandb"  # what `wandb sync` takes; narrowed once the run has begun
        self._troubles: set[str] = set()
        self._left_behind = False
        self._ended: Future[None] = Future()
        threading.Thread(target=self._work, name="runner-wandb", daemon=True).start()

    def log(self, metrics: Mapping[str, float]) -> None:
        self._inner.log(metrics)
        with self._changed:
            self._points.append({f"ts/{key.removeprefix('ts/')}": value for key, value in metrics.items()})
            self._changed.notify()

    async def finish(self, ending: Ending) -> None:
        await self._inner.finish(ending)
        with self._changed:
            self._ending = ending
            self._changed.notify()
        ended, _ = await asyncio.wait([asyncio.wrap_future(self._ended)], timeout=self._config.finish_timeout_s)
        if not ended:
            self._leave_behind()
            # W&B's hook at the interpreter's exit would go on waiting. This removes the hook, and leaves its service
            # process to flush and end by itself.
            threading.Thread(target=_tear_down, name="runner-wandb-teardown", daemon=True).start()
            await asyncio.sleep(0.1)

    def _work(self) -> None:
        try:
            with self._environment():
                run = self._begin()
            while isinstance(item := self._next(), dict):
                self._attempt("a point", run.log, item)
            with self._environment():
                self._end(run, item)
        except Exception as error:
            if not self._left_behind:
                logger.warning("W&B does not track this run, metrics.jsonl does: %s", self._reason(error))
        finally:
            self._ended.set_result(None)

    def _next(self) -> dict[str, Any] | Ending:
        """The oldest point or, after the last one, the ending."""
        with self._changed:
            while not self._points:
                if self._ending is not None:
                    return self._ending
                self._changed.wait()
            return self._points.popleft()

    def _begin(self) -> Any:
        """A run, online if it can be."""
        if self._mode is not TrackerMode.offline:
            try:
                if self._has_credentials():
                    return self._init("online")
            except Exception as error:
                logger.warning("W&B cannot be used online, so the run is kept offline: %s", self._reason(error))
                _tear_down()  # the failed run still holds its id
        return self._init("offline")

    def _has_credentials(self) -> bool:
        """Whether W&B itself finds some: its variables, its settings, netrc. Asks neither the server nor the user."""
        import wandb

        found = bool(wandb.login(verify=False, prompt=False))
        if not found and self._mode is TrackerMode.online:
            logger.warning("W&B has no API key, so the run is kept offline: set WANDB_API_KEY or run `wandb login`")
        return found

    def _init(self, mode: Literal["online", "offline"]) -> Any:
        import wandb

        patience_s = max(self._config.finish_timeout_s, 1.0)
        run = wandb.init(
            id=self._id,
            resume="allow",
            reinit="finish_previous",
            mode=mode,
            dir=str(self._folder),
            project=self._config.project,
            entity=self._config.entity,
            group=self._config.group and self._hide.text(self._config.group),
            tags=[self._hide.text(tag)[:64] for tag in self._config.tags if tag],
            name=self._hide.text(self._name),
            config=self._settings,
            settings={
                **_PRIVATE,
                "init_timeout": min(30.0, patience_s / 2),  # leaves time for the offline run
                "finish_timeout": patience_s,
                "finish_timeout_raises": True,
            },
        )
        self._path = Path(run.dir).parent
        # W&B's own step would drop points that a resumed run logs again.
        run.define_metric("ts/*", step_metric="ts/elapsed_s")
        if mode == "online":
            logger.info("W&B: %s", run.url)
        return run

    def _end(self, run: Any, ending: Ending) -> None:
        self._attempt("the summary", lambda: run.summary.update(_flat(self._hide(ending.summary))))
        if ending.samples:
            self._attempt("the sample table", lambda: run.log({"samples": self._table(ending.samples)}))
        if ending.artifacts:
            self._attempt("the results", lambda: run.log_artifact(self._artifact(ending.artifacts, run.offline)))
        try:
            run.finish(exit_code=ending.exit_code)
            if run.offline:
                logger.info("W&B: kept offline; `wandb sync %s` uploads it", self._path)
        except TimeoutError:
            self._leave_behind()
        finally:
            _tear_down()

    def _table(self, samples: Sequence[Mapping[str, Any]]) -> Any:
        import wandb

        rows: list[dict[str, Any]] = json.loads(orjson.dumps(list(samples), default=str))
        cells = [_cells(self._hide(row)) for row in rows]
        columns = list(dict.fromkeys(name for row in cells for name in row))
        data = [[row.get(name) for name in columns] for row in cells]
        return wandb.Table(columns=columns, data=data, allow_mixed_types=True, log_mode="IMMUTABLE")

    def _artifact(self, files: Sequence[Path], offline: bool) -> Any:
        import wandb

        artifact = wandb.Artifact(f"results-{self._id}", type="results")
        # An offline artifact is uploaded later, when a resumed run may have replaced the file: it needs a copy.
        policy = "mutable" if offline else "immutable"
        for file in map(Path.resolve, files):
            if file.is_file():
                name = str(file.relative_to(self._folder)) if file.is_relative_to(self._folder) else file.name
                artifact.add_file(str(file), name=name, policy=policy, skip_cache=True)
        return artifact

    def _attempt(self, what: str, call: Callable[..., object], *args: Any) -> None:
        """Make one call of W&B, unless it was left behind. What fails, again and again perhaps, is told once."""
        if self._left_behind:
            return
        try:
            call(*args)
        except Exception as error:
            if what not in self._troubles and not self._left_behind:
                logger.warning("W&B did not take %s: %s", what, self._reason(error))
            self._troubles.add(what)

    def _leave_behind(self) -> None:
        if self._left_behind:
            return
        self._left_behind = True
        logger.warning(
            "W&B did not end within %g s and is left behind. metrics.jsonl has the time series;"
            " `wandb sync %s` uploads what W&B has written",
            self._config.finish_timeout_s,
            self._path,
        )

    def _reason(self, error: Exception) -> str:
        return self._hide.text(" ".join(f"{type(error).__name__}: {error}".split()))

    @contextmanager
    def _environment(self) -> Iterator[None]:
        """W&B's variables for as long as it is called: no setting of its own says where it keeps data and cache.

        ``WANDB_CONFIG_DIR`` stays the user's: there are the server and the credentials.
        """
        wanted = {
            "WANDB_DATA_DIR": str(self._folder / "wandb" / "data"),
            "WANDB_CACHE_DIR": str(self._folder / "wandb" / "cache"),
            "WANDB_ERROR_REPORTING": "false",
            "WANDB_SILENT": "true",
            "WANDB_MODE": None,  # an unknown one is an error, and `mode=` says it anyway
            "WANDB_SERVICE": None,  # another process's service may be gone
        }
        before = {name: os.environ.get(name) for name in wanted}
        _set_environment(wanted)
        try:
            yield
        finally:
            _set_environment(before)


_PRIVATE: dict[str, Any] = {
    "silent": True,
    "console": "off",
    "disable_git": True,
    "disable_code": True,
    "save_code": False,
    "label_disable": True,
    "x_disable_meta": True,
    "x_disable_machine_info": True,
    "x_disable_stats": True,
    "x_save_requirements": False,
    "host": "redacted",
    "program": "runner",
}
"""Neither prints nor uploads anything but what is logged: no command line, code, git remote, host or packages."""

_MODES = {
    "online": TrackerMode.online,
    "run": TrackerMode.online,
    "shared": TrackerMode.online,
    "offline": TrackerMode.offline,
    "dryrun": TrackerMode.offline,
}


def _mode(configured: TrackerMode) -> TrackerMode | None:
    """The mode that holds. None: W&B is switched off."""
    wish = os.environ.get("WANDB_MODE", "").strip().lower()
    if wish == "disabled":
        return None
    if wish and wish not in _MODES:
        logger.warning("WANDB_MODE=%s is ignored: it knows online, offline and disabled", wish)
    return _MODES.get(wish, configured) if configured is TrackerMode.auto else configured


def _tear_down() -> None:
    with suppress(Exception, SystemExit):
        import wandb

        wandb.teardown()


def _set_environment(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _flat(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The summary under W&B's keys: ``tokens/total``, ``cost/usd``, ``latency/p95``, ``scores/NAME``. No unknowns."""
    flat: dict[str, Any] = {}
    for key, value in summary.items():
        if key == "scores":
            for name, score in value.items():
                known = score if isinstance(score, Mapping) else {"mean": score}
                flat |= {f"scores/{name}": known.get("mean"), f"scores/{name}/n": known.get("n")}
        elif key == "deployments":
            for label, deployment in value.items():
                flat |= _flat({f"{key}/{label}/{name}": entry for name, entry in deployment.items()})
        elif isinstance(value, Mapping):
            flat |= {f"{key.removesuffix('_s')}/{part}": entry for part, entry in value.items()}
        else:
            flat[re.sub("^cost_", "cost/", key)] = value
    return {key: value for key, value in flat.items() if value is not None}


def _cells(row: Mapping[str, Any]) -> dict[str, Any]:
    """A result row as cells of the sample table, by column."""
    usage = row.get("token_usage") or {}
    metrics = row.get("metrics") or {}
    error = row.get("error")
    columns: dict[str, Any] = {"_index": row.get("_index")}
    columns |= {name: row[name] for name in ("_sample", "input") if name in row}
    columns |= {
        "metadata": json.dumps(row.get("metadata") or {}, ensure_ascii=False),
        "output_text": row.get("output_text", row.get("text")),
        "error": f"{error['type']}: {error['message']}" if error else None,
    }
    columns |= {f"scores/{name}": score for name, score in (row.get("scores") or {}).items()}
    columns |= {name: usage.get(name) for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
    columns |= {name: metrics.get(name) for name in ("service_time_s", "end_to_end_s", "cost_usd")}
    return {name: _cell(value) for name, value in columns.items()}


def _cell(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= TABLE_TEXT else f"{text[:TABLE_TEXT]}…"


_SECRET_VARIABLE = re.compile("KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)

# Bounded and anchored, so that they stay linear on any text.
_URL_USER = re.compile(r"(?<=://)[^/?#\s\"'<>]+@")
_URL_KEY = re.compile(r"([?&][\w.-]{0,40}(?:key|token|secret|password)[\w.-]{0,40}=)[^&#\s\"'<>]+", re.IGNORECASE)


def _is_secret_key(key: Any) -> bool:
    spelt = re.sub(r"[^a-z]", "", str(key).lower())
    return any(part.replace("_", "") in spelt for part in SECRET_KEYS)


def _is_variable(key: Any, value: Any) -> bool:
    return str(key).endswith("_env") and isinstance(value, str) and value in os.environ


def _secrets_in(value: Any, *, secret: bool = False) -> Iterator[str]:
    """The texts under secret keys, and the values of the variables that ``…_env`` keys name."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            if _is_variable(key, entry):
                yield os.environ[entry]
            else:
                yield from _secrets_in(entry, secret=secret or _is_secret_key(key))
    elif isinstance(value, str):
        if secret:
            yield value
    elif isinstance(value, Sequence):
        for entry in value:
            yield from _secrets_in(entry, secret=secret)
