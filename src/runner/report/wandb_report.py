"""A W&B Report of runs: what the page says in tables, and panels over the runs that W&B has."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from runner.bench.table import evidence, verdict_line, wanted_columns
from runner.comparison import HEADER, Comparison, difference_cells
from runner.composition import of_run
from runner.config import RunnerConfig, TrackerConfig
from runner.errors import ConfigError, RunnerError
from runner.extras import missing
from runner.redaction import Redactor
from runner.report.charts import numeric_key
from runner.report.facts import RunFacts, read_benchmarks, score_names
from runner.report.page import SERVER_HEADER, run_header, run_lines, server_lines
from runner.results import replace_file
from runner.sweep import Sweep
from runner.tracker import group_of, identity_of
from runner.tracker.wandb_service import environment, has_credentials, tear_down, turn

_TITLE_LENGTH = 128

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """Where the report went."""

    url: str | None = None
    spec: Path | None = None  # the file that holds it, where W&B does not
    why: str = ""  # it does not


def check_extra() -> None:
    """See whether W&B Reports can be made at all.

    Raises:
        ConfigError: The extra is not installed.
    """
    try:
        import wandb_workspaces.reports.v2  # noqa: F401
    except ImportError:
        raise missing("--wandb", "report") from None


def publish(
    runs: Sequence[RunFacts], comparisons: Sequence[Comparison], *, paths: Sequence[Path], title: str, spec: Path
) -> Published:
    """Save the report in the W&B project of the first run, or its specification to the file ``spec``.

    The file is written where W&B has no key, cannot be reached, or does not answer within ``tracker.finish_timeout_s``.

    Args:
        paths: What the user asked for; those that are sweeps bring the sweep's own run.

    Raises:
        ConfigError: No run has a configuration that tells its project.
        OSError: The file cannot be written.
    """
    configs = {run.folder: config for run in runs if (config := _config(run)) is not None}
    if not configs:
        raise ConfigError("none of these runs has a configuration that tells its W&B project")
    tracker = next(iter(configs.values())).tracker
    draft = _Draft(runs, comparisons, paths=paths, title=title, configs=configs)

    def save() -> str | None:
        """Where it is saved; None without a key."""
        with TemporaryDirectory(ignore_cleanup_errors=True) as name, turn(Path(name)), environment(Path(name)):
            return _saved(draft, tracker) if has_credentials() else None

    why = "W&B has no API key: set WANDB_API_KEY or run `wandb login`"
    try:
        if url := _within(tracker.finish_timeout_s, save):
            return Published(url=url)
    except TimeoutError:
        why = f"W&B did not answer within {tracker.finish_timeout_s:g} s"
    except Exception as error:  # whatever W&B's libraries raise, the report is not lost
        why = draft.hide.text(" ".join(f"W&B did not take it: {type(error).__name__}: {error}".split()))
    replace_file(spec, draft.specification(tracker.project, tracker.entity or "").encode())
    return Published(spec=spec, why=why)


class _Draft:
    """A report before it is saved."""

    def __init__(
        self,
        runs: Sequence[RunFacts],
        comparisons: Sequence[Comparison],
        *,
        paths: Sequence[Path],
        title: str,
        configs: Mapping[Path, RunnerConfig],
    ) -> None:
        self.hide = Redactor({str(folder): asdict(config) for folder, config in configs.items()})
        self._runs = runs
        self._comparisons = comparisons
        self._title = self.hide.text(title)[:_TITLE_LENGTH]
        self._run_ids = [identity_of(config, folder).wandb_id for folder, config in configs.items()]
        self._sweep_ids = [group_of(sweep) for sweep in map(Sweep, paths) if sweep.cells()]

    def save(self, project: str, entity: str) -> str:
        """Save it to W&B and return its address."""
        report = self._report(project, entity, online=True)
        report.save()
        return str(report.url)

    def specification(self, project: str, entity: str) -> str:
        """The report as JSON, as it would be saved. Asks nobody."""
        report = self._report(project, entity, online=False)
        return str(report._to_model().model_dump_json(by_alias=True, exclude_none=True, indent=2))

    def _report(self, project: str, entity: str, *, online: bool) -> Any:
        import wandb_workspaces.reports.v2 as wr

        place = {"project": project, "entity": entity} if online else {}

        def runs_of(name: str, ids: Sequence[str]) -> Any:
            return wr.Runset(name=name, filters=f"Metric('ID') in {list(ids)!r}", **place)

        blocks: list[Any] = [wr.MarkdownBlock(text) for text in self._texts()]
        blocks += [wr.H2("Runs"), wr.PanelGrid(runsets=[runs_of("runs", self._run_ids)], panels=self._panels())]
        if self._sweep_ids:
            table = wr.WeavePanelSummaryTable(table_name="cells", layout=wr.Layout(w=24, h=12))
            blocks += [wr.H2("Cells"), wr.PanelGrid(runsets=[runs_of("sweep", self._sweep_ids)], panels=[table])]
        return wr.Report(project=project, entity=entity, title=self._title, blocks=blocks, width="fluid")

    def _texts(self) -> Iterator[str]:
        """What the page says in tables, as Markdown."""
        yield self._table(run_header(self._runs), run_lines(self._runs))
        for run in self._runs:
            if lines := server_lines(run):
                yield f"### {self._text(f'Servers of {run.label}')}\n\n{self._table(SERVER_HEADER, lines)}"
        for benchmark in read_benchmarks(self._runs):
            header, lines = wanted_columns(benchmark.levels)
            conclusion = [verdict_line(benchmark.verdict), *evidence(benchmark.verdict)]
            shown = conclusion if len(benchmark.levels) > 1 else []
            yield "\n\n".join([f"### {self._text(benchmark.name or 'Levels')}", self._table(header, lines), *shown])
        for each in self._comparisons:
            heading = f"### {self._text(f'{each.first} → {each.second}')}"
            found = each.refusal or self._table(HEADER, [difference_cells(one) for one in each.differences])
            yield "\n\n".join([heading, found, *([each.note] if each.note else [])])

    def _panels(self) -> list[Any]:
        import wandb_workspaces.reports.v2 as wr

        bars = {
            "Throughput": ["requests_per_s"],
            "Latency": ["latency/p50", "latency/p95", "latency/p99"],
            "Cost": ["cost/usd"],
            "Failed": ["failed"],
            **{f"Score: {name}": [f"scores/{name}"] for name in score_names(self._runs)},
        }
        panels: list[Any] = [
            wr.BarPlot(title=title, metrics=[wr.SummaryMetric(metric) for metric in metrics])
            for title, metrics in bars.items()
        ]
        if key := numeric_key(self._runs):
            panels += [
                wr.ScatterPlot(title=f"{title} over {key}", x=wr.Config(key), y=wr.SummaryMetric(metric))
                for title, metric in (("Throughput", "requests_per_s"), ("Latency p95", "latency/p95"))
            ]
        return panels

    def _table(self, header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
        rows = [header, ["---"] * len(header), *([self._text(cell) for cell in line] for line in lines)]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)

    def _text(self, text: str) -> str:
        """Any text as one line of Markdown that shows it as it is, without its secrets."""
        plain = " ".join(self.hide.text(text).split())
        return "".join(f"\\{letter}" if letter in "\\`*_[]<>|#" else letter for letter in plain)


def _config(run: RunFacts) -> RunnerConfig | None:
    with suppress(RunnerError, OSError, ValueError):
        return of_run(run.folder)
    return None


def _saved(draft: _Draft, tracker: TrackerConfig) -> str:
    import wandb

    return draft.save(tracker.project, tracker.entity or wandb.Api().default_entity)


def _within(limit_s: float, call: Callable[[], _T]) -> _T:
    """What ``call`` returns, on a thread that is left behind if it takes longer than that."""
    done: Future[_T] = Future()

    def work() -> None:
        try:
            done.set_result(call())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=work, name="runner-wandb-report", daemon=True).start()
    try:
        return done.result(timeout=limit_s)
    except TimeoutError:
        tear_down()
        raise
