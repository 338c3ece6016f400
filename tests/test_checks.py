from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from runner.checks import (
    check,
    check_deployment,
    check_limits,
    nearest_key,
    unknown_key_message,
    unknown_keys,
    without_effect,
)
from runner.config import (
    BenchConfig,
    BudgetConfig,
    DatasetConfig,
    DatasetKind,
    DeploymentConfig,
    DeploymentLimitsConfig,
    FaultsConfig,
    LimitsConfig,
    RetryConfig,
    RoutingConfig,
    RunnerConfig,
    ScorerConfig,
    ShardConfig,
    Shared,
    SimulatorConfig,
    SloConfig,
    TaskConfig,
    TaskKind,
    TrackerConfig,
    replicas,
)
from runner.errors import ConfigError
from runner.types import Endpoint

# Checks


GOOD: dict[str, dict[str, Any]] = {
    "the defaults": {},
    "a hosted model": {"model": "openai/gpt-4.1-mini"},
    "a model with slashes": {"model": "hosted_vllm/meta-llama/Llama-3", "api_base": "http://localhost:8000/v1"},
    "every limit": {
        "limits": LimitsConfig(
            concurrency=1,
            rpm=1,
            tpm=0.5,
            rpd=1,
            tpd=1,
            itpm=1,
            otpm=1,
            max_request_burst=0.5,
            max_token_burst=1,
            default_output_tokens=0,
        )
    },
    "a window that is found": {"limits": LimitsConfig(concurrency="auto", max_concurrency=1)},
    "no retries": {"retry": RetryConfig(max_retries=0, base_s=0)},
    "a dataset of nothing": {"dataset": DatasetConfig(limit=0)},
    "the last shard": {"dataset": DatasetConfig(shard=ShardConfig(index=3, count=4))},
    "a fleet": {
        "deployments": {
            "a": DeploymentConfig(model="openai/x", weight=0.5, limits=DeploymentLimitsConfig(rpm=5)),
            "b": DeploymentConfig(model="openai/x", order=2, limits=DeploymentLimitsConfig(concurrency=8)),
        },
        "routing": RoutingConfig(strategy="least-busy", hedge=True, failover=False, max_wait_s=0, cooldown_s=5),
    },
    "a model that no deployment needs": {"model": "x", "deployments": {"a": DeploymentConfig(model="openai/x")}},
    "certain faults": {"simulator": SimulatorConfig(faults=FaultsConfig(http_429=0.0, hang=1.0))},
    "ordinary parameters": {"request": {"temperature": 0, "max_tokens": 5, "metadata": {"user": "x"}}},
}


@pytest.mark.parametrize("name", GOOD)
def test_what_can_be_run_passes(name: str) -> None:
    check(RunnerConfig(**GOOD[name]))


def limited(**limits: Any) -> dict[str, Any]:
    return {"limits": LimitsConfig(**limits)}


def rows(**dataset: Any) -> dict[str, Any]:
    return {"dataset": DatasetConfig(**dataset)}


def served(**deployment: Any) -> dict[str, Any]:
    return {"deployments": {"east": DeploymentConfig(**{"model": "openai/x", **deployment})}}


