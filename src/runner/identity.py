"""Identities: which run a configuration is, and which item a row of it is.

Both hash *what is asked* and leave out *how fast*: another concurrency, limit, retry or server address resumes the run.
How long an answer may be (``max_tokens`` and its like) is part of an item and not of the run: where it is raised, the
run is the same, and finds the answers that were given under the lower limit.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson

from runner.config import (
    DatasetConfig,
    DatasetKind,
    DeploymentConfig,
    Resume,
    RunnerConfig,
    SweepConfig,
    TaskKind,
    TrackerConfig,
    replicas,
)
from runner.types import OUTPUT_LIMITS

_NOT_ASKED = frozenset({"timeout", "num_retries", "max_retries", "extra_headers", "stream", "stream_options"})
"""Request parameters that do not change the answer."""


def run_id(config: RunnerConfig, *, swept: Mapping[str, Any] | None = None) -> str:
    """Twelve hex digits that name the run of ``config``.

    Args:
        swept: In a multirun, the cell's own overrides: cells are always runs of their own.
    """
    if config.task.kind is TaskKind.bench:
        asked: Any = replace(config, resume=Resume.auto, tracker=TrackerConfig(), sweep=SweepConfig())
    else:
        dataset, asks = config.dataset, _asked_parameters(config.request)
        asked = {
            "model": model_identity(config),
            "dataset": [
                dataset.kind.value,
                _place(dataset),
                dataset.name,
                dataset.split,
                dataset.function,
                dataset.arguments,
                [dataset.shard.index, dataset.shard.count],
            ],
            "prompt": [config.prompt, config.system, config.mapper],
            "endpoint": config.endpoint.value,
            "request": {key: value for key, value in asks.items() if key not in OUTPUT_LIMITS},
            "response_format": config.response_format,
            "task": [config.task.kind.value, config.task.image],
        }
    return _digest([asked, dict(swept or {})], size=6).hex()


def model_identity(config: RunnerConfig) -> str:
    """The logical model: what answers, wherever it is served. For a simulated one, what decides its answers too."""
    name = ",".join(sorted({_asked_of(deployment) for deployment in replicas(config).values()}))
    if "simulated/" in name:
        simulator = config.simulator
        name += f"#{simulator.seed},{simulator.accuracy},{simulator.output_tokens},{simulator.answers}"
        if config.task.kind is TaskKind.embed:
            name += f",{simulator.embedding_size}"
    return name


def output_limits(config: RunnerConfig) -> dict[str, Any]:
    """How long an answer may be: the part of the request's parameters that says so."""
    return {key: value for key, value in config.request.items() if key in OUTPUT_LIMITS and value is not None}


def answers_alike(config: RunnerConfig) -> bool:
    """Whether the same request is always to be answered alike: nothing is sampled, and one answer is asked for."""
    if config.task.kind is not TaskKind.generate:
        return config.task.kind is not TaskKind.bench
    requests = [{**(each.extra_kwargs or {}), **config.request} for each in replicas(config).values()]
    return all(each.get("temperature") == 0 and each.get("n") in (None, 1) for each in requests)


class ContentHasher:
    """Hashes what one item asks: endpoint, model, parameters and schema, which a run has in common, and its input."""

    def __init__(self, config: RunnerConfig) -> None:
        common = [
            config.task.kind.value,
            config.endpoint.value,
            model_identity(config),
            _asked_parameters(config.request),
            config.response_format,
        ]
        self._common = hashlib.blake2b(dump_json(common), digest_size=16)

    @property
    def common(self) -> str:
        """What its items have in common, in hex."""
        return self._common.hexdigest()

    def __call__(self, asked: Any, sample: int) -> bytes:
        """16 bytes for the input ``asked`` (JSON-like) and the number of the repeat."""
        digest = self._common.copy()
        digest.update(dump_json([asked, sample]))
        return digest.digest()


class WorkloadHasher:
    """Hashes the rows of a dataset as they come, and what is asked about them, whoever is asked."""

    def __init__(self) -> None:
        self._rows = hashlib.blake2b(digest_size=8)
        self._inputs = hashlib.blake2b(digest_size=8)

    def add(self, fields: Mapping[str, Any], asked: Any) -> None:
        """The next row: its fields as the dataset has them, and the input that was made of it (JSON-like)."""
        self._rows.update(_line(fields))
        self._inputs.update(_line(asked))

    @property
    def facts(self) -> dict[str, str]:
        """Both hashes, as a store's meta has them."""
        return {"rows": self._rows.hexdigest(), "inputs": self._inputs.hexdigest()}


def _line(value: Any) -> bytes:
    try:
        return dump_json(value) + b"\n"
    except ValueError:  # nested beyond measure: such a row fails, whoever is asked
        return b"\n"


def _place(dataset: DatasetConfig) -> str | None:
    """The dataset's path from the root; a name on the Hub as it is."""
    if dataset.path is None or dataset.kind is DatasetKind.huggingface:
        return dataset.path
    return str(Path(dataset.path).absolute())


def _asked_of(deployment: DeploymentConfig) -> str:
    extra = _asked_parameters(deployment.extra_kwargs or {})
    return f"{deployment.model}{dump_json(extra).decode()}" if extra else deployment.model


def _asked_parameters(request: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in request.items() if key not in _NOT_ASKED}


def _digest(value: Any, *, size: int) -> bytes:
    return hashlib.blake2b(dump_json(value), digest_size=size).digest()


MOST_LEVELS = 254
"""How deeply the values that are kept are nested at most, as orjson has it."""


def dump_json(value: Any) -> bytes:
    """JSON with sorted keys, of anything: what JSON does not know is written as its text.

    Raises:
        ValueError: It is nested more than `MOST_LEVELS` deep.
    """
    try:
        return orjson.dumps(value, option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS, default=str)
    except TypeError:  # lone surrogates, integers beyond 64 bits, deep nesting, odd keys
        check_levels(value)
        return json.dumps(_plain(value), sort_keys=True, default=str).encode()


def check_levels(value: Any, brackets: int | None = None) -> None:
    """See whether a value is nested as values may be.

    Args:
        brackets: How many open in its JSON, as far as known: where they are few, it is not looked through.

    Raises:
        ValueError: It is nested more than `MOST_LEVELS` deep.
    """
    if brackets is not None and brackets <= MOST_LEVELS:
        return
    level = [value]
    for _ in range(MOST_LEVELS + 1):
        level = [each for each in level if isinstance(each, Mapping | list | tuple)]
        if not level:
            return
        level = [child for each in level for child in (each.values() if isinstance(each, Mapping) else each)]
    raise ValueError(f"nested too deeply: more than {MOST_LEVELS} levels")


def dump_text(value: Any) -> str:
    """JSON that every reader takes: as `dump_json`, with a question mark for each half of a surrogate pair."""
    exact = dump_json(value).decode()
    if "\\ud" not in exact:
        return exact
    return json.dumps(json.loads(exact), ensure_ascii=False).encode("utf-8", "replace").decode()


def _plain(value: Any) -> Any:
    """With text for keys, and null for floats that JSON has no form for, as orjson writes them."""
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
