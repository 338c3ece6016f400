from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runner.dataset import Row
from runner.errors import ConfigError, RowError
from runner.names import import_name
from runner.prompt import Ask, PromptBuilder, is_half_quoted
from runner.types import Endpoint

CHAT, TEXT, RESPONSES = Endpoint.chat_completion, Endpoint.text_completion, Endpoint.responses


def builder(
    prompt: str | None = None,
    *,
    system: str | None = None,
    mapper: str | None = None,
    endpoint: Endpoint = CHAT,
) -> PromptBuilder:
    return PromptBuilder(prompt=prompt, system=system, mapper=mapper, interface=endpoint)


def row(**fields: Any) -> Row:
    return Row(index=16, fields=fields, source="rows.jsonl:17")


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes a module of the user's into the working directory; gives its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each])

    def write(code: str, name: str = f"user_code_{tmp_path.name}") -> str:
        (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return name

    return write


# Templates


def test_a_template_is_filled_with_the_fields_of_the_row() -> None:
    asked = builder("{{ question }} ({{ meta.lang }}, {{ n + 1 }})")(row(question="Who?", meta={"lang": "en"}, n=1))
    assert asked == Ask(input="Who? (en, 2)", metadata={"question": "Who?", "meta": {"lang": "en"}, "n": 1})


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [
        (CHAT, [system("Be brief, Ann."), user("Who?")]),
        (TEXT, "Be brief, Ann.\n\nWho?"),
        (RESPONSES, {"input": "Who?", "instructions": "Be brief, Ann."}),
    ],
)
def test_the_system_text_goes_where_the_endpoint_has_it(endpoint: Endpoint, expected: Any) -> None:
    build = builder("{{ q }}", system="Be brief, {{ name }}.", endpoint=endpoint)
    assert build(row(q="Who?", name="Ann")).input == expected
    assert builder("{{ q }}", endpoint=endpoint)(row(q="Who?")).input == "Who?"


def test_a_system_text_that_comes_out_empty_is_left_out() -> None:
    assert builder("{{ q }}", system="{% if style %}{{ style }}{% endif %}")(row(q="Who?", style="")).input == "Who?"


@pytest.mark.parametrize("value", ["{{ 7 * 7 }}", "{% for x in y %}", "<b>&amp;</b>", "{# gone #}", "\x00\r\n"])
def test_row_values_are_data_and_are_never_rendered_or_escaped(value: str) -> None:
    assert builder("[{{ q }}]")(row(q=value)).input == f"[{value}]"


@pytest.mark.parametrize("text", ["{{ note or '' }}", "{% if note %}{{ note }}{% endif %}", "{{ note | tojson }}"])
def test_a_template_may_provide_for_null(text: str) -> None:
    assert builder(f"Say: {text}")(row(note=None)).input in ("Say: ", "Say: null")


def test_one_newline_at_the_end_of_a_template_is_dropped() -> None:
    assert builder("{{ q }}\n", system="S\n")(row(q="Who?\n")).input == [system("S"), user("Who?\n")]


def test_a_template_of_a_single_row_needs_no_fields() -> None:
    build = builder("Say hello.")
    build.check([row()])
    assert build(row()) == Ask(input="Say hello.", metadata={})


