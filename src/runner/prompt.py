"""How a row becomes what is asked.

Three ways lead from a row to a model's input: a Jinja2 template over the row's fields, the user's own function, or
the row itself. Row values are data: they are put into a template's text and never rendered themselves.

Generations take what their endpoint does. A text to embed is a text, audio to transcribe a path.
"""

from __future__ import annotations

import difflib
import inspect
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from runner.config import TaskKind
from runner.dataset import Row
from runner.errors import ConfigError, RowError
from runner.names import import_name
from runner.types import ChatMessage, Endpoint, GenerateInput

if TYPE_CHECKING:
    from jinja2.sandbox import SandboxedEnvironment

Interface: TypeAlias = Endpoint | TaskKind
"""What the inputs are for: an endpoint of generations, or another task."""

INPUT_FIELDS: Mapping[Interface, tuple[str, ...]] = {
    Endpoint.chat_completion: ("messages", "prompt", "responses_input"),
    Endpoint.text_completion: ("prompt", "messages", "responses_input"),
    Endpoint.responses: ("responses_input", "messages", "prompt"),
    TaskKind.embed: ("text", "prompt", "input"),
    TaskKind.transcribe: ("audio", "path"),
}
"""The fields that hold a row's own input. Where a row has several, the first that is not null is asked."""


_ROW = "row"
"""What a template calls all of a row's fields."""

_DEFAULT = ' | default("")'


class Ask(NamedTuple):
    """What is asked for one row."""

    input: Any  # what the task's requests are made of, as JSON could hold it
    metadata: dict[str, Any]  # goes to the results beside the answer
    files: tuple[str, ...] = ()  # what is read when it is sent; their content is part of what is asked


class PromptBuilder:
    """Builds what is asked from a row.

    With ``prompt``, its text over the row's fields; with ``mapper``, what that returns; with neither, the row's own
    input in one of the `INPUT_FIELDS`. ``system`` goes before a text as the endpoint has it, and before messages that
    have no system message.

    The metadata is the mapper's, or the fields that were not themselves the input; a path stays.

    Args:
        prompt: Jinja2 template. A field that a row lacks is an error, unless the template says what then:
            ``{{ hint | default("") }}``, ``{% if hint is defined %}``. ``row`` holds all fields, for names that are no
            identifiers, as in ``{{ row["ticket text"] }}``, unless a field is called so.
        system: Jinja2 template, likewise. A text that comes out empty is no system message.
        mapper: ``package.module:function``, called with a row's fields, returns ``{"input": …, "metadata": …}``
            where the metadata may be left out.
        interface: What the inputs are for.

    Raises:
        ConfigError: A template cannot be compiled, the mapper cannot be imported, or there are both.
    """

    def __init__(self, *, prompt: str | None, system: str | None, mapper: str | None, interface: Interface) -> None:
        if prompt is not None and mapper is not None:
            raise ConfigError("prompt and mapper are two ways to say the same: keep one of them")
        env = _environment() if (prompt, system) != (None, None) else None
        self._prompt = Template(env, prompt, key="prompt") if env and prompt is not None else None
        self._system = Template(env, system, key="system") if env and system is not None else None
        self._mapper = _import_mapper(mapper) if mapper is not None else None
        self._interface = interface

    def __call__(self, row: Row) -> Ask:
        """What to ask for ``row``.

        Raises:
            RowError: Nothing can be asked for this row; names its source.
        """
        if row.error is not None:
            raise row.error
        asked: Any
        if self._prompt is not None:
            asked, metadata = self._prompt.render(row), row.fields
        elif self._mapper is not None:
            asked, metadata = self._mapped(row, self._mapper)
        else:
            asked, metadata = self._own_input(row)
        if self._system is not None:
            asked = self._under(self._system.render(row), asked)
        return Ask(input=asked, metadata=metadata)

    def check(self, rows: Sequence[Row]) -> None:
        """See on the first rows whether this can work at all, before anything is sent.

        Raises:
            ConfigError: A template names a field that none of ``rows`` has, or nothing says what to ask.
        """
        readable = [row for row in rows if row.error is None]
        if not readable:
            return
        known = list(dict.fromkeys(name for row in readable for name in row.fields))
        for template in (self._prompt, self._system):
            if template is not None:
                template.check(known)
        own = self._prompt is None and self._mapper is None
        if own and all(self._input_field(row) is None for row in readable):
            set_prompt = "" if self._interface is TaskKind.transcribe else "set prompt, or "
            raise ConfigError(
                f"nothing to ask: {set_prompt}give the rows a field {_names(INPUT_FIELDS[self._interface])}"
                f" ({_fields(known)})"
            )

    def _mapped(self, row: Row, mapper: Callable[[dict[str, Any]], Any]) -> tuple[Any, dict[str, Any]]:
        try:
            mapped = mapper(dict(row.fields))
        except Exception as error:  # the user's code: whatever it raises concerns this row
            raise RowError(f"{row.source}: the mapper raised {type(error).__name__}: {error}") from error
        if not isinstance(mapped, Mapping) or "input" not in mapped:
            found = type(mapped).__name__ + (' without "input"' if isinstance(mapped, Mapping) else "")
            raise RowError(f'{row.source}: the mapper returned {found}: return {{"input": …, "metadata": …}}')
        metadata = mapped.get("metadata")
        if not isinstance(metadata, Mapping | None):
            raise RowError(f"{row.source}: the mapper's metadata is of type {type(metadata).__name__}, not dict")
        require_input(mapped["input"], self._interface, f"{row.source}: the mapper's input")
        return mapped["input"], dict(metadata or {})

    def _own_input(self, row: Row) -> tuple[Any, dict[str, Any]]:
        name = self._input_field(row)
        if name is None:
            raise RowError(f"{row.source}: no {_names(INPUT_FIELDS[self._interface])} in this row")
        value = row.fields[name]
        if not isinstance(value, _FIELD_TYPES[name]):
            expected = " or ".join(_TYPE_NAMES[each] for each in _FIELD_TYPES[name])
            if name == "audio":
                expected = 'a path or {"bytes": base64, "path": name}'
            raise RowError(f"{row.source}: {name} is of type {type(value).__name__}, not {expected}")
        require_input(value, self._interface, f"{row.source}: {name}")
        if self._interface is TaskKind.transcribe and isinstance(value, str):
            return value, row.fields
        return value, {key: each for key, each in row.fields.items() if key != name}

    def _input_field(self, row: Row) -> str | None:
        for name in INPUT_FIELDS[self._interface]:
            if row.fields.get(name) is not None:
                return name
        return None

    def _under(self, system: str, asked: GenerateInput) -> GenerateInput:
        if not system:
            return asked
        if isinstance(asked, list):
            if any(message["role"] in ("system", "developer") for message in asked):
                return asked
            return [_message("system", system), *asked]
        if isinstance(asked, dict):
            return {"instructions": system, **asked}
        if self._interface is Endpoint.responses:
            return {"input": asked, "instructions": system}
        if self._interface is Endpoint.text_completion:
            return f"{system}\n\n{asked}"
        return [_message("system", system), _message("user", asked)]


