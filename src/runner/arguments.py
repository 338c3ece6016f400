"""The command line's arguments as Hydra wants them, so that nobody has to learn its grammar for plain values."""

from __future__ import annotations

import difflib
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import chain, pairwise
from pathlib import PurePath
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ValueType
from hydra.errors import HydraException

from runner.checks import no_choice_message, no_section_message
from runner.config import DeploymentConfig, LimitsConfig, RunnerConfig
from runner.errors import ConfigError
from runner.help import ADDED

_OPEN_MAPPINGS = ("request.", "deployments.", "scorers.", "dataset.arguments.")
"""Groups whose keys the user makes up."""

_KEYS = {entry.name for entry in fields(RunnerConfig)} | {entry.name for entry in fields(LimitsConfig)}

_COMPANIONS = ("doctor", "export", "report", "simulator")
"""Modules with a command of their own."""

_TEXTS = ("prompt", "system")
"""Keys that hold prose, which Hydra would otherwise parse."""

_SECTIONS: Mapping[str, Any] = {
    each.name: each.default_factory for each in fields(RunnerConfig) if is_dataclass(each.default_factory)
}
"""Keys that have keys of their own, and the dataclass of these."""

_OPTIONS: Mapping[str, Sequence[str] | None] = {
    **dict.fromkeys(("-m", "--multirun", "-r", "--run", "--resolve", "--hydra-help", "--help", "-h", "--version"), ()),
    **dict.fromkeys(("-c", "--cfg"), ("job", "hydra", "all")),
    **dict.fromkeys(("-i", "--info"), ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")),
    **dict.fromkeys(("-p", "--package", "-cp", "--config-path", "-cn", "--config-name"), None),
    **dict.fromkeys(("-cd", "--config-dir", "--experimental-rerun", "-sc", "--shell-completion"), None),
}
"""What begins with a dash, and the values that it takes: these, none, or, with None, any one."""

_QUOTED_TEXT = re.compile(r""""[^"]*"|'[^']*'""")
_QUOTED_TEXTS = re.compile(rf"(?:{_QUOTED_TEXT.pattern})(?:,\s*(?:{_QUOTED_TEXT.pattern}))*")
_SEVERAL_TEXTS = re.compile(rf"(?:{_QUOTED_TEXT.pattern})(?:,\s*(?:{_QUOTED_TEXT.pattern}))+")

_TEMPLATE = re.compile(r"(\{[{%#]).*?[}%#]\}", re.DOTALL)
"""What Jinja takes for its own, whose commas separate nothing."""

_NO_TEXT = re.compile(r"[-+\d.e]+|null|true|false", re.IGNORECASE)
"""What Hydra takes for a number or another value, where a group's option is meant."""

_AFTER_A_TEXT = re.compile(r",(?=\S)")
_AFTER_A_LISTED_TEXT = re.compile(r"""(?<=["']),\s*(?=["'])""")
"""What separates texts that were to be several. A space after a comma belongs to prose, save in a list."""

_NESTING = frozenset("'\"[]{}() ")
"""What may keep a comma from separating two values of a sweep."""


def options_first(arguments: Sequence[str]) -> list[str]:
    """The arguments in an order that Hydra's parser takes: what begins with a dash, then the others.

    Raises:
        ConfigError: There is no such option, or its value is none or missing; a word is neither an option nor
            ``key=value``.
    """
    options, others = [], []
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("-"):
            others.append(argument)
            continue
        name, equals, value = argument.partition("=")
        key = name.lstrip("-")
        if key.partition(".")[0] in _KEYS | ADDED:
            raise ConfigError(f"{argument}: keys have no dashes, write {'+' if key in ADDED else ''}{key}=…")
        if name not in _OPTIONS:
            near = difflib.get_close_matches(name, _OPTIONS, n=1, cutoff=0.75)
            hint = f"Did you mean {near[0]}?" if near else "`python -m runner --help` lists keys and options."
            raise ConfigError(f"{argument}: there is no such option. {hint}")
        choices = _OPTIONS[name]
        if choices == ():
            options.append(argument)
            continue
        if not equals:
            value = next(rest, "")
            if choices and name in ("-i", "--info") and value not in choices:  # its value may be left out
                others += [value] if value else []
                value = choices[0]
        if choices is not None and value not in choices:
            raise ConfigError(no_choice_message(name, value, choices))
        if not value:
            raise ConfigError(f"{name} needs a value after it")
        options += [name, value]
    _require_overrides(others)
    return options + others


def _require_overrides(arguments: Sequence[str]) -> None:
    """Refuse ``limits.rpm 300``, ``limits.rpm:300``, and what remains of a text without quotes."""
    for index, argument in enumerate(arguments):
        if "=" in argument or argument.startswith("~"):
            continue
        before, equals, text = arguments[index - 1].partition("=") if index else ("", "", "")
        key, _, value = argument.partition(":")
        value = value.strip() or next(iter(arguments[index + 1 : index + 2]), "")
        if argument in _COMPANIONS:
            hint = f"did you mean python -m runner.{argument}?"
        elif (before not in _TEXTS or "." in key) and key.lstrip("+").partition(".")[0] in _KEYS | ADDED:
            meant = f"+{key}=" if key in ADDED else f"{key}="
            hint = f"write {shlex.quote(meant + value) if value and '=' not in value else meant + '…'}"
        elif equals and argument and before.lstrip("+") not in ADDED:
            hint = f"write key=value; or, as one text with what is before it, '{before}={text} {argument}'"
        elif re.fullmatch(r"[\w./-]*\w", argument):
            hint = f"write key=value; or, where that is an experiment, +experiment={PurePath(argument).stem}"
        else:
            hint = "write key=value. `python -m runner --help` lists the keys."
        raise ConfigError(f"{argument!r}: {hint}")


def friendly(arguments: Sequence[str]) -> Iterator[str]:
    """The arguments as Hydra wants them, so that nobody has to know its grammar.

    Keys of open mappings get ``++``. Prompts, and values that it would not take, get quotes. ``deployments={…}``,
    whose name is a group's, becomes a key for each entry.

    Raises:
        ConfigError: A value stands where keys belong, a sweep where none is, or several texts where one does.
    """
    multirun = "-m" in arguments or "--multirun" in arguments
    parser = OverridesParser.create()
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if argument.startswith("-") or not equals:
            yield argument
            continue
        if key.lstrip("+").startswith("hydra.sweeper.params"):
            raise ConfigError(f"{key}: it is for configuration files; here, write what it sweeps over: -m KEY=ONE,TWO")
        if (section := key.lstrip("+")) in _SECTIONS or section == "deployments":
            key = section  # a group that has a default takes no plus sign
            argument = f"{key}={value}"
            _require_name(parser, key, value)
        fleet = parser.parse_override(argument).value() if key == "deployments" and _parses(parser, argument) else None
        if isinstance(fleet, Mapping):
            for label, entry in fleet.items():
                yield f"++deployments.{label}={_written(entry)}"
            continue
        if key.startswith(_OPEN_MAPPINGS):
            key = f"++{key}"
        elif key in ADDED:
            key = f"+{key}"
        is_added = key.lstrip("+") in ADDED
        if (is_added and _NO_TEXT.fullmatch(value)) or (key in {*_SECTIONS, "deployments"} and value == "null"):
            value = quoted(value)
        if key.lstrip("+") in _TEXTS and (texts := _quoted_texts(parser, value)):
            if len(texts) > 1 and not multirun:
                raise _no_sweep(value)
            value = ",".join(map(quoted, texts))
        if key.lstrip("+") in _TEXTS and _is_prose(parser, value, multirun=multirun):
            _require_one_text(key.lstrip("+"), value, multirun=multirun)
            value = quoted(re.sub(r"(\\*)\$\{", r"\1\1\\${", value))
        elif not _parses(parser, f"{key}={value}"):
            parts = value.split(",") if multirun and _NESTING.isdisjoint(value) else [value]
            value = ",".join(part if _parses(parser, f"{key}={part}") else quoted(part) for part in parts)
        yield f"{key}={value}"


def quoted(value: str) -> str:
    """The value in Hydra's single quotes, where only quotes and the backslashes before them are special."""
    escaped = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), value)
    return f"'{escaped}'"


