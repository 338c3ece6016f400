"""The configuration tree: one dataclass a group, one field a key, and the checks that need more than a type.

Hydra composes it from ``conf/``; `LMClient` builds the parts it needs from its arguments. The comments that a user
reads stand beside the keys in ``conf/``; this page holds the types, the defaults and the rules.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

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


class TokenEstimates(StrEnum):
    """How the tokens of a prompt are estimated before it is sent."""

    ratio = "ratio"
    tokenizer = "tokenizer"


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


class CacheMode(StrEnum):
    """Whether the requests of a benchmark may be answered from what the server remembers of others."""

    unique = "unique"
    same = "same"


class Arrivals(StrEnum):
    """When the requests of an open-loop benchmark are sent."""

    poisson = "poisson"
    constant = "constant"


class Resume(StrEnum):
    auto = "auto"
    fresh = "fresh"
    require = "require"


class Dedupe(StrEnum):
    """Whether identical requests of a run are asked once."""

    auto = "auto"
    always = "always"
    never = "never"


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
    max_concurrency: int = 1024  # of auto
    rpm: float | None = None
    tpm: float | None = None
    rpd: float | None = None
    tpd: float | None = None
    itpm: float | None = None
    otpm: float | None = None
    max_request_burst: float | None = None
    max_token_burst: float | None = None
    default_output_tokens: int = 256
    token_estimates: TokenEstimates = TokenEstimates.ratio
    header_bucket_scope: Scope = Scope.auto
    shared: Shared = Shared.none
    shared_folder: str | None = None
    redis_url: str = "redis://localhost:6379/0"


@dataclass(kw_only=True)
class PriceConfig:
    """US dollars per million tokens."""

    prompt: float
    completion: float
    cached: float | None = None  # prompt tokens that the provider had in its cache; None: as `prompt`


@dataclass(kw_only=True)
class DeploymentLimitsConfig(LimitsConfig):
    """Limits of one deployment alone. Those of the root hold above them, for all deployments together."""

    concurrency: Any = None  # None: as many as the root allows


@dataclass(kw_only=True)
class DeploymentConfig:
    """One place that answers for the logical model.

    Args:
        model: LiteLLM model string (``openai/gpt-4.1-mini``, ``hosted_vllm/llama``, ``simulated/echo``).
        api_base: Base URL up to and including ``/v1``; None for a hosted provider's own.
        api_key_env: Name of the environment variable with the key; None: the provider's usual one.
        api_key: The key itself, from code only. A configuration file is stored, so it names the variable.
        weight: Share of the requests, relative to the others.
        order: Deployments of a higher order are asked only while all of lower ones are out.
        limits: Limits of this deployment alone, beside those that all share.
        extra_kwargs: LiteLLM keyword arguments for every request sent here.
        transport: ``direct`` (OpenAI's wire format), ``litellm`` (everything), or ``auto``.
        price: What its tokens cost; None: as LiteLLM lists the model.
        max_output_tokens: The longest answer that the model can write; None: as LiteLLM lists it.
    """

    model: str = "???"
    api_base: str | None = None
    api_key_env: str | None = None
    api_key: str | None = field(default=None, repr=False)
    weight: float = 1.0
    order: int = 0
    limits: DeploymentLimitsConfig | None = None
    extra_kwargs: dict[str, Any] | None = None
    transport: TransportKind = TransportKind.auto
    price: PriceConfig | None = None
    max_output_tokens: int | None = None


@dataclass(kw_only=True)
class RoutingConfig:
    """How requests find a deployment; see `runner.router`."""

    strategy: str = "simple-shuffle"
    failover: bool = True
    max_wait_s: float = 600.0
    cooldown_s: float = 2.0
    hedge: bool = False


@dataclass(kw_only=True)
class RetryConfig:
    max_retries: int = 3
    base_s: float = 1.0
    cap_s: float = 60.0
    budget: float = 500.0


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
    streaming: bool = False
    function: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    limit: int | None = None
    shard: ShardConfig = field(default_factory=ShardConfig)


@dataclass(kw_only=True)
class TaskConfig:
    """What is asked of the model; see `runner.task`.

    Args:
        image: generate: the row's field that holds an image, or several.
        micro_batch_size: embed: texts in one request.
        max_bytes: transcribe: the largest audio file; None: any.
    """

    kind: TaskKind = TaskKind.generate
    image: str | None = None
    micro_batch_size: int = 32
    max_bytes: int | None = 25 * 2**20


@dataclass(kw_only=True)
class SloConfig:
    """What a level has to keep to be recommended. None: no such demand. Seconds, but for the last."""

    latency_p50_s: float | None = None
    latency_p95_s: float | None = None
    latency_p99_s: float | None = None
    ttft_p50_s: float | None = None
    ttft_p95_s: float | None = None
    itl_p50_s: float | None = None
    itl_p95_s: float | None = None
    error_rate: float = 0.01


@dataclass(kw_only=True)
class BenchConfig:
    """How ``task=bench`` measures; see `runner.bench`.

    Args:
        task: What is asked: ``generate`` or ``embed``.
        levels: Requests in flight, level by level; ``auto`` looks for them; None: the one level ``limits.concurrency``.
        rate: Requests per second instead of a number in flight, or a list of them.
    """

    task: TaskKind = TaskKind.generate
    levels: Any = field(default_factory=lambda: [1, 2, 4, 8, 16, 32])
    max_level: int = 256
    rate: Any = None
    arrivals: Arrivals = Arrivals.poisson
    requests: int | None = 100
    duration: float | None = None
    warmup: int = 5
    repeats: int = 1
    cache: CacheMode = CacheMode.unique
    plateau: float = 0.9
    slo: SloConfig = field(default_factory=SloConfig)
    take_turns: bool = True


@dataclass(kw_only=True)
class ScorerConfig:
    """How an answer is scored against its row; see `runner.scoring`."""

    kind: str = "exact_match"
    target: str = "target"
    pattern: str | None = None
    ignore_case: bool = True


@dataclass(kw_only=True)
class BudgetConfig:
    """Where a run, or all cells of a sweep together, stop; see `runner.budget`. None: no such limit."""

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
    slow: float = 0.0
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
    max_in_flight: int | None = None
    rpm: int | None = None
    tpm: int | None = None
    output_tokens: int = 24
    answers: str | None = None
    accuracy: float = 1.0
    embedding_size: int = 16
    api_key: str | None = None
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    retry_after: str | None = None  # of http_429
    hang_s: float = 3600.0
    slow_factor: float = 20.0
    usd_per_million_prompt_tokens: float = 0.15
    usd_per_million_completion_tokens: float = 0.60


@dataclass(kw_only=True)
class SweepConfig:
    """Set by a multirun for its cells; see `runner.sweep`."""

    folder: str | None = None
    over: list[str] = field(default_factory=list)


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
    bench: BenchConfig = field(default_factory=BenchConfig)
    scorers: dict[str, ScorerConfig] = field(default_factory=dict)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    resume: Resume = Resume.auto
    retry_failed: bool = True
    retry_truncated: bool = False
    dedupe: Dedupe = Dedupe.auto
    reuse: bool = False
    plan: bool = False
    pilot: int | None = None
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    simulator: SimulatorConfig = field(default_factory=SimulatorConfig)
    env_file: str = ".env"
    sweep: SweepConfig = field(default_factory=SweepConfig)


def replicas(config: RunnerConfig) -> dict[str, DeploymentConfig]:
    """The deployments by label: those of the ``deployments`` group, or the one that ``model`` describes."""
    if config.deployments:
        return dict(config.deployments)
    return {
        config.model: DeploymentConfig(model=config.model, api_base=config.api_base, api_key_env=config.api_key_env)
    }


def asked_kind(config: RunnerConfig) -> TaskKind:
    """What is asked of the model: by the task itself, or by what a benchmark measures."""
    return config.bench.task if config.task.kind is TaskKind.bench else config.task.kind
