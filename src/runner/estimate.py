"""Estimates: what a request will take from the quota, before the provider counts it."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner.config import TokenEstimates
from runner.errors import ConfigError
from runner.types import EmbeddingRequest, GenerationRequest, Request, TokenUsage

_OUTPUT_KEYS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
_TOKENS_PER_CHARACTER = 0.25
_MEMORY = 50
"""Requests that are remembered, roughly: each counts for less than the one after it."""

_ALIKE = 0.05
"""Prompts whose sizes spread by less than this share of their mean say little about how tokens grow with size."""

_MOST_TOKENS = 1e8
"""A prompt of more is a server's nonsense, and would spoil what was learnt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What one request is expected to take, or has taken, from the quota."""

    prompt_tokens: float = 0.0
    completion_tokens: float = 0.0
    asked_tokens: float = field(default=0.0, compare=False)  # the longest answer, where the request names one
    size: float = field(default=0.0, compare=False)  # of the prompt, in the estimator's units


NOTHING = Estimate()


@dataclass(frozen=True, slots=True, kw_only=True)
class Counting:
    """What a provider counts against its limits, other than the tokens that there were in the end."""

    cached_input: bool = True  # input that it has in its cache
    asked_output: bool = False  # the longest answer that the request allows, not the one that came of it


COUNTING = {
    "anthropic": Counting(cached_input=False),  # https://platform.claude.com/docs/en/api/rate-limits
    "bedrock": Counting(
        cached_input=False
    ),  # https://docs.aws.amazon.com/bedrock/latest/userguide/quotas-token-burndown.html
    "azure": Counting(asked_output=True),  # https://learn.microsoft.com/azure/ai-foundry/openai/how-to/quota
    "openai": Counting(asked_output=True),  # https://platform.openai.com/docs/guides/rate-limits
    "simulated": Counting(asked_output=True),
}
"""By provider, as LiteLLM calls it; all others count what there was."""


class Estimator:
    """Estimates the requests of one model, from their length and from what earlier ones turned out to take.

    A prompt's length is counted in characters, or by a tokenizer. Tokens follow from it by a ratio, and a number that
    is added to each prompt, which are learnt from the usage that comes back: they take in the language, the chat
    template, and images, which have no length. So does the mean error, by which estimates are on the high side.

    Args:
        default_output_tokens: Reserved for an answer where the request sets no maximum.
        counting: What the provider counts.
        measure: The length of a text.
        ratio: Tokens per unit of length, to begin with.
    """

    def __init__(
        self,
        *,
        default_output_tokens: int = 0,
        counting: Counting | None = None,
        measure: Callable[[str], int] = len,
        ratio: float = _TOKENS_PER_CHARACTER,
    ) -> None:
        self._default_output_tokens = default_output_tokens
        self._counting = counting or Counting()
        self._measure = measure
        self._ratio = ratio
        self._added = 0.0
        self._error = 0.0
        self._learnt = 0
        self._size = 0.0  # means, from here on
        self._tokens = 0.0
        self._size_variance = 0.0
        self._covariance = 0.0

    @classmethod
    def of(cls, kind: TokenEstimates, *, model: str, default_output_tokens: int = 0) -> Estimator:
        """The estimator that a configuration describes.

        Raises:
            ConfigError: There is no tokenizer.
        """
        counting = COUNTING.get(model.partition("/")[0])
        if kind is TokenEstimates.tokenizer:
            return cls(
                default_output_tokens=default_output_tokens, counting=counting, measure=_tokenizer(model), ratio=1.0
            )
        return cls(default_output_tokens=default_output_tokens, counting=counting)

    def estimate(self, request: Request) -> Estimate:
        """What ``request`` will take: its prompt, and the longest answer that it allows."""
        if isinstance(request, GenerationRequest):
            params = request.params
            size = _size(request.input, self._measure)
            answers = int(params.get("n") or 1)
            asked = next((float(params[key]) for key in _OUTPUT_KEYS if params.get(key) is not None), None)
            return Estimate(
                prompt_tokens=self._tokens_of(size),
                completion_tokens=answers * (self._default_output_tokens if asked is None else asked),
                asked_tokens=answers * (asked or 0.0),
                size=size,
            )
        if isinstance(request, EmbeddingRequest):
            size = sum(map(self._measure, request.texts))
            return Estimate(prompt_tokens=self._tokens_of(size), size=size)
        return NOTHING

    def counted(self, estimate: Estimate, usage: TokenUsage) -> Estimate:
        """What a request of this ``estimate`` took from the quota in the end; the next estimates learn from it."""
        self._learn(estimate, usage)
        cached = 0 if self._counting.cached_input else usage.cached_tokens or 0
        asked = estimate.asked_tokens if self._counting.asked_output else 0.0
        return Estimate(
            prompt_tokens=usage.prompt_tokens - cached, completion_tokens=max(usage.completion_tokens, asked)
        )

    def _tokens_of(self, size: float) -> float:
        return max(0.0, self._added + size * self._ratio) + self._error

    def _learn(self, estimate: Estimate, usage: TokenUsage) -> None:
        """Fit a line through sizes and tokens, by least squares; the more a request is in the past, the less it counts.

        See https://en.wikipedia.org/wiki/Algorithms_for_calculating_variance#Weighted_incremental_algorithm. Sizes
        that hardly differ say nothing about the slope: then it is the ratio of the means.
        """
        size, tokens = estimate.size, float(usage.prompt_tokens)
        if size <= 0 or not 0 < tokens <= _MOST_TOKENS:
            return
        self._learnt += 1
        share = max(1 / self._learnt, 1 / _MEMORY)
        self._error += share * (abs(tokens - self._added - size * self._ratio) - self._error)
        off = size - self._size
        self._size += share * off
        self._tokens += share * (tokens - self._tokens)
        self._size_variance = (1 - share) * (self._size_variance + share * off * off)
        self._covariance = (1 - share) * self._covariance + share * off * (tokens - self._tokens)
        alike = max(1.0, (_ALIKE * self._size) ** 2)
        self._ratio = (self._covariance + alike * self._tokens / max(1.0, self._size)) / (self._size_variance + alike)
        self._added = self._tokens - self._ratio * self._size


def _size(content: Any, measure: Callable[[str], int]) -> int:
    """The length of the text in an input of any form; images and other media have none."""
    if isinstance(content, str):
        return measure(content)
    if isinstance(content, dict):
        return sum(_size(content.get(key), measure) for key in ("content", "text", "input", "instructions"))
    if isinstance(content, list):
        return sum(_size(part, measure) for part in content)
    return 0


def _tokenizer(model: str) -> Callable[[str], int]:
    """tiktoken's encoding for ``model``; for a model that it does not know, cl100k, which is near enough to learn from.

    LiteLLM ships the files that tiktoken would fetch.
    """
    try:
        tiktoken = importlib.import_module("tiktoken")
    except ImportError:
        raise ConfigError(
            "limits.token_estimates=tokenizer needs tiktoken: pip install tiktoken, or use limits.token_estimates=ratio"
        ) from None
    package = importlib.util.find_spec("litellm")
    if package is not None and package.submodule_search_locations:
        shipped = Path(package.submodule_search_locations[0], "litellm_core_utils", "tokenizers")
        os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(shipped))
    try:
        encoding = tiktoken.encoding_for_model(model.rpartition("/")[2])
    except Exception:  # unknown, or it cannot be fetched
        encoding = tiktoken.get_encoding("cl100k_base")
    return lambda text: len(encoding.encode(text, disallowed_special=()))
