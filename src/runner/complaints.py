"""What Hydra, OmegaConf and YAML find wrong with a configuration, in one sentence with the place and the way out."""

from __future__ import annotations

import re
from pathlib import PurePath

from yaml import Mark, MarkedYAMLError

from runner import config
from runner.checks import no_choice_message, no_section_message, unknown_key_message
from runner.errors import RunnerError
from runner.extras import installation
from runner.help import ADDED


def explain(error: BaseException) -> str:
    """One message for whatever composing the configuration raised."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    for cause in causes:
        match cause:
            case RunnerError():
                return str(cause)
            case MarkedYAMLError(problem_mark=Mark()):
                return _no_yaml(cause)
            case UnicodeDecodeError(object=bytes() as content, start=start):
                return _no_utf8(content, start)
            case OSError(filename=str() as path):
                return f"{path}: {cause.strerror}. Runs go to runs_dir/name/: can they be written there?"
    text = "\n".join(map(str, causes))
    place = re.match(r"In '((?!hydra/)\w+/\w+)'", text)
    where = f"{place[1]}.yaml: " if place else ""
    for pattern, say in _EXPLANATIONS:
        if found := re.search(pattern, text):
            return where + say(found)
    telling = (cause for cause in causes if "full_key" in str(cause))
    message = str(next(telling, causes[-1]))
    lines = (line.strip() for line in message.splitlines() if not re.search("object_type|reference_type", line))
    return where + re.sub(r"\s*full_key: (\S+)", r" (key \1)", " ".join(lines)).strip()


def _no_yaml(error: MarkedYAMLError) -> str:
    """``prompt: Label: {{ text }}`` in a file: where it is not YAML, and what usually mends that."""
    is_unclosed = error.context == "while scanning a quoted scalar"
    mark = error.context_mark if is_unclosed else error.problem_mark
    assert mark is not None
    if is_unclosed:
        advice = "the quote that begins here is not closed"
    elif "'\\t'" in str(error.problem):
        advice = f"{error.problem}: indent with spaces"
    elif "duplicate key" in str(error.problem):
        advice = f"{error.problem}: keep one of them"
    else:
        advice = (
            f"{error.problem}. Put a text with a brace, colon or quote in quotes (prompt: 'Label: {{{{ text }}}}'), a"
            " space after a key's colon, and the keys of a section in one column"
        )
    return f"{mark.name}:{mark.line + 1}: {advice}"


def _no_utf8(content: bytes, at: int) -> str:
    """A file in another encoding, whose path Hydra does not say."""
    line = content[content.rfind(b"\n", 0, at) + 1 :].partition(b"\n")[0].decode("latin-1").strip()
    number = content.count(b"\n", 0, at) + 1
    return f"a configuration file is not UTF-8 in its line {number}, {line!r}: save it as UTF-8"


def _unknown_option(found: re.Match[str]) -> str:
    """``dataset=jsnl``: a group's option that does not exist, or a path in its place."""
    group, options = found[2], found[3].split()
    option = found[1].removeprefix(f"{group}/")
    if group == "hydra/launcher" and (extra := _EXTRAS.get(option)):
        return f"{group}={option} is not installed: {installation(extra)}"
    if group == "dataset" and (kind := PurePath(option).suffix[1:]) in options:
        return f"dataset={option}: it names the kind of the rows. Did you mean dataset={kind} dataset.path={option}?"
    prefix = "+" if group in ADDED else ""
    return no_choice_message(f"{prefix}{group}", option, options)


def _unknown_of_several(found: re.Match[str]) -> str:
    """``dataset=[csv,jsnl]``: Hydra takes a list of options, one over the other."""
    group, option = found[1], found[2]
    prefix = "+" if group in ADDED else ""
    return f"{prefix}{group}=[…]: there is no {option!r}: its options are the files in conf/{group}/"


def _no_number(found: re.Match[str]) -> str:
    """``limits.rpm=many``: OmegaConf's words for a value of another type."""
    whole = "whole " if found[2] == "Integer" else ""
    return f"{found[3]}={found[1]}: a {whole}number, as in {found[3]}=10"


def _several(found: re.Match[str]) -> str:
    """``budget.usd=2,5``: values of a sweep that is none."""
    key, value = found[1].lstrip("+"), found[2]
    return (
        f"{key}={value}: these are several values to sweep over, which takes -m. Or is it a number (2.5), a list"
        f" ('{key}=[one,two]'), a text with a comma ('{key}=\"one, two\"')?"
    )


def _no_truth(found: re.Match[str]) -> str:
    return f"{found[2]}={found[1]}: true or false"


def _no_list(found: re.Match[str]) -> str:
    return f"{found[1]}: a list, as in '{found[1]}=[one, two]'"


def _no_keys(found: re.Match[str]) -> str:
    """``deployments: [{model: …}]`` in a file, of which Hydra does not say the key."""
    return "a list stands where names or keys belong: write NAME: {…}, with a name of your own for each entry"


