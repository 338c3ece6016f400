"""Keyword arguments: a misspelt one is an error that names the right one, as Python itself does from 3.13 on."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_ELSEWHERE = {
    "api_key": "openrouter_api_key",
    "base_url": "api_base",
    "concurrency": "max_parallel_requests",
    "max_concurrency": "max_parallel_requests",
}
"""What other programs, and the command, call some arguments."""


def spelt(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, which is told of a keyword that it does not take together with the nearest one that it does.

    Raises:
        TypeError: The call has an unknown keyword, or an argument without a keyword that needs one.
    """
    parameters = inspect.signature(function).parameters
    known = [name for name in parameters if name != "self"]
    places = sum(each.kind is each.POSITIONAL_OR_KEYWORD for each in parameters.values())
    only_named = [name for name, each in parameters.items() if each.kind is each.KEYWORD_ONLY]

    @wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        if len(args) > places and only_named:
            found = repr(args[places])[:60]
            raise TypeError(f"{function.__qualname__}(): write the name before {found}, as in {only_named[0]}={found}")
        for name in kwargs:
            if name not in known:
                near = [_ELSEWHERE.get(name, "")] if _ELSEWHERE.get(name) in known else []
                near = near or difflib.get_close_matches(name, known, n=1)
                hint = f". Did you mean {near[0]!r}?" if near else f"; it takes {', '.join(known)}"
                raise TypeError(f"{function.__qualname__}() got an unexpected keyword argument {name!r}{hint}")
        return function(*args, **kwargs)

    return called