@pytest.mark.parametrize("key", ["prompt", "system"])
@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("fine\n{{ broken", "line 2: "),
        ("{% if x %}never closed", "line 1: "),
        ("{{ x | shouted }}", "line 1: No filter named 'shouted'"),
        ("{% include 'other' %}", "cannot include, import or extend"),
    ],
)
def test_a_template_that_cannot_be_compiled_is_a_configuration_error(key: str, text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key}.*{problem}"):
        builder(text) if key == "prompt" else builder("fine", system=text)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{{ quest }}", "'quest' is undefined .fields: question, n"),
        ("{{ question.author }}", "has no attribute 'author'"),
        ("{{ question + n }}", "TypeError"),
        ("{{ nothing }}", r"the field 'nothing' is null; \{\{ nothing or '' \}\} leaves it out$"),
        ("{{ nothing | default('') }}!", r"the field 'nothing' is null; \{\{ nothing or '' \}\} leaves it out$"),
        ("{{ row['no one'] }}", r"the field 'no one' is null; \{\{ row\[\"no one\"\] or '' \}\} leaves it out$"),
        ("{{ row['nobody'] }}", "has no attribute 'nobody' .fields: question, n"),
        ("{{ {'a': None}.a }}", r"a value is null; \{\{ FIELD or '' \}\} leaves it out$"),
        ("{{ n / 0 }}", "ZeroDivisionError"),
        ("{{ question.__class__.__mro__ }}", "SecurityError"),
        ("{{ ''.__class__ }}{{ question }}", "SecurityError"),
        ("{{ tags.append(1) }}", "SecurityError"),
        ("{% for i in range(10000000) %}{% endfor %}", "OverflowError"),
    ],
)
@pytest.mark.parametrize("key", ["prompt", "system"])
def test_a_template_that_fails_on_a_row_fails_that_row_only(key: str, text: str, problem: str) -> None:
    build = builder(text) if key == "prompt" else builder("fine", system=text)
    with pytest.raises(RowError, match=rf"^rows.jsonl:17: {key}: .*{problem}"):
        build(row(question="Who?", n=1, tags=[], nothing=None, **{"no one": None}))


def test_a_row_that_could_not_be_read_keeps_its_error() -> None:
    error = RowError("rows.jsonl:17: no valid JSON")
    with pytest.raises(RowError) as caught:
        builder("Say hello.")(Row(index=0, fields={}, source="rows.jsonl:17", error=error))
    assert caught.value is error


# What the row itself holds


@pytest.mark.parametrize(
    ("endpoint", "fields", "expected"),
    [
        (CHAT, {"prompt": "Who?"}, "Who?"),
        (CHAT, {"messages": [user("Who?")]}, [user("Who?")]),
        (CHAT, {"messages": None, "prompt": "Who?"}, "Who?"),
        (TEXT, {"prompt": "Who?"}, "Who?"),
        (RESPONSES, {"responses_input": "Who?"}, "Who?"),
        (RESPONSES, {"responses_input": {"input": "Who?"}}, {"input": "Who?"}),
        (RESPONSES, {"responses_input": {"input": [user("Who?")]}}, {"input": [user("Who?")]}),
        (RESPONSES, {"messages": [user("Who?")]}, [user("Who?")]),
    ],
)
def test_without_a_template_the_row_holds_the_input(endpoint: Endpoint, fields: dict[str, Any], expected: Any) -> None:
    assert builder(endpoint=endpoint)(row(**fields)).input == expected


@pytest.mark.parametrize(("endpoint", "name"), [(CHAT, "messages"), (TEXT, "prompt"), (RESPONSES, "responses_input")])
def test_of_several_inputs_the_endpoints_own_is_asked_and_the_others_are_metadata(
    endpoint: Endpoint, name: str
) -> None:
    fields = {"id": 1, "prompt": "P", "messages": [user("M")], "responses_input": {"input": "R"}}
    asked = builder(endpoint=endpoint)(row(**fields))
    assert asked.input == fields[name]
    assert asked.metadata == {key: value for key, value in fields.items() if key != name}


@pytest.mark.parametrize(
    ("endpoint", "fields", "expected"),
    [
        (CHAT, {"prompt": "Who?"}, [system("Brief."), user("Who?")]),
        (CHAT, {"messages": [user("Who?")]}, [system("Brief."), user("Who?")]),
        (CHAT, {"messages": [system("Mine."), user("Who?")]}, [system("Mine."), user("Who?")]),
        (
            CHAT,
            {"messages": [{"role": "developer", "content": "Mine."}, user("Who?")]},
            [{"role": "developer", "content": "Mine."}, user("Who?")],
        ),
        (TEXT, {"prompt": "Who?"}, "Brief.\n\nWho?"),
        (RESPONSES, {"prompt": "Who?"}, {"input": "Who?", "instructions": "Brief."}),
        (RESPONSES, {"responses_input": {"input": "Who?"}}, {"input": "Who?", "instructions": "Brief."}),
        (
            RESPONSES,
            {"responses_input": {"input": "Who?", "instructions": "Mine."}},
            {"input": "Who?", "instructions": "Mine."},
        ),
    ],
)
def test_the_system_text_goes_before_a_rows_input_that_has_none(
    endpoint: Endpoint, fields: dict[str, Any], expected: Any
) -> None:
    given = row(**fields)
    assert builder(system="Brief.", endpoint=endpoint)(given).input == expected
    assert given == row(**fields)