def require_input(value: Any, interface: Interface, what: str) -> None:
    """See whether ``value`` is an input that ``interface`` takes.

    Raises:
        RowError: It is not; the message calls it ``what``.
    """
    match value:
        case str():
            return
        case list() if interface in (Endpoint.chat_completion, Endpoint.responses):
            if not value:
                raise RowError(f"{what} holds no message")
            for number, message in enumerate(value, 1):
                if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                    raise RowError(f"{what}: message {number} is no dictionary with a role")
        case dict() if interface is Endpoint.responses:
            if not isinstance(value.get("input"), str | list):
                raise RowError(f'{what} is a dictionary without "input", a text or a list')
        case {"bytes": str()} if interface is TaskKind.transcribe:
            return
        case _:
            taken = " or ".join(_TYPE_NAMES[each] for each in _TYPES[interface])
            key = "endpoint" if isinstance(interface, Endpoint) else "task"
            raise RowError(f"{what} is of type {type(value).__name__}, and {key}={interface.value} takes {taken}")


_FIELD_TYPES: dict[str, tuple[type, ...]] = {
    "prompt": (str,),
    "messages": (list,),
    "responses_input": (str, dict),
    "text": (str,),
    "input": (str,),
    "audio": (str, dict),
    "path": (str,),
}
_TYPES: dict[Interface, tuple[type, ...]] = {
    Endpoint.chat_completion: (str, list),
    Endpoint.text_completion: (str,),
    Endpoint.responses: (str, list, dict),
    TaskKind.embed: (str,),
    TaskKind.transcribe: (str,),
}
_TYPE_NAMES: dict[type, str] = {str: "a text", list: "a list of messages", dict: 'a dictionary with "input"'}


