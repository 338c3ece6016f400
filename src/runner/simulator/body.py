"""Requests as they come, and what is read from their bodies. What is malformed is a `Refusal`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, TypeVar

import orjson

from runner.simulator.faults import Refusal, missing
from runner.simulator.text import tokens_in

TOKENS_PER_ATTACHMENT = 85

PREFIX_BYTES = 256

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Body:
    """What a request says, ``identity`` being the hash of what it asks for, however that is spelled and delivered."""

    fields: dict[str, Any]
    identity: str
    id: str  # of this request among all

    @property
    def model(self) -> str:
        return self.required("model", str)

    @property
    def max_tokens(self) -> int | None:
        return self.positive("max_completion_tokens", "max_tokens", "max_output_tokens")

    @property
    def schema(self) -> dict[str, Any] | None:
        """What ``response_format`` (chat) or ``text.format`` (responses) asks for; None for plain text."""
        layout: Any = self.fields.get("response_format") or (self.fields.get("text") or {}).get("format")
        kind = layout.get("type") if isinstance(layout, dict) else None
        if kind == "json_object":
            return {"type": "object", "properties": {"answer": {"type": "string"}}}
        if kind != "json_schema":
            return None
        if not isinstance(schema := layout.get("json_schema", layout).get("schema"), dict):
            raise missing("response_format.json_schema.schema")
        return schema

    @property
    def tool(self) -> tuple[str, dict[str, Any]] | None:
        """Name and parameter schema of the function that must be called; None where the model is free."""
        choice = self.fields.get("tool_choice")
        if choice != "required" and not isinstance(choice, dict):
            return None
        wanted = choice.get("function", choice).get("name") if isinstance(choice, dict) else None
        functions = [tool.get("function", tool) for tool in self.fields.get("tools") or () if isinstance(tool, dict)]
        for function in functions:
            if wanted in (None, function.get("name")):
                return str(function.get("name")), function.get("parameters") or {"type": "object"}
        raise Refusal(f"Tool choice {wanted or 'required'!r} is not among the tools.", param="tool_choice")

    @property
    def beginning(self) -> bytes:
        """How the prompt begins, as a prefix cache would see it; empty where it is short."""
        asked = next((self.fields[name] for name in ("messages", "prompt", "input") if name in self.fields), None)
        begins = orjson.dumps(asked, default=str)[:PREFIX_BYTES]
        return begins if len(begins) == PREFIX_BYTES else b""

    def required(self, name: str, kind: type[T]) -> T:
        value = self.fields.get(name)
        if not isinstance(value, kind) or not value:
            raise missing(name)
        return value

    def positive(self, *names: str) -> int | None:
        """The first of the fields that is set, a number of at least 1."""
        for name in names:
            value = self.fields.get(name)
            if isinstance(value, int) and value >= 1:
                return value
            if value is not None:
                wanted = f"Expected a value >= 1, but got {value} instead."
                message = f"Invalid '{name}': integer below minimum value. {wanted}"
                raise Refusal(message, param=name, code="integer_below_min_value")
        return None

    def texts(self, name: str) -> list[str]:
        """A text or several. Token ids stand for the text that lists them."""
        given = self.fields.get(name)
        if not isinstance(given, list) or (given and all(isinstance(item, int) for item in given)):
            given = [given]
        if not given or not all(isinstance(text, str | list) and text for text in given):
            raise missing(name)
        return [text if isinstance(text, str) else str(text) for text in given]


def read_json(raw: bytes) -> dict[str, Any]:
    try:
        fields = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise Refusal(f"We could not parse the JSON body of your request: {error}") from None
    if not isinstance(fields, dict):
        raise Refusal("The JSON body of your request is no object.")
    return fields


def read_form(raw: bytes, boundary: bytes) -> dict[str, Any]:
    """The fields of a multipart body: texts, and files as (name, content)."""
    fields: dict[str, Any] = {}
    for part in (b"\r\n" + raw).split(b"\r\n--" + boundary)[1:-1]:
        head, _, data = part.partition(b"\r\n\r\n")
        names = dict(_PART_NAME.findall(head.decode("utf-8", "replace")))
        if "name" not in names:
            raise Refusal("We could not parse the form of your request: a part has no name.")
        file = "filename" in names
        fields[names["name"]] = (names["filename"], data) if file else data.decode("utf-8", "replace")
    return fields


_PART_NAME = re.compile(r'\b(name|filename)="([^"]*)"')


def conversation(messages: list[Any]) -> tuple[str, int]:
    """The text of the last message that is the user's, and the tokens of them all."""
    prompt, said, attachments = "", "", 0
    for message in messages:
        if not isinstance(message, dict):
            raise Refusal("Invalid type for a message: expected an object.", code="invalid_type")
        content = message.get("content")
        text = content if isinstance(content, str) else ""
        if isinstance(content, list):
            texts = [part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)]
            attachments += len(content) - len(texts)
            text = "\n".join(texts)
        said += text
        if message.get("role") == "user":
            prompt = text
    return prompt, tokens_in(said) + TOKENS_PER_ATTACHMENT * attachments
