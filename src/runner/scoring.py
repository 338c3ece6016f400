"""How an answer is scored against its row, so that runs are compared by quality as well as by speed.

    scorers:
      exact:  {kind: exact_match, target: answer}
      boxed:  {kind: regex, pattern: 'boxed\\{(.+?)\\}', target: answer}
      mine:   {kind: "my_package.scores:bleu"}

exact_match
    1 if the answer is the target. Both are compared without surrounding white space and quotes, one final ``. , ! ?``,
    and, with ``ignore_case``, without case; runs of white space are one space. Numbers are compared by value:
    ``4``, ``4.0`` and ``1,000`` for ``1000``; not ``007`` for ``7``.
contains
    1 if the target stands in the answer as whole words, under the same rules: ``3`` is in ``x = 3.0``, and neither in
    ``13`` nor in ``3.14``. In scripts written without spaces any place will do.
regex
    1 if ``pattern`` is found in the answer. Where it has a group and the row has the target, what group 1 caught must
    be the target, as in exact_match.
json_valid
    1 if the answer is one JSON document, perhaps in a ```` ```json ```` fence. It needs no target.
package.module:function
    Called as ``function(output_text, fields)``; returns a number, a bool, or None for "cannot be scored". It is
    called on the event loop, so it is to be quick: one that takes long is warned of.

A target is a text, a number, or a list of which any will do. A row without one (absent, null, an empty list; for
contains also an empty text) has the score None, which counts for no mean.

Answers are untrusted: what exceeds `MAX_CHARACTERS` is not looked at, and the built-in kinds take time linear in the
answer's length. A pattern is the user's own: `re` cannot be interrupted, so avoid nested repetition such as
``(a+)+``.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
import logging
import math
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict
from decimal import Decimal
from functools import partial
from typing import Any, NoReturn, SupportsFloat, TypeAlias

from runner.config import ScorerConfig
from runner.errors import ConfigError
from runner.names import import_name

KINDS = ("exact_match", "contains", "regex", "json_valid")
"""The kinds that have a name of their own."""

MAX_CHARACTERS = 1_000_000
"""How much of an answer is looked at: more than a model writes, little enough to search in milliseconds."""

_RULES = 1
"""Raised when the same configuration begins to score differently, so that stored scores are known to be old."""

_SLOW_S = 0.2
"""A function that takes longer for an answer makes all others wait for theirs."""

_log = logging.getLogger(__name__)

_Scorer: TypeAlias = Callable[[str, Mapping[str, Any]], float | None]


class Scorers:
    """All scorers of a run, by name.

    Raises:
        ConfigError: A kind or a pattern that cannot be used; names the key.
    """

    fingerprint: str
    """Changes with the configuration, and with the source of the user's functions: stored scores are then old."""

    def __init__(self, config: Mapping[str, ScorerConfig]) -> None:
        self._config = dict(config)
        self._scorers = {name: _scorer(name, entry) for name, entry in config.items()}
        sources = {name: _source(scorer) for name, scorer in self._scorers.items()}
        settings = {name: asdict(entry) for name, entry in config.items()}
        stamp = json.dumps([_RULES, settings, sources], sort_keys=True)
        self.fingerprint = hashlib.blake2b(stamp.encode(), digest_size=16).hexdigest()

    def __bool__(self) -> bool:
        return bool(self._scorers)

    def __call__(self, output_text: str, fields: Mapping[str, Any]) -> dict[str, float | None]:
        """The scores of one answer by scorer; None where there is nothing to score it against. Never raises."""
        output_text = output_text[:MAX_CHARACTERS]
        return {name: scorer(output_text, fields) for name, scorer in self._scorers.items()}

    def check(self, fields_seen: Collection[str]) -> None:
        """Reject targets that no row has, before anything is sent.

        Args:
            fields_seen: The names of all fields in the first rows.

        Raises:
            ConfigError: A target's field is not among them.
        """
        for name, entry in self._config.items():
            if _needs_target(entry) and entry.target not in fields_seen:
                near = difflib.get_close_matches(entry.target, fields_seen, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                there = ", ".join(sorted(fields_seen)) or "none"
                raise ConfigError(
                    f"scorers.{name}.target={entry.target!r}: the first rows have no such field.{hint}"
                    f" The fields there are: {there}"
                )


def _needs_target(config: ScorerConfig) -> bool:
    if config.kind == "regex":  # can do without, but a name that is not the default was meant
        return config.target != ScorerConfig().target and bool(re.compile(config.pattern or "").groups)
    return config.kind in ("exact_match", "contains")


def _scorer(name: str, config: ScorerConfig) -> _Scorer:
    kind = config.kind
    if config.pattern is not None and kind != "regex":
        raise ConfigError(f"scorers.{name}.pattern is for scorers.{name}.kind=regex; the kind here is {kind!r}")
    if ":" in kind:
        return _UserFunction(name, kind)
    match kind:
        case "exact_match":
            return partial(_exact_match, config)
        case "contains":
            return partial(_contains, config)
        case "regex":
            return partial(_regex, config, _compiled(name, config))
        case "json_valid":
            return _json_valid
    near = difflib.get_close_matches(kind, KINDS, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"scorers.{name}.kind={kind!r}: choose {', '.join(KINDS)} or package.module:function.{hint}")


def _compiled(name: str, config: ScorerConfig) -> re.Pattern[str]:
    if not config.pattern:
        raise ConfigError(f"scorers.{name}.pattern is missing: the regular expression to look for")
    try:
        return re.compile(config.pattern, re.IGNORECASE if config.ignore_case else 0)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"scorers.{name}.pattern={config.pattern!r} is no regular expression: {error}") from None


