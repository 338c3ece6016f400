from __future__ import annotations

import subprocess
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field, RootModel, field_validator

from runner.errors import ConfigError, ParseError
from runner.response_format import ResponseFormat, parse_json


class Answer(BaseModel):
    value: int
    confidence: float


class Unit(Enum):
    metre = "m"
    second = "s"


class Measure(BaseModel):
    amount: float
    unit: Unit = Field(Unit.metre, description="SI")
    note: str | None = None


class Report(BaseModel):
    title: str = "untitled"
    main: Measure = Field(description="the one that counts")
    others: list[Measure] = []


class Tree(BaseModel):
    name: str
    children: list[Tree] = []


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(BaseModel):
    kind: Literal["dog"]


class Owner(BaseModel):
    pet: Annotated[Cat | Dog, Field(discriminator="kind")]


def schema_of(layout: Any) -> dict[str, Any]:
    schema: dict[str, Any] = ResponseFormat.of(layout).schema_param["json_schema"]["schema"]
    return schema


def is_strict(layout: Any) -> bool:
    strict: bool = ResponseFormat.of(layout).schema_param["json_schema"]["strict"]
    return strict


def objects_in(node: Any) -> list[dict[str, Any]]:
    if isinstance(node, list):
        return [found for child in node for found in objects_in(child)]
    if not isinstance(node, dict):
        return []
    here = [node] if node.get("type") == "object" else []
    return here + [found for child in node.values() for found in objects_in(child)]


def test_a_model_is_asked_for_by_its_name_and_strict_schema() -> None:
    assert ResponseFormat.of(Answer).schema_param == {
        "type": "json_schema",
        "json_schema": {
            "name": "Answer",
            "strict": True,
            "schema": {
                "title": "Answer",
                "type": "object",
                "properties": {
                    "value": {"title": "Value", "type": "integer"},
                    "confidence": {"title": "Confidence", "type": "number"},
                },
                "required": ["value", "confidence"],
                "additionalProperties": False,
            },
        },
    }


@pytest.mark.parametrize("depth", [300, 5_000, 90_000])
def test_a_schema_that_is_nested_beyond_measure_is_refused(tmp_path: Path, depth: int) -> None:
    path = tmp_path / "deep.json"
    path.write_text('{"type": "object", "properties": {"a": ' * depth + "{}" + "}}" * depth)

    with pytest.raises(ConfigError, match="response_format"):
        ResponseFormat.configured(str(path))


@pytest.mark.parametrize("model", [Report, Tree, Owner])
def test_in_strict_mode_every_object_is_closed_and_needs_all_its_keys(model: type[BaseModel]) -> None:
    schema = schema_of(model)

    assert is_strict(model)
    assert schema["type"] == "object"
    assert objects_in(schema)
    for node in objects_in(schema):
        assert node["additionalProperties"] is False
        assert node["required"] == list(node["properties"])
    text = str(schema)
    assert all(f"'{word}'" not in text for word in ("default", "oneOf", "allOf", "discriminator"))


def test_a_reference_with_a_description_keeps_both() -> None:
    main = schema_of(Report)["properties"]["main"]

    assert main == {"anyOf": [{"$ref": "#/$defs/Measure"}], "description": "the one that counts"}


def test_a_model_that_strict_mode_cannot_say_is_sent_as_it_is() -> None:
    class Counts(BaseModel):
        by_word: dict[str, int]
        note: str = ""

    class Names(RootModel[list[str]]):
        pass

    assert not is_strict(Counts)
    assert schema_of(Counts) == Counts.model_json_schema()
    assert not is_strict(Names)
    assert ResponseFormat.of(Names).parse('["a"]') == Names(["a"])


def test_the_name_of_a_generic_model_is_one_that_the_wire_takes() -> None:
    from typing import Generic, TypeVar

    T = TypeVar("T")

    class Boxed(BaseModel, Generic[T]):
        value: T

    name = ResponseFormat.of(Boxed[int]).schema_param["json_schema"]["name"]

    assert name.replace("_", "").isalnum()
    assert name.startswith("Boxed")


def test_an_answer_is_read_back_as_the_model() -> None:
    assert ResponseFormat.of(Answer).parse('{"value": 4, "confidence": 0.99}') == Answer(value=4, confidence=0.99)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"value": "four"}', r"does not fit Answer: value: .*integer.*\(and 1 more\)"),
        ("Four.", "does not fit Answer: Invalid JSON"),
        ("", "Invalid JSON"),
        ("[" * 5000, "Answer"),
    ],
)
def test_an_answer_that_does_not_fit_the_model_is_said_in_one_line(text: str, words: str) -> None:
    with pytest.raises(ParseError, match=words) as caught:
        ResponseFormat.of(Answer).parse(text)

    assert "\n" not in str(caught.value)


