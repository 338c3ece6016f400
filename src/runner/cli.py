"""The command: Hydra composes the configuration, this module turns it into runs, folders and exit codes."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from runner.arguments import quoted
from runner.checks import unshared
from runner.complaints import explain
from runner.composition import (
    composed_cells,
    conf_folder,
    first_cell,
    is_multirun,
    joined,
    left_to_multirun,
    load_environment,
    planned,
    prepared,
    sweep_folder,
    swept_by,
    swept_keys,
    typed,
)
from runner.config import DatasetKind, Resume, RunnerConfig, TaskKind
from runner.errors import (
    BAD_CONFIG,
    FINISHED,
    SOME_FAILED,
    STOPPED,
    BudgetExhausted,
    ConfigError,
    Interrupted,
    RowError,
    RunnerError,
    StoreError,
)
from runner.help import help_text, version_text
from runner.lifeline import end_with_launcher, tie_workers
from runner.private import for_owner_only, keep_private
from runner.progress import printable, say, summary_table, sweep_table, write
from runner.signals import Preempted, first_signal, preemption
from runner.sweep import Cell, Sweep

if TYPE_CHECKING:
    from runner.experiment import Report

CELLS_FAILED = 1
BUG = 70  # EX_SOFTWARE

_BAD_INPUT = (HydraException, OmegaConfBaseException, YAMLError, RunnerError, OSError, ValueError)
"""What a configuration that cannot be composed raises."""

_SHOWN_ANSWERS = 3
"""A run without a dataset, or over files, shows its answers if there are no more."""

_LOOK_S = 0.5

_CHECK_S = 2.0
"""Seconds for a look at a sweep's later cells before the first one runs."""

_SHARD = "dataset.shard.index"
"""A sweep over this key has shards for cells."""

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if {"--help", "-h"} & set(arguments):
        write(sys.stdout, help_text([conf_folder(), Path("conf")]))
        return 0
    if "--version" in arguments:
        write(sys.stdout, version_text())
        return 0
    if {"-sc", "--shell-completion"} & set(arguments):
        sys.argv[0] = "runner"  # what is completed is the script's name, not `python` and all that it starts
    with for_owner_only():
        return _main(arguments)


def _main(arguments: list[str]) -> int:
    logging.raiseExceptions = False  # a log that cannot be written (the disk is full) is no reason for a traceback
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions come here, instead of being printed
    try:
        arguments = prepared(arguments)
        if _asks_for_a_plan(arguments):
            return _plan(arguments)
        sweep, swept = _begin_sweep(arguments) if is_multirun(arguments) else (None, [])
    except _BAD_INPUT as error:
        return _complain(explain(error))
    if sweep is not None:
        tie_workers()
        arguments += [f"sweep.folder={quoted(str(sweep.folder))}", f"sweep.over={json.dumps(swept)}"]
    sys.argv[1:] = arguments
    ended: list[int] = []

    @hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="config")
    def task(composed: DictConfig) -> dict[str, Any]:
        cell = run_cell(composed)
        ended.append(cell["exit_code"])
        return cell

    exit_code = 0
    try:
        with first_signal(sweep.stop) if sweep is not None and sweep.is_parallel else nullcontext():
            task()
    except _BAD_INPUT as error:
        exit_code = _complain(explain(error))
    except KeyboardInterrupt:
        exit_code = 130
    except Exception as error:
        if sweep is None:
            raise
        exit_code = _launcher_failed(error, sweep)
        _wait_for_others(sweep)
    else:
        if sweep is not None:
            sweep.end()
    if sweep is not None:
        exit_code = _conclude_sweep(sweep, exit_code)
        _track_sweep(sweep, exit_code)
        return exit_code
    return ended[0] if ended else exit_code


def _begin_sweep(arguments: Sequence[str]) -> tuple[Sweep, list[str]]:
    """The sweep of a command line and the keys that it is over; warns of what its processes would not keep together.

    Says at once which of the later cells cannot be run.

    Raises:
        ConfigError: They are to share what is nowhere, or there is but one cell and it cannot be run.
    """
    from runner.experiment import check_experiment

    first = first_cell(arguments)
    swept = swept_keys(first, arguments)
    launcher = first.hydra.runtime.choices["hydra/launcher"]
    load_environment(first.env_file)
    try:
        config = typed(first)
        if not swept:
            check_experiment(config)
    except ConfigError:
        if not swept:
            raise  # else the cell says so itself, and the others go on
    else:
        for warning in unshared(config, launcher):
            say(sys.stderr, warning)
    if not swept:
        say(sys.stderr, _ONE_CELL)
    sweep = Sweep(sweep_folder(first, arguments), is_parallel=launcher != "basic")
    if not sweep.is_parallel:
        _warn_of_cells(arguments)
    sweep.begin()
    return sweep, swept