# The kinds


def _exact_match(config: ScorerConfig, output: str, fields: Mapping[str, Any]) -> float | None:
    targets = list(_targets(fields, config))
    return float(_is_any(output, targets, config)) if targets else None


def _contains(config: ScorerConfig, output: str, fields: Mapping[str, Any]) -> float | None:
    targets = [target for target in (_normal(text, config) for text in _targets(fields, config)) if target]
    if not targets:
        return None
    text = _folded(output, config)
    return float(any(_stands_in(target, text) for target in targets))


def _regex(config: ScorerConfig, pattern: re.Pattern[str], output: str, fields: Mapping[str, Any]) -> float | None:
    found = pattern.search(output)
    if found is None:
        return 0.0
    targets = list(_targets(fields, config)) if pattern.groups else []
    if not targets:
        return 1.0
    return float(found[1] is not None and _is_any(found[1], targets, config))


def _json_valid(output: str, fields: Mapping[str, Any]) -> float | None:
    try:
        # numbers are not converted: Python refuses integers of many digits, JSON does not
        json.loads(_without_fence(output), parse_constant=_refuse, parse_int=str, parse_float=str)
    except (ValueError, RecursionError):
        return 0.0
    return 1.0


class _UserFunction:
    """A function of the user's: what goes wrong in it costs the score, not the run."""

    def __init__(self, name: str, path: str) -> None:
        self.function = import_name(path, key=f"scorers.{name}.kind")
        self._name = name
        self._warned = False
        self._said_slow = False
        if not callable(self.function) or inspect.iscoroutinefunction(self.function):
            raise ConfigError(f"scorers.{name}.kind={path!r} is no function that can be called without await")

    def __call__(self, output: str, fields: Mapping[str, Any]) -> float | None:
        started = time.perf_counter()
        try:
            value = self.function(output, dict(fields))
        except Exception as error:
            self._warn(f"raised {type(error).__name__}: {error}")
            return None
        finally:
            self._see_time(time.perf_counter() - started)
        if value is None:
            return None
        if not isinstance(value, SupportsFloat):
            self._warn(f"returned a {type(value).__name__}, not a number")
            return None
        score = float(value)
        if not math.isfinite(score):
            self._warn(f"returned {score}")
            return None
        return score

    def _see_time(self, elapsed_s: float) -> None:
        if elapsed_s > _SLOW_S and not self._said_slow:
            self._said_slow = True
            _log.warning(
                "scorer %s took %.2f s for one answer, and nothing else goes on meanwhile, so that all latencies grow:"
                " where it asks a model, let a second run over results.jsonl ask (said once)",
                *(self._name, elapsed_s),
            )

    def _warn(self, problem: str) -> None:
        if not self._warned:
            self._warned = True
            _log.warning("scorer %s %s; such answers have no score (said once)", self._name, problem)