def _no_space(found: re.Match[str]) -> str:
    """``tracker:`` with ``kind:none`` below it."""
    value = found[1]
    return f"{value!r} stands where keys belong: write KEY: VALUE, with a space after the colon"


def _no_text(found: re.Match[str]) -> str:
    """``prompt: [one, two]``."""
    return f"{found[2]}: a text, and no {'list' if found[1].lower() == 'list' else 'mapping'}"


def _no_value(found: re.Match[str]) -> str:
    """``scorers.accuracy=null``: nothing, where something belongs."""
    key = found[1]
    is_users = key.partition(".")[0] in ("scorers", "deployments", "request")
    way_out = f"; '~{key}' leaves it out" + (", and in a file its keys are indented below it" if "." not in key else "")
    return f"{key}=null: it cannot be null" + (way_out if is_users else "")


def _no_section(found: re.Match[str]) -> str:
    """``budget=2``: a value where keys belong."""
    return no_section_message(f"{found[3]}={found[2]}", found[3], getattr(config, found[1]))


def _no_mapping(found: re.Match[str]) -> str:
    """``request=5``: a value where keys of the user's own belong."""
    return f"{found[1]}: it has keys of its own, as in {found[1]}.KEY=VALUE"


def _no_choice(found: re.Match[str]) -> str:
    """``resume=freh``: none of an enum's names."""
    return no_choice_message(found[3], found[1], found[2].split(", "))


def _lacks_package(found: re.Match[str]) -> str:
    """An experiment whose keys Hydra puts below ``experiment``, as nothing says otherwise."""
    return "write `# @package _global_` as its first line, which makes its keys those of the run"


def _default_of_root(found: re.Match[str]) -> str:
    """``- dataset: csv`` in an experiment, where groups are looked for below ``experiment/``."""
    return f"in its defaults, write `- override /{found[1]}: …`, with the slash"


def _no_model(found: re.Match[str]) -> str:
    """``deployments.locl.weight=2``: a deployment that nobody else has named."""
    return (
        f"deployments.{found[1]}: there is none of this name, and a new one needs its model:"
        f" deployments.{found[1]}.model=PROVIDER/NAME"
    )


def _second_default(found: re.Match[str]) -> str:
    """``- /dataset: csv`` in an experiment, for a group that has a default."""
    group, option = found[1], found[2]
    if group in ADDED:
        return f"{group}: {option} is a second one, and a run has one: choose one, or, with -m, +{group}=ONE,TWO"
    return f"{group}: {option} is a second one: in the defaults of an experiment, write `- override /{group}: {option}`"


_EXTRAS = {"joblib": "joblib", "ray": "ray", "submitit_local": "slurm", "submitit_slurm": "slurm"}
"""Our extras that bring Hydra's launchers."""

_EXPLANATIONS = (
    (r"(?s)In 'experiment/.*(Could not override '\w+@\w+\.|Key 'experiment' not in)", _lacks_package),
    (r"(?s)In 'experiment/.*Could not (?:find|override) 'experiment/(\w+)[/@]\w+'", _default_of_root),
    (r"Multiple values for \w+\. To override a value use 'override (\w+): (\w+)'", _second_default),
    (r"Could not override '([^']+)'\.(?:.*\n)*.*not in", lambda found: unknown_key_message(found[1])),
    (r"missing mandatory value: model\s+full_key: deployments\.([^.\s]+)\.model", _no_model),
    (r"Key '[^']+' not in '\w+'\s+full_key: (\S+)", lambda found: unknown_key_message(found[1])),
    (r"Value '(.*)' of type '\w+' could not be converted to (Float|Integer)\s+full_key: (\S+)", _no_number),
    (r"Ambiguous value for argument '([^=]+)=(.*)'", _several),
    (r"Value '(.*)' is not a valid bool \(type \w+\)\s+full_key: (\S+)", _no_truth),
    (r"Invalid value assigned: \w+ is not a ListConfig, list or tuple\.\s+full_key: (\S+)", _no_list),
    (r"Invalid type assigned: \w+ is not a subclass of (\w+)\. value: (.*)\s+full_key: (\S+)", _no_section),
    (r"Cannot merge DictConfig with ListConfig", _no_keys),
    (r"Merge error: \w+ is not a subclass of \w+\. value: (.*)", _no_space),
    (r"Cannot convert '(List|list|Dict|dict)(?:Config)?' to string.*\s+full_key: (\S+)", _no_text),
    (r"(?:field '\S+' is not Optional|Incompatible value 'None' for .*)\s+full_key: (\S+)", _no_value),
    (r"Cannot assign \w+ to Dict\[.*\]\s+full_key: (\S+)", _no_mapping),
    (r"Invalid value '(.*)', expected one of \[(.*)\]\s+full_key: (\S+)", _no_choice),
    (r"Could not find '([^']+)'\s+Available options in '([^']+)':((?:\n\t\S+)*)", _unknown_option),
    (r"Could not load '(\w+)/([^'/]+)'", _unknown_of_several),
)
"""What to say for a pattern in Hydra's or OmegaConf's words."""
