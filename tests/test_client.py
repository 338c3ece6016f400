from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from runner import DeploymentConfig, LMClient
from runner.config import FaultsConfig, SimulatorConfig
from runner.errors import AuthenticationError, ConfigError, InternalServerError, RequestError

FAST = SimulatorConfig(latency_s=0.001, latency_spread=0.0)


def echo(**options: object) -> LMClient:
    return LMClient(**{"model": "simulated/echo", "simulator": FAST, **options})  # type: ignore[arg-type]


@pytest.fixture
def client() -> Iterator[LMClient]:
    with echo() as client:
        yield client


def test_one_prompt_is_answered_with_usage_and_metrics(client: LMClient) -> None:
    result = client.generate("hello")

    assert result.output_text == "echo: hello"
    assert result.finish_reason == "stop"
    assert result.request_id
    assert result.token_usage is not None
    assert result.token_usage.total_tokens == result.token_usage.prompt_tokens + result.token_usage.completion_tokens
    assert result.metrics is not None
    assert result.metrics.deployment == "simulated/echo"
    assert result.metrics.retries == 0
    assert result.metrics.cost_usd is not None
    assert 0 < result.metrics.service_time_s <= result.metrics.end_to_end_s


def test_messages_are_a_conversation(client: LMClient) -> None:
    conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]

    assert client.generate(conversation).output_text == "echo: hello"


@pytest.mark.parametrize("endpoint", ["chat_completion", "text_completion", "responses"])
def test_each_endpoint_answers(client: LMClient, endpoint: str) -> None:
    assert client.generate("hello", endpoint=endpoint).output_text == "echo: hello"  # type: ignore[arg-type]


def test_arguments_of_the_call_go_before_those_of_the_client() -> None:
    with echo(default_request_kwargs={"max_tokens": 1}) as client:
        short = client.generate("one two three four five six seven")
        long = client.generate("one two three four five six seven", max_tokens=50)

    assert short.finish_reason == "length"
    assert long.finish_reason == "stop"


def test_a_batch_keeps_the_order_of_its_inputs(client: LMClient) -> None:
    prompts = [f"prompt {n}" for n in range(300)]

    batch = client.generate_batch(prompts)

    assert [result.output_text for result in batch if result] == [f"echo: {prompt}" for prompt in prompts]
    assert batch.errors == [None] * 300


def test_a_generator_is_read_as_it_is_needed() -> None:
    read = 0
    ahead: list[int] = []

    def prompts() -> Iterator[str]:
        nonlocal read
        for n in range(2000):
            read += 1
            yield f"prompt {n}"

    with echo(max_parallel_requests=4) as client:
        batch = client.generate_batch(prompts(), on_progress=lambda settled, total: ahead.append(read - settled))

    assert len(batch) == 2000
    assert max(ahead) < 200


def test_a_failed_input_is_none_and_its_error_is_beside_it() -> None:
    simulator = SimulatorConfig(latency_s=0.001, faults=FaultsConfig(http_500=0.5), seed=1)
    with echo(simulator=simulator, max_retries=0) as client:
        batch = client.generate_batch([f"prompt {n}" for n in range(40)])

    failed = [index for index, result in enumerate(batch) if result is None]
    assert 0 < len(failed) < 40
    for index, error in enumerate(batch.errors):
        assert isinstance(error, InternalServerError) == (index in failed)


def test_failures_that_pass_are_retried() -> None:
    simulator = SimulatorConfig(latency_s=0.001, faults=FaultsConfig(http_429=0.3), seed=1)
    with echo(simulator=simulator, max_retries=8) as client:
        batch = client.generate_batch([f"prompt {n}" for n in range(20)])

    assert batch.errors == [None] * 20
    assert sum(result.metrics.retries for result in batch if result and result.metrics) > 0


def test_without_return_exceptions_the_first_failure_is_raised() -> None:
    simulator = SimulatorConfig(latency_s=0.001, faults=FaultsConfig(http_500=1.0))
    with echo(simulator=simulator, max_retries=0) as client, pytest.raises(InternalServerError):
        client.generate_batch(["a", "b"], return_exceptions=False)


def test_each_result_is_handed_out_as_it_settles(client: LMClient) -> None:
    seen: dict[int, str] = {}
    progress: list[tuple[int, int]] = []

    client.generate_batch(
        ["a", "b", "c"],
        on_result=lambda index, result, error: seen.update({index: result.output_text if result else str(error)}),
        on_progress=lambda settled, total: progress.append((settled, total)),
    )

    assert seen == {0: "echo: a", 1: "echo: b", 2: "echo: c"}
    assert progress == [(1, 3), (2, 3), (3, 3)]


def test_an_empty_batch_is_empty(client: LMClient) -> None:
    assert len(client.generate_batch([])) == 0


def test_a_wrong_key_is_an_error_of_the_request() -> None:
    with (
        echo(simulator=SimulatorConfig(latency_s=0.001, api_key="right"), api_key="wrong-key-of-mine") as client,
        pytest.raises(AuthenticationError) as caught,
    ):
        client.generate("hello")

    assert isinstance(caught.value, RequestError)
    assert "wrong-key-of-mine" not in str(caught.value)