BAD: list[tuple[dict[str, Any], str]] = [
    ({"model": "gpt-4.1-mini"}, r"^model='gpt-4\.1-mini' has no provider: .*openai/gpt-4\.1-mini"),
    ({"model": "openai/"}, "^model='openai/' has no provider"),
    ({"model": ""}, "^model='' has no provider"),
    ({"api_base": "localhost:8000"}, "^api_base='localhost:8000': a URL begins with http"),
    (limited(concurrency=0), r"^limits\.concurrency=0: a whole number of at least 1"),
    (limited(concurrency=-1), r"^limits\.concurrency=-1"),
    (limited(concurrency=True), r"^limits\.concurrency=True"),
    (limited(concurrency=1.5), r"^limits\.concurrency=1\.5"),
    (limited(concurrency="many"), r"^limits\.concurrency='many'"),
    (limited(concurrency=None), r"^limits\.concurrency=None"),
    (limited(max_concurrency=0), r"^limits\.max_concurrency=0: at least 1"),
    *[
        (limited(**{key: value}), rf"^limits\.{key}={value}: a number above 0")
        for key in ("rpm", "tpm", "rpd", "tpd", "itpm", "otpm", "max_request_burst", "max_token_burst")
        for value in (0, -1, float("nan"))
    ],
    (limited(rpm=0.5), r"^limits\.rpm=0\.5: at least 1"),
    (limited(rpd=0.5), r"^limits\.rpd=0\.5: at least 1"),
    (limited(default_output_tokens=-1), r"^limits\.default_output_tokens=-1: at least 0"),
    ({"retry": RetryConfig(max_retries=-1)}, r"^retry\.max_retries=-1: a whole number of at least 0"),
    ({"retry": RetryConfig(base_s=-1)}, r"^retry\.base_s=-1: at least 0"),
    ({"retry": RetryConfig(cap_s=-1)}, r"^retry\.cap_s=-1: at least 0"),
    ({"samples": 0}, "^samples=0: at least 1"),
    (rows(limit=-1), r"^dataset\.limit=-1: at least 0"),
    (rows(kind=DatasetKind.jsonl), r"^dataset\.path must be set: dataset=jsonl dataset\.path=FILE"),
    (rows(kind=DatasetKind.csv), r"^dataset\.path must be set: dataset=csv"),
    (rows(shard=ShardConfig(count=0)), r"^dataset\.shard\.count=0: at least 1"),
    (rows(shard=ShardConfig(index=2, count=2)), r"^dataset\.shard\.index=2 is outside 0 to 1"),
    (rows(shard=ShardConfig(index=-1, count=2)), r"^dataset\.shard\.index=-1 is outside 0 to 1"),
    ({"routing": RoutingConfig(strategy="fastest")}, r"^routing\.strategy=fastest: choose one of simple-shuffle, "),
    ({"tracker": TrackerConfig(log_every_s=0.01)}, r"^tracker\.log_every_s=0\.01: at least 0\.1"),
    ({"tracker": TrackerConfig(table_rows=-1)}, r"^tracker\.table_rows=-1: at least 0"),
    ({"simulator": SimulatorConfig(faults=FaultsConfig(reset=1.5))}, r"^simulator\.faults\.reset=1\.5: a share"),
    ({"simulator": SimulatorConfig(faults=FaultsConfig(hang=-0.1))}, r"^simulator\.faults\.hang=-0\.1: a share"),
    *[({"name": name}, "becomes a folder's name") for name in ("", "a/b", ".", "..")],
    *[({"prompt": prompt}, "^prompt is empty: write a text, or prompt=null") for prompt in ("", " \n")],
    ({"runs_dir": ""}, "^runs_dir is empty: name a folder"),
    (served(model="x"), r"^deployments\.east\.model='x' has no provider"),
    (served(api_base="host:1"), r"^deployments\.east\.api_base='host:1': a URL begins"),
    (served(limits=DeploymentLimitsConfig(rpm=0)), r"^deployments\.east\.limits\.rpm=0: a number above 0"),
    (served(limits=DeploymentLimitsConfig(concurrency=0)), r"^deployments\.east\.limits\.concurrency=0"),
    *[(served(weight=weight), r"^deployments\.east\.weight=") for weight in (0.0, -1.0, float("inf"), float("nan"))],
]


