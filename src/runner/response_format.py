"""Structured output: the schema that a model is asked to keep to, and its answer read back."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from runner.dataset.paths import suggestion
from runner.errors import ConfigError, ParseError
from runner.identity import check_levels
from runner.names import import_name

if TYPE_CHECKING:
    from pydantic import BaseModel

Layout: TypeAlias = "type[BaseModel] | Mapping[str, Any] | ResponseFormat"
"""What `ResponseFormat.of` takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseFormat:
    """The form that answers are asked for in.

    Make one with `of`, once for all the requests that share it.
    """

    schema_param: dict[str, Any]  # ``response_format`` as chat completions take it
    parse: Callable[[str], Any] = field(repr=False)
    """The answer as an instance of the model, or as a plain Python object that fits the schema.

    Raises:
        ParseError: It does not fit, or is no JSON; in one line.
    """

    @classmethod
    def of(cls, layout: Layout, *, key: str = "response_format") -> ResponseFormat:
        """The format that ``layout`` describes.

        Args:
            layout: A Pydantic model, whose schema is tightened to OpenAI's strict mode where it has such a form. Or a
                JSON schema, sent as it is, and as strict where it says all that strict mode asks for. Or the wire's
                own ``{"type": "json_object"}``, ``{"type": "json_schema", "json_schema": {…}}`` and
                ``{"type": "text"}``, sent as they are.
            key: The argument that it was given for.

        Raises:
            ConfigError: It is none of these, or no valid JSON schema.
        """
        if isinstance(layout, ResponseFormat):
            return layout
        if isinstance(layout, Mapping):
            try:
                return _of_mapping(dict(layout))
            except RecursionError:
                raise ConfigError(f"{key} is nested too deeply for a JSON schema") from None
        if isinstance(layout, type) and hasattr(layout, "model_validate_json"):
            return _of_model(layout)
        raise ConfigError(f"{key} is of type {type(layout).__name__}: give a Pydantic model class or a JSON schema")

    @classmethod
    def configured(cls, value: Any) -> ResponseFormat:
        """The format that a configuration names.

        Args:
            value: What `of` takes as a mapping, the path of a ``.json`` file that holds it, or
                ``package.module:PydanticModel``.

        Raises:
            ConfigError: There is no such file or model, or it is of no use.
        """
        if not isinstance(value, str):
            return cls.of(value)
        path = Path(value).expanduser()
        if not value.endswith(".json"):
            if ":" not in value:
                raise ConfigError(
                    f"response_format={value}: give a JSON schema, the path of a .json file, or"
                    " package.module:PydanticModel"
                )
            return cls.of(import_name(value, key="response_format"), key=f"response_format={value}")
        try:
            layout = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise ConfigError(f"response_format={value}: there is no such file.{suggestion(str(path))}") from None
        except OSError as error:
            raise ConfigError(f"response_format={value}: it cannot be read ({error.strerror})") from None
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"response_format={value} holds no JSON: {error}") from None
        return cls.of(layout)


def parse_json(text: str) -> Any:
    """The value of a JSON text. ``NaN`` and ``Infinity`` are no JSON.

    Raises:
        ParseError: It is none, or is nested too deeply to be kept.
    """
    try:
        value = json.loads(text, parse_constant=_no_json)
        check_levels([value], 1 + text.count("{") + text.count("["))  # as deep as it is among the details of an answer
    except (ValueError, RecursionError) as error:
        raise ParseError(f"the answer is no JSON: {error}") from None
    return value


def _of_mapping(layout: dict[str, Any]) -> ResponseFormat:
    match layout:
        case {"type": "text"}:
            return ResponseFormat(schema_param=layout, parse=str)
        case {"type": "json_object"}:
            return ResponseFormat(schema_param=layout, parse=parse_json)
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            return ResponseFormat(schema_param=layout, parse=_parser(schema))
        case {"type": "json_schema"}:
            raise ConfigError(
                'response_format: {"type": "json_schema"} needs {"json_schema": {"name": …, "schema": …}}'
            )
    parse = _parser(layout)
    name = layout.get("title") or "response"
    return ResponseFormat(schema_param=_wrapped(name, layout, is_strict=_is_strict(layout)), parse=parse)