_ONE_CELL = (
    "-m, but one cell: no key has several values. A comma separates them, as in request.temperature=0,1; texts with"
    """ commas, colons or braces need quotes of their own: 'prompt="Sort: {{ text }}","Label: {{ text }}"'"""
)


def _warn_of_cells(arguments: Sequence[str]) -> None:
    """Say now which of the later cells will not run, as far as a moment tells, and not when hours of others are over.

    The first one says so itself at once.
    """
    from runner.experiment import check_experiment

    until = time.monotonic() + _CHECK_S
    told: set[str] = set()
    for number, (swept, composed) in enumerate(composed_cells(arguments)):
        try:
            check_experiment(typed(composed))
        except ConfigError as error:
            if number and str(error) not in told:
                say(sys.stderr, f"{printable(joined(swept))} will not run: {printable(str(error))}")
            told.add(str(error))
        except KeyboardInterrupt:
            raise
        except BaseException:  # from a function of the user's; its cell says so
            pass
        if time.monotonic() > until:
            break


def _warn_of_multirun(job: HydraConf, overrides: Sequence[str]) -> None:
    for note in left_to_multirun(job, overrides):
        say(sys.stderr, printable(note))


def _wait_for_others(sweep: Sweep) -> None:
    """Where a launcher gives up at the first job that it lost, the others go on: they are not left to themselves."""
    from runner.database import RUN_DATABASE, is_locked

    with first_signal(sweep.stop):
        while any(cell.exit_code is None and is_locked(Path(cell.folder, RUN_DATABASE)) for cell in sweep.cells()):
            time.sleep(_LOOK_S)


def _asks_for_a_plan(arguments: Sequence[str]) -> bool:
    wanted = [
        value.lower() for key, _, value in (each.partition("=") for each in arguments) if key.lstrip("+") == "plan"
    ]
    return wanted[-1:] in (["true"], ["yes"], ["on"], ["1"])


def _plan(arguments: Sequence[str]) -> int:
    """Explain what each cell would do, and all of them together."""
    from runner.plan import make_plan, together

    def end(signum: int) -> None:
        say(sys.stderr, f"runner: {Interrupted(signum)}")
        raise SystemExit(128 + signum)  # so that the copies that were planned in are removed

    _calm_garbage_collector()
    if not is_multirun(arguments):
        _warn_of_multirun(first_cell(arguments).hydra, arguments)
    plans = []
    with first_signal(end):
        for name, config, folder in planned(arguments):
            plan = asyncio.run(make_plan(config, folder))
            say(sys.stdout, f"{printable(name or str(folder))}\n{plan}\n")
            plans.append(plan)
    if len(plans) > 1:
        say(sys.stdout, f"{len(plans)} runs together\n{together(plans)}\n")
    write(sys.stdout, "Nothing was sent. Without plan=true the same command does it.\n")
    return FINISHED


def run_cell(composed: DictConfig) -> dict[str, Any]:
    """Run one composed configuration in its folder and say how it ended. Raises nothing but an interrupt.

    Returns:
        Its `Cell` as plain data, which any launcher carries.
    """
    end_with_launcher()
    job = HydraConfig.get()
    keep_private(Path(job.runtime.output_dir))
    sweep = None
    if composed.sweep.folder:
        sweep = Sweep(Path(composed.sweep.folder), is_parallel=job.runtime.choices["hydra/launcher"] != "basic")
    own = dict(swept_by(job.overrides.task, composed.sweep.over))
    is_shard = _SHARD in own and composed.task.kind is not TaskKind.bench
    cell = Cell(
        number=job.job.num if sweep else 0,
        name=joined(own),
        folder=job.runtime.output_dir,
        shard=composed.dataset.shard.index if is_shard else None,
        shards=composed.dataset.shard.count,
        whole=joined({key: value for key, value in own.items() if key != _SHARD}),
    )
    if sweep is None:
        _warn_of_multirun(job, job.overrides.task)
    else:
        say(sys.stdout, f"\n#{cell.number}  {printable(cell.name)}")
        sweep.note(cell)
    if sweep is not None and (signum := sweep.stopped_by) is not None:
        cell = replace(cell, exit_code=128 + signum, message="not begun")
    else:
        with preemption():
            cell = _ended(cell, composed, sweep)
    if sweep is not None:
        sweep.note(cell)
        if cell.exit_code is not None and cell.exit_code > 128 and not sweep.is_parallel:
            raise KeyboardInterrupt  # ends the sweep too; where each cell has a process, the others go on
    return asdict(cell)