class Template:
    """One Jinja2 template of the configuration.

    Args:
        env: What it is compiled in.
        text: The template as the user wrote it.
        key: The configuration key it was written for; every error names it.

    Raises:
        ConfigError: It is no template; names the line.
    """

    def __init__(self, env: SandboxedEnvironment, text: str, *, key: str) -> None:
        from jinja2 import TemplateSyntaxError, meta

        self._key = key
        try:
            tree = env.parse(text)
            self._names = sorted(meta.find_undeclared_variables(tree))
            self._needed = [name for name in self._names if name not in _optional(tree)]
            self._items = _items(tree)
            self._template = env.from_string(tree)
            self._pieces = _pieces(tree)
        except TemplateSyntaxError as error:
            spaced = re.search(r"\{\{\s*(\w+(?: \w+)+)\s*\}\}", text)
            hint = f". A field of this name is {spelt(spaced[1])}" if spaced else ""
            raise ConfigError(f"{key}, line {error.lineno}: {error.message}{hint}") from None
        if list(meta.find_referenced_templates(tree)):
            raise ConfigError(f"{key}: a template stands alone: it cannot include, import or extend another")

    def render(self, row: Row) -> str:
        """The text for ``row``.

        Raises:
            RowError: The row lacks a field, or has null there, or the template cannot work with its values.
        """
        try:
            if self._pieces is not None:
                fields = row.fields
                return "".join([text if name is None else str(_no_null(fields[name])) for text, name in self._pieces])
        except Exception:  # the template says what is wrong
            pass
        try:
            return self._template.render({_ROW: row.fields, **row.fields} if _ROW in self._names else row.fields)
        except _NullError as error:
            name = next((each for each in (*self._names, *self._items) if row.fields.get(each, "") is None), None)
            what = "a value is null" if name is None else f"the field {name!r} is null"
            without = spelt(name or "FIELD", " or ''")
            raise RowError(f"{row.source}: {self._key}: {what}; {without} leaves it out") from error
        except Exception as error:  # filters and operators raise what they like, over values of any type
            what = f"{type(error).__name__}: {error} ({_fields(row.fields)})"
            raise RowError(f"{row.source}: {self._key}: {what}") from error

    def check(self, known: Collection[str]) -> None:
        """Raise a `ConfigError` if a field is needed that is not ``known``."""
        needed: Sequence[str] = self._needed
        if self._items and _ROW not in known:
            items = (name for name, is_needed in self._items.items() if is_needed)
            needed = [*(name for name in needed if name != _ROW), *items]
        for name in needed:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                near += [each for each in known if name in re.split(r"\W+", each)]  # {{ ticket-text }} names two
                hint = f"Did you mean {spelt(near[0])}?" if near else f"If rows may lack it: {spelt(name, _DEFAULT)}"
                raise ConfigError(f"{self._key} names the field {name!r}, which no row has ({_fields(known)}). {hint}")


def _environment() -> SandboxedEnvironment:
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    return ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, autoescape=False, keep_trailing_newline=False, finalize=_no_null
    )


def _no_null(value: Any) -> Any:
    """The value of an expression that a template writes down; null would be written as the word None."""
    if value is None:
        raise _NullError
    return value


class _NullError(Exception):
    """A template has a null to write down."""


def _pieces(tree: Any) -> list[tuple[str, str | None]] | None:
    """The texts and the names of fields that a template is a mere sequence of; None: there is more to it.

    Such a template, and most are, is filled in a tenth of the time that Jinja2 takes, to the same text.
    """
    from jinja2 import nodes

    pieces: list[tuple[str, str | None]] = []
    for output in tree.body:
        for node in output.nodes if isinstance(output, nodes.Output) else [output]:
            if isinstance(node, nodes.TemplateData):
                pieces.append((node.data, None))
            elif isinstance(node, nodes.Name) and node.name != "self":
                pieces.append(("", node.name))
            else:
                return None
    return pieces


def _optional(tree: Any) -> set[str]:
    """The names that a template itself provides for being absent, by a test or a default."""
    from jinja2 import nodes

    return {node.name for node in _provided(tree) if isinstance(node, nodes.Name)}


def _items(tree: Any) -> dict[str, bool]:
    """The fields that a template takes out of ``row``, and whether it needs them to be there."""
    from jinja2 import nodes

    provided = _provided(tree)
    of_row = (node for node in tree.find_all(nodes.Getitem) if node.node == nodes.Name(_ROW, "load"))
    named = (node for node in of_row if isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str))
    return {node.arg.value: node not in provided for node in named}


def _provided(tree: Any) -> list[Any]:
    """What a template tests for being there, or has a default for."""
    from jinja2 import nodes

    handlers = {"defined", "undefined", "default", "d"}
    return [node.node for node in tree.find_all((nodes.Test, nodes.Filter)) if node.name in handlers]


def is_half_quoted(template: str) -> bool:
    """Whether a text begins with a quote that nothing closes, such as one half of a pair forgotten in a shell."""
    return template.startswith('"') and re.sub(r"\{[{%#].*?[}%#]\}", "", template, flags=re.DOTALL).count('"') == 1


def spelt(name: str, rest: str = "") -> str:
    """A field as a template has it, followed by what else is to be done with it."""
    field = name if name.isidentifier() else f"{_ROW}[{json.dumps(name, ensure_ascii=False)}]"
    return f"{{{{ {field}{rest} }}}}"


def _import_mapper(path: str) -> Callable[[dict[str, Any]], Any]:
    mapper = import_name(path, key="mapper")
    if not callable(mapper) or inspect.iscoroutinefunction(mapper):
        found = "an async function" if callable(mapper) else f"of type {type(mapper).__name__}"
        raise ConfigError(f"mapper={path!r} is {found}, not a function of a row's fields")
    return mapper  # type: ignore[no-any-return]


def _message(role: str, content: str) -> ChatMessage:
    return {"role": role, "content": content}


def _names(names: Collection[Any]) -> str:
    return " or ".join(repr(name) for name in names)


def _fields(names: Collection[str]) -> str:
    """The fields there are, for a message. A table of a thousand columns is not listed whole."""
    if not names:
        return "there are no fields: choose a dataset, for example dataset=jsonl dataset.path=rows.jsonl"
    shown = ", ".join(list(names)[:20])
    return f"fields: {shown}{', …' if len(names) > 20 else ''}"
