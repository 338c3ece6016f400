"""Composition: Hydra puts the configuration together from ``conf/``, the user's own ``./conf`` and overrides."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.conf import HydraConf
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from runner.arguments import friendly, options_first
from runner.checks import LIMIT_KEYS, check_name, check_secrets, unknown_key_message, unknown_keys
from runner.complaints import explain
from runner.config import RunnerConfig, Shared
from runner.errors import ConfigError, RunnerError
from runner.private import check_folder
from runner.sweep import sweep_id

logger = logging.getLogger(__name__)


def compose(overrides: Sequence[str]) -> RunnerConfig:
    """The configuration that a command with these overrides would run with. Makes no folder.

    Raises:
        ConfigError: It cannot be composed, or holds what no key allows.
        HydraException: A group or an option does not exist.
    """
    composed = _composed(prepared(overrides))
    load_environment(composed.env_file)
    return typed(composed)


def prepared(arguments: Sequence[str]) -> list[str]:
    """A command line as Hydra wants it.

    ``deployments=none`` leaves out those that an experiment names itself, too, of which Hydra knows nothing.

    Raises:
        ConfigError: It cannot be meant, or two folders have a file that it chooses.
        HydraException: It cannot be composed.
    """
    asked = list(friendly(options_first(arguments)))
    check_options(asked)
    if "deployments=none" not in asked:
        return asked
    named = first_cell([each for each in asked if not each.startswith("++deployments.")]).deployments
    return [*(f"~deployments.{label}" for label in named), *asked]


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


def of_run(folder: Path) -> RunnerConfig:
    """The configuration with which the run in ``folder`` was composed.

    Raises:
        ConfigError: It holds what no key allows.
        OSError: There is none.
    """
    composed = OmegaConf.load(folder / ".hydra" / "config.yaml")
    assert isinstance(composed, DictConfig)
    return typed(composed)


def conf_folder() -> Path:
    """The shipped configuration: beside the package in a wheel, at the top of a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "conf", package.parents[1] / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise ConfigError(f"runner's configuration is missing from {package}: install it again")


def load_environment(path: str) -> None:
    """Read the file of environment variables, where it exists."""
    from dotenv import load_dotenv

    if Path(path).is_file():
        try:
            load_dotenv(path)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"env_file={path}: it cannot be read ({error})") from None


def check_options(arguments: Sequence[str]) -> None:
    """Refuse options that two folders have, so that one file would silently stand for the other.

    Only what a command line or a file that it leads to chooses counts, not the defaults. Files with the same content
    are one.

    Raises:
        ConfigError: There is one; the message names both files.
    """
    if not (twice := _in_both_folders()):
        return
    with suppress(HydraException):  # what cannot be composed is complained of when it is
        for option in _chosen(arguments):
            if option in twice:
                ours, own = twice[option]
                raise ConfigError(
                    f"{option} is in two folders, and not the same: {own} would be left aside for {ours}."
                    " Rename one of them"
                )


def is_multirun(arguments: Sequence[str]) -> bool:
    """Whether a command line asks for a sweep."""
    return bool({"-m", "--multirun", "hydra.mode=MULTIRUN"} & set(arguments))


def first_cell(arguments: Sequence[str]) -> DictConfig:
    """The first cell of what a command line runs, and ``hydra`` beside it.

    Raises:
        HydraException: It cannot be composed.
    """
    overrides = _overrides(arguments)
    return _composed([values[0] for values in _choices(overrides).values()], with_hydra=True)


def swept_keys(first: DictConfig, arguments: Sequence[str]) -> list[str]:
    """The keys that a multirun sweeps over, by its command line and by ``hydra.sweeper.params`` of its first cell."""
    parser = OverridesParser.create()
    overrides = parser.parse_overrides(_overrides(arguments))
    swept = [override.get_key_element() for override in overrides if override.is_sweep_override()]
    return list(dict.fromkeys(key.lstrip("+") for key in (*_sweeper_params(first.hydra), *swept)))


def sweep_folder(first: DictConfig, arguments: Sequence[str]) -> Path:
    """Where a multirun gathers its cells: beside their runs, by the name and ``runs_dir`` of the first one.

    Raises:
        ConfigError: Its name is none.
    """
    check_name(str(first.name))
    return Path(first.runs_dir).absolute() / str(first.name) / f"sweep-{sweep_id(arguments)}"


