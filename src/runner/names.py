"""Names of the user's own Python objects, as the configuration writes them: ``package.module:function``."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from types import ModuleType
from typing import Any

from runner.errors import ConfigError


def import_name(path: str, *, key: str) -> Any:
    """The object that ``path`` names: ``package.module:function``, or ``package.module:Class.method``.

    Modules are looked for as ``python -m`` does, in the working directory and among what is installed.
    The module's code runs. Whether the object can be called is for the caller to check.

    Args:
        path: What the user wrote.
        key: The configuration key it was written for; every error names it.

    Raises:
        ConfigError: The path is malformed, the module or the name in it does not exist, or importing it failed.
    """
    where = f"{key}={path!r}"
    module_name, _, attributes = path.partition(":")
    if not _is_dotted(module_name) or not _is_dotted(attributes) or module_name.endswith(".py"):
        raise ConfigError(f"{where}: write package.module:function{_respelt(path)}")
    found: Any = _import_module(module_name, where)
    name = module_name
    for attribute in attributes.split("."):
        try:
            found = getattr(found, attribute)
        except AttributeError:
            near = difflib.get_close_matches(attribute, [each for each in dir(found) if each[0] != "_"], n=1)
            hint = f". Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{where}: {name!r} has no {attribute!r}{hint}") from None
        name = f"{name}.{attribute}"
    return found


def _import_module(name: str, where: str) -> ModuleType:
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()  # the file may be newer than the last look into its folder
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # the user's code: whatever it raises, and a script's exit()
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{name}.".startswith(f"{missing}."):
            raise ConfigError(f"{where}: there is no module {missing!r} in {here} or among what is installed") from None
        raise ConfigError(f"{where}: importing {name!r} failed: {type(error).__name__}: {error}") from error


def _is_dotted(name: str) -> bool:
    return all(part.isidentifier() for part in name.split("."))


def _respelt(path: str) -> str:
    """A guess at what was meant, for the forms that people write instead: a file's name, a dot for the colon."""
    module, _, name = path.partition(":")
    module = module.removeprefix("./").removesuffix(".py").strip("/").replace("/", ".")
    if not name:
        module, _, name = module.rpartition(".")
    guess = f"{module}:{name}"
    return f", for example {guess}" if guess != path and _is_dotted(module) and _is_dotted(name) else ""
