"""Documents that satisfy a JSON schema."""

from __future__ import annotations

import math
from functools import reduce
from operator import getitem
from typing import Any

MAX_DEPTH = 6  # of a document, where its schema lets it end


def document_for(schema: Any, *, text: str, number: float) -> Any:
    """A JSON value that satisfies a simple schema: ``text`` where it fits, else drawn by ``number``, 0 to 1.

    Known are types, ``properties``, ``items``, ``enum``, ``const``, ``$ref``, ``anyOf``, ``oneOf``, ``allOf``, the
    bounds of numbers, strings and arrays, and the usual formats. ``pattern``, ``not`` and conditions are ignored.

    Raises:
        ValueError: It is no JSON schema, or one that nothing finite satisfies.
    """

    def value(node: Any, depth: int = 0) -> Any:
        if not isinstance(node, dict):
            return text
        if "$ref" in node or "allOf" in node:
            return value(_flat(schema, node), depth + 1)
        if "const" in node:
            return node["const"]
        if "enum" in node:
            options = node["enum"]
            return next((option for option in options if str(option) == text), options[int(number * len(options))])
        if branches := node.get("anyOf") or node.get("oneOf"):
            # A schema that contains itself has a way out of the circle in one of its branches.
            ranked = sorted(branches, key=lambda branch: branch.get("type") == "null", reverse=depth > MAX_DEPTH)
            return value(ranked[0], depth + 1)
        kinds = node.get("type") or ("object" if "properties" in node else "array" if "items" in node else "string")
        match next((kind for kind in ([kinds] if isinstance(kinds, str) else kinds) if kind != "null"), "null"):
            case "object":
                needed = node.get("required", ())
                children = {name: {} for name in needed} | node.get("properties", {})
                return {name: value(children[name], depth + 1) for name in (children if depth <= MAX_DEPTH else needed)}
            case "array":
                fixed = node.get("prefixItems", [])
                size = max(int(depth <= MAX_DEPTH), node.get("minItems", 0), len(fixed))
                items = [*fixed, *[node.get("items", {})] * (size - len(fixed))]
                return [value(child, depth + 1) for child in items[: node.get("maxItems")]]
            case "integer":
                return int(_number(node, text, number, step=1))
            case "number":
                return _number(node, text, number, step=0)
            case "boolean":
                return text.strip().lower() in ("true", "yes") or number >= 0.5
            case "null":
                return None
        said: str = _FORMATS.get(node.get("format", ""), text) or "x"
        missing = node.get("minLength", 0) - len(said)
        return (said + f" {said}" * math.ceil(missing / len(said)))[: node.get("maxLength")]

    try:
        return value(schema)
    except (AttributeError, IndexError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None


def _flat(schema: Any, node: dict[str, Any]) -> dict[str, Any]:
    """A node that says itself what its ``$ref`` (``#/$defs/NAME``) and the parts of its ``allOf`` say."""
    merged = {name: said for name, said in node.items() if name not in ("$ref", "allOf")}
    referred = [reduce(getitem, node["$ref"].split("/")[1:], schema)] if "$ref" in node else []
    for part in [_flat(schema, part) for part in (*referred, *node.get("allOf", ()))]:
        properties = merged.get("properties", {}) | part.get("properties", {})
        required = [*merged.get("required", ()), *part.get("required", ())]
        merged |= {**part, "required": required} | ({"properties": properties} if properties else {})
    return merged


def _number(node: dict[str, Any], text: str, drawn: float, *, step: float) -> float:
    step = node.get("multipleOf", step)
    margin = step or 1e-3
    low: float = max(node.get("minimum", -math.inf), node.get("exclusiveMinimum", -math.inf) + margin)
    high: float = min(node.get("maximum", math.inf), node.get("exclusiveMaximum", math.inf) - margin)
    try:
        if low <= (said := float(text)) <= high and (not step or said % step == 0):
            return said
    except ValueError:  # the text is no number
        pass
    if low == -math.inf:
        low = 0.0 if high >= 0 else high - 100
    high = min(high, low + 100)
    if not step:
        return round(low + drawn * (high - low), 3) if high - low > 1e-2 else (low + high) / 2
    first, last = math.ceil(low / step), math.floor(high / step)
    return float((first + int(drawn * (last - first + 1))) * step)


_FORMATS = {
    "date": "2025-01-31",
    "date-time": "2025-01-31T12:00:00Z",
    "time": "12:00:00Z",
    "duration": "P1D",
    "email": "someone@example.com",
    "hostname": "example.com",
    "ipv4": "192.0.2.1",
    "ipv6": "2001:db8::1",
    "uri": "https://example.com/",
    "uuid": "123e4567-e89b-42d3-a456-426614174000",
}
