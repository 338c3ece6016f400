from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.config import (
    BudgetConfig,
    DatasetConfig,
    DatasetKind,
    DeploymentConfig,
    LimitsConfig,
    Resume,
    RetryConfig,
    RoutingConfig,
    RunnerConfig,
    ScorerConfig,
    ShardConfig,
    SimulatorConfig,
    TaskConfig,
    TaskKind,
    TrackerConfig,
)
from runner.identity import (
    MOST_LEVELS,
    ContentHasher,
    WorkloadHasher,
    answers_alike,
    dump_json,
    model_identity,
    output_limits,
    run_id,
)
from runner.types import Endpoint

BASE = RunnerConfig(
    model="openai/gpt-4.1-mini",
    prompt="Say {{ word }}.",
    dataset=DatasetConfig(kind=DatasetKind.jsonl, path="rows.jsonl"),
    request={"temperature": 0.5},
)

Change = Callable[[RunnerConfig], RunnerConfig]


def change(**values: Any) -> Change:
    return lambda config: replace(config, **values)


ASKED: dict[str, Change] = {
    "model": change(model="openai/gpt-4.1"),
    "dataset.path": change(dataset=DatasetConfig(kind=DatasetKind.jsonl, path="other.jsonl")),
    "dataset.kind": change(dataset=DatasetConfig(kind=DatasetKind.csv, path="rows.jsonl")),
    "dataset.name": change(dataset=DatasetConfig(kind=DatasetKind.jsonl, path="rows.jsonl", name="x")),
    "dataset.split": change(dataset=DatasetConfig(kind=DatasetKind.jsonl, path="rows.jsonl", split="x")),
    "dataset.function": change(dataset=DatasetConfig(kind=DatasetKind.jsonl, path="rows.jsonl", function="x:y")),
    "dataset.shard.index": change(
        dataset=DatasetConfig(kind=DatasetKind.jsonl, path="rows.jsonl", shard=ShardConfig(index=1, count=2))
    ),
    "prompt": change(prompt="Shout {{ word }}."),
    "system": change(system="Be brief."),
    "mapper": change(mapper="package.module:function"),
    "endpoint": change(endpoint=Endpoint.responses),
    "request.temperature": change(request={"temperature": 0.6}),
    "response_format": change(response_format={"type": "object"}),
    "task": change(task=TaskConfig(kind=TaskKind.embed)),
    "task.image": change(task=TaskConfig(image="picture")),
    "dataset.arguments": change(
        dataset=DatasetConfig(kind=DatasetKind.jsonl, path="rows.jsonl", arguments={"seed": 1})
    ),
}

NOT_ASKED: dict[str, Change] = {
    "limits": change(limits=LimitsConfig(concurrency=7, rpm=5)),
    "retry": change(retry=RetryConfig(max_retries=9)),
    "routing": change(routing=RoutingConfig(strategy="least-busy")),
    "api_base": change(api_base="http://elsewhere/v1"),
    "api_key_env": change(api_key_env="MY_KEY"),
    "request.timeout": change(request={"temperature": 0.5, "timeout": 5}),
    "request.max_tokens": change(request={"temperature": 0.5, "max_tokens": 5}),
    "request.extra_headers": change(request={"temperature": 0.5, "extra_headers": {"x": "y"}}),
    "request.stream": change(request={"temperature": 0.5, "stream": True}),
    "dataset.streaming": change(dataset=DatasetConfig(kind=DatasetKind.jsonl, path="rows.jsonl", streaming=True)),
    "task.micro_batch_size": change(task=TaskConfig(micro_batch_size=5, max_bytes=5)),
    "dataset.limit": change(dataset=DatasetConfig(kind=DatasetKind.jsonl, path="rows.jsonl", limit=5)),
    "name": change(name="other"),
    "runs_dir": change(runs_dir="elsewhere"),
    "resume": change(resume=Resume.require),
    "retry_failed": change(retry_failed=False),
    "budget": change(budget=BudgetConfig(usd=5)),
    "tracker": change(tracker=TrackerConfig(project="other")),
    "scorers": change(scorers={"exact": ScorerConfig()}),
    "simulator": change(simulator=SimulatorConfig(seed=5, latency_s=9.0)),
    "deployments": change(deployments={"a": DeploymentConfig(model="openai/gpt-4.1-mini", api_base="http://x")}),
}


@pytest.mark.parametrize("key", ASKED)
def test_what_is_asked_names_the_run(key: str) -> None:
    assert run_id(ASKED[key](BASE)) != run_id(BASE)


@pytest.mark.parametrize("key", NOT_ASKED)
def test_how_fast_it_is_asked_does_not(key: str) -> None:
    assert run_id(NOT_ASKED[key](BASE)) == run_id(BASE)