@pytest.mark.parametrize(("values", "message"), BAD)
def test_what_cannot_be_run_is_rejected_by_the_name_of_its_key(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(RunnerConfig(**values))


SECRET = "sk-do-not-print-me"


@pytest.mark.parametrize(
    ("values", "key"),
    [
        (served(api_key=SECRET), "deployments.east.api_key"),
        (served(extra_kwargs={"api_key": SECRET}), "deployments.east.extra_kwargs.api_key"),
        ({"request": {"api_key": SECRET}}, "request.api_key"),
        (rows(kind=DatasetKind.python, arguments={"password": SECRET}), "dataset.arguments.password"),
        ({"request": {"aws_secret_access_key": SECRET}}, "request.aws_secret_access_key"),
        ({"request": {"extra_headers": {"Authorization": SECRET}}}, "request.extra_headers.Authorization"),
        ({"request": {"extra_headers": {"X-Api-Key": SECRET}}}, "request.extra_headers.X-Api-Key"),
    ],
)
def test_a_secret_is_rejected_and_not_repeated(values: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(RunnerConfig(**values))
    assert str(caught.value).startswith(f"{key}: ")
    assert "api_key_env" in str(caught.value)
    assert SECRET not in str(caught.value)


def test_limits_that_are_shared_must_be_there() -> None:
    with pytest.raises(ConfigError, match=r"limits\.shared=file shares limits, and there are none: set limits\.rpm"):
        check(RunnerConfig(limits=LimitsConfig(shared=Shared.file)))
    check(RunnerConfig(limits=LimitsConfig(shared=Shared.file, otpm=5)))


def test_a_password_has_no_place_in_the_address_of_redis() -> None:
    with pytest.raises(ConfigError, match="RUNNER_REDIS_PASSWORD") as caught:
        check(RunnerConfig(limits=LimitsConfig(redis_url="redis://:hunter2@host:6379/0")))
    assert "hunter2" not in str(caught.value)


BENCH = TaskConfig(kind=TaskKind.bench)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"task": BENCH, "budget": BudgetConfig(usd=1.0)}, "budget with task=bench"),
        ({"task": BENCH, "plan": True}, "plan=true with task=bench"),
        ({"task": BENCH, "pilot": 5}, "pilot with task=bench"),
    ],
)
def test_a_key_that_would_have_no_effect_is_rejected(values: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(RunnerConfig(**values))
    assert str(caught.value).startswith(f"{key} is not available in this version")


EMBED = TaskConfig(kind=TaskKind.embed)
TRANSCRIBE = TaskConfig(kind=TaskKind.transcribe)
SCHEMA = {"type": "object"}


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"task": EMBED, "system": "Brief."}, "system is for task=generate, and the task here is embed"),
        ({"task": TRANSCRIBE, "response_format": SCHEMA}, "response_format is for .*request.response_format says how"),
        ({"task": TRANSCRIBE, "endpoint": Endpoint.responses}, "endpoint is for task=generate"),
        ({"task": EMBED, "scorers": {"a": ScorerConfig()}}, "scorers score texts"),
        ({"task": replace(EMBED, micro_batch_size=0)}, "task.micro_batch_size=0: at least 1"),
        ({"task": replace(TRANSCRIBE, max_bytes=0)}, "task.max_bytes=0: at least 1"),
        (
            {"task": TaskConfig(image="path"), "endpoint": Endpoint.text_completion},
            "endpoint=text_completion takes no images",
        ),
        ({"response_format": SCHEMA, "request": {"response_format": SCHEMA}}, "are the same"),
        (rows(kind=DatasetKind.single, path="rows.csv"), "dataset.path is set, and dataset=single has no use for it"),
        (rows(kind=DatasetKind.csv, path="a.csv", split="test"), "dataset=huggingface has$"),
        (rows(kind=DatasetKind.python), "dataset.function must be set"),
    ],
)
def test_a_key_of_another_task_or_dataset_is_rejected(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        check(RunnerConfig(**values))


def test_parts_can_be_checked_alone_and_name_their_own_place() -> None:
    with pytest.raises(ConfigError, match=r"^deployments\['a'\]\.model='x' has no provider"):
        check_deployment("deployments['a']", DeploymentConfig(model="x"))
    with pytest.raises(ConfigError, match=r"^here\.rpm=0"):
        check_limits("here", LimitsConfig(rpm=0))


# Deployments


def test_the_short_way_is_one_deployment_named_by_its_model() -> None:
    config = RunnerConfig(model="openai/x", api_base="http://host/v1", api_key_env="MY_KEY")
    assert replicas(config) == {
        "openai/x": DeploymentConfig(model="openai/x", api_base="http://host/v1", api_key_env="MY_KEY")
    }


def test_the_deployments_group_replaces_the_short_way() -> None:
    fleet = {"a": DeploymentConfig(model="openai/a"), "b": DeploymentConfig(model="openai/b")}
    assert replicas(RunnerConfig(model="openai/x", deployments=fleet)) == fleet


def test_a_key_is_not_shown_when_a_deployment_is_printed() -> None:
    assert SECRET not in repr(DeploymentConfig(model="openai/x", api_key=SECRET))


def test_configurations_share_no_state() -> None:
    RunnerConfig().request["temperature"] = 1
    RunnerConfig().limits.rpm = 5
    assert RunnerConfig().request == {}
    assert RunnerConfig().limits == LimitsConfig()
    assert replace(RunnerConfig(), name="x") == RunnerConfig(name="x")


# Misspelt keys


@pytest.mark.parametrize(
    ("node", "unknown"),
    [
        ({}, []),
        ({"model": "x", "limits": {"rpm": 5}, "dataset": {"shard": {"index": 1}}}, []),
        ({"request": {"whatever": 1, "deep": {"er": 2}}}, []),
        ({"modell": "x"}, ["modell"]),
        ({"limits": {"rmp": 5, "rpm": 5}}, ["limits.rmp"]),
        ({"dataset": {"shard": {"indx": 1}}}, ["dataset.shard.indx"]),
        ({"deployments": {"my label": {"model": "openai/x"}}}, []),
        (
            {"deployments": {"a": {"modell": "x", "limits": {"rmp": 5}}}},
            ["deployments.a.modell", "deployments.a.limits.rmp"],
        ),
        ({"deployments": {"a": {"extra_kwargs": {"anything": 1}}}}, []),
        ({"scorers": {"mine": {"kind": "regex", "patern": "x"}}}, ["scorers.mine.patern"]),
        ({"response_format": {"type": "object", "properties": {}}}, []),
        ({"limits": None, "deployments": {"a": None}}, []),
        ({"a": 1, "b": {"c": 2}}, ["a", "b"]),
    ],
)
def test_keys_that_are_no_field_are_found(node: dict[str, Any], unknown: list[str]) -> None:
    assert list(unknown_keys(node)) == unknown


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("modell", "model"),
        ("limits.rmp", "limits.rpm"),
        ("limit.rpm", "limits.rpm"),
        ("rpm", "limits.rpm"),
        ("concurrency", "limits.concurrency"),
        ("max_retries", "retry.max_retries"),
        ("max_tokens", "request.max_tokens"),
        ("seed", "request.seed"),
        ("limit", "dataset.limit"),
        ("datset.path", "dataset.path"),
        ("dataset.shard.idx", "dataset.shard.index"),
        ("deployments.a.modell", "deployments.a.model"),
        ("deployments.my label.wieght", "deployments.my label.weight"),
        ("scorers.mine.patern", "scorers.mine.pattern"),
        ("deployments.a.price.promt", "deployments.a.price.prompt"),
        ("deployments.a.prise.prompt", "deployments.a.price.prompt"),
        ("deployments.a.price.weight", "deployments.a.weight"),
        ("deployments.a.limits.rmp", "deployments.a.limits.rpm"),
        ("deployments.a.rpm", "deployments.a.limits.rpm"),
        ("deployments.a.prompt", "deployments.a.price.prompt"),
        ("dataset.shards.index", "dataset.shard.index"),
        ("deployments.a.api_kee", "deployments.a.api_key_env"),
        ("deployment.a.model", "deployments.a.model"),
        ("scorers.mine.rpm", "limits.rpm"),
        ("scorers.mine.weight", None),
        ("scorers.mine.limits.rpm", "limits.rpm"),
        ("nowhere.a.rpm", "limits.rpm"),
        ("limits_rpm", "limits.rpm"),
        ("deployments.a.price.input", None),
        ("limits.input", None),
        ("qqqqqqqq", None),
        ("", None),
    ],
)
def test_the_key_that_was_meant_is_guessed(path: str, meant: str | None) -> None:
    assert nearest_key(path) == meant