@pytest.mark.parametrize(
    ("endpoint", "fields", "problem"),
    [
        (CHAT, {"question": "Who?"}, "no 'messages' or 'prompt' or 'responses_input' in this row"),
        (CHAT, {"prompt": 3}, "prompt is of type int, not a text"),
        (CHAT, {"prompt": [user("Who?")]}, "prompt is of type list, not a text"),
        (CHAT, {"messages": "Who?"}, "messages is of type str, not a list of messages"),
        (CHAT, {"messages": []}, "messages holds no message"),
        (CHAT, {"messages": [user("Who?"), "me"]}, "messages: message 2 is no dictionary with a role"),
        (CHAT, {"messages": [{"content": "Who?"}]}, "messages: message 1 is no dictionary with a role"),
        (CHAT, {"responses_input": {"input": "Who?"}}, "endpoint=chat_completion takes a text or a list of messages"),
        (TEXT, {"messages": [user("Who?")]}, "messages is of type list, and endpoint=text_completion takes a text"),
        (RESPONSES, {"responses_input": {"instructions": "Brief."}}, 'a dictionary without "input"'),
        (RESPONSES, {"responses_input": {"input": 3}}, 'a dictionary without "input"'),
        (RESPONSES, {"responses_input": 3}, "responses_input is of type int, not a text or a dictionary"),
    ],
)
def test_an_input_of_the_wrong_type_fails_that_row(endpoint: Endpoint, fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(RowError, match=f"^rows.jsonl:17: .*{problem}"):
        builder(endpoint=endpoint)(row(**fields))


# Mappers


def test_a_mapper_gives_input_and_metadata(module: Callable[[str], str]) -> None:
    name = module(
        "def full(row): return {'input': 'Ask ' + row.pop('q'), 'metadata': {'left': row}}\n"
        "def bare(row): return {'input': [{'role': 'user', 'content': row['q']}]}\n"
    )
    given = row(q="Who?", id=1)
    assert builder(mapper=f"{name}:full")(given) == Ask(input="Ask Who?", metadata={"left": {"id": 1}})
    assert builder(mapper=f"{name}:bare")(given) == Ask(input=[user("Who?")], metadata={})
    assert builder(mapper=f"{name}:bare", system="{{ id }}")(given).input == [system("1"), user("Who?")]
    assert given.fields == {"q": "Who?", "id": 1}  # whatever a mapper does to its argument


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("return row['nope']", "the mapper raised KeyError: 'nope'"),
        ("raise ValueError('odd row')", "the mapper raised ValueError: odd row"),
        ("return None", "the mapper returned NoneType"),
        ("return 'Who?'", "the mapper returned str"),
        ("return {'prompt': 'Who?'}", 'the mapper returned dict without "input"'),
        (
            "return {'input': 3}",
            "the mapper's input is of type int, and endpoint=chat_completion takes a text or a list",
        ),
        ("return {'input': 'Who?', 'metadata': 3}", "the mapper's metadata is of type int, not dict"),
    ],
)
def test_a_mapper_that_fails_on_a_row_fails_that_row_only(
    module: Callable[[str], str], body: str, problem: str
) -> None:
    build = builder(mapper=f"{module(f'def f(row): {body}')}:f")
    with pytest.raises(RowError, match=f"^rows.jsonl:17: {problem}"):
        build(row(q="Who?"))


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("f = 3", "is of type int, not a function"),
        ("async def f(row): return {}", "is an async function, not a function"),
    ],
)
def test_a_mapper_has_to_be_a_plain_function(module: Callable[[str], str], code: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=f"^mapper=.* {problem}"):
        builder(mapper=f"{module(code)}:f")


