"""What the types let through: values out of range, secrets, and misspelt keys with the right one beside them."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import PurePath
from typing import Any, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

from runner.config import (
    SECRET_KEYS,
    STRATEGIES,
    DatasetConfig,
    DatasetKind,
    DeploymentConfig,
    DeploymentLimitsConfig,
    LimitsConfig,
    PriceConfig,
    Resume,
    RetryConfig,
    RoutingConfig,
    RunnerConfig,
    Shared,
    SloConfig,
    TaskKind,
    asked_kind,
    replicas,
)
from runner.errors import ConfigError
from runner.help import ADDED
from runner.intervals import samples_for
from runner.types import Endpoint


def check(config: RunnerConfig) -> None:
    """Reject what the types let through.

    Raises:
        ConfigError: The first problem found, naming its key.
    """
    check_secrets(config)
    _reject_misplaced(config.request)
    check_request("request", config.request)
    for label, deployment in config.deployments.items():
        check_deployment(f"deployments.{label}", deployment)
    if not config.deployments:
        check_deployment("", replicas(config)[config.model])
    check_limits("limits", config.limits)
    check_routing(config.routing)
    _check_dataset(config.dataset)
    _check_task(config)
    if config.task.kind is TaskKind.bench:
        check_bench_settings(config)
    check_retry(config.retry)
    _at_least("samples", config.samples, 1)
    _at_least("tracker.log_every_s", config.tracker.log_every_s, 0.1)
    _at_least("tracker.finish_timeout_s", config.tracker.finish_timeout_s, 0)
    _at_least("tracker.table_rows", config.tracker.table_rows, 0)
    for key, rate in vars(config.simulator.faults).items():
        if not 0 <= rate <= 1:
            raise ConfigError(f"simulator.faults.{key}={rate}: a share between 0 and 1")
    check_name(config.name)
    if config.prompt is not None and not config.prompt.strip():
        raise ConfigError("prompt is empty: write a text, or prompt=null where the rows bring what is asked")
    if not config.runs_dir:
        raise ConfigError("runs_dir is empty: name a folder, or leave it out for runs/")
    for key, amount in vars(config.budget).items():
        _above_zero(f"budget.{key}", amount, "a number above 0, or null for no limit")
    _at_least("pilot", config.pilot, 1)
    _check_reuse(config)
    _reject_unavailable(config)


def check_all(*checks: Callable[[], Sequence[str] | None]) -> list[str]:
    """Carry out every check, so that all that they find is told together. Returns the doubts that they return.

    Raises:
        ConfigError: One check's own, or one with the messages of several.
    """
    doubts: list[str] = []
    failed: list[ConfigError] = []
    for each in checks:
        try:
            doubts += each() or ()
        except ConfigError as error:
            failed.append(error)
    if len(failed) == 1:
        raise failed[0]
    if failed:
        raise ConfigError(*(message for error in failed for message in error.args))
    return doubts


def without_effect(config: RunnerConfig) -> Iterator[str]:
    """A model of the root that differs from those of ``deployments``: it is asked nothing."""
    left_alone = RunnerConfig()
    for key in ("model", "api_base", "api_key_env") if config.deployments else ():
        value = getattr(config, key)
        used = {getattr(left_alone, key), *(getattr(each, key) for each in config.deployments.values())}
        if value not in used:
            yield (
                f"{key}={value} has no effect beside deployments ({', '.join(config.deployments)}): set"
                f" deployments.LABEL.{key}, or leave them out with deployments=none"
            )


def check_name(name: str) -> None:
    """Refuse a name that leads out of ``runs_dir``.

    Raises:
        ConfigError: It does, or is none.
    """
    if not name or "/" in name or name in (".", "..") or not name.isprintable():
        raise ConfigError(f"name={name!r} becomes a folder's name: use letters, digits, '-' and '_'")


def check_secrets(config: RunnerConfig) -> None:
    """Refuse keys in a configuration, which is stored with the run.

    Raises:
        ConfigError: There is one; the message names its place, and not the key.
    """
    _check_secrets("request", config.request)
    _check_secrets("dataset.arguments", config.dataset.arguments)
    for label, deployment in replicas(config).items():
        where = f"deployments.{label}." if config.deployments else ""
        if deployment.api_key:
            raise ConfigError(_no_place_for_a_key(f"{where}api_key"))
        if "@" in urlsplit(deployment.api_base or "").netloc:
            raise ConfigError(_no_place_for_a_key(f"{where}api_base (user:password@host)"))
        _check_secrets(f"{where}extra_kwargs", deployment.extra_kwargs or {})


def check_deployment(where: str, deployment: DeploymentConfig) -> None:
    """Check one deployment; ``where`` is the path of its keys, empty for the root."""
    prefix = f"{where}." if where else ""
    for key in ("model", "api_base", "api_key", "api_key_env"):
        given = getattr(deployment, key)
        if not isinstance(given, str) and (given is not None or key == "model"):
            raise ConfigError(f"{prefix}{key} is of type {type(given).__name__}, and not a text")
    if deployment.model == DeploymentConfig.model:
        raise ConfigError(f"{prefix}model must be set, for example to 'openai/gpt-4.1-mini'")
    if "/" not in deployment.model.strip("/"):
        raise ConfigError(
            f"{prefix}model={deployment.model!r} has no provider: write provider/model, for example"
            f" openai/{deployment.model}, or hosted_vllm/{deployment.model} with api_base=http://HOST:PORT/v1"
        )
    base = deployment.api_base
    if base is not None and not base.startswith(("http://", "https://")):
        raise ConfigError(f"{prefix}api_base={base!r}: a URL begins with http:// or https://")
    if not (_is_number(deployment.weight) and 0 < deployment.weight < math.inf):
        raise ConfigError(f"{prefix}weight={deployment.weight!r}: a number above 0")
    for part, kind in (("price", PriceConfig), ("limits", LimitsConfig)):
        if (given := getattr(deployment, part)) is not None and not isinstance(given, kind):
            example = ", ".join(each.name for each in fields(kind)[:3])
            raise ConfigError(
                f"{prefix}{part} is of type {type(given).__name__}: it has fields of its own ({example}, …)"
            )
    for key, price in (vars(deployment.price) if deployment.price else {}).items():
        _at_least(f"{prefix}price.{key}", price, 0)
    _at_least(f"{prefix}max_output_tokens", deployment.max_output_tokens, 1)
    _at_least(f"{prefix}order", deployment.order, 0)
    if deployment.limits is not None:
        check_limits(f"{prefix}limits", deployment.limits)


def check_limits(where: str, limits: LimitsConfig) -> None:
    """Check limits; ``where`` is the path of their keys, empty for the arguments of a function."""
    prefix, nothing = (f"{where}.", "null") if where else ("", "None")
    concurrency = limits.concurrency
    unbounded = concurrency is None and isinstance(limits, DeploymentLimitsConfig)
    is_number = isinstance(concurrency, int) and not isinstance(concurrency, bool)
    if not unbounded and concurrency != "auto" and not (is_number and concurrency >= 1):
        raise ConfigError(f"{prefix}concurrency={concurrency!r}: a whole number of at least 1, or auto")
    _at_least(f"{prefix}max_concurrency", limits.max_concurrency, 1)
    for key in (*LIMIT_KEYS, "max_request_burst", "max_token_burst"):
        _above_zero(f"{prefix}{key}", getattr(limits, key), f"a number above 0, or {nothing} for no limit")
    for key in ("rpm", "rpd"):
        _at_least(f"{prefix}{key}", getattr(limits, key), 1)
    _at_least(f"{prefix}default_output_tokens", limits.default_output_tokens, 0)
    if limits.shared is not Shared.none and not any(getattr(limits, key) for key in LIMIT_KEYS):
        raise ConfigError(f"{prefix}shared={limits.shared.value} shares limits, and there are none: set {prefix}rpm")
    if "@" in urlsplit(limits.redis_url).netloc:
        raise ConfigError(
            f"{prefix}redis_url: configurations are stored with the run, so a password has no place in them. Put it"
            " into RUNNER_REDIS_PASSWORD, in the environment or in .env"
        )
    _check_redis(where, limits)
    if limits.redis_url not in ("", LimitsConfig.redis_url) and limits.shared is not Shared.redis:
        raise ConfigError(f"{prefix}redis_url has no effect without {prefix}shared=redis: set that too")
    if limits.shared_folder is not None and limits.shared is not Shared.file:
        raise ConfigError(f"{prefix}shared_folder has no effect without {prefix}shared=file: set that too")


def unshared(config: RunnerConfig, launcher: str) -> Iterator[str]:
    """Warnings of limits that each process of a multirun would keep by itself, where ``launcher`` starts several.

    Raises:
        ConfigError: The limits are to be shared, and nobody said where.
    """
    if launcher == "basic":
        return
    own = {f"deployments.{label}.limits": each.limits for label, each in config.deployments.items() if each.limits}
    for where, limits in {"limits": config.limits, **own}.items():
        _check_redis(where, limits)
        if not any(getattr(limits, key) for key in LIMIT_KEYS):
            continue
        if limits.shared is Shared.none:
            yield (
                f"{where}: each of the processes keeps to them by itself, so that all together send more: set"
                f" {where}.shared=file, or redis on several hosts"
            )
        elif limits.shared is Shared.file and launcher in _LAUNCHERS_OF_HOSTS:
            yield f"{where}.shared=file: only the processes of one host keep to them together; redis is for several"


_LAUNCHERS_OF_HOSTS = ("ray", "ray_aws", "submitit_slurm")
"""Launchers whose processes may be on several hosts."""


def _check_redis(where: str, limits: LimitsConfig) -> None:
    if limits.shared is Shared.redis and not limits.redis_url:
        raise ConfigError(
            f"{where}.redis_url is not set: processes on several hosts keep their limits together through a Redis"
            f" server that all of them reach: {where}.redis_url=redis://HOST:6379/0"
        )


LIMIT_KEYS = ("rpm", "tpm", "rpd", "tpd", "itpm", "otpm")


def check_retry(retry: RetryConfig) -> None:
    """Check numbers of attempts and waits."""
    check_count("retry.max_retries", retry.max_retries, 0)
    _at_least("retry.base_s", retry.base_s, 0)
    _at_least("retry.cap_s", retry.cap_s, 0)
    _at_least("retry.budget", retry.budget, 0)


def check_routing(routing: RoutingConfig) -> None:
    """Check the strategy and the times."""
    check_choice("routing.strategy", routing.strategy, STRATEGIES)
    _at_least("routing.max_wait_s", routing.max_wait_s, 0)
    _at_least("routing.cooldown_s", routing.cooldown_s, 0.1)


def check_choice(key: str, value: str, options: Sequence[str]) -> None:
    """Raise a `ConfigError` where ``value`` is none of the ``options``, with the nearest one."""
    if value not in options:
        raise ConfigError(no_choice_message(key, value, options))


def no_choice_message(key: str, value: str, options: Sequence[str]) -> str:
    """What to say of a ``value`` that is none of the ``options``."""
    names = (value, PurePath(value).stem)  # of a path, its file's
    near = [match for name in names for match in difflib.get_close_matches(name, options, n=1)]
    hint = f" Did you mean {key}={near[0]}?" if near else ""
    return f"{key}={value}: choose one of {', '.join(options)}.{hint}"


def no_section_message(given: str, path: str, section: type) -> str:
    """What to say of a value that is ``given`` where the keys of ``section`` belong, below ``path``."""
    keys = ", ".join(f"{path}.{name}" for name in _names(section))
    return f"{given}: it has keys of its own, as there are {keys}"


_NOT_AVAILABLE = "is not available in this version"


def _reject_unavailable(config: RunnerConfig) -> None:
    """Keys whose capability this version does not have: better an error than a key without effect."""
    is_bench = config.task.kind is TaskKind.bench
    amounts = [f"budget.{key}=null" for key, amount in vars(config.budget).items() if amount is not None]
    if is_bench and amounts:
        raise ConfigError(f"budget with task=bench {_NOT_AVAILABLE}: leave it out, or set {' '.join(amounts)}")
    wanted = {
        "plan=true with task=bench": is_bench and config.plan,
        "pilot with task=bench": is_bench and config.pilot is not None,
    }
    for key, is_wanted in wanted.items():
        if is_wanted:
            raise ConfigError(f"{key} {_NOT_AVAILABLE}: leave it out")


def _check_reuse(config: RunnerConfig) -> None:
    if config.reuse and config.task.kind is TaskKind.bench:
        raise ConfigError("reuse=true with task=bench: a benchmark measures answers, and takes none over")
    if config.reuse and config.resume is Resume.fresh:
        raise ConfigError("resume=fresh asks everything anew, reuse=true takes answers over: keep one of them")


def check_request(where: str, request: Mapping[str, Any], *, beside: Sequence[str] = ()) -> None:
    """Check the names of the parameters, and the values of those that are numbers everywhere.

    ``where`` is the path of their keys, empty for the arguments of a function, which has others ``beside`` them.
    """
    prefix = f"{where}." if where else ""
    _reject_misspelt(prefix, request, (*_PARAMETERS, *beside))
    for key in ("timeout", "max_tokens", "max_completion_tokens", "max_output_tokens", "n"):
        _above_zero(f"{prefix}{key}", request.get(key))
    for key in _NUMBERS:
        if (value := request.get(key)) is not None and not _is_number(value):
            raise ConfigError(f"{prefix}{key}={value!r}: a number, as in {prefix}{key}=1")
    stream = request.get("stream")
    if stream is not None and not isinstance(stream, bool):
        raise ConfigError(f"{prefix}stream={stream!r}: true or false")


_NUMBERS = (
    *("temperature", "top_p", "top_k", "min_p", "seed", "dimensions", "top_logprobs", "best_of"),
    *("frequency_penalty", "presence_penalty", "repetition_penalty"),
)
"""Parameters that no server takes as a text. Their range is the server's affair."""

