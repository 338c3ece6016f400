"""Strategies: which of the replicas that can take a request gets it. The names are LiteLLM's."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, Protocol

from runner.router.affinity import PrefixAffinity
from runner.router.replica import Replica
from runner.types import Request


class Strategy(Protocol):
    """Chooses. One object serves one router."""

    def pick(self, replicas: Sequence[Replica], request: Request) -> Replica:
        """One of ``replicas``, which are two at least, and able to take it."""
        ...


def strategy_of(name: str, replicas: Sequence[Replica]) -> Strategy:
    """The strategy of that name for a router over ``replicas``."""
    if name == "prefix-affinity":
        return PrefixAffinity(replicas, otherwise=LeastBusy())
    return _BY_NAME[name]()


class Shuffle:
    """At random, by weight (``simple-shuffle``). Choose it for equal servers, or for shares that are to be exact."""

    def __init__(self, *, seed: int | None = None) -> None:
        self._random = random.Random(seed)

    def pick(self, replicas: Sequence[Replica], request: Request) -> Replica:
        return self._random.choices(replicas, [replica.weight for replica in replicas])[0]


class LeastBusy:
    """The one with the fewest requests in flight for its weight (``least-busy``).

    Choose it for servers of unequal speed: a faster one is done earlier, and gets more.
    """

    def __init__(self) -> None:
        self._turn = itertools.count()

    def pick(self, replicas: Sequence[Replica], request: Request) -> Replica:
        return _least(replicas, attrgetter("load"), next(self._turn))


class LowestLatency:
    """The one that will answer first, by smoothed service time and requests in flight (``latency-based-routing``).

    Choose it for work over regions or providers. One that has not answered yet counts as the fastest.
    """

    def __init__(self) -> None:
        self._turn = itertools.count()

    def pick(self, replicas: Sequence[Replica], request: Request) -> Replica:
        known = [replica.latency_s for replica in replicas if replica.latency_s is not None]
        fastest = min(known, default=1.0)

        def expected_s(replica: Replica) -> float:
            latency_s = fastest if replica.latency_s is None else replica.latency_s
            return latency_s * (1 + replica.load)

        return _least(replicas, expected_s, next(self._turn))


class LowestUsage:
    """The one with the largest share of its own limits left (``usage-based-routing``).

    Choose it for deployments with ``limits`` of their own; ``rpm``, ``tpm`` and ``concurrency`` are looked at, and the
    one that is used up most counts. Of equal ones, the less busy.
    """

    def __init__(self) -> None:
        self._turn = itertools.count()

    def pick(self, replicas: Sequence[Replica], request: Request) -> Replica:
        now = time.monotonic()
        return _least(replicas, lambda replica: (replica.usage(now), replica.load), next(self._turn))


class LowestCost:
    """The cheapest, by the sum of its prices for input and output (``cost-based-routing``).

    An unknown price counts as the highest.

    Choose it for one model at several providers. Of equally cheap ones, the less busy.
    """

    def __init__(self) -> None:
        self._turn = itertools.count()

    def pick(self, replicas: Sequence[Replica], request: Request) -> Replica:
        def cost(replica: Replica) -> tuple[float, float]:
            price = replica.price
            return (math.inf if price is None else price.prompt + price.completion), replica.load

        return _least(replicas, cost, next(self._turn))


_BY_NAME: dict[str, Callable[[], Strategy]] = {
    "simple-shuffle": Shuffle,
    "least-busy": LeastBusy,
    "latency-based-routing": LowestLatency,
    "usage-based-routing": LowestUsage,
    "cost-based-routing": LowestCost,
}


def _least(replicas: Sequence[Replica], key: Callable[[Replica], Any], turn: int) -> Replica:
    """The one with the least ``key``; those that are equal take turns."""
    first = turn % len(replicas)
    return min([*replicas[first:], *replicas[:first]], key=key)
