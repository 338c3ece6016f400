"""Weights & Biases."""

from __future__ import annotations

import asyncio
import logging
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from runner.charts import Chart
from runner.config import TrackerConfig, TrackerMode
from runner.redaction import Redactor
from runner.tracker.presentation import flat, sample_table, shown, wandb_artifact
from runner.tracker.records import Ending, Table, Tracker
from runner.tracker.wandb_service import environment, has_credentials, tear_down, turn

logger = logging.getLogger(__name__)

PENDING_POINTS = 10_000
"""Points that wait for W&B before the oldest are dropped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """As which run it appears."""

    run_id: str  # a run with the same one goes on
    name: str  # what people call it
    group: str | None = None  # what it belongs to; tracker.group goes before it
    job_type: str | None = None  # what it is in its group

    @property
    def wandb_id(self) -> str:
        """The ``run_id`` in the letters and the length that W&B takes. Its end tells runs apart."""
        return re.sub(r"[^\w.-]+", "-", self.run_id, flags=re.ASCII)[-64:].strip("-")


class WandbTracker:
    """Weights & Biases. One daemon thread makes all its calls.

    To import and start it takes a second or two, and a server may hang: so `log` only queues (`PENDING_POINTS`, then
    the oldest are dropped), and a W&B that does not end in time is left behind. Without credentials, or where
    the server cannot be reached, the run is kept offline for ``wandb sync``.

    At the end it gets the summary, the tables (`sample_table` of the rows, and others), the charts, and an artifact of
    type ``results`` with the given files. All of it is redacted, save for the files.

    Args:
        inner: Gets everything as well.
        folder: The run's folder, absolute. All that W&B writes is under ``wandb`` in it.
        away: See `open_tracker`.
    """

    def __init__(
        self,
        inner: Tracker,
        config: TrackerConfig,
        *,
        mode: TrackerMode,
        folder: Path,
        identity: Identity,
        settings: Mapping[str, Any],
        hide: Redactor,
        away: Path | None = None,
    ) -> None:
        self._inner = inner
        self._config = config
        self._mode = mode
        self._folder = folder
        self._identity = identity
        self._settings = hide(settings)
        self._hide = hide
        self._away = away
        self._points: deque[dict[str, Any]] = deque(maxlen=PENDING_POINTS)
        self._ending: Ending | None = None
        self._changed = threading.Condition()  # guards the two above
        self._path = folder / "wandb"  # what `wandb sync` takes; narrowed once the run has begun
        self._troubles: set[str] = set()
        self._left_behind = False
        self._teardown: threading.Thread | None = None
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
            self._teardown = threading.Thread(target=tear_down, name="runner-wandb-left", daemon=True)
            self._teardown.start()
            await asyncio.sleep(0.1)

    def _work(self) -> None:
        try:
            with turn(self._folder):
                try:
                    self._track()
                finally:
                    if self._teardown is not None:  # it must not meet the next run
                        self._teardown.join()
        except Exception as error:
            if not self._left_behind:
                logger.warning("W&B does not track this run, metrics.jsonl does: %s", self._reason(error))
        finally:
            self._ended.set_result(None)

    def _track(self) -> None:
        with environment(self._folder):
            run = self._begin()
        while isinstance(item := self._next(), dict):
            self._attempt("a point", run.log, item)
        with environment(self._folder):
            self._end(run, item)

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
        if self._mode is not TrackerMode.offline and not self._is_away():
            try:
                if self._has_credentials():
                    return self._init("online")
            except Exception as error:
                logger.warning("W&B cannot be used online, so the run is kept offline: %s", self._reason(error))
                self._note_away()
                tear_down()  # the failed run still holds its id
        return self._init("offline")

    def _is_away(self) -> bool:
        if self._away is None or not self._away.exists():
            return False
        logger.info("W&B could not be reached a moment ago, so the run is kept offline")
        return True

    def _note_away(self) -> None:
        if self._away is not None:
            with suppress(OSError):
                self._away.touch()

    def _has_credentials(self) -> bool:
        found = has_credentials()
        if not found and self._mode is TrackerMode.online:
            logger.warning("W&B has no API key, so the run is kept offline: set WANDB_API_KEY or run `wandb login`")
        return found

    def _init(self, mode: Literal["online", "offline"]) -> Any:
        import wandb

        patience_s = max(self._config.finish_timeout_s, 1.0)
        run = wandb.init(
            id=self._identity.wandb_id,
            resume="allow",
            reinit="finish_previous",
            mode=mode,
            dir=str(self._folder),
            project=self._config.project,
            entity=self._config.entity,
            group=self._hide.text(self._config.group or self._identity.group or "")[:128] or None,
            job_type=self._identity.job_type,
            tags=[self._hide.text(tag)[:64] for tag in self._config.tags if tag],
            name=self._hide.text(self._identity.name)[:128],
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
        hide = self._hide
        self._attempt("the summary", lambda: run.summary.update(flat(hide(ending.summary))))
        for name, piece in _pieces(ending, hide):
            self._attempt(name, self._show, run, name, piece)
        if files := [path for path in ending.artifacts if path.is_file()]:
            self._attempt("the results", self._keep, run, files)
        try:
            run.finish(exit_code=ending.exit_code)
            if run.offline:
                logger.info("W&B: kept offline; `wandb sync %s` uploads it", self._path)
        except TimeoutError:
            self._leave_behind()

    def _show(self, run: Any, name: str, piece: Table | Chart) -> None:
        run.log({name: shown(piece, self._hide)})

    def _keep(self, run: Any, files: Sequence[Path]) -> None:
        name = f"results-{self._identity.wandb_id}"
        run.log_artifact(wandb_artifact(name, files, folder=self._folder, offline=run.offline))

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
        self._note_away()
        logger.warning(
            "W&B did not end within %g s and is left behind. metrics.jsonl has the time series;"
            " `wandb sync %s` uploads what W&B has written",
            self._config.finish_timeout_s,
            self._path,
        )

    def _reason(self, error: Exception) -> str:
        return self._hide.text(" ".join(f"{type(error).__name__}: {error}".split()))


def _pieces(ending: Ending, hide: Redactor) -> Iterator[tuple[str, Table | Chart]]:
    """What is shown beside the summary, with the key under which it is."""
    if ending.samples:
        yield "samples", sample_table(ending.samples, hide)
    yield from ending.tables.items()
    for chart in ending.charts:
        yield f"charts/{chart.title}", chart


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