_PARAMETERS = (
    *("temperature", "top_p", "top_k", "min_p", "n", "seed", "stop", "stream", "stream_options", "timeout", "user"),
    *("max_tokens", "max_completion_tokens", "max_output_tokens", "frequency_penalty", "presence_penalty"),
    *("repetition_penalty", "logit_bias", "logprobs", "top_logprobs", "response_format", "tools", "tool_choice"),
    *("parallel_tool_calls", "reasoning_effort", "reasoning", "thinking", "service_tier", "store", "metadata"),
    *("modalities", "prediction", "verbosity", "extra_body", "extra_headers", "instructions", "truncation"),
    *("dimensions", "encoding_format", "input_type", "language", "prompt", "best_of", "echo", "suffix", "include"),
)
"""Parameters that a misspelt one is compared with."""


_ELSEWHERE = {
    **{key: f"limits.{key}" for key in (*LIMIT_KEYS, "concurrency")},
    **dict.fromkeys(("max_retries", "num_retries"), "retry.max_retries"),
    **dict.fromkeys(("api_base", "base_url"), "api_base"),
    **dict.fromkeys(("messages", "input"), "prompt"),
    "model": "model",
    "system": "system",
}
"""What is looked for among the parameters and has a key of its own."""


def _reject_misplaced(request: Mapping[str, Any]) -> None:
    """Refuse ``request.rpm``, which limits nothing, and ``request.model``, which is counted as another model."""
    for key, meant in _ELSEWHERE.items():
        if key in request:
            raise ConfigError(
                f"request.{key}: did you mean {meant}? If the server really has {key!r}, write request.extra_body.{key}"
            )


