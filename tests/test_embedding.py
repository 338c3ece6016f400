from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from runner import errors
from runner.config import RetryConfig
from runner.embedding import EmbeddingOutcome, embed, usage_shares
from runner.retry import Retrying
from runner.types import EmbeddingRequest, Embeddings, Request, Response, TokenPrice, TokenUsage
from virtual_time import virtual_time


class Provider:
    """Answers with the length of each text; ``fails`` says with what a request fails."""

    def __init__(self, fails: Callable[[list[str]], Exception | None] = lambda texts: None) -> None:
        self.asked: list[list[str]] = []
        self.fails = fails

    async def send(self, request: Request) -> Response:
        assert isinstance(request, EmbeddingRequest)
        texts = list(request.texts)
        self.asked.append(texts)
        error = self.fails(texts)
        if error is not None:
            raise error
        request.trace.price = TokenPrice(prompt=1e-6, completion=0.0)
        characters = sum(map(len, texts))
        return Response(
            output=Embeddings(vectors=tuple([float(len(text))] for text in texts)),
            model_id="m-1",
            request_id=f"r-{len(self.asked)}",
            usage=TokenUsage(prompt_tokens=characters, total_tokens=characters),
            headers={},
        )

    async def aclose(self) -> None: ...


def fails_on(*words: str, error: Exception | None = None) -> Callable[[list[str]], Exception | None]:
    refusal = error or errors.BadRequestError("no", status=400)
    return lambda texts: refusal if set(words) & set(texts) else None


async def outcomes_of(provider: Provider, texts: list[str], *, max_retries: int = 0) -> list[EmbeddingOutcome]:
    client = Retrying(provider, RetryConfig(max_retries=max_retries))
    return [outcome async for part in embed(client.send, texts, requests_for(texts)) for outcome in part]


def requests_for(texts: list[str]) -> Callable[[range], EmbeddingRequest]:
    return lambda part: EmbeddingRequest(texts=texts[part.start : part.stop])


async def test_texts_go_in_one_request_and_come_back_in_order() -> None:
    provider = Provider()

    outcomes = await outcomes_of(provider, ["a", "bb", "ccc"])

    assert provider.asked == [["a", "bb", "ccc"]]
    assert [outcome.place for outcome in outcomes] == [0, 1, 2]
    assert [outcome.embedding for outcome in outcomes] == [[1.0], [2.0], [3.0]]
    assert {(outcome.model_id, outcome.request_id) for outcome in outcomes} == {("m-1", "r-1")}
    assert len({id(outcome.trace) for outcome in outcomes}) == 1


async def test_of_no_texts_nothing_is_asked() -> None:
    provider = Provider()

    assert await outcomes_of(provider, []) == []
    assert provider.asked == []


@pytest.mark.parametrize(
    "error",
    [
        errors.BadRequestError("no", status=422),
        errors.ContextWindowExceededError("too long"),
        errors.ContentPolicyViolationError("rude"),
        errors.RequestTooLargeError("too large", status=413),
        errors.APIResponseError("garbage"),
        errors.RowError("no UTF-8"),
    ],
)
async def test_a_bad_text_fails_alone(error: errors.ItemError) -> None:
    texts = [f"text {n}" for n in range(32)]
    provider = Provider(fails_on("text 13", error=error))

    outcomes = await outcomes_of(provider, texts)

    assert [outcome.place for outcome in outcomes] == list(range(32))
    assert [outcome.place for outcome in outcomes if outcome.embedding is None] == [13]
    assert outcomes[13].error is error
    assert len(provider.asked) == 1 + 2 * 5


@virtual_time
async def test_a_server_that_answers_nothing_but_garbage_gets_two_requests_a_text_at_most() -> None:
    provider = Provider(lambda texts: errors.APIResponseError("garbage"))

    outcomes = await outcomes_of(provider, [f"text {n}" for n in range(32)], max_retries=3)

    assert all(isinstance(outcome.error, errors.APIResponseError) for outcome in outcomes)
    assert len(provider.asked) == 3 + 2 * 32 - 1


