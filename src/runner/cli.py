"""The command: Hydra composes the configuration, this module turns it into runs, folders and exit codes."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import hydra
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from runner.arguments import friendly
from runner.checks import check_secrets, unknown_key_message, unknown_keys
from runner.complaints import explain
from runner.config import DatasetKind, RunnerConfig
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
    _register()
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
    own = [f"{key}={value}" for key, value in _swept(job.overrides.task, job.sweeper)] if swept else []
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


def typed(composed: DictConfig) -> RunnerConfig:
    """The composed configuration as an object.

    Raises:
        ConfigError: A key is unknown, or a value is missing.
    """
    content = _plain(composed)
    content.pop("hydra", None)
    for path in unknown_keys(content):
        raise ConfigError(unknown_key_message(path))
    missing = sorted(OmegaConf.missing_keys(OmegaConf.create(content)))
    if missing:
        raise ConfigError(f"{' and '.join(missing)} must be set: {missing[0]}=…")
    try:
        config = OmegaConf.to_object(OmegaConf.merge(RunnerConfig, content))
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from None
    assert isinstance(config, RunnerConfig)
    return config


def conf_folder() -> Path:
    """The shipped configuration: beside the package in a wheel, at the top of a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "conf", package.parents[1] / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise ConfigError(f"runner's configuration is missing from {package}: install it again")


class UserConf(SearchPathPlugin):
    """Finds the user's own ``./conf`` too. Appended, so that a stranger's config.yaml never replaces ours."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        own = Path.cwd() / "conf"
        if own.is_dir() and own.resolve() != conf_folder():
            search_path.append(provider="user", path=f"file://{own}")


@dataclass
class _Composed(RunnerConfig):
    """What Hydra composes into. Entries under names of the user's own get their types in `typed`."""

    deployments: dict[str, Any] = field(default_factory=dict)
    scorers: dict[str, Any] = field(default_factory=dict)


def _register() -> None:
    Plugins.instance().register(UserConf)
    ConfigStore.instance().store(name="schema", node=_Composed)
    OmegaConf.register_new_resolver("run_id", _run_id, replace=True)
    OmegaConf.register_new_resolver("package_data", _package_data, replace=True)


def _run_id(*, _root_: DictConfig) -> str:
    """The ``${run_id:}`` of the folder's name. Sees first whether the run can begin, so that a bad one makes no folder.

    In a sweep, a bad cell has a folder, and the other cells go on.
    """
    from runner.experiment import check_experiment
    from runner.identity import run_id

    job = _root_.hydra
    if job.mode is RunMode.MULTIRUN:
        try:
            config = typed(_root_)
        except ConfigError:
            return f"rejected-{job.job.num}"
        check_secrets(config)  # Hydra would write them into the cell's folder
        return run_id(config, swept=dict(_swept(job.overrides.task, job.sweeper)))
    _load_environment(_root_.env_file)
    config = typed(_root_)
    try:
        check_experiment(config)
    except RunnerError:
        raise
    except Exception:  # a bug: the run will meet it too, in a folder for its traceback
        logger.debug("the check failed", exc_info=True)
    return run_id(config)


def _package_data(name: str) -> str:
    return str(resources.files("runner").joinpath("data", name))


def _swept(overrides: Sequence[str], sweeper: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The overrides that differ between the cells of this multirun, in a cell's own list of overrides."""
    keys = set(sweeper.get("params") or ())
    keys |= {argument.partition("=")[0] for argument in sys.argv[1:] if _is_sweep(argument)}
    for override in overrides:
        key, _, value = override.partition("=")
        if key in keys:
            yield key.lstrip("+"), value


def _is_sweep(argument: str) -> bool:
    if argument.startswith("-") or "=" not in argument:
        return False
    return bool(OverridesParser.create().parse_override(argument).is_sweep_override())


def _run(composed: DictConfig, folder: Path) -> tuple[int, Mapping[str, Any]]:
    """Run the experiment and show what came of it; its exit code and summary."""
    from runner.experiment import run_experiment

    _load_environment(composed.env_file)
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


def _plain(config: DictConfig) -> dict[str, Any]:
    """A configuration as plain data, nothing resolved."""
    content = OmegaConf.to_container(config, resolve=False, enum_to_str=True)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def _load_environment(path: str) -> None:
    from dotenv import load_dotenv

    if Path(path).is_file():
        try:
            load_dotenv(path)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"env_file={path}: it cannot be read ({error})") from None


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