def _reject_misspelt(prefix: str, request: Mapping[str, Any], known: Sequence[str]) -> None:
    """A parameter that is nearly one that everybody knows: servers ignore it, and nobody notices."""
    for key in request:
        near = [] if key in known else difflib.get_close_matches(str(key), known, n=1, cutoff=0.85)
        if near:
            way_out = f"{prefix}extra_body.{key}" if prefix else f"extra_body={{{key!r}: …}}"
            raise ConfigError(
                f"{prefix}{key}: did you mean {prefix}{near[0]}? If the server really has {key!r}, write {way_out}"
            )


_GENERATE_ONLY = {"system": None, "response_format": None, "endpoint": Endpoint.chat_completion}
"""Root keys that only a generation has a use for, and what they are where they are left alone."""


def _check_task(config: RunnerConfig) -> None:
    task, kind = config.task, asked_kind(config)
    _at_least("task.micro_batch_size", task.micro_batch_size, 1)
    _at_least("task.max_bytes", task.max_bytes, 1)
    if kind is TaskKind.bench:
        raise ConfigError("bench.task=bench: say what is to be measured: generate or embed")
    if kind is TaskKind.generate:
        if task.image is not None and config.endpoint is Endpoint.text_completion:
            raise ConfigError("task.image: endpoint=text_completion takes no images: use chat_completion or responses")
        if config.response_format is not None and config.request.get("response_format") is not None:
            raise ConfigError("response_format and request.response_format are the same: leave out the latter")
        return
    for key, default in _GENERATE_ONLY.items():
        if getattr(config, key) != default:
            hint = " (request.response_format says how a transcript is written)" if key == "response_format" else ""
            raise ConfigError(f"{key} is for task=generate, and the task here is {kind.value}: leave it out{hint}")
    if config.scorers and kind is TaskKind.embed:
        raise ConfigError("scorers score texts, and task=embed answers with vectors: leave them out")


