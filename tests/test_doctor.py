from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest
from aiohttp import web

from harness import SOURCES, Asked, refusal, serving, shout
from runner.config import (
    BudgetConfig,
    DatasetConfig,
    DatasetKind,
    DeploymentConfig,
    LimitsConfig,
    RunnerConfig,
    ScorerConfig,
    TaskConfig,
    TaskKind,
    TrackerConfig,
    TrackerKind,
)
from runner.doctor import Finding, Verdict, examine, main


def experiment(url: str, **changes: object) -> RunnerConfig:
    config = RunnerConfig(
        model="hosted_vllm/llama",
        api_base=url,
        prompt="hi",
        tracker=TrackerConfig(kind=TrackerKind.none),
    )
    for key, value in changes.items():
        setattr(config, key, value)
    return config


async def findings(config: RunnerConfig, *, ask: bool = False) -> list[Finding]:
    return [finding async for finding in examine(config, ask=ask)]


def faults(found: list[Finding]) -> list[str]:
    return [finding.text for finding in found if finding.verdict is Verdict.fault]


def listing(*models: str) -> web.Response:
    return web.json_response({"data": [{"id": model} for model in models]})


async def test_a_server_that_lists_the_model_is_fine_and_is_asked_nothing_that_costs() -> None:
    async with serving(lambda asked: listing("llama")) as server:
        found = await findings(experiment(server.url))

    assert faults(found) == []
    assert [asked.path for asked in server.requests] == ["/v1/models"]


async def test_a_model_that_the_server_does_not_list_is_named_with_those_it_does() -> None:
    async with serving(lambda asked: listing("llama-3-8b")) as server:
        [fault] = faults(await findings(experiment(server.url)))

    assert "'llama'" in fault
    assert "llama-3-8b" in fault


async def test_rows_that_cannot_be_asked_are_counted_with_an_example(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "x"}\n' * 100 + '{"prompt": \n{"no": 1}\n')
    dataset = DatasetConfig(kind=DatasetKind.jsonl, path=str(path))
    async with serving(lambda asked: listing("llama")) as server:
        found = await findings(experiment(server.url, dataset=dataset, prompt="{{ prompt }}"))

    [note] = [each for each in found if each.subject == "dataset" and each.verdict is Verdict.note]
    assert note.text.startswith("2 of 102 cannot be asked, for example rows.jsonl:101: no valid JSON")


async def test_a_file_in_another_encoding_is_a_fault_of_its_own_and_not_of_a_scorer(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes("text,label\nMüller,bug\nLöwe,bug\n".encode("latin-1"))
    dataset = DatasetConfig(kind=DatasetKind.csv, path=str(path))
    scorers = {"accuracy": ScorerConfig(target="label")}
    async with serving(lambda asked: listing("llama")) as server:
        found = await findings(experiment(server.url, dataset=dataset, prompt="{{ text }}", scorers=scorers))

    [fault] = faults(found)
    assert fault.startswith("2 of 2 cannot be asked, for example rows.csv:2: no valid UTF-8")


async def test_a_refused_key_is_a_fault_and_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sk-canary-0123456789")
    async with serving(lambda asked: refusal(401, "invalid_api_key", "bad key sk-canary-0123456789")) as server:
        found = await findings(experiment(server.url, api_key_env="MY_KEY"))

    [fault] = faults(found)
    assert "refuses the key" in fault
    assert not any("canary" in finding.text for finding in found)


async def test_an_interrupt_ends_it_without_a_traceback(tmp_path: Path) -> None:
    asked = asyncio.Event()

    def answer(request: Asked) -> float:
        asked.set()
        return 60.0

    async with serving(answer) as server:
        doctor = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "runner.doctor", "model=hosted_vllm/m", f"api_base={server.url}", "prompt=hi"),
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(SOURCES)},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        await asked.wait()
        doctor.send_signal(signal.SIGINT)
        _, err = await doctor.communicate()

    assert doctor.returncode == 130
    assert err == b""


async def test_a_server_that_is_not_there_is_a_fault() -> None:
    async with serving() as server:
        gone = server.url

    [fault] = faults(await findings(experiment(gone)))

    assert "nobody listens" in fault


