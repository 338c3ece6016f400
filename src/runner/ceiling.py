"""The ceiling: the most that one attempt at a row can take, in tokens and money, known before anything is sent.

A token is at least one byte of text, so a prompt has no more tokens than its JSON form has bytes, beside what the
provider's own template adds. An answer has no more than its limit, or than the model can write. Where a prompt holds
more than text, or the provider adds to it (a conversation it keeps, a search), or a price or a limit is unknown, there
is no ceiling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runner.config import DeploymentConfig, RunnerConfig, TaskKind, replicas
from runner.identity import dump_json
from runner.transports.prices import longest_answer_of, price_for
from runner.types import OUTPUT_LIMITS, TokenPrice

TEMPLATE_TOKENS = 256
"""What a provider's template adds to a prompt, generously: roles, a date, a line about the model."""

_BYTES_PER_TOKEN = 4
"""Of English text, about: https://help.openai.com/en/articles/4936856."""

_PREAMBLE_TOKENS = 1024
"""What it adds where there are tools, generously: Anthropic's preamble has up to 530."""

_BEYOND_THE_PROMPT = frozenset(
    {
        *("audio", "background", "conversation", "modalities", "prediction", "previous_response_id", "prompt"),
        "web_search_options",
    }
)
"""Parameters that are charged for by what the request does not show."""


class Ceiling:
    """Bounds what attempts take under one configuration.

    Args:
        config: The deployments (an attempt may reach any of them), their prices, and the request's parameters.
    """

    def __init__(self, config: RunnerConfig) -> None:
        self._bounds: Sequence[_Bound] = ()
        if config.task.kind is not TaskKind.transcribe:
            bounds = [_bound(each, config) for each in replicas(config).values()]
            self._bounds = [each for each in bounds if each is not None] if None not in bounds else ()

    def usd(self, asked: Any) -> float | None:
        """The most that one attempt costs that asks ``asked``, an input of a request; None: not to be known."""
        if any(each.price is None for each in self._bounds) or not self._bounds or not _is_text(asked):
            return None
        prompt_bytes = len(dump_json(asked))
        return max(each.usd(prompt_bytes) for each in self._bounds)

    def tokens(self, asked: Any) -> float | None:
        """The most tokens, prompt and answer, that one attempt takes that asks ``asked``; None: not to be known."""
        if not self._bounds or not _is_text(asked):
            return None
        prompt_bytes = len(dump_json(asked))
        return max(each.prompt_tokens + prompt_bytes + each.output_tokens for each in self._bounds)

    def of_prompt(self, asked: Any) -> Mapping[str, float]:
        """About what the prompt alone takes, a token for four bytes, by the names `usd` and `tokens`; none: nothing."""
        if not self._bounds or not _is_text(asked):
            return {"usd": 0.0, "tokens": 0.0}
        tokens = len(dump_json(asked)) // _BYTES_PER_TOKEN
        prices = [each.price.prompt for each in self._bounds if each.price is not None]
        return {"usd": tokens * min(prices, default=0.0), "tokens": float(tokens)}

    def of_answer(self) -> Mapping[str, float]:
        """The part of `usd` and `tokens` that is the longest answer's, by these names, where there is a ceiling."""
        dollars = [each.output_tokens * each.price.completion for each in self._bounds if each.price is not None]
        return {
            "usd": max(dollars, default=0.0),
            "tokens": float(max((each.output_tokens for each in self._bounds), default=0)),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bound:
    """What an attempt at one deployment takes at most, beside a token for each byte of its prompt."""

    prompt_tokens: int
    output_tokens: int
    price: TokenPrice | None

    def usd(self, prompt_bytes: int) -> float:
        assert self.price is not None
        dearest = max(self.price.prompt, self.price.cached or 0.0)
        return (self.prompt_tokens + prompt_bytes) * dearest + self.output_tokens * self.price.completion


def _bound(deployment: DeploymentConfig, config: RunnerConfig) -> _Bound | None:
    params = {**(deployment.extra_kwargs or {}), **config.request}
    params |= params.get("extra_body") or {}
    output_tokens = 0 if config.task.kind is TaskKind.embed else _most_output(deployment, params)
    if output_tokens is None or _asks_beyond(params):
        return None
    prompt_tokens = TEMPLATE_TOKENS + len(dump_json([params, config.response_format]))
    prompt_tokens += _PREAMBLE_TOKENS if params.get("tools") or params.get("functions") else 0
    price = price_for(deployment, config.simulator)
    return _Bound(prompt_tokens=prompt_tokens, output_tokens=output_tokens, price=price)


def _most_output(deployment: DeploymentConfig, params: Mapping[str, Any]) -> int | None:
    """The most tokens that a request's answers can have together, reasoning included; None: not to be known."""
    limits = [int(params[key]) for key in OUTPUT_LIMITS if params.get(key) is not None]
    limit = max(limits) if limits else longest_answer_of(deployment)
    choices = max(int(params.get(key) or 1) for key in ("n", "best_of"))
    return None if limit is None else limit * choices


def _asks_beyond(params: Mapping[str, Any]) -> bool:
    tools = params.get("tools") or ()
    return not _BEYOND_THE_PROMPT.isdisjoint(params) or any(tool.get("type") != "function" for tool in tools)


def _is_text(asked: Any) -> bool:
    """Whether an input is a text, or messages with nothing but text in them."""
    match asked:
        case None | str():
            return True
        case list():
            return all(map(_is_text, asked))
        case {"type": str(kind)} if kind not in _TEXTS:
            return False
        case dict():
            return asked.keys() <= _KEYS and all(_is_text(asked.get(key)) for key in ("content", "input", "output"))
    return False


_TEXTS = frozenset({"message", "text", "input_text", "output_text", "refusal", "function_call", "function_call_output"})
"""Types of messages and of their parts whose tokens are those of the text in them."""

_KEYS = frozenset(
    {
        *("role", "content", "type", "text", "input", "instructions", "name", "refusal", "id", "status", "annotations"),
        *("tool_call_id", "tool_calls", "function_call", "call_id", "arguments", "output"),
    }
)
"""What such a message has, and a Responses input."""