def check_bench_settings(config: RunnerConfig) -> None:
    """Check what a benchmark measures, and whether that is enough to know what it is asked for."""
    bench, slo = config.bench, config.bench.slo
    if bench.task not in (TaskKind.generate, TaskKind.embed) or config.task.image is not None:
        raise ConfigError(f"bench.task={bench.task.value}: texts are measured, with generate or embed, and no files")
    if bench.levels is None and bench.rate is None and config.limits.concurrency == "auto":
        raise ConfigError("bench.levels=null measures limits.concurrency: give it a number, or use bench.levels=auto")
    if bench.levels not in (None, "auto"):
        _check_levels("bench.levels", bench.levels, "a number of at least 1, a list of them, auto, or null", whole=True)
    if bench.rate is not None:
        _check_levels("bench.rate", bench.rate, "requests per second above 0, a list of them, or null")
    if bench.requests is None and bench.duration is None:
        raise ConfigError("bench.requests and bench.duration are both null: set one, or a level never ends")
    for key, least in (("requests", 1), ("max_level", 1), ("warmup", 0), ("repeats", 1)):
        _at_least(f"bench.{key}", getattr(bench, key), least)
    if bench.duration is not None and not bench.duration > 0:
        raise ConfigError(f"bench.duration={bench.duration}: seconds above 0")
    if not 0 < bench.plateau <= 1:
        raise ConfigError(f"bench.plateau={bench.plateau}: a share of the best throughput, above 0 and at most 1")
    _check_slo(config, slo)


