"""The settings: what each one means, which values are possible, and how they are changed by name."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass, replace
from types import NoneType
from typing import Any, TypeVar, get_args, get_type_hints

from runner.config import SimulatorConfig
from runner.errors import ConfigError

SETTINGS = {
    "seed": "what all draws start from: the same seed and request give the same answer, latency and fault",
    "latency_s": "mean service time of a request, in seconds",
    "latency_spread": "relative standard deviation of the service time (lognormal); 0 for a constant one",
    "ttft_s": "seconds to the first token; default: 40 % of the service time",
    "itl_s": "seconds between tokens; the service time is then ttft + itl x (output tokens - 1), without spread",
    "slots": "requests in service at once, the others wait in line; default: no bound",
    "max_in_flight": "requests under way at once, waiting ones included, above which it refuses; default: no limit",
    "rpm": "requests per sliding minute; default: no limit",
    "tpm": "tokens per sliding minute; default: no limit",
    "output_tokens": "length of an answer that no key, echo or schema determines, in tokens, approximately",
    "answers": "JSONL of `question` and `answer`: a prompt that holds a question gets its answer; default: quickstart",
    "accuracy": "share of the known questions, 0 to 1, that are answered right",
    "embedding_size": "dimensions of an embedding, unless the request says otherwise",
    "api_key": "the only key that is let in; default: everyone is",
    "faults.http_429": "share of the requests that gets a 429 with a short retry-after-ms",
    "faults.http_500": "share that gets a 500",
    "faults.http_502": "share that gets a 502 with a proxy's HTML page",
    "faults.http_503": "share that gets a 503",
    "faults.http_529": "share that gets a 529, as Anthropic's API does when overloaded",
    "faults.reset": "share whose connection is reset (RST) in place of the answer, or halfway through a stream",
    "faults.hang": "share that is left without an answer for hang_s",
    "faults.slow": "share that takes slow_factor times as long",
    "faults.truncated": "share whose answer breaks off in the middle",
    "faults.invalid_json": "share that gets a 200 with half a JSON document",
    "faults.error_200": "share that gets a 200 with an error in it",
    "retry_after": "what faults.http_429 says in Retry-After, whatever that is; default: 20 ms, in retry-after-ms",
    "hang_s": "how long a hanging request waits, in seconds",
    "slow_factor": "how many times as long a slow request takes",
    "usd_per_million_prompt_tokens": "price of the ledger's cost_usd",
    "usd_per_million_completion_tokens": "price of the ledger's cost_usd",
}
"""What each field of `SimulatorConfig` means, by its path."""

T = TypeVar("T")


def check(config: SimulatorConfig) -> None:
    """Reject settings that no provider could have.

    Raises:
        ConfigError: The first one found.
    """
    for path, _, value in options(config):
        least = 1 if path in ("slots", "max_in_flight", "rpm", "tpm", "output_tokens", "embedding_size") else 0
        most = 1 if path == "accuracy" or path.startswith("faults.") else sys.float_info.max
        if isinstance(value, int | float) and path != "seed" and not least <= value <= most:
            wanted = "a share between 0 and 1" if most == 1 else f"at least {least}"
            raise ConfigError(f"simulator.{path}={value}: {wanted}")
    if (total := sum(vars(config.faults).values())) > 1 + 1e-9:
        raise ConfigError(f"simulator.faults: the shares add up to {total:g}, more than all requests")


def changed(config: T, changes: Mapping[str, Any], prefix: str = "") -> T:
    """A copy of a settings dataclass with ``changes``, which nests as the dataclass does.

    Raises:
        ConfigError: A name is no field, or a value is of the wrong type.
    """
    known = _kinds(config)
    values = dict(changes)
    for name, value in changes.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(f"unknown setting {prefix + name!r}." + (f" Did you mean {near[0]!r}?" if near else ""))
        if is_dataclass(current := getattr(config, name)) and isinstance(value, Mapping):
            values[name] = changed(current, value, f"{prefix}{name}.")
        elif float in known[name] and type(value) is int:
            values[name] = float(value)
        elif type(value) not in known[name]:
            allowed = " or ".join("null" if kind is NoneType else kind.__name__ for kind in known[name])
            raise ConfigError(f"{prefix}{name}={value!r}: expected {allowed}")
    return replace(config, **values)  # type: ignore[type-var]


def options(config: Any, prefix: str = "") -> Iterator[tuple[str, type, Any]]:
    """Each setting's path, type and value."""
    for name, kinds in _kinds(config).items():
        value = getattr(config, name)
        if is_dataclass(value):
            yield from options(value, f"{prefix}{name}.")
        else:
            yield prefix + name, kinds[0], value


def _kinds(config: Any) -> dict[str, tuple[type, ...]]:
    """The types that each field may have."""
    return {name: get_args(hint) or (hint,) for name, hint in get_type_hints(type(config)).items()}
