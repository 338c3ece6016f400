from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from aiohttp import ClientSession
from hypothesis import given
from hypothesis import strategies as st

from runner.ceiling import Ceiling
from runner.config import DeploymentConfig, RunnerConfig, SimulatorConfig, TaskConfig, TaskKind
from runner.simulator import Simulator
from runner.transports import direct
from runner.types import Endpoint, GenerationRequest

PROMPT_USD, COMPLETION_USD = 2e-6, 8e-6

BASE = RunnerConfig(
    model="simulated/echo",
    request={"max_tokens": 100},
    simulator=SimulatorConfig(usd_per_million_prompt_tokens=2.0, usd_per_million_completion_tokens=8.0),
)


def usd(asked: Any = "x", **changes: Any) -> float | None:
    return Ceiling(replace(BASE, **changes)).usd(asked)


def test_a_ceiling_holds_the_prompts_bytes_and_the_longest_answer() -> None:
    ceiling = usd("ü" * 1_000)
    assert ceiling is not None
    assert 2_000 * PROMPT_USD + 100 * COMPLETION_USD <= ceiling <= 2_500 * PROMPT_USD + 100 * COMPLETION_USD


def test_a_prompt_is_taken_to_have_a_token_for_four_bytes() -> None:
    about = Ceiling(BASE).of_prompt("four" * 1_000)
    assert about == {"usd": pytest.approx(1_000 * PROMPT_USD), "tokens": 1_000}


@given(
    text=st.text(),
    max_tokens=st.integers(1, 500),
    n=st.integers(1, 4),
    messages=st.lists(st.text(min_size=1), min_size=1),
)
def test_no_byte_level_tokenizer_can_pass_it(text: str, max_tokens: int, n: int, messages: list[str]) -> None:
    answers_usd = max_tokens * n * COMPLETION_USD
    request = {"max_tokens": max_tokens, "n": n}
    for asked, said in (
        (text, text),
        ([{"role": "user", "content": each} for each in messages], "".join(messages)),
        ({"input": text, "instructions": text}, text * 2),
    ):
        ceiling = usd(asked, request=request)
        assert ceiling is not None
        assert ceiling > len(said.encode("utf-8", "replace")) * PROMPT_USD + answers_usd


@pytest.mark.parametrize(
    ("request_", "tokens"),
    [
        ({"max_tokens": 10}, 10),
        ({"max_completion_tokens": 20}, 20),
        ({"max_output_tokens": 30, "n": 2}, 60),
        ({"max_tokens": 5, "best_of": 3}, 15),
        ({"max_tokens": 5, "extra_body": {"max_tokens": 50}}, 50),
    ],
)
def test_the_longest_answer_is_what_the_request_allows(request_: dict[str, Any], tokens: int) -> None:
    ceiling = usd(request=request_)
    assert ceiling is not None
    assert tokens * COMPLETION_USD < ceiling < tokens * COMPLETION_USD + 400 * PROMPT_USD


def test_the_dearest_deployment_counts() -> None:
    cheap, dear = (DeploymentConfig(model=f"openai/{name}") for name in ("gpt-4.1-nano", "gpt-4.1"))
    assert usd(deployments={"a": cheap, "b": dear}) == usd(deployments={"b": dear}) != usd(deployments={"a": cheap})


def test_where_the_request_sets_no_limit_the_models_own_counts() -> None:
    known = usd(model="openai/gpt-4.1-mini", request={})
    assert known is not None
    assert known > 32_768 * 1.6e-6


@pytest.mark.parametrize(
    "changes",
    [
        {"request": {}},  # how long the answer may be is not known
        {"model": "hosted_vllm/llama"},  # nor the price
        {"deployments": {"a": DeploymentConfig(model="simulated/echo"), "b": DeploymentConfig(model="hosted_vllm/x")}},
        {"request": {"max_tokens": 5, "previous_response_id": "resp_1"}},
        {"request": {"max_tokens": 5, "tools": [{"type": "web_search"}]}},
        {"task": TaskConfig(kind=TaskKind.transcribe)},
    ],
)
def test_where_something_is_unknown_there_is_no_ceiling(changes: dict[str, Any]) -> None:
    assert usd(**changes) is None


@pytest.mark.parametrize(
    "asked",
    [
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://x/y.png"}}]}],
        [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "input_audio", "input_audio": {}}]}],
        [{"type": "item_reference", "id": "msg_1"}],
        [{"role": "user", "content": "x", "attachments": ["y"]}],
        {"input": "x", "prompt": {"id": "pmpt_1"}},
        {"asked": "x", "images": ["https://x/y.png"]},
        7,
    ],
)
def test_what_is_more_than_text_has_no_ceiling(asked: Any) -> None:
    assert usd(asked) is None


@pytest.mark.parametrize(
    "asked",
    [
        "text",
        [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
        {"input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "x"}]}]},
        [{"role": "assistant", "content": None, "tool_calls": []}, {"role": "tool", "content": "x"}],
    ],
)
def test_text_in_any_form_has_one(asked: Any) -> None:
    assert usd(asked) is not None


def test_an_embedding_costs_its_prompt_only() -> None:
    ceiling = usd("x" * 1_000, request={}, task=TaskConfig(kind=TaskKind.embed))
    assert ceiling is not None
    assert 1_000 * PROMPT_USD <= ceiling <= 1_500 * PROMPT_USD


async def test_what_the_simulator_charges_stays_below_it() -> None:
    async with Simulator(BASE.simulator) as simulator:
        client = direct.DirectTransport(model="echo", api_base=simulator.url)
        ceilings = 0.0
        for asked in ("x", "größer " * 50, [{"role": "user", "content": "a" * n} for n in range(1, 40)]):
            ceilings += usd(asked) or 0.0
            await client.send(GenerationRequest(input=asked, params=BASE.request, endpoint=Endpoint.chat_completion))
        await client.aclose()
        async with ClientSession() as session, session.get(simulator.url.removesuffix("/v1") + "/ledger") as ledger:
            charged = (await ledger.json())["cost_usd"]
    assert 0 < charged < ceilings