def _check_levels(key: str, given: Any, wanted: str, *, whole: bool = False) -> None:
    levels = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    for level in levels:
        if (
            isinstance(level, bool)
            or not isinstance(level, int if whole else int | float)
            or level < whole
            or level <= 0
        ):
            raise ConfigError(f"{key}={given!r}: {wanted}")
    if not levels or len(set(levels)) < len(levels):
        raise ConfigError(f"{key}={given!r}: {wanted}, each once")


def _check_slo(config: RunnerConfig, slo: SloConfig) -> None:
    bench = config.bench
    for key, limit in vars(slo).items():
        if key == "error_rate":
            if not 0 <= limit <= 1:
                raise ConfigError(f"bench.slo.{key}={limit}: a share between 0 and 1")
            continue
        if limit is None:
            continue
        if not limit > 0:
            raise ConfigError(f"bench.slo.{key}={limit}: seconds above 0")
        if not key.startswith("latency") and not config.request.get("stream"):
            raise ConfigError(f"bench.slo.{key} is known of streamed answers only: set request.stream=true")
        percent = int(key.rpartition("_p")[2].removesuffix("_s"))
        needed = samples_for(percent / 100)
        if bench.requests is not None and bench.requests * bench.repeats < needed:
            raise ConfigError(
                f"bench.slo.{key}: p{percent} takes {needed} requests a level, and bench.requests ×"
                f" bench.repeats is {bench.requests * bench.repeats}: raise bench.requests"
            )