async def test_a_server_that_hangs_up_is_a_fault() -> None:
    async with await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        [fault] = faults(await findings(experiment(url)))

    assert fault.startswith(f"the server is there, and does not answer: {url}/models cannot be read")


async def test_a_server_without_a_list_of_models_is_noted_only() -> None:
    async with serving(lambda asked: web.Response(status=404)) as server:
        found = await findings(experiment(server.url))

    assert faults(found) == []
    assert any("list of models" in finding.text for finding in found)


@pytest.mark.parametrize("path", ["", "/v1/chat/completions"])
async def test_an_address_that_is_not_the_api_s_is_a_fault_that_names_the_one_which_is(path: str) -> None:
    def answer(asked: Asked) -> web.Response:
        return listing("llama") if asked.path == "/v1/models" else web.Response(status=404)

    async with serving(answer) as server:
        base = server.url.removesuffix("/v1")
        alone = await findings(experiment(f"{base}{path}"))
        named = RunnerConfig(
            deployments={"gpu": DeploymentConfig(model="hosted_vllm/llama", api_base=f"{base}{path}")},
            prompt="hi",
            tracker=TrackerConfig(kind=TrackerKind.none),
        )
        one_of_several = await findings(named)

    fault = f"there is no API at {base}{path}, but there is one at {base}/v1: set"
    assert faults(alone) == [f"{fault} api_base={base}/v1"]
    assert faults(one_of_several) == [f"{fault} deployments.gpu.api_base={base}/v1"]


async def test_a_request_on_consent_compares_the_limits_with_the_provider_s_headers() -> None:
    def answer(asked: Asked) -> web.Response:
        if asked.path == "/v1/models":
            return listing("llama")
        response = shout(asked)
        response.headers["x-ratelimit-limit-requests"] = "300"
        response.headers["x-ratelimit-remaining-requests"] = "299"
        response.headers["x-ratelimit-limit-tokens"] = "1000"
        response.headers["x-ratelimit-remaining-tokens"] = "990"
        return response

    limits = LimitsConfig(rpm=500)
    async with serving(answer) as server:
        found = await findings(experiment(server.url, limits=limits), ask=True)

    notes = [finding.text for finding in found if finding.verdict is Verdict.note]
    assert any("limits.rpm=500 is above the provider's 300" in note for note in notes)
    assert any("limits.tpm=1000 would keep to it" in note for note in notes)
    assert server.requests[-1].body["max_tokens"] == 16


async def test_a_quota_of_the_day_is_compared_with_the_limit_of_the_day() -> None:
    def answer(asked: Asked) -> web.Response:
        if asked.path == "/v1/models":
            return listing("llama")
        response = shout(asked)
        response.headers["x-ratelimit-limit-requests"] = "1000"
        response.headers["x-ratelimit-remaining-requests"] = "999"
        response.headers["x-ratelimit-reset-requests"] = "23h59m"
        return response

    async with serving(answer) as server:
        found = await findings(experiment(server.url, limits=LimitsConfig(rpm=2000)), ask=True)

    assert any("limits.rpd=1000 would keep to it" in finding.text for finding in found)
    assert not any("limits.rpm" in finding.text for finding in found)


async def test_rows_that_all_ask_the_same_are_noted(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"id": 1, "text": "one"}\n{"id": 2, "text": "two"}\n', encoding="utf-8")
    rows = DatasetConfig(kind=DatasetKind.jsonl, path=str(tmp_path / "rows.jsonl"))
    constant = experiment("", model="simulated/echo", api_base=None, dataset=rows)

    found = await findings(constant)
    assert any("does prompt name a field of theirs, as in {{ text }}?" in finding.text for finding in found)

    constant.prompt = "Say {{ text }}"
    assert not any("very same" in finding.text for finding in await findings(constant))


