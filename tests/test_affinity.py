from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterator

import pytest

from runner.router import Replica
from runner.router.affinity import LONGEST, PrefixAffinity, prefixes_of
from runner.router.strategies import LeastBusy
from runner.types import EmbeddingRequest, GenerateInput, GenerationRequest, Trace
from virtual_fleet import Server


def filler(seed: object, length: int) -> str:
    return "".join(random.Random(str(seed)).choices("abcdefghij ", k=length))


def request(content: GenerateInput) -> GenerationRequest:
    return GenerationRequest(input=content)


class Pool:
    """Replicas with a number of requests in flight, of which the oldest ends when a new one comes."""

    def __init__(self, count: int, *, in_flight: int = 32) -> None:
        self.replicas = [Replica(f"gpu-{index}", Server("x")) for index in range(count)]
        self.strategy = PrefixAffinity(self.replicas, otherwise=LeastBusy())
        self._in_flight: list[Replica] = []
        self._size = in_flight

    def ask(self, content: GenerateInput, *, without: Replica | None = None) -> str:
        ready = [replica for replica in self.replicas if replica is not without]
        picked = self.strategy.pick(ready, request(content))
        picked.enter(0.0, Trace())
        self._in_flight.append(picked)
        if len(self._in_flight) > self._size:
            self._in_flight.pop(random.Random(len(content)).randrange(self._size)).leave()
        return picked.label


def ask_all(pool: Pool, systems: list[str], count: int, seed: int = 0) -> dict[str, Counter[str]]:
    """Who answered how many, by system prompt."""
    draw = random.Random(seed)
    answered: dict[str, Counter[str]] = defaultdict(Counter)
    for number in range(count):
        system = draw.choice(systems)
        chat = [{"role": "system", "content": system}, {"role": "user", "content": f"Question {number}?"}]
        answered[system][pool.ask(chat)] += 1
    return answered


def loads(answered: dict[str, Counter[str]]) -> Counter[str]:
    return sum(answered.values(), Counter())


@pytest.mark.parametrize("seed", range(5))
def test_requests_with_one_prefix_go_to_one_replica_and_the_load_is_even(seed: int) -> None:
    systems = [filler((seed, index), 1_000) for index in range(50)]
    answered = ask_all(Pool(4), systems, 5_000, seed)
    assert all(max(counts.values()) >= 0.9 * sum(counts.values()) for counts in answered.values())
    assert max(loads(answered).values()) <= 1.3 * 5_000 / 4


def test_a_prefix_that_all_share_is_spread() -> None:
    answered = ask_all(Pool(4), [filler("one", 3_000)], 4_000)
    assert len(loads(answered)) == 4
    assert max(loads(answered).values()) <= 1.35 * 1_000


def test_documents_behind_one_instruction_get_homes_of_their_own() -> None:
    pool = Pool(4)
    instruction = filler("instruction", 600)
    answered: dict[int, Counter[str]] = defaultdict(Counter)
    for number in range(6_000):
        document = number * 7 % 60
        answered[document][pool.ask(f"{instruction}{filler(document, 4_000)} Question {number}?")] += 1
    total = sum(answered.values(), Counter())
    assert max(total.values()) <= 1.35 * 1_500
    settled = [max(counts.values()) / sum(counts.values()) for counts in answered.values()]
    assert sorted(settled)[len(settled) // 2] > 0.9


def test_while_a_home_is_out_its_prefixes_go_to_one_guest_house() -> None:
    pool = Pool(4)
    system = filler("system", 1_000)
    home = pool.ask(f"{system} 0")
    out = next(replica for replica in pool.replicas if replica.label == home)
    ask_all(pool, [filler(index, 1_000) for index in range(50)], 1_000)
    meanwhile = Counter(pool.ask(f"{system} {number}", without=out) for number in range(20))
    assert meanwhile.most_common(1)[0][1] >= 15
    assert home not in meanwhile
    assert pool.ask(f"{system} 99") == home


def test_the_same_prefix_has_the_same_home_in_another_process() -> None:
    def first_homes() -> Iterator[str]:
        for index in range(20):
            yield Pool(5).ask(filler(index, 500))

    homes = list(first_homes())
    assert list(first_homes()) == homes
    assert len(set(homes)) > 2


def test_texts_that_begin_alike_share_their_prefixes() -> None:
    common = filler("common", 1_100)
    one, other = prefixes_of(request(common + filler(1, 900))), prefixes_of(request(common + filler(2, 900)))
    assert (len(one), len(other)) == (3, 3)
    assert one == other
    assert prefixes_of(request(common[:1_000] + filler(1, 900)))[1:] == one[1:]
    assert prefixes_of(request(common[:1_000] + filler(1, 900)))[0] != one[0]


def test_a_prefix_is_no_longer_than_what_is_looked_at() -> None:
    text = filler("long", LONGEST)
    assert prefixes_of(request(text)) == prefixes_of(request(text + "and more"))
    assert len(prefixes_of(request(text))) == 6


def test_inputs_of_every_form_have_prefixes() -> None:
    text = filler("text", 300)
    parts = [{"type": "image_url", "image_url": {"url": f"data:{text}"}}, {"type": "text", "text": "What is it?"}]
    contents: list[GenerateInput] = [
        text,
        [{"role": "user", "content": text}],
        [{"role": "user", "content": parts}],
        {"instructions": text, "input": "Hi"},
        {"input": [{"role": "user", "content": text}]},
    ]
    assert all(len(prefixes_of(request(content))) == 1 for content in contents)


def test_what_has_no_long_prefix_goes_to_the_least_busy() -> None:
    assert prefixes_of(request("Hi")) == []
    assert prefixes_of(EmbeddingRequest(texts=["x" * 1_000])) == []
    pool = Pool(4)
    assert len({pool.ask("Hi") for _ in range(4)}) == 4
