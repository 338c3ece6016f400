"""The simulator's books, against which a client's own can be checked."""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

from runner.config import SimulatorConfig


@dataclass(slots=True)
class Count:
    """How often something was asked, and answered to the last byte."""

    asked: int = 0
    answered: int = 0


@dataclass(kw_only=True)
class Ledger:
    """What came and went. One `Count` is kept for each body and each prompt, until the ledger is reset."""

    requests: int = 0
    answered: int = 0  # good answers whose last byte was handed to the transport
    abandoned: int = 0  # the client left first
    in_flight_peak: int = 0  # requests under way at once, waiting ones included
    in_service_peak: int = 0  # requests that held a slot at once
    tokens: Counter[str] = field(default_factory=lambda: Counter(prompt=0, completion=0))  # charged
    cost_usd: float = 0.0
    by_status: Counter[str] = field(default_factory=Counter)  # as sent; a reset has none
    faults: Counter[str] = field(default_factory=Counter)
    bodies: defaultdict[str, Count] = field(default_factory=lambda: defaultdict(Count))  # by hash
    prompts: defaultdict[str, Count] = field(default_factory=lambda: defaultdict(Count))
    prefixes: Counter[str] = field(
        default_factory=lambda: Counter(hits=0, misses=0)
    )  # of prompts of 256 bytes at least
    beginnings: set[bytes] = field(default_factory=set)
    arrived: array[float] = field(default_factory=lambda: array("d"))  # when each request did, on the monotonic clock
    took: array[float] = field(default_factory=lambda: array("d"))  # tokens that each was charged

    def totals(self) -> dict[str, Any]:
        details = ("bodies", "prompts", "beginnings", "arrived", "took")
        return {name: value for name, value in vars(self).items() if name not in details}

    def arrive(self, at: float) -> int:
        """Count a request; returns its number, from 0."""
        self.requests += 1
        self.arrived.append(at)
        self.took.append(0)
        return len(self.took) - 1

    def note_beginning(self, beginning: bytes) -> None:
        """Count whether a prompt that begins so is the first one."""
        if beginning:
            self.prefixes["hits" if beginning in self.beginnings else "misses"] += 1
            self.beginnings.add(beginning)

    def charge(self, number: int, prompt_tokens: int, completion_tokens: int, config: SimulatorConfig) -> None:
        self.took[number] += prompt_tokens + completion_tokens
        self.tokens["prompt"] += prompt_tokens
        self.tokens["completion"] += completion_tokens
        self.cost_usd += prompt_tokens * config.usd_per_million_prompt_tokens / 1e6
        self.cost_usd += completion_tokens * config.usd_per_million_completion_tokens / 1e6
