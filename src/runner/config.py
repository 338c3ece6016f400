"""The configuration tree: one dataclass a group, one field a key, and the checks that need more than a type.

Hydra composes it from ``conf/``; `LMClient` builds the parts it needs from its arguments. The comments that a user
reads stand beside the keys in ``conf/``; this page holds the types, the defaults and the rules.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from enum import StrEnum
from typing import Any, get_args, get_origin, get_type_hints

from runner.errors import ConfigError
from runner.types import Endpoint

# OmegaConf reads enums by member name, so name == value; and it knows Optional[X] but no `X | None`.


class Scope(StrEnum):
    """Which window a provider's rate-limit headers speak of."""

    auto = "auto"
    minute = "minute"
    day = "day"


class Shared(StrEnum):
    """How processes share one quota."""

    none = "none"
    file = "file"
    redis = "redis"


class TransportKind(StrEnum):
    auto = "auto"
    direct = "direct"
    litellm = "litellm"


class DatasetKind(StrEnum):
    single = "single"
    jsonl = "jsonl"
    csv = "csv"
    parquet = "parquet"
    huggingface = "huggingface"
    files = "files"
    python = "python"


class TaskKind(StrEnum):
    generate = "generate"
    embed = "embed"
    transcribe = "transcribe"
    bench = "bench"


class Resume(StrEnum):
    auto = "auto"
    fresh = "fresh"
    require = "require"


class TrackerKind(StrEnum):
    wandb = "wandb"
    none = "none"


class TrackerMode(StrEnum):
    auto = "auto"
    online = "online"
    offline = "offline"


STRATEGIES = (
    "simple-shuffle",
    "least-busy",
    "latency-based-routing",
    "usage-based-routing",
    "cost-based-routing",
    "prefix-affinity",
)

SECRET_KEYS = ("api_key", "password", "secret", "authorization", "access_token", "auth_token")
"""Parts of a key's name that mark its value as a secret."""


@dataclass(kw_only=True)
class LimitsConfig:
    """What may be sent per unit of time, and at once. None: no such limit."""

    concurrency: Any = 32  # requests in flight; "auto" finds it
    rpm: float | None = None
    tpm: float | None = None
    rpd: float | None = None
    tpd: float | None = None
    itpm: float | None = None
    otpm: float | None = None
    max_request_burst: float | None = None
    max_token_burst: float | None = None
    default_output_tokens: int = 256
    header_bucket_scope: Scope = Scope.auto
    shared: Shared = Shared.none


@dataclass(kw_only=True)
class DeploymentConfig:
    """One place that answers for the logical model.

    Args:
        model: LiteLLM model string (``openai/gpt-4.1-mini``, ``hosted_vllm/llama``, ``simulated/echo``).
        api_base: Base URL up to and including ``/v1``; None for a hosted provider's own.
        api_key_env: Name of the environment variable with the key; None: the provider's usual one.
        api_key: The key itself, from code only. A configuration file is stored, so it names the variable.
        weight: Share of the requests under ``simple-shuffle``, relative to the others.
        limits: Limits of this deployment alone.
        extra_kwargs: LiteLLM keyword arguments for every request sent here.
        transport: ``direct`` (OpenAI's wire format), ``litellm`` (everything), or ``auto``.
    """

    model: str = "???"
    api_base: str | None = None
    api_key_env: str | None = None
    api_key: str | None = field(default=None, repr=False)
    weight: float = 1.0
    limits: LimitsConfig | None = None
    extra_kwargs: dict[str, Any] | None = None
    transport: TransportKind = TransportKind.auto


@dataclass(kw_only=True)
class RoutingConfig:
    strategy: str = "simple-shuffle"


@dataclass(kw_only=True)
class RetryConfig:
    max_retries: int = 3
    base_s: float = 1.0
    cap_s: float = 60.0


@dataclass(kw_only=True)
class ShardConfig:
    index: int = 0
    count: int = 1


@dataclass(kw_only=True)
class DatasetConfig:
    kind: DatasetKind = DatasetKind.single
    path: str | None = None
    name: str | None = None
    split: str | None = None
    function: str | None = None
    limit: int | None = None
    shard: ShardConfig = field(default_factory=ShardConfig)


@dataclass(kw_only=True)
class TaskConfig:
    kind: TaskKind = TaskKind.generate


@dataclass(kw_only=True)
class ScorerConfig:
    """How an answer is scored against its row; see `runner.scoring`."""

    kind: str = "exact_match"
    target: str = "target"
    pattern: str | None = None
    ignore_case: bool = True


@dataclass(kw_only=True)
class BudgetConfig:
    usd: float | None = None
    tokens: int | None = None
    requests: int | None = None
    seconds: float | None = None


@dataclass(kw_only=True)
class TrackerConfig:
    kind: TrackerKind = TrackerKind.wandb
    mode: TrackerMode = TrackerMode.auto
    project: str = "runner"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    log_every_s: float = 1.0
    table_rows: int = 200
    finish_timeout_s: float = 60.0


