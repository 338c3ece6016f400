"""Micro-batches: many texts in one embedding request, and each text's own share of what comes of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

from runner.errors import APIResponseError, BadRequestError, ItemError, RowError
from runner.types import EmbeddingRequest, Embeddings, Request, Response, TokenUsage, Trace

MICRO_BATCH_SIZE = 32
"""Texts in a request, by default."""


class EmbeddingOutcome(NamedTuple):
    """What came of one text."""

    place: int  # in the micro-batch
    trace: Trace  # of the request, shared by all its texts
    embedding: list[float] | None = None  # None: there is an error
    error: ItemError | None = None
    model_id: str = ""
    request_id: str | None = None
    usage: TokenUsage | None = None  # this text's share; the shares of a request add up to its usage

    @property
    def cost_usd(self) -> float | None:
        """This text's share; None: unknown."""
        return self.trace.cost_usd(self.usage)


async def embed(
    send: Callable[[Request], Awaitable[Response]],
    texts: Sequence[str],
    make_request: Callable[[range], EmbeddingRequest],
    *,
    on_split: Callable[[range, Trace, ItemError], Awaitable[None]] | None = None,
) -> AsyncIterator[list[EmbeddingOutcome]]:
    """Ask for the vectors of ``texts`` in one request; yields the outcomes of the texts of each request that settles.

    A request that fails for what may be the fault of one of its texts is asked again in halves, so that in the end a
    bad text fails alone. Garbage may be one text's fault too: its halves are asked for without retrying more of it, so
    that a server that answers nothing else gets at most two requests a text, and the retries of the first. Any other
    failure is that of all its texts. One request is sent at a time, and what it brought
    is yielded before the next one is sent, so that it can be kept.

    Args:
        send: A client's `send`.
        texts: The micro-batch. Of none, nothing is asked.
        make_request: Called with the places of the texts to ask for, once a request.
        on_split: Awaited when a request failed and before its texts are asked for again, so that a ledger can keep it.

    Raises:
        Exception: Whatever ``send`` raises that is no `ItemError`.
    """
    waiting = [(range(len(texts)), False)] if texts else []
    while waiting:
        part, garbled = waiting.pop()
        request = make_request(part)
        request.trace.garbled = garbled
        try:
            response = await send(request)
        except ItemError as error:
            if len(part) > 1 and _may_be_one_texts_fault(error):
                if on_split is not None:
                    await on_split(part, request.trace, error)
                middle = len(part) // 2
                garbled = garbled or isinstance(error, APIResponseError)
                waiting += [(part[middle:], garbled), (part[:middle], garbled)]
            else:
                yield [EmbeddingOutcome(place=place, trace=request.trace, error=error) for place in part]
        else:
            yield _shared_out(part, texts, request.trace, response)


def _may_be_one_texts_fault(error: ItemError) -> bool:
    refused = isinstance(error, BadRequestError) and not error.retryable
    return refused or isinstance(error, APIResponseError | RowError)


def _shared_out(part: range, texts: Sequence[str], trace: Trace, response: Response) -> list[EmbeddingOutcome]:
    output = response.output
    assert isinstance(output, Embeddings)
    usages = usage_shares(response.usage, [max(1, len(texts[place])) for place in part])
    return [
        EmbeddingOutcome(
            place=place,
            trace=trace,
            embedding=vector,
            model_id=response.model_id,
            request_id=response.request_id,
            usage=usage,
        )
        for place, vector, usage in zip(part, output.vectors, usages, strict=True)
    ]


def usage_shares(usage: TokenUsage | None, weights: Sequence[int]) -> list[TokenUsage] | list[None]:
    """A request's usage, shared out by weights above 0: whole tokens that add up to it."""
    if usage is None:
        return [None] * len(weights)
    if len(weights) == 1:
        return [usage]
    prompts, completions, totals, cached = (
        [None] * len(weights) if tokens is None else _shares(tokens, weights)
        for tokens in (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens, usage.cached_tokens)
    )
    return [_usage(*counts) for counts in zip(prompts, completions, totals, cached, strict=True)]


@lru_cache(maxsize=1024)
def _usage(prompt: int, completion: int, total: int, cached: int | None) -> TokenUsage:
    """Most shares are small numbers, so that many texts have the same."""
    return TokenUsage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=total, cached_tokens=cached)


def _shares(total: int, weights: Sequence[int]) -> list[int]:
    """Each within 1 of its exact share."""
    if not total:
        return [0] * len(weights)
    whole = sum(weights)
    reached = [total * weight // whole for weight in accumulate(weights)]
    return [here - before for before, here in pairwise([0, *reached])]