def _ended(cell: Cell, composed: DictConfig, sweep: Sweep | None) -> Cell:
    """Run the cell, whatever comes."""
    folder = Path(cell.folder)
    try:
        report = _run(composed, folder)
    except (ConfigError, StoreError) as error:
        logger.error(error)
        message = str(error)
        told = _first_with(message, sweep)
        return replace(cell, exit_code=_complain(message if told is None else f"as in #{told}"), message=message)
    except (KeyboardInterrupt, Preempted):
        raise
    except BaseException as error:  # a bug, or sys.exit in a function of the user's, which would end the other cells
        whose = "a function of yours ends the process" if isinstance(error, SystemExit) else "this is a fault of runner"
        message = f"{type(error).__name__}: {error}; {whose}, see {_keep_traceback(folder)}"
        _complain(message)
        return replace(cell, exit_code=BUG, message=message)
    if report.message:
        logger.warning(report.message)
    return replace(cell, exit_code=report.exit_code, message=report.message, summary=dict(report.summary))


def _first_with(message: str, sweep: Sweep | None) -> int | None:
    """The number of the cell that has said so already."""
    with suppress(StoreError):
        return next((cell.number for cell in sweep.cells() if cell.message == message), None) if sweep else None
    return None


def _launcher_failed(error: Exception, sweep: Sweep) -> int:
    """Say why a multirun ended before its cells: a worker was killed, a cluster gave up, or somebody ended it."""
    if (signum := sweep.stopped_by) is not None:  # workers without a cell die of it, and the launcher of that
        write(sys.stderr, "interrupted: the same command goes on.\n")
        return 128 + signum
    first = str(error).strip().partition("\n")[0]
    _complain(f"the launcher failed with {type(error).__name__}: {first}; see {_keep_traceback(sweep.folder)}")
    say(sys.stderr, "Cells that are done are kept: the same command goes on with the others.")
    return CELLS_FAILED


def _keep_traceback(folder: Path) -> Path:
    """Of the exception that is being handled."""
    path = folder / "traceback.txt"
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(traceback.format_exc(), encoding="utf-8")
    return path


def _run(composed: DictConfig, folder: Path) -> Report:
    """Run the experiment, or the benchmark, and show what came of it."""
    from runner.experiment import run_experiment

    load_environment(composed.env_file)
    config = typed(composed)
    _calm_garbage_collector()
    if config.task.kind is TaskKind.bench:
        return _run_bench(config, folder)
    report = asyncio.run(run_experiment(config, folder, settings=asdict(config)))
    if report.summary:
        shown = config.dataset.kind in (DatasetKind.single, DatasetKind.files)
        if shown and report.summary["rows"] <= _SHOWN_ANSWERS:
            _show_answers(folder / "results.jsonl")
        summary_table(report.summary, results=Path(os.path.relpath(folder / "results.jsonl")))
    _say_why(report, config)
    return report


def _run_bench(config: RunnerConfig, folder: Path) -> Report:
    from runner.bench import run_bench
    from runner.bench.sweeps import gather
    from runner.bench.table import show_levels

    report = asyncio.run(run_bench(config, folder, settings=asdict(config)))
    for found in gather([Cell(number=0, name="", folder=str(folder), summary=report.summary)]):
        show_levels(found.levels, found.verdict, stream=sys.stdout)
    write(sys.stdout, f"results  {os.path.relpath(folder / 'bench.json')}\n")
    _say_why(report, config)
    return report


def _say_why(report: Report, config: RunnerConfig) -> None:
    if not report.message:
        return
    has_failed = report.exit_code == SOME_FAILED
    is_data = has_failed and report.summary.get("errors", {}).keys() == {RowError.__name__}
    if is_data:
        again = "asks these rows, once they are mended"
    else:
        again = "asks the failed rows again" if has_failed else "goes on from here"
    conditions = {
        "resume=auto": config.resume is Resume.fresh,
        "retry_failed=true": has_failed and not is_data and not config.retry_failed,
        "a larger budget": _is_spent(report),
    }
    before = ["once that is mended"] if report.exit_code == STOPPED and not _is_spent(report) else []
    if needed := " and ".join(condition for condition, holds in conditions.items() if holds):
        before.append(f"with {needed}")
    said = ", ".join([*before, f"the same command {again}."])
    say(sys.stderr, f"{printable(report.message)}\n{said[0].upper()}{said[1:]}")