def test_a_prompt_and_a_mapper_together_are_refused() -> None:
    with pytest.raises(ConfigError, match="prompt and mapper"):
        builder("Say hello.", mapper="os.path:join")


# The check before anything is sent


@pytest.mark.parametrize("key", ["prompt", "system"])
def test_check_names_a_field_that_no_row_has_and_the_nearest(key: str) -> None:
    build = builder("{{ questoin }}") if key == "prompt" else builder("fine", system="{{ questoin }}")
    with pytest.raises(ConfigError) as caught:
        build.check([row(question="Who?", id=1), row(question="Why?", answer="So.")])
    assert str(caught.value) == (
        f"{key} names the field 'questoin', which no row has (fields: question, id, answer)."
        " Did you mean {{ question }}?"
    )


@pytest.mark.parametrize("text", ['{{ row["Ticket Text"] }}', "{{ row['Ticket-Text'] }}", '{{ row["größe"] }}'])
def test_a_field_of_any_name_is_taken_out_of_the_row(text: str) -> None:
    fields = {"Ticket Text": "Who?", "Ticket-Text": "Who?", "größe": "Who?"}
    build = builder(text, system='{{ row["none"] | default("Be brief.") }}')
    build.check([row(**fields)])
    assert build(row(**fields)).input == [system("Be brief."), user("Who?")]