def planned(arguments: Sequence[str]) -> Iterator[tuple[str, RunnerConfig, Path]]:
    """What a command line would run: the name, the configuration and the folder of each cell. Makes no folder.

    Raises:
        ConfigError: A cell cannot be composed, or holds what no key allows.
        HydraException: A group or an option does not exist.
    """
    from runner.identity import run_id

    for swept, composed in composed_cells(arguments):
        load_environment(composed.env_file)
        config = typed(composed)
        yield joined(swept), config, Path(config.runs_dir) / config.name / run_id(config, swept=swept)


def composed_cells(arguments: Sequence[str]) -> Iterator[tuple[dict[str, str], DictConfig]]:
    """What sets each cell of a command line apart, and its configuration as composed; in the order in which they run.

    Raises:
        HydraException: A group or an option does not exist.
    """
    asked = _of_the_run(arguments)
    if not is_multirun(arguments):
        yield {}, _composed(asked)
        return
    first = first_cell(arguments)
    keys = swept_keys(first, arguments)
    for overrides in product(*_choices([*_swept_by_file(first), *asked]).values()):
        yield dict(swept_by(overrides, keys)), _composed(list(overrides))


def swept_by(overrides: Sequence[str], keys: Sequence[str]) -> Iterator[tuple[str, str]]:
    """What sets a cell apart: those of its overrides that are swept over."""
    for override in overrides:
        key, _, value = override.partition("=")
        if key.lstrip("+") in keys:
            yield key.lstrip("+"), value


def joined(overrides: Mapping[str, str]) -> str:
    """The name of what sets a cell apart."""
    return " ".join(f"{key}={value}" for key, value in overrides.items())


def _choices(overrides: Sequence[str]) -> dict[str, list[str]]:
    """The overrides by their keys, each once for every value that it is swept over; the last one of a key counts."""
    choices: dict[str, list[str]] = {}
    with _initialized():
        parser = OverridesParser.create(GlobalHydra.instance().config_loader())  # a glob is one over its options
        for text in overrides:
            [override] = parser.parse_overrides([text])
            values = override.sweep_string_iterator() if override.is_sweep_override() else ()
            key = override.get_key_element()
            choices[key] = [f"{key}={value}" for value in values] or [text]
    return choices


def left_to_multirun(hydra: HydraConf, overrides: Sequence[str]) -> Iterator[str]:
    """What a configuration says of multiruns alone, for a command without ``-m``, where it has no effect."""
    given = {each.partition("=")[0].lstrip("+~") for each in overrides}
    if swept := [key for key in _sweeper_params(hydra) if key not in given]:
        yield f"this is one run, though the experiment sweeps over {', '.join(swept)}: with -m it runs every value"
    if (launcher := hydra.runtime.choices["hydra/launcher"]) != "basic":
        yield f"hydra/launcher={launcher} has no effect without -m: this is one run, in this process"


def _sweeper_params(hydra: HydraConf) -> dict[str, str]:
    """What the configuration itself sweeps over."""
    return {str(key): str(value) for key, value in (hydra.sweeper.get("params") or {}).items()}


def _swept_by_file(first: DictConfig) -> list[str]:
    """The same as overrides."""
    return [f"{key}={values}" for key, values in _sweeper_params(first.hydra).items()]


def _chosen(arguments: Sequence[str]) -> Iterator[str]:
    """The options that any cell of a command line chooses, as paths below ``conf/``.

    Raises:
        HydraException: A cell cannot be composed.
    """
    overrides = _overrides(arguments)
    if is_multirun(arguments):
        overrides = [*_swept_by_file(first_cell(arguments)), *overrides]
    choices = _choices(overrides)
    with _initialized():
        loader = GlobalHydra.instance().config_loader()
        usual = {each.config_path for each in loader.compute_defaults_list("config", [], RunMode.RUN).defaults}
        groups = [each for key, each in choices.items() if loader.get_group_options(key.lstrip("+").partition("@")[0])]
        for cell in product(*groups):
            found = loader.compute_defaults_list("config", list(cell), RunMode.RUN)
            overridden = found.overrides.override_choices
            for each in found.defaults:
                if each.config_path not in usual or each.override_key in overridden:
                    yield each.config_path