@dataclass(kw_only=True)
class FaultsConfig:
    """Share of the requests, 0 to 1, that meets each fault."""

    http_429: float = 0.0
    http_500: float = 0.0
    http_502: float = 0.0
    http_503: float = 0.0
    http_529: float = 0.0
    reset: float = 0.0
    hang: float = 0.0
    truncated: float = 0.0
    invalid_json: float = 0.0
    error_200: float = 0.0


@dataclass(kw_only=True)
class SimulatorConfig:
    """The simulated provider; see `runner.simulator`."""

    seed: int = 0
    latency_s: float = 0.05
    latency_spread: float = 0.2
    ttft_s: float | None = None
    itl_s: float | None = None
    slots: int | None = None
    rpm: int | None = None
    tpm: int | None = None
    output_tokens: int = 24
    answers: str | None = None
    accuracy: float = 1.0
    embedding_size: int = 16
    api_key: str | None = None
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    hang_s: float = 3600.0
    usd_per_million_prompt_tokens: float = 0.15
    usd_per_million_completion_tokens: float = 0.60


@dataclass(kw_only=True)
class RunnerConfig:
    """The root. Every key that a user can set is a field here or below."""

    name: str = "default"
    runs_dir: str = "runs"
    model: str = "simulated/echo"
    api_base: str | None = None
    api_key_env: str | None = None
    deployments: dict[str, DeploymentConfig] = field(default_factory=dict)
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    retry: RetryConfig = field(default_factory=RetryConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    prompt: str | None = None
    system: str | None = None
    mapper: str | None = None
    endpoint: Endpoint = Endpoint.chat_completion
    request: dict[str, Any] = field(default_factory=dict)
    response_format: Any = None
    samples: int = 1
    task: TaskConfig = field(default_factory=TaskConfig)
    scorers: dict[str, ScorerConfig] = field(default_factory=dict)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    resume: Resume = Resume.auto
    retry_failed: bool = True
    reuse: bool = False
    plan: bool = False
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    simulator: SimulatorConfig = field(default_factory=SimulatorConfig)
    env_file: str = ".env"


def replicas(config: RunnerConfig) -> dict[str, DeploymentConfig]:
    """The deployments by label: those of the ``deployments`` group, or the one that ``model`` describes."""
    if config.deployments:
        return dict(config.deployments)
    return {
        config.model: DeploymentConfig(model=config.model, api_base=config.api_base, api_key_env=config.api_key_env)
    }


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
    """The key that ``path`` was most likely meant to be."""
    known = list(_paths(RunnerConfig))
    group, _, last = path.rpartition(".")
    entry = _ENTRIES.get(path.partition(".")[0])
    if entry is not None and path.count(".") > 1:  # below a label of the user's own
        known += [f"{group}.{each.name}" for each in fields(entry)]
    close = difflib.get_close_matches(path, known, n=1, cutoff=0.6)
    if not close:  # the right name in the wrong place: rpm for limits.rpm
        tails: dict[str, str] = {}
        for candidate in known:
            tails.setdefault(candidate.rpartition(".")[2], candidate)
        near = difflib.get_close_matches(last, tails, n=1, cutoff=0.75)
        close = [tails[near[0]]] if near else []
    return close[0] if close else None


_ENTRIES = {"deployments": DeploymentConfig, "scorers": ScorerConfig}


def unknown_key_message(path: str) -> str:
    near = nearest_key(path)
    hint = f" Did you mean {near!r}?" if near else " `python -m runner --help` lists the keys."
    return f"unknown key {path!r}.{hint}"


def check(config: RunnerConfig) -> None:
    """Reject what the types let through.

    Raises:
        ConfigError: The first problem found, naming its key.
    """
    _check_secrets("request", config.request)
    for label, deployment in config.deployments.items():
        if deployment.api_key:
            raise ConfigError(_no_place_for_a_key(f"deployments.{label}.api_key"))
        check_deployment(f"deployments.{label}", deployment)
    if not config.deployments:
        check_deployment("", replicas(config)[config.model])
    check_limits("limits", config.limits)
    check_routing(config.routing)
    _check_dataset(config.dataset)
    _at_least("retry.max_retries", config.retry.max_retries, 0)
    _at_least("retry.base_s", config.retry.base_s, 0)
    _at_least("retry.cap_s", config.retry.cap_s, 0)
    _at_least("samples", config.samples, 1)
    _at_least("tracker.log_every_s", config.tracker.log_every_s, 0.1)
    _at_least("tracker.finish_timeout_s", config.tracker.finish_timeout_s, 0)
    _at_least("tracker.table_rows", config.tracker.table_rows, 0)
    for key, rate in vars(config.simulator.faults).items():
        if not 0 <= rate <= 1:
            raise ConfigError(f"simulator.faults.{key}={rate}: a share between 0 and 1")
    if not config.name or "/" in config.name or config.name in (".", ".."):
        raise ConfigError(f"name={config.name!r} becomes a folder's name: use letters, digits, '-' and '_'")
    _reject_unavailable(config)


def check_deployment(where: str, deployment: DeploymentConfig) -> None:
    """Check one deployment; ``where`` is the path of its keys, empty for the root."""
    prefix = f"{where}." if where else ""
    if "/" not in deployment.model.strip("/"):
        raise ConfigError(
            f"{prefix}model={deployment.model!r} has no provider: write provider/model, for example"
            f" openai/{deployment.model}, or hosted_vllm/{deployment.model} with api_base=http://HOST:PORT/v1"
        )
    base = deployment.api_base
    if base is not None and not base.startswith(("http://", "https://")):
        raise ConfigError(f"{prefix}api_base={base!r}: a URL begins with http:// or https://")
    if not 0 < deployment.weight < math.inf:
        raise ConfigError(f"{prefix}weight={deployment.weight}: a number above 0")
    if deployment.limits is not None:
        check_limits(f"{prefix}limits", deployment.limits)
    _check_secrets(f"{prefix}extra_kwargs", deployment.extra_kwargs or {})


def check_limits(where: str, limits: LimitsConfig) -> None:
    """Check limits whose keys are below ``where``."""
    concurrency = limits.concurrency
    if concurrency == "auto":
        raise ConfigError(f"{where}.concurrency=auto {_NOT_AVAILABLE}: give a number")
    if isinstance(concurrency, bool) or not isinstance(concurrency, int) or concurrency < 1:
        raise ConfigError(f"{where}.concurrency={concurrency!r}: a number of at least 1")
    for key in ("rpm", "tpm", "rpd", "tpd", "itpm", "otpm", "max_request_burst", "max_token_burst"):
        value = getattr(limits, key)
        if value is not None and not value > 0:
            raise ConfigError(f"{where}.{key}={value}: a number above 0, or null for no limit")
    for key in ("rpm", "rpd"):
        _at_least(f"{where}.{key}", getattr(limits, key), 1)
    _at_least(f"{where}.default_output_tokens", limits.default_output_tokens, 0)
    if limits.header_bucket_scope is not Scope.auto:
        raise ConfigError(f"{where}.header_bucket_scope={limits.header_bucket_scope.value} {_NOT_AVAILABLE}")
    if limits.shared is not Shared.none:
        raise ConfigError(f"{where}.shared={limits.shared.value} {_NOT_AVAILABLE}: use none")


def check_routing(routing: RoutingConfig) -> None:
    """Check the strategy."""
    if routing.strategy not in STRATEGIES:
        raise ConfigError(f"routing.strategy={routing.strategy!r}: choose one of {', '.join(STRATEGIES)}")
    if routing.strategy != "simple-shuffle":
        raise ConfigError(f"routing.strategy={routing.strategy} {_NOT_AVAILABLE}: use simple-shuffle")


_NOT_AVAILABLE = "is not available in this version"


def _reject_unavailable(config: RunnerConfig) -> None:
    """Keys whose capability this version does not have: better an error than a key without effect."""
    wanted = {
        f"task={config.task.kind.value}": config.task.kind is not TaskKind.generate,
        "response_format": config.response_format is not None,
        "budget": any(value is not None for value in vars(config.budget).values()),
        "resume=fresh": config.resume is Resume.fresh,
        "reuse=true": config.reuse,
        "plan=true": config.plan,
        "request.stream=true": bool(config.request.get("stream")),
    }
    for key, is_wanted in wanted.items():
        if is_wanted:
            raise ConfigError(f"{key} {_NOT_AVAILABLE}: leave it out")


def _check_dataset(dataset: DatasetConfig) -> None:
    if dataset.kind in (DatasetKind.jsonl, DatasetKind.csv) and not dataset.path:
        raise ConfigError(f"dataset.path must be set: dataset={dataset.kind.value} dataset.path=FILE")
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


def _at_least(key: str, value: float | None, least: float) -> None:
    if value is not None and value < least:
        raise ConfigError(f"{key}={value}: at least {least}")


def _paths(schema: type, prefix: str = "") -> Iterator[str]:
    hints = get_type_hints(schema)
    for entry in fields(schema):
        path = f"{prefix}{entry.name}"
        yield path
        kind = _dataclass_of(hints[entry.name])
        if kind is not None and not _is_mapping(hints[entry.name]):
            yield from _paths(kind, f"{path}.")


def _dataclass_of(hint: Any) -> type | None:
    """The dataclass in ``X``, ``Optional[X]`` or ``dict[str, X]``."""
    for candidate in (hint, *get_args(hint)):
        if isinstance(candidate, type) and is_dataclass(candidate):
            return candidate
    return None


def _is_mapping(hint: Any) -> bool:
    return get_origin(hint) is dict
