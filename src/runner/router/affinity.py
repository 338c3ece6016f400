"""Prefix affinity: requests that begin alike go where their beginning is in the KV cache already."""

from __future__ import annotations

from bisect import bisect
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from runner.router.replica import Replica
from runner.types import GenerationRequest, Request

if TYPE_CHECKING:
    from runner.router.strategies import Strategy

SHORTEST, LONGEST = 256, 8192
"""Characters: the shortest prefix that is worth sharing, and what is looked at; some 64 and 2,000 tokens."""

_REMEMBERED = 65_536
"""Prefixes whose homes are known."""

_POINTS = 64
"""Places of each replica on the ring."""

_SETTLING = 1.05
"""Times its fair share of the requests: a replica with more gets no new prefixes …"""

_CROWDED = 1.25
"""… and one with more than this sends some away."""

_MEMORY = 400
"""Requests a replica, on average, before older ones count half."""


class PrefixAffinity:
    """The replica that had the prefix before, unless it has more than its share of the work (``prefix-affinity``).

    Choose it for self-hosted servers with a prefix cache, where requests share long system prompts, few-shot blocks or
    documents.

    Each prefix has a home. A new one gets the first on a ring of hashes that has no more than its share, of requests
    and of beginnings: consistent hashing with bounded loads (https://arxiv.org/abs/1608.01350). What begins like
    others, but goes on differently, is at home with them, until that replica has too much to do: then the longer
    beginning gets a home of its own. While a home is out, its prefixes are guests of the next on the ring. What is
    left goes where ``otherwise`` says: one prefix that is too much for a replica, and requests without a prefix of
    256 characters.
    """

    def __init__(self, replicas: Sequence[Replica], *, otherwise: Strategy) -> None:
        self._otherwise = otherwise
        self._homes: OrderedDict[bytes, Replica] = OrderedDict()  # the longest unused first
        self._ring = sorted(
            (_digest(f"{replica.label}\0{point}".encode()), index)
            for index, replica in enumerate(replicas)
            for point in range(_POINTS)
        )
        self._replicas = replicas
        self._counts = dict.fromkeys(replicas, 0.0)  # requests, recent ones above all
        self._families = dict.fromkeys(replicas, 0.0)  # beginnings that were new, recent ones above all

    def pick(self, replicas: Sequence[Replica], request: Request) -> Replica:
        prefixes = prefixes_of(request)
        picked = self._home(replicas, prefixes) if prefixes else None
        picked = picked or self._otherwise.pick(replicas, request)
        self._counts[picked] += 1
        return picked

    def _home(self, replicas: Sequence[Replica], prefixes: Sequence[bytes]) -> Replica | None:
        loads = _Loads(replicas, self._counts)
        if loads.total > _MEMORY * len(replicas):
            self._counts = {replica: count / 2 for replica, count in self._counts.items()}
            self._families = {replica: count / 2 for replica, count in self._families.items()}
        for place, prefix in enumerate(prefixes):
            home = self._homes.get(prefix)
            if home is None:
                continue
            present = home in replicas
            if present and not loads.is_crowded(home):
                self._settle(prefixes[: place + 1] if loads.has_spare(home) else [prefix], home)
                return home
            if place == 0:
                return None if present else self._next_on_ring(prefix, replicas, loads)
            break
        is_new = prefixes[-1] not in self._homes
        roomy = [replica for replica in replicas if self._has_room(replica)] if is_new else replicas
        home = self._next_on_ring(prefixes[0], roomy, loads)
        if home is not None:
            self._families[home] += is_new
            self._settle([prefix for prefix in prefixes if prefix not in self._homes], home)
        return home

    def _has_room(self, replica: Replica) -> bool:
        """Whether it has no more than its share of the beginnings: how much work each will bring is not known yet."""
        fair = sum(self._families.values()) / sum([each.weight for each in self._replicas])
        return self._families[replica] / replica.weight <= _SETTLING * fair + 0.5

    def _next_on_ring(self, prefix: bytes, replicas: Collection[Replica], loads: _Loads) -> Replica | None:
        start = bisect(self._ring, (prefix, 0))
        seen: set[int] = set()
        for step in range(len(self._ring)):
            index = self._ring[(start + step) % len(self._ring)][1]
            if index in seen:
                continue
            seen.add(index)
            replica = self._replicas[index]
            if replica in replicas and loads.has_spare(replica):
                return replica
            if len(seen) == len(self._replicas):
                break
        return None

    def _settle(self, prefixes: Sequence[bytes], home: Replica) -> None:
        for prefix in prefixes:
            self._homes[prefix] = home
            self._homes.move_to_end(prefix)
        while len(self._homes) > _REMEMBERED:
            self._homes.popitem(last=False)


def prefixes_of(request: Request) -> list[bytes]:
    """Digests of how ``request`` begins: of its first 256, 512, … 8192 characters, as far as it goes, longest first."""
    if not isinstance(request, GenerationRequest):
        return []
    text = _beginning(request.input)
    digests: list[bytes] = []
    hashed, begin, end = blake2b(digest_size=8), 0, SHORTEST
    while end <= len(text):
        hashed.update(text[begin:end].encode("utf-8", "surrogatepass"))
        digests.append(hashed.digest())
        begin, end = end, 2 * end
    return digests[::-1]


class _Loads:
    """What some replicas have had to do lately, and have now."""

    def __init__(self, replicas: Sequence[Replica], counts: dict[Replica, float]) -> None:
        weight = sum([replica.weight for replica in replicas])
        self.total = sum([counts[replica] for replica in replicas])
        self._counts = counts
        self._fair = self.total / weight
        self._load = sum([replica.in_flight for replica in replicas]) / weight

    def has_spare(self, replica: Replica) -> bool:
        return self._counts[replica] / replica.weight <= _SETTLING * self._fair + 1

    def is_crowded(self, replica: Replica) -> bool:
        """Over its share, or with far more in flight than the others: chance alone makes for some unevenness."""
        return (
            self._counts[replica] / replica.weight > _CROWDED * self._fair + 8
            or replica.in_flight / replica.weight > 2 * self._load + 4
        )


_TEXT_KEYS = ("instructions", "role", "text", "content", "input", "image_url", "input_audio", "url", "data")


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=8).digest()


def _beginning(content: Any) -> str:
    pieces: list[str] = []
    length = 0
    for piece in _texts(content):
        pieces.append(piece)
        length += len(piece)
        if length >= LONGEST:
            break
    return "\n".join(pieces)[:LONGEST]


def _texts(content: Any) -> Iterator[str]:
    """The texts in an input of any form, in the order in which a model reads them."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, list):
        for part in content:
            yield from _texts(part)
    elif isinstance(content, dict):
        for key in _TEXT_KEYS:
            yield from _texts(content.get(key))
