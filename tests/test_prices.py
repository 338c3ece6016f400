from __future__ import annotations

import importlib.util
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from runner.transports.prices import PRICE_MAP, price_map, price_of
from runner.types import TokenPrice

CHEAP = {"input_cost_per_token": 1e-6, "output_cost_per_token": 2e-6}

PriceMap = Callable[[str], None]


@pytest.fixture(autouse=True)
def _nothing_remembered() -> Iterator[None]:
    price_map.cache_clear()
    yield
    price_map.cache_clear()


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PriceMap:
    """A LiteLLM that ships the price map that the test writes, and cannot be imported."""
    package = tmp_path / "litellm"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('imported')")
    monkeypatch.delitem(sys.modules, "litellm", raising=False)
    monkeypatch.syspath_prepend(tmp_path)

    def write(text: str) -> None:
        (package / PRICE_MAP).write_text(text)

    return write


def listed(shipped: PriceMap, **models: dict[str, Any]) -> None:
    shipped(json.dumps(models))


def test_a_full_name_is_looked_up_first(shipped: PriceMap) -> None:
    dear = {"input_cost_per_token": 3e-6, "output_cost_per_token": 6e-6, "litellm_provider": "acme"}
    shipped(json.dumps({"acme/m": dear, "m": {**CHEAP, "litellm_provider": "acme"}}))
    assert price_of("acme/m") == TokenPrice(prompt=3e-6, completion=6e-6)


@pytest.mark.parametrize("provider", ["acme", "acme-language-models", "acme_chat", "text-completion-acme"])
def test_a_bare_name_counts_for_its_own_provider(shipped: PriceMap, provider: str) -> None:
    listed(shipped, m={**CHEAP, "litellm_provider": provider})
    assert price_of("acme/m") == TokenPrice(prompt=1e-6, completion=2e-6)


@pytest.mark.parametrize("model", ["other/m", "acm/m", "hosted_vllm/m", "acme/n", "acme/", "/m", ""])
def test_another_providers_model_of_that_name_has_another_price(shipped: PriceMap, model: str) -> None:
    listed(shipped, m={**CHEAP, "litellm_provider": "acme"})
    assert price_of(model) is None


def test_cached_tokens_have_their_own_price(shipped: PriceMap) -> None:
    listed(shipped, m={**CHEAP, "cache_read_input_token_cost": 1e-7})
    assert price_of("m") == TokenPrice(prompt=1e-6, completion=2e-6, cached=1e-7)


def test_embeddings_cost_their_prompt_alone(shipped: PriceMap) -> None:
    listed(shipped, m={"mode": "embedding", "input_cost_per_token": 1e-8})
    assert price_of("m") == TokenPrice(prompt=1e-8, completion=0.0)


@pytest.mark.parametrize(
    "entry",
    [
        {},
        {"input_cost_per_second": 0.01},
        {"input_cost_per_token": 1e-6},
        {"output_cost_per_token": 1e-6},
        {"input_cost_per_token": 0, "output_cost_per_token": 0.0},
        {"input_cost_per_token": "1e-6", "output_cost_per_token": "2e-6"},
        {"input_cost_per_token": -1, "output_cost_per_token": -1},
        {"input_cost_per_token": True, "output_cost_per_token": True},
    ],
)
def test_what_is_not_priced_per_token_has_no_price(shipped: PriceMap, entry: dict[str, Any]) -> None:
    listed(shipped, m=entry)
    assert price_of("m") is None


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"m": 3}'])
def test_a_broken_map_makes_prices_unknown(shipped: PriceMap, text: str) -> None:
    shipped(text)
    assert price_of("m") is None


@pytest.mark.usefixtures("shipped")
def test_a_missing_map_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert price_of("openai/gpt-4.1-mini") is None
        assert price_of("openai/gpt-4.1") is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "price map" in caplog.text


def test_without_litellm_prices_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert price_of("openai/gpt-4.1-mini") is None


def test_the_map_that_litellm_ships_is_read_without_importing_it() -> None:
    code = (
        "import sys; from runner.transports.prices import price_of;"
        "price = price_of('openai/gpt-4.1-mini'); assert 0 < price.cached < price.prompt < price.completion < 1e-4;"
        "assert price_of('anthropic/claude-sonnet-4-5') and price_of('vertex_ai/gemini-2.5-pro');"
        "assert 'litellm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