def _source(scorer: _Scorer) -> str | None:
    if not isinstance(scorer, _UserFunction):
        return None
    try:
        return inspect.getsource(scorer.function)
    except (OSError, TypeError):  # a built-in, or an object that can be called
        return None


# Targets and texts


def _targets(fields: Mapping[str, Any], config: ScorerConfig) -> Iterator[str]:
    value = fields.get(config.target)
    for each in value if isinstance(value, list | tuple) else (value,):
        if isinstance(each, str):
            yield each
        elif each is not None:
            yield json.dumps(each, ensure_ascii=False, default=str)


def _is_any(text: str, targets: list[str], config: ScorerConfig) -> bool:
    text = _normal(text, config)
    number = _number(text)
    for target in (_normal(target, config) for target in targets):
        if text == target or (number is not None and number == _number(target)):
            return True
    return False


def _folded(text: str, config: ScorerConfig) -> str:
    text = " ".join(text.split())
    return text.casefold() if config.ignore_case else text


def _normal(text: str, config: ScorerConfig) -> str:
    """Folded, without the quotes around it and one mark at its end, be it inside the quotes or outside."""
    text = _folded(text, config)
    bare = _without_mark(text)
    unquoted = _without_quotes(bare)
    return _without_mark(unquoted) if bare == text else unquoted


def _without_mark(text: str) -> str:
    return text[:-1].rstrip() if len(text) > 1 and text[-1] in ".,!?" else text


def _without_quotes(text: str) -> str:
    return text[1:-1].strip() if len(text) > 2 and text[0] + text[-1] in _QUOTES else text


_QUOTES = frozenset(('""', "''", "``", "“”", "‘’", "„“", "‚‘", "«»", "»«", "‹›", "「」", "『』"))

_NUMBER_PATTERN = (
    r"[-+−]?(?:(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[1-9][0-9]*|0)(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]{1,4})?"
)
_NUMBER = re.compile(_NUMBER_PATTERN)
_NUMBER_IN_TEXT = re.compile(rf"(?<!\w)(?<![0-9]\.){_NUMBER_PATTERN}(?!\w)(?!\.[0-9])")
_NUMBER_CHARACTERS = 400  # the longest double, written out, has fewer


def _number(text: str) -> Decimal | None:
    if len(text) > _NUMBER_CHARACTERS or not _NUMBER.fullmatch(text):
        return None
    return Decimal(text.replace(",", "").replace("−", "-"))


def _stands_in(target: str, text: str) -> bool:
    number = _number(target)
    if number is not None:
        return any(_number(found[0]) == number for found in _NUMBER_IN_TEXT.finditer(text))
    start = text.find(target)
    while start >= 0:
        end = start + len(target)
        if not _in_one_word(text[start - 1 : start], target[0]) and not _in_one_word(target[-1], text[end : end + 1]):
            return True
        start = text.find(target, start + 1)
    return False


def _in_one_word(left: str, right: str) -> bool:
    """Whether two neighbours belong to one word; an empty text is the edge of the text."""
    return all(each.isalnum() or each == "_" for each in (left, right)) and not _UNSPACED.search(left + right)


_UNSPACED = re.compile(
    "["
    "\u0e00-\u0eff"  # Thai, Lao
    "\u1000-\u109f"  # Burmese
    "\u1780-\u17ff"  # Khmer
    "\u3040-\u30ff"  # Japanese
    "\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Chinese characters
    "\uac00-\ud7af"  # Korean: spaced, but particles are joined to the word
    "]"
)


def _without_fence(text: str) -> str:
    text = text.strip()
    if not (len(text) >= 6 and text.startswith("```") and text.endswith("```")):
        return text
    language, newline, body = text[3:-3].partition("\n")
    return body if newline and language.strip().lower() in ("", "json") else text[3:-3]


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")