@virtual_time
async def test_the_half_of_a_garbled_request_is_still_tried_again_where_it_is_turned_away() -> None:
    refusals = iter([errors.RateLimitError("slow down", status=429)])
    provider = Provider(lambda texts: errors.APIResponseError("garbage") if "bad" in texts else next(refusals, None))

    outcomes = await outcomes_of(provider, ["a", "b", "bad", "d"], max_retries=1)

    assert [outcome.place for outcome in outcomes if outcome.error] == [2]


async def test_several_bad_texts_fail_each_for_itself() -> None:
    texts = [f"text {n}" for n in range(20)]

    outcomes = await outcomes_of(Provider(fails_on("text 0", "text 1", "text 19")), texts)

    assert [outcome.place for outcome in outcomes if outcome.error] == [0, 1, 19]


@pytest.mark.parametrize(
    "error",
    [
        errors.AuthenticationError("wrong key", status=401),
        errors.RateLimitError("slow down", status=429),
        errors.Timeout("too slow"),
        errors.InternalServerError("sorry", status=500),
        errors.ConnectError("nobody"),
        errors.ConflictError("busy", status=409),
    ],
)
async def test_what_is_not_a_texts_fault_fails_them_all_at_once(error: errors.ItemError) -> None:
    provider = Provider(lambda texts: error)

    outcomes = await outcomes_of(provider, ["a", "b", "c"])

    assert [outcome.error for outcome in outcomes] == [error] * 3
    assert len(provider.asked) == 1


async def test_the_outcomes_of_a_request_are_there_before_the_next_is_sent() -> None:
    texts = ["a", "b", "bad", "d"]
    provider = Provider(fails_on("bad"))

    sent = [
        (len(provider.asked), [outcome.place for outcome in part])
        async for part in embed(provider.send, texts, requests_for(texts))
    ]

    assert sent == [(2, [0, 1]), (4, [2]), (5, [3])]


async def test_each_request_has_a_trace_of_its_own() -> None:
    outcomes = await outcomes_of(Provider(fails_on("bad")), ["a", "b", "bad", "d"])

    traces = [id(outcome.trace) for outcome in outcomes]
    assert traces[0] == traces[1]
    assert len(set(traces)) == 3


async def test_an_error_that_is_no_items_failure_goes_on_to_the_caller() -> None:
    with pytest.raises(ZeroDivisionError):
        await outcomes_of(Provider(lambda texts: ZeroDivisionError()), ["a", "b"])


async def test_usage_and_cost_are_shared_out_by_length() -> None:
    outcomes = await outcomes_of(Provider(), ["a", "bb", "ccc"])

    assert [outcome.usage.prompt_tokens for outcome in outcomes if outcome.usage] == [1, 2, 3]
    assert [outcome.cost_usd for outcome in outcomes] == pytest.approx([1e-6, 2e-6, 3e-6])


def test_the_shares_of_a_usage_add_up_to_it() -> None:
    draw = random.Random(1)
    for _ in range(200):
        prompt = draw.randrange(1000)
        usage = TokenUsage(prompt_tokens=prompt, total_tokens=prompt, cached_tokens=prompt // 3)
        weights = [draw.randrange(1, 50) for _ in range(draw.randrange(1, 40))]

        parts = [part for part in usage_shares(usage, weights) if part]

        assert sum(part.prompt_tokens for part in parts) == sum(part.total_tokens for part in parts) == prompt
        assert sum(part.cached_tokens or 0 for part in parts) == usage.cached_tokens
        for part, weight in zip(parts, weights, strict=True):
            assert abs(part.prompt_tokens - prompt * weight / sum(weights)) < 1


async def test_without_a_usage_there_is_nothing_to_share_out() -> None:
    assert usage_shares(None, [1, 2]) == [None, None]


async def test_empty_texts_have_a_share_too() -> None:
    outcomes = await outcomes_of(Provider(), ["", ""])

    assert [outcome.usage for outcome in outcomes] == [TokenUsage(), TokenUsage()]
