"""Redaction: what is shown or sent anywhere goes without its secrets."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from enum import Enum
from typing import Any

from runner.config import SECRET_KEYS


def redact(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of ``settings`` as plain JSON data without its secrets; see `Redactor`."""
    plain: dict[str, Any] = Redactor(settings)(settings)
    return plain


class Redactor:
    """Copies data as plain JSON data, with ``***`` in place of secrets.

    Secret are:

    - what stands under a key that `config.SECRET_KEYS` marks, however it is spelt (``apiKey``, ``X-API-Key``), save
      for a key ``…_env`` that names an existing environment variable;
    - user names, passwords and key parameters in URLs;
    - anywhere in a text, from 8 characters on: the values found under such keys in ``settings``, and those of
      environment variables that such a ``…_env`` names or whose name has KEY, TOKEN, SECRET or PASSWORD in it.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        secrets = {value for name, value in os.environ.items() if _SECRET_VARIABLE.search(name)}
        secrets.update(_secrets_in(settings))
        longest_first = sorted((value for value in secrets if len(value) >= 8), key=len, reverse=True)
        self._secrets = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def __call__(self, value: Any) -> Any:
        if isinstance(value, Enum):
            value = value.value
        if value is None or isinstance(value, bool | int | float):
            return value
        if isinstance(value, Mapping):
            return {self.text(str(key)): self._entry(key, entry) for key, entry in value.items()}
        if isinstance(value, Sequence | Set) and not isinstance(value, str | bytes):
            return [self(entry) for entry in value]
        return self.text(str(value))

    def _entry(self, key: Any, value: Any) -> Any:
        hidden = value and _is_secret_key(key) and not _is_variable(key, value)
        return "***" if hidden else self(value)

    def text(self, text: str) -> str:
        text = _URL_USER.sub("", text)
        text = _URL_KEY.sub(r"\1***", text)
        return self._secrets.sub("***", text) if self._secrets else text


_SECRET_VARIABLE = re.compile("KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)

# Bounded and anchored, so that they stay linear on any text.
_URL_USER = re.compile(r"(?<=://)[^/?#\s\"'<>]+@")
_URL_KEY = re.compile(r"([?&][\w.-]{0,40}(?:key|token|secret|password)[\w.-]{0,40}=)[^&#\s\"'<>]+", re.IGNORECASE)


def _is_secret_key(key: Any) -> bool:
    spelt = re.sub(r"[^a-z]", "", str(key).lower())
    return any(part.replace("_", "") in spelt for part in SECRET_KEYS)


def _is_variable(key: Any, value: Any) -> bool:
    return str(key).endswith("_env") and isinstance(value, str) and value in os.environ


def _secrets_in(value: Any, *, secret: bool = False) -> Iterator[str]:
    """The texts under secret keys, and the values of the variables that ``…_env`` keys name."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            for each in entry if isinstance(entry, list | tuple) else [entry]:
                if _is_variable(key, each):
                    yield os.environ[each]
                else:
                    yield from _secrets_in(each, secret=secret or _is_secret_key(key))
    elif isinstance(value, str):
        if secret:
            yield value
    elif isinstance(value, Sequence):
        for entry in value:
            yield from _secrets_in(entry, secret=secret)