def test_a_run_is_named_by_twelve_hex_digits() -> None:
    assert len(run_id(BASE)) == 12
    assert int(run_id(BASE), 16) >= 0


def test_the_name_is_the_same_in_another_process(tmp_path: Path) -> None:
    program = (
        "from runner.config import *; from runner.identity import run_id;"
        "print(run_id(RunnerConfig(model='openai/x', prompt='p', request={'b': 1, 'a': [2]})))"
    )
    expected = run_id(RunnerConfig(model="openai/x", prompt="p", request={"a": [2], "b": 1}))
    source = str(Path(__file__).resolve().parents[1] / "src")
    for seed in ("0", "1"):
        environment = {"PYTHONPATH": source, "PYTHONHASHSEED": seed}
        ran = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=tmp_path, check=True
        )
        assert ran.stdout.strip() == expected


def test_a_relative_and_an_absolute_path_are_the_same_dataset() -> None:
    absolute = DatasetConfig(kind=DatasetKind.jsonl, path=str(Path("rows.jsonl").absolute()))
    assert run_id(replace(BASE, dataset=absolute)) == run_id(BASE)


def test_the_cells_of_a_sweep_are_runs_of_their_own() -> None:
    names = {run_id(BASE, swept=swept) for swept in (None, {"limits.concurrency": 1}, {"limits.concurrency": 2})}
    assert len(names) == 3
    assert run_id(BASE, swept={}) == run_id(BASE)


def test_a_benchmark_is_named_by_everything() -> None:
    bench = replace(BASE, task=TaskConfig(kind=TaskKind.bench))
    assert run_id(replace(bench, limits=LimitsConfig(concurrency=7))) != run_id(bench)


# The logical model


def test_where_a_model_is_served_does_not_matter() -> None:
    fleet = {
        "gpu-0": DeploymentConfig(model="hosted_vllm/llama", api_base="http://host0:8000/v1"),
        "gpu-1": DeploymentConfig(model="hosted_vllm/llama", api_base="http://host1:8000/v1", weight=2.0),
    }
    assert model_identity(RunnerConfig(deployments=fleet)) == model_identity(RunnerConfig(model="hosted_vllm/llama"))


def test_a_mixture_of_models_is_another_model_in_any_order() -> None:
    a, b = DeploymentConfig(model="openai/a"), DeploymentConfig(model="openai/b")
    mixed = model_identity(RunnerConfig(deployments={"x": a, "y": b}))
    assert mixed == model_identity(RunnerConfig(deployments={"p": b, "q": a}))
    assert mixed != model_identity(RunnerConfig(model="openai/a"))


@pytest.mark.parametrize(
    ("simulator", "same"),
    [
        (SimulatorConfig(seed=1), False),
        (SimulatorConfig(accuracy=0.5), False),
        (SimulatorConfig(output_tokens=9), False),
        (SimulatorConfig(answers="answers.jsonl"), False),
        (SimulatorConfig(latency_s=9.0, slots=2, rpm=5), True),
    ],
)
def test_a_simulated_model_is_what_decides_its_answers(simulator: SimulatorConfig, same: bool) -> None:
    assert (model_identity(RunnerConfig(simulator=simulator)) == model_identity(RunnerConfig())) is same


# Items


def hashed(config: RunnerConfig = BASE, asked: Any = "a prompt", sample: int = 0) -> bytes:
    return ContentHasher(config)(asked, sample)


def test_an_item_is_named_by_sixteen_bytes() -> None:
    assert len(hashed()) == 16


@pytest.mark.parametrize("asked", ["another", ["a prompt"], {"input": "a prompt"}, None, ""])
def test_another_input_is_another_item(asked: Any) -> None:
    assert hashed(asked=asked) != hashed()


def test_another_repeat_is_another_item() -> None:
    assert hashed(sample=1) != hashed()


def test_the_order_of_an_inputs_fields_does_not_matter() -> None:
    assert hashed(asked={"role": "user", "content": "x"}) == hashed(asked={"content": "x", "role": "user"})


@pytest.mark.parametrize("key", ["model", "endpoint", "request.temperature", "response_format", "task"])
def test_what_items_have_in_common_is_part_of_each(key: str) -> None:
    assert hashed(ASKED[key](BASE)) != hashed()


@pytest.mark.parametrize(
    "key",
    [
        *sorted(NOT_ASKED.keys() - {"request.max_tokens"}),
        "prompt",
        "system",
        "mapper",
        "dataset.path",
        "dataset.shard.index",
    ],
)
def test_an_item_is_the_same_wherever_it_comes_from(key: str) -> None:
    assert hashed({**ASKED, **NOT_ASKED}[key](BASE)) == hashed()


def test_how_long_an_answer_may_be_is_part_of_an_item_and_not_of_the_run() -> None:
    longer = replace(BASE, request={"temperature": 0.5, "max_tokens": 5})
    assert run_id(longer) == run_id(BASE)
    assert hashed(longer) != hashed()
    assert (output_limits(longer), output_limits(BASE)) == ({"max_tokens": 5}, {})