_DATASET_KEYS = {
    DatasetKind.single: (),
    DatasetKind.jsonl: ("path",),
    DatasetKind.csv: ("path",),
    DatasetKind.parquet: ("path",),
    DatasetKind.files: ("path",),
    DatasetKind.huggingface: ("path", "name", "split", "streaming"),
    DatasetKind.python: ("function", "arguments"),
}
"""What describes a dataset of each kind; the first key must be set."""


def _check_dataset(dataset: DatasetConfig) -> None:
    kind, keys = dataset.kind.value, _DATASET_KEYS[dataset.kind]
    if keys and not getattr(dataset, keys[0]):
        example = "package.module:function" if keys[0] == "function" else "FILE"
        raise ConfigError(f"dataset.{keys[0]} must be set: dataset={kind} dataset.{keys[0]}={example}")
    for key in ("path", "name", "split", "streaming", "function", "arguments"):
        if getattr(dataset, key) and key not in keys:
            owners = " or ".join(each.value for each, theirs in _DATASET_KEYS.items() if key in theirs)
            raise ConfigError(f"dataset.{key} is set, and dataset={kind} has no use for it: dataset={owners} has")
    _at_least("dataset.limit", dataset.limit, 0)
    _at_least("dataset.shard.count", dataset.shard.count, 1)
    if not 0 <= dataset.shard.index < dataset.shard.count:
        raise ConfigError(
            f"dataset.shard.index={dataset.shard.index} is outside 0 to {dataset.shard.count - 1}"
            " (dataset.shard.count - 1)"
        )


