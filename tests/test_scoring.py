from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.config import ScorerConfig
from runner.errors import ConfigError
from runner.scoring import KINDS, MAX_CHARACTERS, Scorers

WriteModule = Callable[[str], str]


@pytest.fixture
def write_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> WriteModule:
    """Writes a module of scoring functions; gives its name, which no other test uses."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(source: str) -> str:
        name = f"scores_{abs(hash(request.node.nodeid))}_{len(list(tmp_path.iterdir()))}"
        (tmp_path / f"{name}.py").write_text(source)
        return name

    return write


def score(kind: str, output: str, target: Any = None, **settings: Any) -> float | None:
    scorers = Scorers({"it": ScorerConfig(kind=kind, **settings)})
    return scorers(output, {"target": target})["it"]


@pytest.mark.parametrize(
    ("output", "target"),
    [
        ("Paris", "Paris"),
        ("  paris \n", "Paris"),
        ("Paris.", "Paris"),
        ('"Paris"', "Paris"),
        ('"Paris."', "Paris"),
        ('"Paris".', "Paris"),
        ("“Paris”!", "Paris"),
        ("« Paris »", "Paris"),
        ("New\n   York", "new york"),
        ("U.S.", "U.S."),
        ("U.S", "U.S."),
        ("STRASSE", "Straße"),
        ("4", 4),
        ("4.0", 4),
        ("4", "4.0"),
        ("4.", 4.0),
        ("+4", 4),
        ("−4", -4),
        (".5", 0.5),
        ("1,000,000", 1_000_000),
        ("6.02e23", 6.02e23),
        ("true", True),
        ("paris", ["London", "Paris"]),
        ("4.0", ["four", 4]),
        ("", ""),
        ("?", "?"),
        ('{"a": 1}', {"a": 1}),
    ],
)
def test_an_exact_match_overlooks_how_it_is_written(output: str, target: Any) -> None:
    assert score("exact_match", output, target) == 1.0


@pytest.mark.parametrize(
    ("output", "target"),
    [
        ("Paris, France", "Paris"),
        ("Paris..", "Paris"),
        ("NewYork", "New York"),
        ("'Paris", "Paris"),
        ("7", "007"),
        ("14", 4),
        ("4.01", 4),
        ("1,00", 100),
        ("four", 4),
        ("!", "?"),
        ("", "Paris"),
        ("Berlin", ["London", "Paris"]),
        ("nan", "NaN is no number"),
    ],
)
def test_an_exact_match_is_exact_in_what_is_written(output: str, target: Any) -> None:
    assert score("exact_match", output, target) == 0.0


def test_case_counts_where_it_is_not_ignored() -> None:
    assert score("exact_match", "paris", "Paris", ignore_case=False) == 0.0
    assert score("contains", "in paris", "Paris", ignore_case=False) == 0.0
    assert score("regex", "in paris", pattern="Paris", ignore_case=False) == 0.0
    assert score("regex", "in paris", pattern="Paris") == 1.0


@pytest.mark.parametrize(
    ("output", "target"),
    [
        ("The capital is Paris.", "Paris"),
        ("It is PARIS!", "paris"),
        ("in New\nYork today", "New York"),
        ("**Paris**", "Paris"),
        ("Paris-based", "Paris"),
        ("x = 3", "3"),
        ("x = 3.0.", 3),
        ("1,2,3", 2),
        ("pages 1-3", 3),
        ("It has 1,000 rows", 1000),
        ("In 1984, he", 1984),
        ("about 50%", "50%"),
        ("I write C++.", "C++"),
        ("首都是巴黎。", "巴黎"),
        ("수도는 파리입니다", "파리"),
        ("London or Paris", ["Berlin", "Paris"]),
        ("Paris", "Paris."),
        ("concatenate the cat", "cat"),
    ],
)
def test_contains_finds_whole_words(output: str, target: Any) -> None:
    assert score("contains", output, target) == 1.0


@pytest.mark.parametrize(
    ("output", "target"),
    [
        ("13", "3"),
        ("13", 3),
        ("30", 3),
        ("3.14", 3),
        ("3.14", 14),
        ("version 1.2.3", 2),
        ("1,300", 300),
        ("it is -3", 3),
        ("3rd", 3),
        ("comparison", "Paris"),
        ("Parisian", "Paris"),
        ("cat_food", "cat"),
        ("150%", "50%"),
        ("", "Paris"),
    ],
)
def test_contains_does_not_find_parts_of_words_and_numbers(output: str, target: Any) -> None:
    assert score("contains", output, target) == 0.0


@pytest.mark.parametrize("kind", ["exact_match", "contains"])
@pytest.mark.parametrize("fields", [{}, {"target": None}, {"target": []}, {"target": [None]}, {"answer": "x"}])
def test_a_row_without_a_target_has_no_score(kind: str, fields: dict[str, Any]) -> None:
    assert Scorers({"it": ScorerConfig(kind=kind)})("x", fields) == {"it": None}


def test_nothing_to_look_for_is_no_score() -> None:
    assert score("contains", "anything", "") is None


def test_the_target_is_the_field_that_is_named() -> None:
    scorers = Scorers({"it": ScorerConfig(target="answer")})
    assert scorers("Paris", {"answer": "Paris", "target": "London"}) == {"it": 1.0}


@pytest.mark.parametrize(
    ("pattern", "output", "target", "expected"),
    [
        (r"\d+", "there are 12", None, 1.0),
        (r"\d+", "there are none", None, 0.0),
        (r"\d+", "there are 12", "13", 1.0),
        (r"answer: (\w+)", "the answer: Paris.", "paris", 1.0),
        (r"answer: (\w+)", "the answer: Rome.", "paris", 0.0),
        (r"answer: (\w+)", "the answer: Rome.", None, 1.0),
        (r"answer: (\w+)", "Paris", "paris", 0.0),
        (r"(\S+)$", "so x = 4.0", 4, 1.0),
        (r"(?:a|(b))", "a", "b", 0.0),
    ],
)
def test_a_regex_is_found_and_its_group_compared(pattern: str, output: str, target: Any, expected: float) -> None:
    assert score("regex", output, target, pattern=pattern) == expected


@pytest.mark.parametrize(
    "output",
    ['{"a": [1, 2.5e3, null]}', ' "text"\n', "12", '```json\n{"a": 1}\n```', "```\n[]\n```\n", "```{}```", "9" * 5_000],
)
def test_one_json_document_is_valid(output: str) -> None:
    assert score("json_valid", output) == 1.0


@pytest.mark.parametrize(
    "output",
    ["", "{", "{'a': 1}", '{"a": 1} {"b": 2}', "NaN", "[Infinity]", 'Here: ```json\n{"a": 1}\n```', "``````", "```"],
)
def test_anything_else_is_no_json(output: str) -> None:
    assert score("json_valid", output) == 0.0


def test_all_scorers_score_one_answer() -> None:
    scorers = Scorers(
        {
            "exact": ScorerConfig(target="answer"),
            "json": ScorerConfig(kind="json_valid"),
            "other": ScorerConfig(target="missing"),
        }
    )
    assert scorers("4", {"answer": 4}) == {"exact": 1.0, "json": 1.0, "other": None}
    assert scorers
    assert not Scorers({})
    assert Scorers({})("4", {}) == {}


# The user's functions


def test_a_function_scores_the_answer_and_its_row(write_module: WriteModule) -> None:
    module = write_module(
        "def overlap(output, fields): return len(set(output) & set(fields['answer'])) / 2\n"
        "def is_long(output, fields): return len(output) > 3\n"
        "def skip(output, fields): return None\n"
    )
    scorers = Scorers({name: ScorerConfig(kind=f"{module}:{name}") for name in ("overlap", "is_long", "skip")})
    assert scorers("abc", {"answer": "bcd"}) == {"overlap": 1.0, "is_long": 0.0, "skip": None}


@pytest.mark.parametrize("body", ["1 / 0", "'0.5'", "float('nan')", "float('inf')"])
def test_a_function_that_fails_costs_the_score_and_warns_once(
    write_module: WriteModule, caplog: pytest.LogCaptureFixture, body: str
) -> None:
    scorers = Scorers({"mine": ScorerConfig(kind=f"{write_module(f'def f(output, fields): return {body}')}:f")})
    with caplog.at_level(logging.WARNING):
        assert [scorers("x", {}) for _ in range(3)] == [{"mine": None}] * 3
    assert len(caplog.records) == 1
    assert "scorer mine" in caplog.text


def test_a_function_that_takes_long_is_warned_of_once(
    write_module: WriteModule, caplog: pytest.LogCaptureFixture
) -> None:
    module = write_module("import time\ndef f(output, fields): time.sleep(0.25); return 1")
    scorers = Scorers({"judge": ScorerConfig(kind=f"{module}:f")})

    with caplog.at_level(logging.WARNING):
        assert [scorers("x", {}) for _ in range(2)] == [{"judge": 1.0}] * 2

    assert len(caplog.records) == 1
    assert "scorer judge took 0." in caplog.text


def test_a_function_cannot_change_the_row(write_module: WriteModule) -> None:
    module = write_module("def f(output, fields): fields.clear(); return 1")
    fields = {"answer": "x"}
    Scorers({"mine": ScorerConfig(kind=f"{module}:f")})("x", fields)
    assert fields == {"answer": "x"}


@pytest.mark.parametrize("source", ["f = 3", "async def f(output, fields): return 1"])
def test_what_cannot_be_called_is_refused(write_module: WriteModule, source: str) -> None:
    with pytest.raises(ConfigError, match=r"scorers\.mine\.kind"):
        Scorers({"mine": ScorerConfig(kind=f"{write_module(source)}:f")})


def test_a_function_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"scorers\.mine\.kind"):
        Scorers({"mine": ScorerConfig(kind="no.such.module:f")})


# The configuration


def test_an_unknown_kind_names_the_key_the_kinds_and_the_nearest() -> None:
    with pytest.raises(ConfigError) as caught:
        Scorers({"quality": ScorerConfig(kind="exactmatch")})
    message = str(caught.value)
    assert "scorers.quality.kind='exactmatch'" in message
    assert all(kind in message for kind in KINDS)
    assert "Did you mean 'exact_match'?" in message


@pytest.mark.parametrize("pattern", [None, "", "(", "a{99999999999}"])
def test_a_pattern_that_cannot_be_used_names_its_key(pattern: str | None) -> None:
    with pytest.raises(ConfigError, match=r"scorers\.it\.pattern"):
        Scorers({"it": ScorerConfig(kind="regex", pattern=pattern)})


def test_a_pattern_without_a_regex_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"scorers\.it\.pattern is for scorers\.it\.kind=regex"):
        Scorers({"it": ScorerConfig(kind="contains", pattern="x")})


def test_check_names_a_target_that_no_row_has() -> None:
    scorers = Scorers({"exact": ScorerConfig(target="anwser")})
    with pytest.raises(ConfigError) as caught:
        scorers.check(["question", "answer"])
    assert str(caught.value) == (
        "scorers.exact.target='anwser': the first rows have no such field. Did you mean 'answer'?"
        " The fields there are: answer, question"
    )


def test_check_accepts_what_can_be_scored() -> None:
    Scorers(
        {
            "exact": ScorerConfig(target="answer"),
            "json": ScorerConfig(kind="json_valid"),
            "found": ScorerConfig(kind="regex", pattern="x"),
            "caught": ScorerConfig(kind="regex", pattern="(x)"),
        }
    ).check({"answer"})


def test_check_rejects_a_misspelt_target_of_a_group() -> None:
    scorers = Scorers({"it": ScorerConfig(kind="regex", pattern="(x)", target="anwser")})
    with pytest.raises(ConfigError, match=r"scorers\.it\.target='anwser'"):
        scorers.check({"answer"})


def test_the_fingerprint_tells_configurations_apart() -> None:
    one, two = ScorerConfig(target="answer"), ScorerConfig(kind="json_valid")
    fingerprint = Scorers({"a": one, "b": two}).fingerprint
    assert fingerprint == Scorers({"b": two, "a": one}).fingerprint
    others = [
        Scorers({"a": one}),
        Scorers({"a": two, "b": one}),
        Scorers({"a": ScorerConfig(target="answer", ignore_case=False), "b": two}),
        Scorers({}),
    ]
    assert len({fingerprint, *(each.fingerprint for each in others)}) == 5
    assert int(fingerprint, 16)


def test_the_fingerprint_changes_with_a_functions_source(
    write_module: WriteModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib
    import linecache

    module = write_module("def f(output, fields): return 1")
    config = {"mine": ScorerConfig(kind=f"{module}:f")}
    before = Scorers(config).fingerprint
    assert Scorers(config).fingerprint == before
    (tmp_path / f"{module}.py").write_text("def f(output, fields): return 100")
    linecache.clearcache()
    importlib.reload(importlib.import_module(module))
    assert Scorers(config).fingerprint != before


# Untrusted answers


@given(output=st.text(), target=st.none() | st.text() | st.integers() | st.floats() | st.lists(st.text()))
def test_any_answer_has_a_score_between_0_and_1(output: str, target: Any) -> None:
    scorers = Scorers({kind: ScorerConfig(kind=kind, pattern="(.)" if kind == "regex" else None) for kind in KINDS})
    assert set(scorers(output, {"target": target}).values()) <= {None, 0.0, 1.0}


@given(text=st.text())
def test_every_text_matches_itself(text: str) -> None:
    assert score("exact_match", text, text) == 1.0


@pytest.mark.parametrize(
    "output",
    [
        "a" * MAX_CHARACTERS,
        "1" * (MAX_CHARACTERS - 1) + "x",
        "111," * (MAX_CHARACTERS // 4),
        "1." * (MAX_CHARACTERS // 2),
        "-" * MAX_CHARACTERS,
        "[" * MAX_CHARACTERS,
        '{"a":' * (MAX_CHARACTERS // 5),
        "`" * MAX_CHARACTERS,
        " " * MAX_CHARACTERS,
        '"' * MAX_CHARACTERS,
    ],
    ids=["letters", "digits", "groups", "dots", "dashes", "brackets", "objects", "fences", "spaces", "quotes"],
)
def test_a_hostile_answer_takes_little_time(output: str) -> None:
    scorers = Scorers({kind: ScorerConfig(kind=kind) for kind in ("exact_match", "contains", "json_valid")})
    began = time.process_time()
    for target in ("a" * 1_000 + "b", 3, "1.1"):
        assert set(scorers(output, {"target": target}).values()) == {0.0}
    assert time.process_time() - began < 5


def test_what_exceeds_the_limit_is_not_looked_at() -> None:
    assert score("contains", " " * MAX_CHARACTERS + "Paris", "Paris") == 0.0
