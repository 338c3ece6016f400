"""The command: Hydra composes the configuration, this module turns it into runs, folders and exit codes."""

from __future__ import annotations

import asyncio
import difflib
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
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

from runner import config as schema
from runner.config import RunnerConfig
from runner.errors import ConfigError, RunnerError, StoreError

BAD_CONFIG = 2
CELLS_FAILED = 1
BUG = 70  # EX_SOFTWARE

_OPEN_MAPPINGS = ("request", "deployments", "scorers")
"""Groups whose keys the user makes up: ``++`` is put before them, so that nobody has to know of it."""

_TEXTS = ("prompt", "system")
"""Keys that hold prose, which Hydra would otherwise parse."""

_STATUS_FILE = "status.json"

_rejected: list[ConfigError] = []
"""What `_run_id` found wrong: an exception loses its class on the way through OmegaConf."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _register()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions come here, instead of being printed
    sys.argv[1:] = list(_friendly(arguments))
    exit_codes: list[int] = []
    started = time.time()

    @hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="config")
    def task(composed: DictConfig) -> dict[str, Any]:
        status = run_cell(composed)
        exit_codes.append(status["exit_code"])
        return status

    try:
        task()
    except (HydraException, OmegaConfBaseException, YAMLError, RunnerError) as error:
        return _complain(str(_rejected[0]) if _rejected else _explain(error))
    except KeyboardInterrupt:
        return 130
    if "-m" in arguments or "--multirun" in arguments:
        return _conclude_sweep(started)
    return exit_codes[0] if exit_codes else 0


def run_cell(composed: DictConfig) -> dict[str, Any]:
    """Run one composed configuration in its folder and say how it ended. Raises nothing but an interrupt.

    Returns:
        ``exit_code``, ``message`` and ``overrides``: plain data, so that any launcher can carry it.
    """
    job = HydraConfig.get()
    folder = Path(job.runtime.output_dir)
    overrides = [override for override in job.overrides.task if not override.startswith("hydra")]
    try:
        exit_code, message = _run(composed, folder)
    except (ConfigError, StoreError) as error:
        exit_code, message = _complain(str(error)), str(error)
    except Exception as error:  # a bug: said in one line, with the traceback in the folder
        (folder / "traceback.txt").write_text(traceback.format_exc(), encoding="utf-8")
        message = f"{type(error).__name__}: {error}; this is a fault of runner, see {folder / 'traceback.txt'}"
        exit_code = BUG
        _complain(message)
    status = {"exit_code": exit_code, "message": message, "overrides": overrides, "ended_at": time.time()}
    (folder / _STATUS_FILE).write_text(json.dumps(status), encoding="utf-8")
    if exit_code > 128 and job.mode is RunMode.MULTIRUN:
        raise SystemExit(exit_code)
    return status


def typed(composed: DictConfig) -> RunnerConfig:
    """The composed configuration as an object.

    Raises:
        ConfigError: A key is unknown, or a value is missing.
    """
    content = _plain(composed)
    content.pop("hydra", None)
    for path in schema.unknown_keys(content):
        raise ConfigError(schema.unknown_key_message(path))
    missing = sorted(OmegaConf.missing_keys(OmegaConf.create(content)))
    if missing:
        raise ConfigError(f"{' and '.join(missing)} must be set: {missing[0]}=…")
    try:
        config = OmegaConf.to_object(OmegaConf.merge(RunnerConfig, content))
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error)) from None
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
    """The ``${run_id:}`` of the folder's name. Checks the configuration first, so that a bad one makes no folder."""
    from runner.identity import run_id

    try:
        config = typed(_root_)
        schema.check(config)
    except ConfigError as error:
        _rejected.append(error)
        raise
    job = _root_.hydra
    swept = dict(_swept(job.overrides.task, job.sweeper)) if job.mode is RunMode.MULTIRUN else None
    return run_id(config, swept=swept)


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