@pytest.mark.parametrize(
    ("settings", "alike"),
    [
        ({"request": {"temperature": 0}}, True),
        ({"request": {"temperature": 0.0, "n": 1}}, True),
        ({"request": {"temperature": 0, "n": 2}}, False),
        ({"request": {"temperature": 0.1}}, False),
        ({"request": {}}, False),
        ({"task": TaskConfig(kind=TaskKind.embed)}, True),
        ({"task": TaskConfig(kind=TaskKind.bench), "request": {"temperature": 0}}, False),
        ({"deployments": {"a": DeploymentConfig(model="x/y", extra_kwargs={"temperature": 0})}, "request": {}}, True),
        ({"deployments": {"a": DeploymentConfig(model="x/y", extra_kwargs={"temperature": 1})}, "request": {}}, False),
    ],
)
def test_requests_are_answered_alike_where_nothing_is_sampled(settings: dict[str, Any], alike: bool) -> None:
    assert answers_alike(replace(BASE, **settings)) is alike


def test_a_hasher_is_not_changed_by_its_use() -> None:
    hasher = ContentHasher(BASE)
    first = hasher("x", 0)
    hasher("y", 3)
    assert hasher("x", 0) == first


# JSON of anything


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=())),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(exclude_categories=())), inner),
    max_leaves=8,
)


@given(value=PLAIN)
def test_json_of_plain_data_reads_back_as_it_was(value: Any) -> None:
    assert json.loads(dump_json(value)) == value


@given(value=st.dictionaries(st.text(), PLAIN, max_size=5))
def test_the_order_of_keys_does_not_matter(value: dict[str, Any]) -> None:
    assert dump_json(dict(reversed(value.items()))) == dump_json(value)


@pytest.mark.parametrize(
    "value",
    [
        {1: 2**70, "a": 1},
        {"odd": 2**70, None: 1, 2.5: 2},
        {("a", "b"): 1, "c": 2},
        {"when": date(2026, 3, 1), "n": 2**70},
        {"a set": {1}, "bytes": b"x", "path": Path("x"), "n": 2**70},
    ],
)
def test_json_is_written_of_anything(value: Any) -> None:
    assert isinstance(json.loads(dump_json(value)), dict)


@pytest.mark.parametrize("big", [1, 2**70])
def test_what_json_has_no_number_for_is_null(big: int) -> None:
    written = dump_json({"x": float("nan"), "y": [float("inf"), -float("inf")], "n": big}).decode()
    assert json.loads(written, parse_constant=pytest.fail) == {"x": None, "y": [None, None], "n": big}


def test_what_deployments_add_to_requests_is_asked_too() -> None:
    def model(**extra: object) -> str:
        deployment = DeploymentConfig(model="openai/m", extra_kwargs=dict(extra))
        return model_identity(RunnerConfig(deployments={"a": deployment}))

    assert len({model(), model(temperature=0), model(temperature=1)}) == 3
    assert model(timeout=5) == model()


@pytest.mark.parametrize("innermost", [1, 2**80], ids=["plain", "odd"])
def test_what_is_nested_beyond_measure_is_refused_and_no_crash(innermost: int) -> None:
    def nested(levels: int) -> object:
        deep: object = innermost
        for level in range(levels):
            deep = [deep] if level % 2 else {"a": deep}
        return deep

    assert json.loads(dump_json(nested(MOST_LEVELS))) == nested(MOST_LEVELS)
    for levels in (MOST_LEVELS + 1, 300, 800, 5_000, 100_000):
        with pytest.raises(ValueError, match="nested too deeply"):
            dump_json(nested(levels))


def test_many_brackets_are_not_deep() -> None:
    flat = {"a": [{"b": "[" * 1_000}] * 1_000}
    assert json.loads(dump_json(flat)) == flat


def test_a_workload_is_known_by_its_rows_and_by_what_is_asked_about_them() -> None:
    def facts(*rows: tuple[dict[str, Any], Any]) -> dict[str, str]:
        hasher = WorkloadHasher()
        for fields, asked in rows:
            hasher.add(fields, asked)
        return hasher.facts

    first = facts(({"q": 1}, "Say 1"), ({"q": 2}, ["Say 2"]))
    other_prompt = facts(({"q": 1}, "Name 1"), ({"q": 2}, ["Name 2"]))

    assert first == facts(({"q": 1}, "Say 1"), ({"q": 2}, ["Say 2"]))
    assert first["rows"] == other_prompt["rows"]
    assert first["inputs"] != other_prompt["inputs"]
    assert first["rows"] != facts(({"q": 2}, ["Say 2"]), ({"q": 1}, "Say 1"))["rows"]