def test_whatever_a_models_own_validator_raises_concerns_the_answer() -> None:
    class Word(BaseModel):
        word: str

        @field_validator("word")
        @classmethod
        def known(cls, word: str) -> str:
            raise KeyError(word)

    with pytest.raises(ParseError, match="Word cannot read the answer: KeyError"):
        ResponseFormat.of(Word).parse('{"word": "x"}')


def test_a_schema_is_sent_as_it_is_and_its_answers_are_plain_objects() -> None:
    schema = {"title": "My answer", "type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    layout = ResponseFormat.of(schema)

    assert layout.schema_param == {
        "type": "json_schema",
        "json_schema": {"name": "My_answer", "schema": schema, "strict": False},
    }
    assert layout.parse('{"n": 1, "more": null}') == {"n": 1, "more": None}
    with pytest.raises(ParseError, match=r"\$\.n: 'x' is not of type 'integer'"):
        layout.parse('{"n": "x"}')
    with pytest.raises(ParseError, match="'n' is a required property"):
        layout.parse("{}")


@pytest.mark.parametrize(
    ("change", "strict"),
    [
        ({}, True),
        ({"additionalProperties": True}, False),
        ({"required": []}, False),
        ({"properties": {"n": {"type": "integer", "default": 1}}}, False),
        ({"properties": {"n": {"type": "object"}}}, False),
        ({"properties": {"n": {"type": "array", "items": {"type": "object", "properties": {}}}}}, False),
        ({"properties": {"n": {"oneOf": [{"type": "string"}]}}}, False),
        ({"type": "array"}, False),
    ],
)
def test_a_schema_is_strict_where_it_says_all_that_strict_mode_asks_for(change: dict[str, Any], strict: bool) -> None:
    closed = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }

    assert is_strict({**closed, **change}) is strict


@pytest.mark.parametrize("text", ["", "{", "NaN", '{"a": Infinity}', "[" * 100_000, "1" * 5000, "```json\n{}\n```"])
def test_what_is_no_json_is_a_parse_error(text: str) -> None:
    with pytest.raises(ParseError, match="no JSON"):
        parse_json(text)


def test_the_wires_own_forms_are_sent_as_they_are() -> None:
    schema = {"type": "object", "required": ["n"]}
    wrapped = {"type": "json_schema", "json_schema": {"name": "mine", "schema": schema, "strict": True}}

    assert ResponseFormat.of(wrapped).schema_param == wrapped
    with pytest.raises(ParseError, match="required"):
        ResponseFormat.of(wrapped).parse("{}")
    assert ResponseFormat.of({"type": "json_object"}).schema_param == {"type": "json_object"}
    assert ResponseFormat.of({"type": "json_object"}).parse('{"any": 1}') == {"any": 1}
    assert ResponseFormat.of({"type": "text"}).parse("as it is") == "as it is"


def test_a_format_is_its_own_description() -> None:
    layout = ResponseFormat.of(Answer)

    assert ResponseFormat.of(layout) is layout
    assert ResponseFormat.of(Answer) is layout


def test_no_reference_out_of_a_schema_is_followed() -> None:
    layout = ResponseFormat.of({"$ref": "http://127.0.0.1:1/schema.json"})

    with pytest.raises(ParseError, match="cannot be held against the schema"):
        layout.parse("{}")


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ("Answer", "of type str"),
        (str, "of type type"),
        (Answer(value=1, confidence=1), "of type Answer"),
        ({"type": "objekt"}, r"no JSON schema: \$\.type: 'objekt'"),
        ({"type": "json_schema", "name": "x"}, '"json_schema": {"name"'),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 1}}}, "no JSON schema"),
    ],
)
def test_what_is_no_format_is_refused_before_anything_is_sent(layout: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ResponseFormat.of(layout)


def test_a_model_without_a_schema_is_refused() -> None:
    class Opaque(BaseModel):
        model_config = {"arbitrary_types_allowed": True}
        thing: subprocess.Popen[bytes]

    with pytest.raises(ConfigError, match="Opaque has no JSON schema"):
        ResponseFormat.of(Opaque)


def test_the_module_needs_neither_pydantic_nor_jsonschema_until_a_format_is_made() -> None:
    code = "import sys, runner.response_format; print({'pydantic', 'jsonschema'} & sys.modules.keys())"

    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