def _run(composed: DictConfig, folder: Path) -> tuple[int, str | None]:
    config = typed(composed)
    _load_environment(config.env_file)
    from runner.experiment import run_experiment
    from runner.progress import summary_table

    report = asyncio.run(run_experiment(config, folder, settings=_plain(OmegaConf.structured(config))))
    if report.summary:
        summary_table({**report.summary, "name": config.name}, results=folder / "results.jsonl")
    if report.message:
        print(f"{report.message}\nThe same command goes on from here.", file=sys.stderr)
    return report.exit_code, report.message


def _plain(config: DictConfig) -> dict[str, Any]:
    """A configuration as plain data, nothing resolved."""
    content = OmegaConf.to_container(config, resolve=False, enum_to_str=True)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def _load_environment(path: str) -> None:
    from dotenv import load_dotenv

    if Path(path).is_file():
        load_dotenv(path)


def _conclude_sweep(started: float) -> int:
    """Read what the cells of this multirun left behind, say it in a table, and return the exit code of the whole."""
    folder = Path(OmegaConf.to_container(HydraConfig.instance().cfg)["hydra"]["sweep"]["dir"])  # type: ignore
    cells = []
    for path in folder.glob(f"*/{_STATUS_FILE}"):
        status = json.loads(path.read_text(encoding="utf-8"))
        if status["ended_at"] >= started:
            cells.append((path.parent, status))
    return CELLS_FAILED if any(status["exit_code"] not in (0, 3) for _, status in cells) else 0


def _friendly(arguments: Sequence[str]) -> Iterator[str]:
    """The arguments as Hydra wants them: open mappings get ``++``, texts that it cannot parse get quotes."""
    multirun = "-m" in arguments or "--multirun" in arguments
    parser = OverridesParser.create()
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if argument.startswith("-") or not equals:
            yield argument
            continue
        if key.partition(".")[0] in _OPEN_MAPPINGS and "." in key:
            key = f"++{key}"
        prose = key in _TEXTS and not multirun and value != "null" and not _is_quoted(value)
        if prose or not _parses(parser, f"{key}={value}"):
            value = _quoted(value)
        yield f"{key}={value}"


def _parses(parser: OverridesParser, argument: str) -> bool:
    try:
        parser.parse_override(argument)
    except HydraException:
        return False
    return True


def _is_quoted(value: str) -> bool:
    return len(value) > 1 and value[0] == value[-1] and value[0] in "'\""


def _quoted(value: str) -> str:
    """The value in Hydra's single quotes, where only quotes and the backslashes before them are special."""
    escaped = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), value)
    return f"'{escaped}'"


def _explain(error: BaseException) -> str:
    """One message for whatever composing the configuration raised."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    text = "\n".join(map(str, causes))
    for pattern, explain in _EXPLANATIONS:
        if found := re.search(pattern, text):
            return explain(found)
    telling = (cause for cause in causes if isinstance(cause, YAMLError) or "full_key" in str(cause))
    message = str(next(telling, causes[-1]))
    lines = (line.strip() for line in message.splitlines() if not re.search("object_type|reference_type", line))
    return re.sub(r"\s*full_key: (\S+)", r" (key \1)", " ".join(lines)).strip()


def _unknown_option(found: re.Match[str]) -> str:
    """``dataset=jsnl``: a group's option that does not exist."""
    group, _, option = found[1].rpartition("/")
    options = found[2].split()
    near = difflib.get_close_matches(option, options, n=1)
    prefix = "+" if group == "experiment" else ""
    hint = f" Did you mean {prefix}{group}={near[0]}?" if near else ""
    return f"{prefix}{group}={option}: there are {', '.join(options)}.{hint}"


_EXPLANATIONS = (
    (r"Could not override '([^']+)'\.(?:.*\n)*.*not in", lambda found: schema.unknown_key_message(found[1])),
    (r"Key '[^']+' not in '\w+'\s+full_key: (\S+)", lambda found: schema.unknown_key_message(found[1])),
    (r"Could not find '([^']+)'\s+Available options in '[^']+':((?:\n\t\S+)*)", _unknown_option),
)
"""What to say for a pattern in Hydra's or OmegaConf's words."""


def _complain(message: str) -> int:
    print(f"runner: {message}", file=sys.stderr)
    return BAD_CONFIG