def _require_name(parser: OverridesParser, key: str, value: str) -> None:
    """Refuse numbers and switches where Hydra takes the name of a group's option, and says so without the key."""
    if not _parses(parser, f"{key}={value}"):
        return
    override = parser.parse_override(f"{key}={value}")
    if override.value_type is ValueType.GLOB_CHOICE_SWEEP:
        return
    for each in override.sweep_iterator() if override.is_sweep_override() else [override.value()]:
        first = each[0] if isinstance(each, list) and each else each
        if isinstance(first, int | float):
            path, section = ("deployments.LABEL", DeploymentConfig) if key == "deployments" else (key, _SECTIONS[key])
            raise ConfigError(no_section_message(f"{key}={value}", path, section))


def _written(value: Any) -> str:
    """Plain data in Hydra's grammar."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_written(entry)}' for key, entry in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_written, value))}]"
    if isinstance(value, str):
        return quoted(value)
    return "null" if value is None else str(value).lower()


def _quoted_texts(parser: OverridesParser, value: str) -> list[str]:
    """The texts of ``"{{ row["a"] }}","{{ row["b"] }}"``, where Hydra takes a template's quotes for a text's end.

    Empty where it reads them itself, or they are no texts in quotes.
    """
    without = _TEMPLATE.sub(lambda found: "_" * len(found[0]), value)
    if _parses(parser, f"text={value}") or re.search(r"""\\["']""", value) or not _QUOTED_TEXTS.fullmatch(without):
        return []
    return [value[found.start() + 1 : found.end() - 1] for found in _QUOTED_TEXT.finditer(without)]