async def test_a_request_on_consent_is_one_of_the_task_s_own(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_text("voice", encoding="utf-8")
    recordings = DatasetConfig(kind=DatasetKind.files, path=str(tmp_path))
    async with serving(lambda asked: listing("llama") if asked.path == "/v1/models" else shout(asked)) as server:
        embed = experiment(server.url, task=TaskConfig(kind=TaskKind.embed), request={"dimensions": 2})
        embedded = await findings(embed, ask=True)
        asked = [request for request in server.requests if request.path != "/v1/models"]
        transcribe = experiment(server.url, task=TaskConfig(kind=TaskKind.transcribe), prompt=None, dataset=recordings)
        transcribed = await findings(transcribe, ask=True)

    assert faults(embedded) == faults(transcribed) == []
    assert [(each.path, each.body["input"], each.body["dimensions"]) for each in asked] == [
        ("/v1/embeddings", ["OK"], 2)
    ]
    assert any("one request: answered" in finding.text for finding in embedded)
    assert any("not asked" in finding.text for finding in transcribed)
    assert [request.path for request in server.requests[-1:]] == ["/v1/models"]


async def test_every_deployment_is_looked_at() -> None:
    async with serving(lambda asked: listing("llama")) as server:
        config = experiment(
            server.url,
            deployments={
                "gpu-0": DeploymentConfig(model="hosted_vllm/llama", api_base=server.url),
                "gpu-1": DeploymentConfig(model="hosted_vllm/lama", api_base=server.url),
            },
        )
        found = await findings(config)

    assert {finding.subject for finding in found if finding.verdict is Verdict.fault} == {"gpu-1"}


async def test_a_folder_that_cannot_be_made_and_too_many_slots_are_faults(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    config = experiment("", model="simulated/echo", api_base=None, runs_dir=str(file / "runs"))
    config.limits.concurrency = 10_000_000

    assert any("runs_dir" in fault for fault in faults(await findings(config)))
    assert any("ulimit" in fault for fault in faults(await findings(config)))


def test_a_finding_keeps_to_the_width_of_the_terminal() -> None:
    text = "there is no key in HOSTED_VLLM_API_KEY: right for a server that wants none"
    finding = Finding(verdict=Verdict.note, subject="local", text=text)

    lines = finding.shown(width=60).splitlines()

    assert max(map(len, lines)) <= 60
    assert {line[:23].strip() for line in lines[1:]} == {""}
    assert " ".join(line[23:].strip() for line in lines) == text
    assert finding.shown().endswith(text)


def test_the_command_says_what_is_wrong_and_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["promt=x"]) == 2
    assert "Did you mean 'prompt'" in capsys.readouterr().err
    assert main(["tracker=none"]) == 2
    assert "FAULT  dataset" in capsys.readouterr().out
    assert main(["tracker=none", "+experiment=quickstart"]) == 0
    assert "Everything is in place." in capsys.readouterr().out


async def test_all_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a", "label": "b"}\n', encoding="utf-8")
    wrong = experiment(
        "http://127.0.0.1:1",
        budget=BudgetConfig(usd=1.0),
        dataset=DatasetConfig(kind=DatasetKind.jsonl, path=str(rows)),
        prompt="Classify {{ txt }}",
        scorers={"exact": ScorerConfig(kind="exact_match", target="lable")},
    )

    price, length, field, target, server = faults(await findings(wrong))

    assert price.startswith("budget.usd needs a price")
    assert length.startswith("budget.usd must know how long an answer can be")
    assert "Did you mean {{ text }}?" in field
    assert "Did you mean 'label'" in target
    assert "nobody listens" in server


async def test_a_name_that_is_not_listed_is_no_fault_where_a_request_for_it_is_answered() -> None:
    def answer(asked: Asked) -> web.Response:
        return listing("alias") if asked.path.endswith("/models") else shout(asked)

    async with serving(answer) as server:
        found = await findings(experiment(server.url), ask=True)

    assert faults(found) == []
    assert any("does not list 'llama', but alias" in finding.text for finding in found)


async def test_a_model_beside_deployments_is_noted() -> None:
    async with serving(lambda asked: listing("llama")) as server:
        fleet = {"gpu": DeploymentConfig(model="hosted_vllm/llama", api_base=server.url)}
        config = RunnerConfig(deployments=fleet, model="hosted_vllm/lama", prompt="hi")
        found = await findings(config)

    assert any("model=hosted_vllm/lama has no effect" in finding.text for finding in found)