def test_the_message_names_the_key_that_was_meant_or_where_to_look() -> None:
    assert unknown_key_message("limits.rmp") == "unknown key 'limits.rmp'. Did you mean 'limits.rpm'?"
    assert "--help" in unknown_key_message("qqqqqqqq")
    assert unknown_key_message("deployments.a.price.input").endswith(
        "The keys of 'deployments.a.price' are prompt, completion, cached"
    )


@pytest.mark.parametrize("place", ["", "limits.", "deployments.a.", "deployments.a.price.", "scorers.s.", "nowhere.a."])
@pytest.mark.parametrize("name", ["rmp", "modell", "pice", "promt", "shard", "limit", "kind", "usage", "x"])
def test_a_key_that_is_suggested_exists(place: str, name: str) -> None:
    node: Any = None
    for part in reversed((nearest_key(f"{place}{name}") or "model").split(".")):
        node = {part: node}
    assert list(unknown_keys(node)) == []


@pytest.mark.parametrize("value", ["abc", 0, -1, True])
@pytest.mark.parametrize("key", ["timeout", "max_tokens", "n"])
def test_parameters_that_are_reckoned_with_are_numbers(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"request.{key}"):
        check(RunnerConfig(request={key: value}))


@pytest.mark.parametrize("value", ["yes", 1])
def test_an_answer_is_streamed_or_not(value: object) -> None:
    with pytest.raises(ConfigError, match=r"request\.stream=.*: true or false"):
        check(RunnerConfig(request={"stream": value}))


def test_a_password_in_an_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError, match="no place") as caught:
        check(RunnerConfig(model="hosted_vllm/m", api_base="http://me:hunter2@host/v1"))
    assert "hunter2" not in str(caught.value)