def _is_prose(parser: OverridesParser, value: str, *, multirun: bool) -> bool:
    """Whether a text is to be taken as it stands. Hydra's own are quoted ones, ``null``, and what a multirun sweeps.

    A comma in a multirun separates two texts, unless a space follows it.
    """
    try:
        override = parser.parse_override(f"text={value}")
    except HydraException:
        return True
    quoted = value[:1] in ("'", '"')
    if override.is_sweep_override():
        plain = override.value_type is ValueType.SIMPLE_CHOICE_SWEEP and not quoted
        return not multirun or (plain and ", " in value)
    return not quoted and value != "null"


def _require_one_text(key: str, value: str, *, multirun: bool) -> None:
    """Refuse a text that was to be several: all rows would be asked with all of them at once."""
    if not multirun and _SEVERAL_TEXTS.fullmatch(value):
        raise _no_sweep(value)
    if (count := _texts_in(value)) > 1:
        raise ConfigError(
            f"{key} reads like {count} texts. To compare them, put quotes around each:"
            f""" -m '{key}="Sort: {{{{ text }}}}","Label: {{{{ text }}}}"'. If it is one, around the whole:"""
            f""" '{key}="…"'"""
        )


def _texts_in(value: str) -> int:
    """How many texts with templates one value reads like.

    A text has words and a template. It ends at a comma without a space after it; where that leaves pieces which are no
    text of their own (``One,{{ text }},Two {{ text }}``), only if both sides ask for the same.
    """
    separator = _AFTER_A_LISTED_TEXT if value.startswith("[") else _AFTER_A_TEXT
    blank = _TEMPLATE.sub(lambda found: "{" * len(found[0]), value)
    cuts = [found.span() for found in separator.finditer(blank)]
    pieces = [value[start:end] for (_, start), (end, _) in pairwise([(0, 0), *cuts, (len(value), 0)])]
    texts = [""]
    for piece in pieces:
        if _is_text(texts[-1]):
            texts.append("")
        texts[-1] += f",{piece}"
    if not _is_text(texts[-1]):
        texts.pop()
    shared = max(Counter(chain.from_iterable(map(_asked, texts))).values(), default=0) > 1
    return len(texts) if shared or len(texts) == len(pieces) else 1


def _is_text(text: str) -> bool:
    return bool(_asked(text) and re.search(r"\w", _TEMPLATE.sub("", text)))


def _asked(text: str) -> set[str]:
    """What a text's templates ask for."""
    return {found[0].replace(" ", "") for found in _TEMPLATE.finditer(text) if found[1] == "{{"}


def _no_sweep(value: str) -> ConfigError:
    return ConfigError(f"several texts ({value[:40]}…) make a sweep: add -m")


def _parses(parser: OverridesParser, argument: str) -> bool:
    try:
        parser.parse_override(argument)
    except HydraException:
        return False
    return True