def _check_secrets(where: str, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if any(part in str(key).lower().replace("-", "_") for part in SECRET_KEYS):
            raise ConfigError(_no_place_for_a_key(f"{where}.{key}"))
        if isinstance(value, Mapping):
            _check_secrets(f"{where}.{key}", value)


def _no_place_for_a_key(path: str) -> str:
    return (
        f"{path}: configurations are stored with the run, so a key has no place in them. Put it in the environment or"
        " in .env, and name the variable: api_key_env=NAME, or deployments.LABEL.api_key_env=NAME"
    )


def check_count(key: str, value: object, least: int = 1) -> None:
    """Raise a `ConfigError` where ``value`` is no whole number of at least so many."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{key}={value!r}: a whole number of at least {least}")


def _at_least(key: str, value: float | None, least: float) -> None:
    if value is not None and not (_is_number(value) and value >= least):
        raise ConfigError(f"{key}={value!r}: at least {least}")


def _above_zero(key: str, value: float | None, wanted: str = "a number above 0") -> None:
    if value is not None and not (_is_number(value) and value > 0):
        raise ConfigError(f"{key}={value!r}: {wanted}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def unknown_keys(node: Mapping[str, Any], schema: type = RunnerConfig, prefix: str = "") -> Iterator[str]:
    """Dotted paths in a composed configuration that are no field of ``schema``."""
    hints = get_type_hints(schema)
    for key, value in node.items():
        path = f"{prefix}{key}"
        if key not in hints:
            yield path
            continue
        kind = _dataclass_of(hints[key])
        if kind is None or not isinstance(value, Mapping):
            continue
        if _is_mapping(hints[key]):
            for label, entry in value.items():
                if isinstance(entry, Mapping):
                    yield from unknown_keys(entry, kind, f"{path}.{label}.")
        else:
            yield from unknown_keys(value, kind, f"{path}.")


def nearest_key(path: str) -> str | None:
    """The key that ``path`` was most likely meant to be: the right name in the wrong place, or nearly the right one."""
    if path in _PARAMETERS:
        return f"request.{path}"
    sections = dict(_sections(path))
    known = [_joined(section, name) for section, kind in sections.items() for name in _names(kind)]
    place = _joined(_innermost(path, sections), "")  # what is right of the path would make all below it look alike
    places: dict[str, str] = {}
    for candidate in sorted(known, key=lambda each: (not each.startswith(place), each.count("."))):
        places.setdefault(candidate.rpartition(".")[2], candidate)
    if path in places:
        return places[path]
    below = [each.removeprefix(place) for each in known if each.startswith(place)]
    if near := difflib.get_close_matches(path.removeprefix(place), below, n=1, cutoff=0.6):
        return place + near[0]
    near = difflib.get_close_matches(path.rpartition(".")[2], places, n=1, cutoff=0.75)
    return places[near[0]] if near else None


def unknown_key_message(path: str) -> str:
    """What to say of a key that does not exist: the one that was meant, or those that there are."""
    if path.rpartition(".")[2] == "api_key":
        return f"unknown key {path!r}: keys come from the environment or from .env; api_key_env names the variable"
    if re.match(r"(\w+)\.\1(\.|$)", path):
        group = path.partition(".")[0]
        return f"unknown key {path!r}. These are the keys of {group!r} already: leave the inner `{group}` out"
    if added := difflib.get_close_matches(path, ADDED, n=1, cutoff=0.75):
        return f"unknown key {path!r}. Did you mean +{added[0]}=…?"
    if near := _nearest_keys(path):
        return f"unknown key {path!r}. Did you mean {' or '.join(map(repr, near))}?"
    sections = dict(_sections(path))
    if section := _innermost(path, sections):
        return f"unknown key {path!r}. The keys of {section!r} are {', '.join(_names(sections[section]))}"
    return f"unknown key {path!r}. `python -m runner --help` lists the keys."


def _nearest_keys(path: str) -> list[str]:
    """What may be meant: a misspelt section, or the nearest key wherever it is."""
    near = nearest_key(path)
    first, *rest = path.split(".")
    alike = difflib.get_close_matches(first, _names(RunnerConfig), n=1, cutoff=0.75)
    if not alike or alike == [first]:
        return [near] if near else []
    if rest:
        return [".".join([*alike, *rest]) if near in (None, *alike) else str(near)]
    return list(dict.fromkeys([*alike, near or alike[0]]))


def _innermost(path: str, sections: Container[str]) -> str:
    """The section that ``path`` leads to, as far as it is right."""
    section = path.rpartition(".")[0]
    while section not in sections:
        section = section.rpartition(".")[0]
    return section


def _sections(path: str) -> Iterator[tuple[str, type]]:
    """What has keys of its own, by its dotted path; entries of the user's own only where ``path`` has a label."""
    first, *rest = path.split(".")
    label = rest[0] if len(rest) > 1 else ""
    is_misspelt = first not in get_type_hints(RunnerConfig)

    def below(section: str, kind: type) -> Iterator[tuple[str, type]]:
        yield section, kind
        for name, hint in get_type_hints(kind).items():
            inner, own = _dataclass_of(hint), _joined(section, name)
            if inner is not None and not _is_mapping(hint):
                yield from below(own, inner)
            elif inner is not None and label and (name == first or is_misspelt):
                yield from below(_joined(own, label), inner)

    yield from below("", RunnerConfig)


def _joined(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name


def _names(section: type) -> list[str]:
    """The keys of a section, save those that no configuration may hold."""
    return [each.name for each in fields(section) if each.name not in SECRET_KEYS]


def _dataclass_of(hint: Any) -> type | None:
    """The dataclass in ``X``, ``Optional[X]`` or ``dict[str, X]``."""
    for candidate in (hint, *get_args(hint)):
        if isinstance(candidate, type) and is_dataclass(candidate):
            return candidate
    return None


def _is_mapping(hint: Any) -> bool:
    return get_origin(hint) is dict