def test_a_field_called_row_comes_before_the_row() -> None:
    build = builder("{{ row }} {{ row[0] }}")
    build.check([row(row="B7")])
    assert build(row(row="B7")).input == "B7 B"
    with pytest.raises(ConfigError, match="the field 'row', which no row has"):
        builder("{{ row }}").check([row(seat="B7")])


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("{{ ticket_text }}", 'Did you mean {{ row["ticket text"] }}?'),
        ("{{ ticket-nr }}", 'Did you mean {{ row["ticket-nr"] }}?'),
        ('{{ row["ticket txt"] }}', 'Did you mean {{ row["ticket text"] }}?'),
        ('{{ row["in it"] }}', 'If rows may lack it: {{ row["in it"] | default("") }}'),
    ],
)
def test_check_spells_a_field_whose_name_is_no_identifier(text: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        builder(text).check([row(**{"ticket text": "Who?", "ticket-nr": 1})])
    assert str(caught.value).endswith(hint)


@pytest.mark.parametrize(
    ("text", "is_half"),
    [
        ('"Sort: {{ text }}', True),
        ('"Sort: {{ row["a b"] }} {# "one" #}', True),
        ('"Sort" it: {{ text }}', False),
        ('A board of 5"', False),
        ("'Tis {{ text }}", False),
        ("", False),
    ],
)
def test_half_of_a_pair_of_quotes_is_told_from_quotes_of_the_text(text: str, is_half: bool) -> None:
    assert is_half_quoted(text) is is_half


def test_a_name_with_a_space_is_told_how_it_is_written() -> None:
    with pytest.raises(
        ConfigError, match=r'^prompt, line 2: .* A field of this name is \{\{ row\["ticket text"\] \}\}$'
    ):
        builder("About this:\n{{ ticket text }}")


def test_check_leaves_a_field_that_some_row_has_to_the_rows() -> None:
    build = builder("{{ question }} {{ hint }}")
    build.check([row(question="Who?"), row(question="Why?", hint="h")])
    with pytest.raises(RowError, match="'hint' is undefined"):
        build(row(question="Who?"))


@pytest.mark.parametrize(
    "text",
    [
        '{{ hint | default("") }}',
        "{{ hint | d('none') | upper }}",
        "{% if hint is defined %}{{ hint }}{% endif %}",
        "{{ hint if hint is not undefined }}",
        "{% set hint = 'x' %}{{ hint }}",
        "{% for hint in range(3) %}{{ hint }}{% endfor %}",
    ],
)
def test_check_lets_a_template_provide_for_a_field_that_is_absent(text: str) -> None:
    build = builder(text)
    build.check([row(question="Who?")])
    assert isinstance(build(row(question="Who?")).input, str)


def test_check_points_to_the_dataset_where_a_template_has_no_fields_to_use() -> None:
    with pytest.raises(ConfigError, match=r"names the field 'question', .*choose a dataset, for example dataset=jsonl"):
        builder("{{ question }}").check([row()])


def test_check_wants_something_to_ask() -> None:
    build = builder()
    build.check([row(question="Who?"), row(prompt="Who?")])
    with pytest.raises(ConfigError, match=r"nothing to ask: set prompt, or .*'messages' or 'prompt'.*fields: question"):
        build.check([row(question="Who?"), row(question="Why?", prompt=None)])


def test_check_has_no_opinion_without_a_readable_row() -> None:
    broken = Row(index=0, fields={}, source="rows.jsonl:1", error=RowError("rows.jsonl:1: bad"))
    builder("{{ question }}").check([])
    builder("{{ question }}").check([broken])
    builder().check([broken])


def test_check_does_not_call_the_mapper(module: Callable[[str], str]) -> None:
    builder(mapper=f"{module('def f(row): raise SystemError')}:f").check([row(question="Who?")])


def test_check_lists_the_fields_of_a_wide_table_in_part() -> None:
    with pytest.raises(ConfigError) as caught:
        builder("{{ q }}").check([row(**{f"column_{n}": n for n in range(1000)})])
    assert len(str(caught.value)) < 500


# Names


def test_a_name_is_found_in_the_working_directory_and_among_what_is_installed(module: Callable[[str], str]) -> None:
    name = module("class Thing:\n    def method(self): ...\n")
    assert import_name(f"{name}:Thing", key="mapper").__name__ == "Thing"
    assert import_name(f"{name}:Thing.method", key="mapper").__name__ == "method"
    assert import_name("json.decoder:JSONDecoder", key="mapper").__module__ == "json.decoder"


def test_the_working_directory_is_put_on_the_path_once(module: Callable[[str], str]) -> None:
    name = module("x = 1")
    before = list(sys.path)
    for _ in range(3):
        assert import_name(f"{name}:x", key="mapper") == 1
    assert sys.path == [str(Path.cwd()), *before]


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("", "write package.module:function"),
        ("package", "write package.module:function"),
        (":function", "write package.module:function"),
        ("package:", "write package.module:function"),
        ("a b:c", "write package.module:function"),
        ("package.module.function", "write package.module:function, for example package.module:function"),
        ("./prompts.py:build", "write package.module:function, for example prompts:build"),
        ("tools/prompts.py:build", "write package.module:function, for example tools.prompts:build"),
        ("nowhere.at.all:f", "there is no module 'nowhere' in /"),
        ("json.nowhere:f", "there is no module 'json.nowhere' in /"),
        ("json:lods", "'json' has no 'lods'. Did you mean 'loads'?"),
        ("json:JSONDecoder.decoed", "'json.JSONDecoder' has no 'decoed'. Did you mean 'decode'?"),
    ],
)
def test_a_name_that_leads_nowhere_says_which_part(path: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        import_name(path, key="scorers.mine.kind")
    assert str(caught.value).startswith(f"scorers.mine.kind={path!r}: {problem}")


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("import nowhere", "ModuleNotFoundError: No module named 'nowhere'"),
        ("x = 1 / 0", "ZeroDivisionError: division by zero"),
        ("def f(:", "SyntaxError: "),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
    ],
)
def test_a_module_that_fails_on_import_says_why(module: Callable[[str], str], code: str, problem: str) -> None:
    name = module(code)
    with pytest.raises(ConfigError, match=f"^mapper='{name}:f': importing '{name}' failed: {problem}"):
        import_name(f"{name}:f", key="mapper")