def _is_spent(report: Report) -> bool:
    return report.summary.get("stopped") == BudgetExhausted.reason


def _calm_garbage_collector() -> None:
    """Let it look at what a run makes, not at the libraries loaded before, and seldom: records die by themselves.

    Its threshold is above what some thousand requests in flight consist of, so that these are not looked at again and
    again.
    """
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)


def _show_answers(results: Path) -> None:
    for line in results.read_bytes().splitlines():  # as text, an answer's own U+2028 would end a line
        row = json.loads(line)
        error = row["error"]
        text = f"{error['type']}: {error['message']}" if error else _answer_in(row)
        write(sys.stdout, "\n".join(map(printable, text.splitlines())) + "\n\n")


def _answer_in(row: Mapping[str, Any]) -> str:
    if "embedding" in row:
        vector = row["embedding"]
        return f"[{', '.join(f'{value:.4f}' for value in vector[:4])}, …] ({len(vector)} numbers)"
    return str(row["text"] if "text" in row else row["output_text"])


def _conclude_sweep(sweep: Sweep, exit_code: int) -> int:
    """Show the cells of a multirun side by side, and return the exit code of the whole."""
    cells = sweep.cells()
    if not cells:
        return exit_code
    sweep_table([asdict(cell) for cell in cells])
    _show_benchmarks(sweep, cells)
    merged = _merge_shards(sweep)
    _show_differences([cell for cell in cells if cell.shard is None])
    exit_codes: set[int | None] = {exit_code, merged, *(cell.exit_code for cell in cells)}
    if interrupted := {code for code in exit_codes if code is not None and code > 128}:
        return max(interrupted)
    return CELLS_FAILED if exit_codes - {FINISHED, SOME_FAILED} else FINISHED


def _show_benchmarks(sweep: Sweep, cells: Sequence[Cell]) -> None:
    """Gather the levels of the cells into one table for each model, prompt and so on."""
    from runner.bench.sweeps import compare_benchmarks, gather, write_gathered
    from runner.bench.table import show_levels
    from runner.comparison import show_comparisons

    if found := gather(cells):
        for each in found:
            write(sys.stdout, f"\n{printable(each.name)}\n" if each.name else "\n")
            show_levels(each.levels, each.verdict, stream=sys.stdout)
        show_comparisons(compare_benchmarks(found), stream=sys.stdout)
        write_gathered(found, sweep.folder / "bench.json")
        write(sys.stdout, f"results  {os.path.relpath(sweep.folder / 'bench.json')}\n")


def _merge_shards(sweep: Sweep) -> int:
    """Make one run of the cells that went through one dataset together; returns an exit code."""
    from runner.shards import find_shards, merge

    for shards in find_shards(sweep):
        try:
            summary = asyncio.run(merge(shards))
        except (StoreError, OSError) as error:
            return _complain(f"{shards.folder}: the shards were not merged: {error}")
        write(sys.stdout, f"\n{printable(shards.name) or 'all shards'}\n")
        summary_table(summary, results=Path(os.path.relpath(shards.folder / "results.jsonl")))
        if shards.unfinished:
            write(sys.stderr, f"{len(shards.unfinished)} of {shards.count} shards are not finished\n")
    return FINISHED


def _show_differences(cells: Sequence[Cell]) -> None:
    """Compare the cells with the first one, row by row."""
    from runner.comparison import compare, is_run, show_comparisons

    ended = [(cell.name, Path(cell.folder)) for cell in cells if cell.exit_code in (FINISHED, SOME_FAILED)]
    if len(runs := [run for run in ended if is_run(run[1])]) > 1:
        try:
            show_comparisons(asyncio.run(compare(runs)), stream=sys.stdout)
        except StoreError as error:
            logger.warning(error)


def _track_sweep(sweep: Sweep, exit_code: int) -> None:
    from runner.overview import track_sweep

    track_sweep(sweep, exit_code=exit_code)


def _complain(message: str) -> int:
    say(sys.stderr, f"runner: {printable(message)}")
    return BAD_CONFIG