def test_a_misspelt_parameter_is_refused_with_the_right_one_and_the_way_round() -> None:
    with pytest.raises(ConfigError, match=r"request\.temprature: did you mean request\.temperature.*extra_body"):
        check(RunnerConfig(prompt="x", request={"temprature": 0}))

    check(RunnerConfig(prompt="x", request={"extra_body": {"temprature": 0}, "guided_json": {}, "top_a": 1}))


@pytest.mark.parametrize(
    ("key", "meant"), [("rpm", "limits.rpm"), ("concurrency", "limits.concurrency"), ("model", "model")]
)
def test_a_key_of_the_run_among_the_parameters_is_refused_with_its_place(key: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=rf"request\.{key}: did you mean {meant}\? .* request\.extra_body\.{key}$"):
        check(RunnerConfig(prompt="x", request={key: 1}))

    check(RunnerConfig(prompt="x", request={"extra_body": {key: 1}}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"levels": [1, 0]}, "bench.levels=[1, 0]: a number of at least 1"),
        ({"levels": [1, 1]}, "each once"),
        ({"levels": "many"}, "bench.levels='many'"),
        ({"levels": []}, "bench.levels=[]"),
        ({"rate": -1}, "bench.rate=-1: requests per second above 0"),
        ({"requests": None}, "bench.requests and bench.duration are both null"),
        ({"requests": 0}, "bench.requests=0: at least 1"),
        ({"duration": 0.0}, "bench.duration=0.0"),
        ({"plateau": 2.0}, "bench.plateau=2.0"),
        ({"task": TaskKind.bench}, "bench.task=bench"),
        ({"task": TaskKind.transcribe}, "generate or embed"),
        ({"slo": SloConfig(latency_p95_s=1.0), "requests": 50}, "p95 takes 72 requests a level"),
        ({"slo": SloConfig(latency_p95_s=-1.0)}, "bench.slo.latency_p95_s=-1.0: seconds above 0"),
        ({"slo": SloConfig(ttft_p95_s=1.0)}, "request.stream=true"),
        ({"slo": SloConfig(error_rate=2.0)}, "bench.slo.error_rate=2.0"),
    ],
)
def test_a_benchmark_that_cannot_show_what_it_is_asked_for_is_rejected(changes: dict[str, Any], message: str) -> None:
    config = RunnerConfig(task=TaskConfig(kind=TaskKind.bench), bench=BenchConfig(**changes))

    with pytest.raises(ConfigError, match=re.escape(message)):
        check(config)


@pytest.mark.parametrize(
    "changes",
    [{"levels": "auto"}, {"levels": 4}, {"levels": None}, {"rate": [0.5, 2]}, {"requests": None, "duration": 9}],
)
def test_a_benchmark_may_name_its_levels_in_several_ways(changes: dict[str, Any]) -> None:
    check(RunnerConfig(task=TaskConfig(kind=TaskKind.bench), bench=BenchConfig(**changes)))


def test_a_place_for_shared_limits_that_are_not_shared_is_refused() -> None:
    for limits in (LimitsConfig(rpm=1, redis_url="redis://other:6379/0"), LimitsConfig(rpm=1, shared_folder="x")):
        with pytest.raises(ConfigError, match=r"has no effect without limits\.shared="):
            check(RunnerConfig(prompt="x", limits=limits))


def test_a_key_as_a_key_of_the_configuration_points_to_the_environment() -> None:
    assert "api_key_env names the variable" in unknown_key_message("api_key")


def test_a_root_model_beside_deployments_is_said_to_have_no_effect() -> None:
    fleet = {"a": DeploymentConfig(model="openai/x")}
    assert list(without_effect(RunnerConfig(deployments=fleet))) == []
    assert list(without_effect(RunnerConfig(deployments=fleet, model="openai/x"))) == []
    assert list(without_effect(RunnerConfig(model="openai/y", api_base="http://h/v1"))) == []
    [said] = without_effect(RunnerConfig(deployments=fleet, model="openai/y"))
    assert said.startswith("model=openai/y has no effect beside deployments (a): set deployments.LABEL.model")


def test_a_budget_of_a_benchmark_is_refused_with_the_key_that_takes_it_away() -> None:
    with pytest.raises(ConfigError, match=r"or set budget\.usd=null$"):
        check(RunnerConfig(task=BENCH, budget=BudgetConfig(usd=1.0)))
