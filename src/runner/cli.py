"""The command: Hydra composes the configuration, this module turns it into runs, folders and exit codes."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from runner.arguments import friendly
from runner.complaints import explain
from runner.composition import conf_folder, load_environment, register, swept_by, typed
from runner.config import DatasetKind
from runner.errors import BAD_CONFIG, FINISHED, SOME_FAILED, ConfigError, RunnerError, StoreError
from runner.help import help_text, version_text
from runner.progress import printable, summary_table, sweep_table, write

CELLS_FAILED = 1
BUG = 70  # EX_SOFTWARE

_CELLS = "RUNNER_CELLS"
"""Environment variable: the file in which cells note how they ended, whichever process they run in."""

_SHOWN_ANSWERS = 3
"""A run without a dataset shows its answers if there are no more."""

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
    register()
    logging.raiseExceptions = False  # a log that cannot be written (the disk is full) is no reason for a traceback
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions come here, instead of being printed
    try:
        sys.argv[1:] = list(friendly(arguments))
    except ConfigError as error:
        return _complain(str(error))

    @hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="config")
    def task(composed: DictConfig) -> dict[str, Any]:
        return run_cell(composed)

    exit_code = 0
    with NamedTemporaryFile("r", prefix="runner-", encoding="utf-8") as notes:
        os.environ[_CELLS] = notes.name
        try:
            task()
        except (HydraException, OmegaConfBaseException, YAMLError, RunnerError, OSError, ValueError) as error:
            exit_code = _complain(explain(error))
        except KeyboardInterrupt:
            exit_code = 130
        cells = [json.loads(line) for line in notes]
    if any(cell["swept"] for cell in cells):
        return _conclude_sweep(cells, exit_code)
    return int(cells[0]["exit_code"]) if cells else exit_code


def run_cell(composed: DictConfig) -> dict[str, Any]:
    """Run one composed configuration in its folder and say how it ended. Raises nothing but an interrupt.

    Returns:
        ``cell`` (what sets it apart), ``swept``, ``exit_code`` and ``summary``: plain data, which any launcher carries.
    """
    job = HydraConfig.get()
    folder = Path(job.runtime.output_dir)
    swept = job.mode is RunMode.MULTIRUN
    own = [f"{key}={value}" for key, value in swept_by(job.overrides.task, job.sweeper)] if swept else []
    name = " ".join(own or job.overrides.task)
    summary: Mapping[str, Any] = {}
    if swept:
        write(sys.stdout, f"\n#{job.job.num}  {printable(name)}\n")
    try:
        exit_code, summary = _run(composed, folder)
    except (ConfigError, StoreError) as error:
        exit_code = _complain(str(error))
        logger.error(error)
    except Exception as error:  # a bug: said in one line, with the traceback in the folder
        (folder / "traceback.txt").write_text(traceback.format_exc(), encoding="utf-8")
        _complain(f"{type(error).__name__}: {error}; this is a fault of runner, see {folder / 'traceback.txt'}")
        exit_code = BUG
    cell = {"cell": name, "swept": swept, "exit_code": exit_code, "summary": dict(summary)}
    if path := os.environ.get(_CELLS):  # a worker on another host may have none
        with open(path, "a", encoding="utf-8") as notes:
            notes.write(f"{json.dumps(cell)}\n")
    if exit_code > 128 and swept:
        raise KeyboardInterrupt  # ends the sweep too
    return cell


def _run(composed: DictConfig, folder: Path) -> tuple[int, Mapping[str, Any]]:
    """Run the experiment and show what came of it; its exit code and summary."""
    from runner.experiment import run_experiment

    load_environment(composed.env_file)
    config = typed(composed)
    _calm_garbage_collector()
    report = asyncio.run(run_experiment(config, folder, settings=asdict(config)))
    if report.summary:
        if config.dataset.kind is DatasetKind.single and report.summary["rows"] <= _SHOWN_ANSWERS:
            _show_answers(folder / "results.jsonl")
        summary_table(report.summary, results=Path(os.path.relpath(folder / "results.jsonl")))
    if report.message:
        again = "asks the failed rows again" if report.exit_code == SOME_FAILED else "goes on from here"
        write(sys.stderr, f"{printable(report.message)}\nThe same command {again}.\n")
    return report.exit_code, report.summary


def _calm_garbage_collector() -> None:
    """Let it look at what a run makes, not at the libraries loaded before, and seldom: records die by themselves."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 100)


def _show_answers(results: Path) -> None:
    for line in results.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        error = row["error"]
        text = f"{error['type']}: {error['message']}" if error else row["output_text"]
        write(sys.stdout, "\n".join(map(printable, text.splitlines())) + "\n\n")


def _conclude_sweep(cells: Sequence[Mapping[str, Any]], exit_code: int) -> int:
    """Show the cells of this multirun side by side, and return the exit code of the whole."""
    sweep_table(cells)
    exit_codes: set[int] = {exit_code, *(cell["exit_code"] for cell in cells)}
    if interrupted := {code for code in exit_codes if code > 128}:
        return max(interrupted)
    return CELLS_FAILED if exit_codes - {FINISHED, SOME_FAILED} else 0


def _complain(message: str) -> int:
    write(sys.stderr, f"runner: {message}\n")
    return BAD_CONFIG
