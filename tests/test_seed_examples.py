"""The examples of infermesh's documentation, with the import line changed and the simulated provider as the server."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import wave
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from harness import Command, read_rows
from runner import LMClient

ANSWERS = {
    "What is the capital of France?": "Paris.",
    "What is 2 + 2?": "4",
    "Say hello in one sentence.": "Hello to you.",
    "Hello": "Hello.",
}

Example: TypeAlias = Callable[..., list[str]]


@pytest.fixture(scope="module")
def server_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    answers = tmp_path_factory.mktemp("simulator") / "answers.jsonl"
    rows = [{"question": question, "answer": answer} for question, answer in ANSWERS.items()]
    answers.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    command = [sys.executable, "-m", "runner.simulator", "--port", "0", "--latency-s", "0", "--answers", str(answers)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield server.stdout.readline().split()[-1]
        server.terminate()


@pytest.fixture
def run(
    server_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Example:
    """Runs an example with these names defined; returns the lines it prints."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-examples")
    monkeypatch.setenv("OPENAI_API_BASE", server_url)
    monkeypatch.chdir(tmp_path)

    def run(example: str, **names: Any) -> list[str]:
        code = re.sub(r"http://host\d:8000/v1", server_url, example)
        exec(compile(code, "example", "exec"), names)
        return capsys.readouterr().out.splitlines()

    return run


@pytest.fixture
def client(run: Example) -> Iterator[LMClient]:
    with LMClient(model="openai/gpt-4.1-mini") as client:
        yield client


@pytest.fixture
def whisper(run: Example) -> Iterator[LMClient]:
    with LMClient(model="openai/whisper-1") as client:
        yield client


