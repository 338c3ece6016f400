"""Estimates learn from what comes back, and count what the provider counts."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable

import pytest

from runner.config import TokenEstimates
from runner.errors import ConfigError
from runner.estimate import NOTHING, Counting, Estimate, Estimator
from runner.types import GenerationRequest, TokenUsage


def asking(size: int, **params: int) -> GenerationRequest:
    return GenerationRequest(input="x" * size, params=params)


def taught(tokens: Callable[[int], float], sizes: list[int]) -> Estimator:
    """An estimator that has seen prompts of these sizes."""
    estimator = Estimator()
    for size in sizes:
        estimator.counted(estimator.estimate(asking(size)), TokenUsage(prompt_tokens=round(tokens(size))))
    return estimator


MIXED = random.Random(1).choices(range(50, 3_000), k=200)


@pytest.mark.parametrize(
    "tokens",
    [lambda size: size / 4 + 7, lambda size: size / 1.5, lambda size: size / 4 + 1_105],
    ids=["a chat template", "another language", "an image"],
)
def test_what_a_prompt_takes_is_learnt(tokens: Callable[[int], float]) -> None:
    estimator = taught(tokens, MIXED)
    for size in (50, 700, 3_000):
        assert estimator.estimate(asking(size)).prompt_tokens == pytest.approx(tokens(size), rel=0.02)


def test_a_few_answers_are_enough() -> None:
    assert taught(lambda size: size / 2, [800, 300, 500]).estimate(asking(600)).prompt_tokens >= 270


def test_prompts_of_one_length_teach_the_ratio() -> None:
    estimator = taught(lambda size: size / 3, [900] * 50)
    assert estimator.estimate(asking(1_800)).prompt_tokens == pytest.approx(600, rel=0.05)


def test_a_request_that_was_not_estimated_teaches_nothing() -> None:
    estimator = Estimator()
    estimator.counted(NOTHING, TokenUsage(prompt_tokens=5_000))
    assert estimator.estimate(asking(400)).prompt_tokens == 100


def test_where_tokens_vary_the_estimate_is_on_the_high_side() -> None:
    noise = random.Random(2)
    estimator = taught(lambda size: size / 4 * noise.uniform(0.7, 1.3), MIXED)
    estimates = [estimator.estimate(asking(size)).prompt_tokens for size in MIXED]
    assert sum(estimates) > 1.05 * sum(MIXED) / 4


@pytest.mark.parametrize("tokens", [0, -5, 10**12])
def test_nonsense_teaches_nothing(tokens: int) -> None:
    estimator = taught(lambda size: size / 4, MIXED)
    before = estimator.estimate(asking(400)).prompt_tokens
    estimator.counted(estimator.estimate(asking(400)), TokenUsage(prompt_tokens=tokens))
    assert estimator.estimate(asking(400)).prompt_tokens == before


@pytest.mark.parametrize(
    ("counting", "params", "expected"),
    [
        (Counting(), {"max_tokens": 100}, Estimate(prompt_tokens=50, completion_tokens=20)),
        (Counting(cached_input=False), {}, Estimate(prompt_tokens=10, completion_tokens=20)),
        (Counting(asked_output=True), {"max_tokens": 100}, Estimate(prompt_tokens=50, completion_tokens=100)),
        (Counting(asked_output=True), {"max_tokens": 100, "n": 2}, Estimate(prompt_tokens=50, completion_tokens=200)),
        (Counting(asked_output=True), {"max_tokens": 5}, Estimate(prompt_tokens=50, completion_tokens=20)),
        (Counting(asked_output=True), {}, Estimate(prompt_tokens=50, completion_tokens=20)),
    ],
)
def test_what_counts_is_the_providers_rule(counting: Counting, params: dict[str, int], expected: Estimate) -> None:
    estimator = Estimator(counting=counting, default_output_tokens=256)
    usage = TokenUsage(prompt_tokens=50, completion_tokens=20, total_tokens=70, cached_tokens=40)
    assert estimator.counted(estimator.estimate(asking(200, **params)), usage) == expected


@pytest.mark.parametrize(
    ("model", "prompt", "completion"),
    [("anthropic/claude", 10, 20), ("openai/gpt", 50, 100), ("azure/gpt", 50, 100), ("hosted_vllm/m", 50, 20)],
)
def test_each_provider_has_its_rule(model: str, prompt: float, completion: float) -> None:
    estimator = Estimator.of(TokenEstimates.ratio, model=model)
    usage = TokenUsage(prompt_tokens=50, completion_tokens=20, total_tokens=70, cached_tokens=40)
    counted = estimator.counted(estimator.estimate(asking(200, max_tokens=100)), usage)
    assert counted == Estimate(prompt_tokens=prompt, completion_tokens=completion)


@pytest.mark.parametrize("model", ["openai/gpt-4.1-mini", "hosted_vllm/llama"])
def test_the_tokenizer_counts_where_it_is_asked_for(model: str) -> None:
    estimator = Estimator.of(TokenEstimates.tokenizer, model=model)
    request = GenerationRequest(input="Hello world, how are you? <|endoftext|>")
    assert 7 <= estimator.estimate(request).prompt_tokens <= 20


def test_without_a_tokenizer_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(ConfigError, match="pip install tiktoken"):
        Estimator.of(TokenEstimates.tokenizer, model="openai/gpt-4.1-mini")
