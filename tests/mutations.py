"""Good JSON made bad: values replaced by anything, bytes changed, lost or added."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

JUNK: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=5,
)


@st.composite
def mutated_json(draw: st.DrawFn, document: bytes) -> bytes:
    """``document``, if it is JSON, with up to three of its values replaced, and perhaps with some bytes changed."""
    try:
        value = json.loads(document)
    except ValueError:
        return document
    for _ in range(draw(st.integers(0, 3))):
        replace_value(value, draw(st.integers(0, 40)), draw(JUNK))
    return draw(mutated_bytes(json.dumps(value).encode())) if draw(st.booleans()) else json.dumps(value).encode()


@st.composite
def mutated_bytes(draw: st.DrawFn, raw: bytes) -> bytes:
    """``raw`` with some bytes replaced, or without its end."""
    start = draw(st.integers(0, len(raw)))
    end = len(raw) if draw(st.booleans()) else draw(st.integers(start, len(raw)))
    return raw[:start] + draw(st.binary(max_size=4)) + raw[end:]


def replace_value(document: Any, number: int, value: Any) -> None:
    """Replace the ``number``-th value of ``document``, counted from the outside in, and round about."""
    places: list[tuple[Any, Any]] = []
    nodes = [document]
    for node in nodes:
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, child in list(items):
            places.append((node, key))
            nodes.append(child)
    if places:
        node, key = places[number % len(places)]
        node[key] = value