def write_recordings(*names: str) -> None:
    for name in names:
        with wave.open(name, "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(8000)
            file.writeframes(bytes(8000))


# In Python


def test_quick_start(run: Example) -> None:
    printed = run("""
from runner import LMClient

prompts = [
    "Summarize section 1 in two bullet points.",
    "Summarize section 2 in two bullet points.",
    "Summarize section 3 in two bullet points.",
]

with LMClient(
    model="openai/gpt-4.1-mini",
    max_parallel_requests=32,
    rpm=500,
    tpm=100_000,
) as client:
    batch = client.generate_batch(prompts)

retry_prompts: list[str] = []

for i, result in enumerate(batch):
    if result is None:
        print(f"FAILED: {prompts[i]}\\n  {batch.errors[i]}")
        retry_prompts.append(prompts[i])
    else:
        print(result.output_text)
        if result.token_usage is not None:
            print("tokens:", result.token_usage.total_tokens)

if retry_prompts:
    with LMClient(model="openai/gpt-4.1-mini") as retry_client:
        retry_batch = retry_client.generate_batch(retry_prompts)
""")

    assert len(printed) == 6
    for text, tokens in zip(printed[::2], printed[1::2], strict=True):
        assert text
        assert re.fullmatch(r"tokens: \d+", tokens)


def test_a_single_request(run: Example) -> None:
    printed = run("""
from runner import LMClient

with LMClient(model="openai/gpt-4.1-mini") as client:
    result = client.generate("What is the capital of France?")
    print(result.output_text)
""")

    assert printed == ["Paris."]


def test_generate_text(run: Example, client: LMClient) -> None:
    text, usage, finish_reason, request_id = run(
        """
result = client.generate("Say hello in one sentence.")

print(result.output_text)     # generated text
print(result.token_usage)     # prompt / completion / total token counts
print(result.finish_reason)   # "stop", "length", …
print(result.request_id)      # provider-assigned ID for debugging
""",
        client=client,
    )

    assert text == "Hello to you."
    assert re.search(r"prompt_tokens=\d+, completion_tokens=\d+, total_tokens=\d+", usage)
    assert finish_reason == "stop"
    assert request_id


def test_create_embeddings(run: Example, client: LMClient) -> None:
    vector, count = run(
        """
# Single string → EmbeddingResult
result = client.embed("The quick brown fox")
print(result.embedding)          # list[float]

# Multiple strings → processed in resilient micro-batches by default
batch = client.embed_batch(
    ["sentence one", "sentence two", "sentence three"],
    micro_batch_size=32,
)
vectors = [r.embedding for r in batch if r is not None]
print(len(vectors))
""",
        client=client,
    )

    assert all(isinstance(value, float) for value in json.loads(vector))
    assert count == "3"


def test_transcribe_audio(run: Example, whisper: LMClient) -> None:
    write_recordings("recording.wav", "recording-a.wav", "recording-b.wav")

    text, language, duration, texts = run(
        """
result = client.transcribe("recording.wav")   # path, bytes, or file-like object
print(result.text)
print(result.language)     # detected language code, e.g. "en"
print(result.duration_s)   # audio length in seconds

batch = client.transcribe_batch(["recording-a.wav", "recording-b.wav"])
texts = [r.text if r is not None else None for r in batch]
print(texts)
""",
        client=whisper,
    )

    assert text
    assert language == "english"
    assert duration == "0.5"
    assert "None" not in texts


def test_results_on_disk_as_they_come(run: Example) -> None:
    run(
        """
import json
from runner import LMClient

with open("results.jsonl", "w") as out, \\
     LMClient(model="openai/gpt-4.1-mini", max_parallel_requests=32) as client:

    def save(index: int, result, error) -> None:
        row = {"index": index}
        if error is not None:
            row["error"] = str(error)
        else:
            row["output_text"] = result.output_text
        out.write(json.dumps(row) + "\\n")
        out.flush()

    client.generate_batch(prompts, on_result=save)
""",
        prompts=list(ANSWERS),
    )

    rows = [json.loads(line) for line in Path("results.jsonl").read_text().splitlines()]
    assert {row["index"]: row["output_text"] for row in rows} == dict(enumerate(ANSWERS.values()))


def test_rate_limiting(run: Example) -> None:
    printed = run("""
from runner import LMClient

client = LMClient(
    model="openai/gpt-4.1-mini",
    rpm=500,      # requests per minute
    tpm=100_000,  # tokens per minute
)
print(client.generate("Hello").output_text)
client.close()
""")

    assert printed == ["Hello."]


@pytest.mark.parametrize("strategy", ["simple-shuffle", "least-busy", "latency-based-routing"])
def test_multi_replica_routing(run: Example, strategy: str) -> None:
    [deployment] = run(
        """
from runner import DeploymentConfig, LMClient

client = LMClient(
    model="llama-3-8b",
    deployments={
        "gpu-0": DeploymentConfig(
            model="hosted_vllm/meta-llama/Meta-Llama-3-8B-Instruct",
            api_base="http://host1:8000/v1",
        ),
        "gpu-1": DeploymentConfig(
            model="hosted_vllm/meta-llama/Meta-Llama-3-8B-Instruct",
            api_base="http://host2:8000/v1",
        ),
        "gpu-2": DeploymentConfig(
            model="hosted_vllm/meta-llama/Meta-Llama-3-8B-Instruct",
            api_base="http://host3:8000/v1",
        ),
    },
    routing_strategy="least-busy",   # or "simple-shuffle" (default), "latency-based-routing"
)

result = client.generate("Summarise this paper in one paragraph.")
print(result.metrics.deployment)  # e.g. "gpu-1"
client.close()
""".replace("least-busy", strategy)
    )

    assert deployment in ("gpu-0", "gpu-1", "gpu-2")


@pytest.mark.parametrize("form", ["keys", "mapping", "file"])
async def test_multi_replica_routing_on_the_command_line(form: str, server_url: str, tmp_path: Path) -> None:
    command = Command(tmp_path)
    model = "hosted_vllm/meta-llama/Meta-Llama-3-8B-Instruct"
    fleet = {label: {"model": model, "api_base": server_url} for label in ("gpu-0", "gpu-1", "gpu-2")}
    arguments = [f"deployments.{label}.{key}={value}" for label in fleet for key, value in fleet[label].items()]
    if form == "mapping":
        entries = (f"{label}: {{model: {model}, api_base: '{server_url}'}}" for label in fleet)
        arguments = [f"deployments={{{', '.join(entries)}}}"]
    elif form == "file":
        command.write("conf/deployments/mine.yaml", json.dumps(fleet))
        arguments = ["deployments=mine"]
    rows = command.write_rows("rows.jsonl", [{"prompt": f"Hello {number}"} for number in range(30)])

    ended = await command(
        "name=hello", *arguments, "routing.strategy=least-busy", "dataset=jsonl", f"dataset.path={rows}", "tracker=none"
    )

    assert ended.exit_code == 0, ended.err
    assert {row["metrics"]["deployment"] for row in read_rows(command.run())} == set(fleet)


def test_async_api(run: Example) -> None:
    write_recordings("a.wav", "b.wav")

    printed = run("""
import asyncio
from runner import LMClient

async def main():
    async with LMClient(model="openai/gpt-4.1-mini") as client:
        result = await client.agenerate("Hello")
        batch  = await client.agenerate_batch(["prompt A", "prompt B", "prompt C"])
        emb    = await client.aembed("The quick brown fox")
        embs   = await client.aembed_batch(["text a", "text b"])
        txs    = await client.atranscribe_batch(["a.wav", "b.wav"])
        print(result.output_text, len(batch), len(emb.embedding), len(embs), len(txs))
        print(batch.errors + embs.errors + txs.errors)

asyncio.run(main())
""")

    assert printed == ["Hello. 3 16 2 2", str([None] * 7)]


def test_structured_output(run: Example, client: LMClient) -> None:
    raw, parsed = run(
        """
from pydantic import BaseModel

class Answer(BaseModel):
    value: int
    confidence: float

result = client.generate(
    "What is 2 + 2? Respond in JSON.",
    response_format=Answer,
)

print(result.output_text)   # raw JSON string
print(result.output_parsed) # Answer(value=4, confidence=0.99)
""",
        client=client,
    )

    assert json.loads(raw)["value"] == 4
    assert re.fullmatch(r"value=4 confidence=\S+", parsed)


def test_automatic_retries(run: Example) -> None:
    printed = run("""
from runner import LMClient

client = LMClient(
    model="openai/gpt-4.1-mini",
    max_retries=3,   # default; set to 0 to disable
)
result = client.generate("Hello")
print(result.metrics.retries)   # 0 on first-attempt success
client.close()
""")

    assert printed == ["0"]


def test_timeout_and_overrides(run: Example) -> None:
    run("""
from runner import LMClient

client = LMClient(
    model="openai/gpt-4.1-mini",
    timeout=30.0,   # seconds
)
result = client.generate("Hello", timeout=5.0, max_tokens=64)
client.close()

client = LMClient(
    model="openai/gpt-4.1-mini",
    default_request_kwargs={"max_tokens": 256, "temperature": 0.7},
)
result = client.generate("Hello")
client.close()
""")


# On the command line


@pytest.fixture
def openai(command: Command, server_url: str) -> Command:
    """The command, with OpenAI's place taken by the simulated provider."""
    command.environment |= {"OPENAI_API_KEY": "sk-of-the-examples"}
    return command


async def test_command_generates_from_a_single_prompt(openai: Command, server_url: str) -> None:
    ended = await openai("model=openai/gpt-4.1-mini", f"api_base={server_url}", "prompt=Hello")

    assert ended.exit_code == 0, ended.err
    assert read_rows(openai.run())[0]["output_text"] == "Hello."


async def test_command_generates_from_a_file_and_resumes(openai: Command, server_url: str) -> None:
    openai.write_rows(
        "prompts.jsonl", [{"prompt": "Hello"}, {"messages": [{"role": "user", "content": "What is 2 + 2?"}]}]
    )
    arguments = (
        *("model=openai/gpt-4.1-mini", f"api_base={server_url}"),
        *("dataset=jsonl", "dataset.path=prompts.jsonl"),
    )
    first = await openai(*arguments)
    again = await openai(*arguments, "resume=require")

    assert (first.exit_code, again.exit_code) == (0, 0), first.err + again.err
    rows = read_rows(openai.run())
    assert [(row["_index"], row["output_text"]) for row in rows] == [(0, "Hello."), (1, "4")]


async def test_command_embeds_a_text(openai: Command, server_url: str) -> None:
    ended = await openai(
        *("task=embed", "model=openai/text-embedding-3-small", f"api_base={server_url}", "prompt=hello world")
    )

    assert ended.exit_code == 0, ended.err
    assert len(read_rows(openai.run())[0]["embedding"]) == 16
    assert "(16 numbers)" in ended.out


async def test_command_transcribes_a_file(openai: Command, server_url: str) -> None:
    with wave.open(str(openai.folder / "recording.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(2 * 8000))
    ended = await openai(
        *("task=transcribe", "model=openai/whisper-1", f"api_base={server_url}"),
        *("dataset=files", "dataset.path=recording.wav", "request.response_format=verbose_json"),
    )

    assert ended.exit_code == 0, ended.err
    [row] = read_rows(openai.run())
    assert row["text"] in ended.out
    assert (row["language"], row["duration_s"]) == ("english", 1.0)


async def test_command_maps_rows(openai: Command, server_url: str) -> None:
    openai.write_rows("dataset.jsonl", [{"country": "France"}])
    openai.write("mypackage/__init__.py", "")
    openai.write(
        "mypackage/prompts.py",
        "def build_prompt(row):\n    question = f\"What is the capital of {row['country']}?\"\n"
        '    return {"input": question, "metadata": row}\n',
    )
    ended = await openai(
        *("model=openai/gpt-4.1-mini", f"api_base={server_url}"),
        *("dataset=jsonl", "dataset.path=dataset.jsonl", "mapper=mypackage.prompts:build_prompt"),
    )

    assert ended.exit_code == 0, ended.err
    [row] = read_rows(openai.run())
    assert (row["output_text"], row["metadata"]) == ("Paris.", {"country": "France"})