def test_a_timeout_of_the_call_is_obeyed() -> None:
    with echo(simulator=SimulatorConfig(latency_s=5.0), max_retries=0) as client:
        batch = client.generate_batch(["hello"], timeout=0.05)

    assert type(batch.errors[0]).__name__ == "Timeout"


def test_several_deployments_share_the_requests() -> None:
    deployments = {"a": DeploymentConfig(model="simulated/echo"), "b": {"model": "simulated/echo"}}
    with echo(model="echo", deployments=deployments) as client:
        batch = client.generate_batch([f"prompt {n}" for n in range(60)])

    assert {result.metrics.deployment for result in batch if result and result.metrics} == {"a", "b"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "needs a model"),
        ({"model": "gpt-4.1"}, "has no provider"),
        ({"model": "simulated/echo", "rpm": 0}, "rpm"),
        ({"model": "simulated/echo", "max_parallel_requests": 0}, "concurrency"),
        ({"model": "simulated/echo", "endpoint": "chat"}, "endpoint='chat'"),
        ({"model": "simulated/echo", "deployments": {"a": {"modle": "x"}}}, "modle"),
        ({"model": "simulated/echo", "routing_strategy": "fastest"}, "fastest"),
    ],
)
def test_arguments_that_cannot_be_used_are_named(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        LMClient(**arguments)  # type: ignore[arg-type]


async def test_both_twins_work_within_a_running_event_loop() -> None:
    async with echo() as client:
        awaited = await client.agenerate("hello")
        called = client.generate("hello")
        batch = await client.agenerate_batch(["a", "b"])

    assert awaited.output_text == called.output_text == "echo: hello"
    assert [result.output_text for result in batch if result] == ["echo: a", "echo: b"]


async def test_both_twins_keep_one_limit() -> None:
    with echo(rpm=120, max_request_burst=1) as client:
        client.generate("first")
        second = await client.agenerate("second")
        await client.aclose()

    assert second.metrics is not None
    assert second.metrics.queue_wait_s > 0.2


def test_one_client_serves_one_event_loop_after_the_other() -> None:
    client = echo()

    async def ask() -> str:
        async with client:
            return (await client.agenerate("hello")).output_text

    async def ask_only() -> str:
        text = (await client.agenerate("hello")).output_text
        await client.aclose()
        return text

    assert asyncio.run(ask_only()) == asyncio.run(ask()) == "echo: hello"


def test_many_threads_may_call_at_once(client: LMClient) -> None:
    texts: list[str] = []

    def ask(number: int) -> None:
        texts.append(client.generate(f"from {number}").output_text)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(texts) == sorted(f"echo: from {number}" for number in range(16))


def test_a_closed_client_says_so(client: LMClient) -> None:
    client.generate("hello")
    client.close()
    client.close()

    with pytest.raises(RuntimeError, match="closed"):
        client.generate("hello")


def test_a_synchronous_call_from_a_callback_is_refused_and_not_deadlocked(client: LMClient) -> None:
    with pytest.raises(RuntimeError, match="callback"):
        client.generate_batch(["a"], on_result=lambda index, result, error: print(client.generate("b")))


def test_a_client_from_before_a_fork_says_so() -> None:
    code = (
        "import os\n"
        "from runner import LMClient\n"
        "client = LMClient(model='simulated/echo')\n"
        "client.generate('hello')\n"
        "if os.fork() == 0:\n"
        "    try:\n"
        "        client.generate('hello')\n"
        "    except RuntimeError as error:\n"
        "        print(error, flush=True)\n"
        "    os._exit(0)\n"
        "os.wait()\n"
        "client.close()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)

    assert "before a fork" in done.stdout


def test_ctrl_c_ends_a_synchronous_batch() -> None:
    with echo(simulator=SimulatorConfig(latency_s=30.0)) as client:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            client.generate_batch([f"prompt {n}" for n in range(100)])


@pytest.mark.parametrize("name", ["generate", "generate_batch"])
def test_the_synchronous_twin_has_the_signature_and_documentation(name: str) -> None:
    twin, written = getattr(LMClient, name), getattr(LMClient, f"a{name}")

    assert inspect.signature(twin) == inspect.signature(written)
    assert twin.__doc__ == written.__doc__
    assert twin.__name__ == name
    assert not inspect.iscoroutinefunction(twin)


def test_closing_from_another_thread_ends_those_who_wait() -> None:
    client = echo(simulator=SimulatorConfig(latency_s=0.001, faults=FaultsConfig(hang=0.5)), max_retries=0)
    answered, ended = threading.Event(), threading.Event()

    def ask() -> None:
        with contextlib.suppress(BaseException):
            client.generate_batch([f"prompt {n}" for n in range(20)], on_result=lambda *outcome: answered.set())
        ended.set()

    thread = threading.Thread(target=ask)
    thread.start()
    assert answered.wait(10)
    client.close()

    assert ended.wait(10)
    thread.join()