@lru_cache(maxsize=64)
def _of_model(model: type[BaseModel]) -> ResponseFormat:
    from pydantic import ValidationError
    from pydantic.errors import PydanticUserError

    def parse(text: str) -> Any:
        try:
            return model.model_validate_json(text)
        except ValidationError as error:
            first, *others = error.errors(include_url=False, include_context=False, include_input=False)
            where = ".".join(map(str, first["loc"]))
            more = f" (and {len(others)} more)" if others else ""
            raise ParseError(
                f"the answer does not fit {model.__name__}: {where + ': ' if where else ''}{first['msg']}{more}"
            ) from None
        except Exception as error:  # a validator of the user's: whatever it raises concerns this answer
            raise ParseError(f"{model.__name__} cannot read the answer: {type(error).__name__}: {error}") from error

    try:
        schema = model.model_json_schema()
    except PydanticUserError as error:
        raise ConfigError(f"response_format: {model.__name__} has no JSON schema: {error.message}") from None
    if "$ref" in schema:  # how Pydantic writes a model that contains itself
        schema = {**schema["$defs"][schema["$ref"].removeprefix("#/$defs/")], "$defs": schema["$defs"]}
    strict = _tightened(schema)
    if _is_strict(strict):
        return ResponseFormat(schema_param=_wrapped(model.__name__, strict, is_strict=True), parse=parse)
    return ResponseFormat(schema_param=_wrapped(model.__name__, schema, is_strict=False), parse=parse)


def _parser(schema: dict[str, Any]) -> Callable[[str], Any]:
    """A reader of answers that fit ``schema``. It follows no reference out of the schema."""
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import Draft202012Validator, validator_for
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    kind: Any = validator_for(schema, default=Draft202012Validator)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise ConfigError(f"response_format is no JSON schema: {error.json_path}: {error.message}") from None
    validator = kind(schema, registry=Registry())

    def parse(text: str) -> Any:
        value = parse_json(text)
        try:
            wrong = next(validator.iter_errors(value), None)
        except (Unresolvable, RecursionError) as error:
            raise ParseError(f"the answer cannot be held against the schema: {error}") from None
        if wrong is not None:
            raise ParseError(f"the answer does not fit the schema: {wrong.json_path}: {_shortened(wrong.message)}")
        return value

    return parse


def _wrapped(name: str, schema: dict[str, Any], *, is_strict: bool) -> dict[str, Any]:
    """The chat form; OpenAI takes names of up to 64 letters, digits, ``_`` and ``-``."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:64]
    return {"type": "json_schema", "json_schema": {"name": name, "schema": schema, "strict": is_strict}}


# OpenAI's strict mode, https://platform.openai.com/docs/guides/structured-outputs#supported-schemas: the root is an
# object, every object closed and all its properties required, and only these keywords combine schemas.

_CHILDREN = ("properties", "$defs", "definitions")
_LISTS = ("anyOf", "allOf", "oneOf", "prefixItems")
_UNSUPPORTED = frozenset(
    {
        "allOf",
        "contains",
        "default",
        "dependentRequired",
        "dependentSchemas",
        "discriminator",
        "else",
        "if",
        "not",
        "oneOf",
        "patternProperties",
        "prefixItems",
        "propertyNames",
        "then",
        "unevaluatedItems",
        "unevaluatedProperties",
        "uniqueItems",
    }
)


def _is_strict(schema: dict[str, Any]) -> bool:
    """Whether strict mode takes the schema as it is."""
    return schema.get("type") == "object" and all(
        not _UNSUPPORTED & node.keys()
        and ("$ref" not in node or len(node) == 1)
        and (
            "object" not in _types(node)
            or (
                node.get("additionalProperties") is False
                and set(node.get("required", ())) == node.get("properties", {}).keys()
            )
        )
        for node in _nodes(schema)
    )


def _nodes(schema: Any) -> Iterator[dict[str, Any]]:
    """The schema and those within it."""
    if not isinstance(schema, dict):
        return
    yield schema
    for key in _CHILDREN:
        for child in schema.get(key, {}).values():
            yield from _nodes(child)
    for key in _LISTS:
        for child in schema.get(key, ()):
            yield from _nodes(child)
    yield from _nodes(schema.get("items"))


def _types(node: dict[str, Any]) -> list[str]:
    kinds = node.get("type", "object" if "properties" in node else ())
    return [kinds] if isinstance(kinds, str) else list(kinds)


def _tightened(node: Any) -> Any:
    """A copy of a model's schema that says what strict mode wants, as far as there is a way to say it.

    Objects are closed and need all their properties: one with a default is written out by the model.
    """
    if not isinstance(node, dict):
        return node
    tight = {key: value for key, value in node.items() if key not in ("default", "discriminator")}
    if "$ref" in tight and len(tight) > 1:  # a reference stands alone
        tight["anyOf"] = [{"$ref": tight.pop("$ref")}]
    if "oneOf" in tight:
        tight["anyOf"] = tight.pop("oneOf")
    for key in _CHILDREN:
        if key in tight:
            tight[key] = {name: _tightened(child) for name, child in tight[key].items()}
    for key in _LISTS:
        if key in tight:
            tight[key] = [_tightened(child) for child in tight[key]]
    if "items" in tight:
        tight["items"] = _tightened(tight["items"])
    if "properties" in tight:
        tight.setdefault("additionalProperties", False)
        tight["required"] = list(tight["properties"])
    return tight


def _no_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON value")


def _shortened(message: str) -> str:
    return message if len(message) <= 300 else f"{message[:300]}…"
