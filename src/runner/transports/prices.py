"""What models cost, from the price map that LiteLLM ships. Reads the file; LiteLLM itself is not imported."""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from runner.config import DeploymentConfig, RunnerConfig, SimulatorConfig, replicas
from runner.types import TokenPrice

PRICE_MAP = "model_prices_and_context_window_backup.json"

_log = logging.getLogger(__name__)


class Listing(NamedTuple):
    """One model of the price map."""

    provider: str
    price: TokenPrice
    max_output_tokens: int | None  # None: the map does not say


def price_for(deployment: DeploymentConfig, simulator: SimulatorConfig) -> TokenPrice | None:
    """What a deployment charges, or None where that is unknown."""
    if deployment.price is not None:
        own = deployment.price
        cached = None if own.cached is None else own.cached / 1e6
        return TokenPrice(prompt=own.prompt / 1e6, completion=own.completion / 1e6, cached=cached)
    if deployment.model.startswith("simulated/"):
        return TokenPrice(
            prompt=simulator.usd_per_million_prompt_tokens / 1e6,
            completion=simulator.usd_per_million_completion_tokens / 1e6,
        )
    return price_of(deployment.model)


def prices_for(config: RunnerConfig) -> Mapping[str, TokenPrice | None]:
    """What each of a run's deployments charges, by its label, or None where that is unknown."""
    return {label: price_for(deployment, config.simulator) for label, deployment in replicas(config).items()}


def longest_answer_of(deployment: DeploymentConfig) -> int | None:
    """The longest answer that a deployment's model can write, in tokens, or None where that is unknown."""
    return deployment.max_output_tokens or max_output_tokens_of(deployment.model)


def price_of(model: str) -> TokenPrice | None:
    """The list price of a LiteLLM model string, or None where none is known.

    ``openai/gpt-4.1-mini`` is looked up as it is written, then as ``gpt-4.1-mini``, which counts only if it is a model
    of the same provider. Prices are those of the standard tier: no surcharge for long prompts, no batch discount.
    """
    found = _listing(model)
    return found.price if found else None


def max_output_tokens_of(model: str) -> int | None:
    """The longest answer of a LiteLLM model string, found as `price_of` finds its price; None: unknown."""
    found = _listing(model)
    return found.max_output_tokens if found else None


@functools.cache
def price_map() -> Mapping[str, Listing]:
    """Every model with a price per token. Read once, about 20 ms; empty, with one warning, where it cannot be read."""
    try:
        package = importlib.util.find_spec("litellm")
        folders = package.submodule_search_locations if package else None
        if not folders:
            raise FileNotFoundError("LiteLLM is not installed")
        entries = orjson.loads(Path(folders[0], PRICE_MAP).read_bytes())
        items = entries.items()
    except (OSError, ValueError, AttributeError) as error:
        _log.warning("costs are unknown: LiteLLM's price map cannot be read (%s)", error)
        return {}
    return {
        model: Listing(str(entry.get("litellm_provider")), price, _count(entry.get("max_output_tokens")))
        for model, entry in items
        if isinstance(entry, dict) and (price := _price(entry)) is not None
    }


def _listing(model: str) -> Listing | None:
    listed = price_map()
    found = listed.get(model)
    if found is not None:
        return found
    prefix, _, name = model.partition("/")
    found = listed.get(name)
    return found if found is not None and _serves(found.provider, prefix) else None


def _price(entry: dict[str, Any]) -> TokenPrice | None:
    """None where nothing is charged per token: the map writes 0 for prices that it does not know, too."""
    prompt = _amount(entry.get("input_cost_per_token"))
    completion = _amount(entry.get("output_cost_per_token"))
    if completion is None and entry.get("mode") == "embedding":
        completion = 0.0
    if prompt is None or completion is None or prompt == completion == 0:
        return None
    return TokenPrice(prompt=prompt, completion=completion, cached=_amount(entry.get("cache_read_input_token_cost")))


def _amount(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) and value >= 0 else None


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _serves(provider: str, prefix: str) -> bool:
    """Whether the map's ``provider`` (``vertex_ai-language-models``, ``bedrock_converse``) is what ``prefix`` names."""
    provider = provider.removeprefix("text-completion-")
    return provider == prefix or provider.startswith((f"{prefix}-", f"{prefix}_"))