def _in_both_folders() -> dict[str, tuple[Path, Path]]:
    """The file in the shipped folder and the other one in the user's own, by the option that they are for."""
    ours, own = conf_folder(), _own_conf()
    if own is None:
        return {}
    pairs = {file.relative_to(ours).with_suffix(""): file for file in ours.rglob("*.yaml")}
    both = {option.as_posix(): (file, own / file.relative_to(ours)) for option, file in pairs.items()}
    return {option: pair for option, pair in both.items() if _differ(*pair)}


def _differ(ours: Path, own: Path) -> bool:
    try:
        return own.is_file() and own.read_bytes() != ours.read_bytes()
    except OSError:  # Hydra does not find it either
        return False


def _own_conf() -> Path | None:
    """The user's own ``./conf``, unless it is the shipped one."""
    own = Path.cwd() / "conf"
    return own if own.is_dir() and own.resolve() != conf_folder() else None


def _overrides(arguments: Sequence[str]) -> list[str]:
    """``key=value`` and ``~key``, without Hydra's options and what belongs to these."""
    return [each for each in arguments if ("=" in each and not each.startswith("-")) or each.startswith("~")]


def _of_the_run(arguments: Sequence[str]) -> list[str]:
    """The overrides that say what is run, not how Hydra runs it."""
    return [override for override in _overrides(arguments) if not override.startswith((*_OF_HYDRA, "+scale="))]


_OF_HYDRA = tuple(f"{sign}hydra{mark}" for sign in ("", "+", "++", "~") for mark in "./")


class UserConf(SearchPathPlugin):
    """Finds the user's own ``./conf`` too. Appended, so that a stranger's config.yaml never replaces ours."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        if own := _own_conf():
            search_path.append(provider="user", path=f"file://{own}")


@dataclass
class _Composed(RunnerConfig):
    """What Hydra composes into. Entries under names of the user's own get their types in `typed`."""

    deployments: dict[str, Any] = field(default_factory=dict)
    scorers: dict[str, Any] = field(default_factory=dict)


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
        check_name(config.name)  # which is somewhere else where the name leads there
        return _own(config, run_id(config, swept=dict(swept_by(job.overrides.task, config.sweep.over))))
    load_environment(_root_.env_file)
    config = typed(_root_)
    try:
        check_experiment(config)
    except RunnerError:
        raise
    except Exception:  # a bug: the run will meet it too, in a folder for its traceback
        logger.debug("the check failed", exc_info=True)
    return _own(config, run_id(config))


def _own(config: RunnerConfig, name: str) -> str:
    """The name of the run's folder, whose files are no links: Hydra writes there before the run begins."""
    check_folder(Path(config.runs_dir) / config.name / name)
    return name


def _where_limited(sharing: str, *, _parent_: DictConfig) -> str:
    """The ``${where_limited:file}`` of conf/scale: how limits are shared, if there are any."""
    return sharing if any(_parent_.get(key) for key in LIMIT_KEYS) else Shared.none.value


def _package_data(name: str) -> str:
    return str(resources.files("runner").joinpath("data", name))


def _composed(overrides: list[str], *, with_hydra: bool = False) -> DictConfig:
    with _initialized():
        return hydra_compose("config", overrides=overrides, return_hydra_config=with_hydra)


def _initialized() -> AbstractContextManager[None]:
    initialized: AbstractContextManager[None] = initialize_config_dir(str(conf_folder()), version_base="1.3")
    return initialized


def _plain(config: DictConfig) -> dict[str, Any]:
    """A configuration as plain data, nothing resolved."""
    content = OmegaConf.to_container(config, resolve=False, enum_to_str=True)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def _register() -> None:
    """Make our groups, resolvers and the user's folder known to Hydra.

    On import: a launcher's worker imports this module to unpickle its task, and then resolves the folder's name.
    """
    Plugins.instance().register(UserConf)
    ConfigStore.instance().store(name="schema", node=_Composed)
    OmegaConf.register_new_resolver("run_id", _run_id, replace=True)
    OmegaConf.register_new_resolver("where_limited", _where_limited, replace=True)
    OmegaConf.register_new_resolver("package_data", _package_data, replace=True)


_register()
