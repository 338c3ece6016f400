"""Keyword arguments: a misspelt one is an error that names the right one, as Python itself does from 3.13 on."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def spelt(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, which is told of a keyword that it does not take together with the nearest one that it does.

    Raises:
        TypeError: The call has an unknown keyword.
    """
    known = [name for name in inspect.signature(function).parameters if name != "self"]

    @wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f". Did you mean {near[0]!r}?" if near else f"; it takes {', '.join(known)}"
                raise TypeError(f"{function.__qualname__}() got an unexpected keyword argument {name!r}{hint}")
        return function(*args, **kwargs)

    return called
