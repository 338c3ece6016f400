"""The command line's arguments as Hydra wants them, so that nobody has to learn its grammar for plain values."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ValueType
from hydra.errors import HydraException

from runner.config import LimitsConfig, RunnerConfig
from runner.errors import ConfigError

_OPEN_MAPPINGS = ("request.", "deployments.", "scorers.", "dataset.arguments.")
"""Groups whose keys the user makes up."""

_KEYS = {entry.name for entry in fields(RunnerConfig)} | {entry.name for entry in fields(LimitsConfig)}

_TEXTS = ("prompt", "system")
"""Keys that hold prose, which Hydra would otherwise parse."""


_SEVERAL_TEXTS = re.compile(r"""(?:"[^"]*"|'[^']*')(?:,(?:"[^"]*"|'[^']*'))+""")


def friendly(arguments: Sequence[str]) -> Iterator[str]:
    """The arguments as Hydra wants them, so that nobody has to know its grammar.

    Keys of open mappings get ``++``. Prompts, and values that it would not take, get quotes. ``deployments={…}``,
    whose name is a group's, becomes a key for each entry.
    """
    multirun = "-m" in arguments or "--multirun" in arguments
    parser = OverridesParser.create()
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if argument.startswith("--") and argument[2:].partition("=")[0].partition(".")[0] in _KEYS:
            raise ConfigError(f"{argument}: keys have no dashes, write {argument[2:].partition('=')[0]}=…")
        if argument.startswith("-") or not equals:
            yield argument
            continue
        fleet = parser.parse_override(argument).value() if key == "deployments" and _parses(parser, argument) else None
        if isinstance(fleet, Mapping):
            for label, entry in fleet.items():
                yield f"++deployments.{label}={_written(entry)}"
            continue
        if key.startswith(_OPEN_MAPPINGS):
            key = f"++{key}"
        elif key == "experiment":
            key = "+experiment"
        if key.lstrip("+") in _TEXTS and _is_prose(parser, value, multirun=multirun):
            value = quoted(re.sub(r"(\\*)\$\{", r"\1\1\\${", value))
        elif not _parses(parser, f"{key}={value}"):
            value = quoted(value)
        yield f"{key}={value}"


def quoted(value: str) -> str:
    """The value in Hydra's single quotes, where only quotes and the backslashes before them are special."""
    escaped = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), value)
    return f"'{escaped}'"


def _written(value: Any) -> str:
    """Plain data in Hydra's grammar."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_written(entry)}' for key, entry in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_written, value))}]"
    if isinstance(value, str):
        return quoted(value)
    return "null" if value is None else str(value).lower()


def _is_prose(parser: OverridesParser, value: str, *, multirun: bool) -> bool:
    """Whether a text is to be taken as it stands. Hydra's own are quoted ones, ``null``, and what a multirun sweeps.

    A comma in a multirun separates two texts, unless a space follows it.
    """
    try:
        override = parser.parse_override(f"text={value}")
    except HydraException:
        return True
    quoted = value[:1] in ("'", '"')
    if override.is_sweep_override() and not multirun and _SEVERAL_TEXTS.fullmatch(value):
        raise ConfigError(f"several texts ({value[:40]}…) make a sweep: add -m")
    if override.is_sweep_override():
        plain = override.value_type is ValueType.SIMPLE_CHOICE_SWEEP and not quoted
        return not multirun or (plain and ", " in value)
    return not quoted and value != "null"


def _parses(parser: OverridesParser, argument: str) -> bool:
    try:
        parser.parse_override(argument)
    except HydraException:
        return False
    return True
