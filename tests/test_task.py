"""What each task asks of a provider, keeps of its answers, and does about failures."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
from collections import Counter
from contextlib import closing
from pathlib import Path
from sqlite3 import connect
from typing import Any

import pytest
from aiohttp import web
from pydantic import BaseModel

from harness import Asked, Experiment, Json, read_rows, refusal, serving, shout
from runner.config import (
    DatasetConfig,
    DatasetKind,
    LimitsConfig,
    RetryConfig,
    ScorerConfig,
    SimulatorConfig,
    TaskConfig,
    TaskKind,
)
from runner.errors import ConfigError, DatasetError
from runner.simulator import Simulator
from runner.types import Endpoint

EMBED = TaskConfig(kind=TaskKind.embed, micro_batch_size=4)
TRANSCRIBE = TaskConfig(kind=TaskKind.transcribe)


def texts(count: int) -> list[Json]:
    return [{"text": f"text {index}", "id": index} for index in range(count)]


def attempts(folder: Path) -> list[tuple[str, float | None]]:
    """The ledger: error class and cost of each attempt that did not become an outcome."""
    with closing(connect(folder / "results.sqlite")) as database:
        return database.execute("SELECT error_type, cost_usd FROM attempts").fetchall()


# Embeddings


async def test_texts_share_requests_and_have_their_vectors_in_order(tmp_path: Path) -> None:
    async with serving() as provider:
        experiment = Experiment(tmp_path, api_base=provider.url, task=EMBED)
        report = await experiment(texts(10), request={"dimensions": 2})

    assert report.exit_code == 0
    assert sorted(len(asked.body["input"]) for asked in provider.requests) == [2, 4, 4]
    assert {(asked.path, asked.body["model"], asked.body["dimensions"]) for asked in provider.requests} == {
        ("/v1/embeddings", "m", 2)
    }
    rows = read_rows(experiment.folder)
    assert [row["embedding"] for row in rows] == [[6.0, 0.5]] * 10
    assert [row["metadata"] for row in rows] == [{"id": index} for index in range(10)]
    assert "output_text" not in rows[0]
    assert report.summary["tokens"]["total"] == sum(row["token_usage"]["total_tokens"] for row in rows) == 20


@pytest.mark.parametrize(
    ("row", "settings", "asked"),
    [
        ({"text": "a", "prompt": "b", "input": "c"}, {}, "a"),
        ({"prompt": "b", "input": "c"}, {}, "b"),
        ({"input": "c"}, {}, "c"),
        ({"title": "T", "body": "B"}, {"prompt": "{{ title }}: {{ body }}"}, "T: B"),
        ({"body": "B"}, {"mapper": f"{__name__}:shouted"}, "B!"),
    ],
)
async def test_the_text_is_the_prompt_or_the_rows_own(tmp_path: Path, row: Json, settings: Json, asked: str) -> None:
    async with serving() as provider:
        await Experiment(tmp_path, api_base=provider.url, task=EMBED, **settings)([row])

    assert [request.body["input"] for request in provider.requests] == [[asked]]


def shouted(fields: Json) -> Json:
    return {"input": f"{fields['body']}!"}


async def test_a_text_that_is_no_text_fails_before_anything_is_sent_for_it(tmp_path: Path) -> None:
    async with serving() as provider:
        experiment = Experiment(tmp_path, api_base=provider.url, task=EMBED)
        report = await experiment([{"text": "a"}, {"text": 5}, {"text": "b"}])

    assert report.exit_code == 3
    assert [asked.body["input"] for asked in provider.requests] == [["a", "b"]]
    assert read_rows(experiment.folder)[1]["error"]["message"] == "rows.jsonl:2: text is of type int, not a text"


async def test_a_bad_text_fails_alone_and_every_attempt_is_in_the_ledger(tmp_path: Path) -> None:
    def answer(asked: Asked) -> web.Response:
        return refusal(400, "bad") if "text 2" in asked.body["input"] else shout(asked)

    async with serving(answer) as provider:
        experiment = Experiment(tmp_path, api_base=provider.url, task=EMBED)
        report = await experiment(texts(8))
        again = await experiment()

    assert (report.exit_code, report.summary["failed"], report.summary["succeeded"]) == (3, 1, 7)
    assert read_rows(experiment.folder)[2]["error"]["type"] == "BadRequestError"
    # 4 rows, then 2 of them shared a request that was refused; at the end the failed row was asked again
    assert Counter(attempts(experiment.folder)) == {("BadRequestError", 0.0): 4 + 2 + 1}
    assert len(provider.requests) == 6 + 1
    assert again.summary["reused"] == 7


async def test_a_retry_that_texts_share_counts_once_and_its_cost_for_each_of_them(tmp_path: Path) -> None:
    troubles = iter([True, True])

    def answer(asked: Asked) -> web.Response:
        return refusal(500, "sorry") if "text 0" in asked.body["input"] and next(troubles, False) else shout(asked)

    async with serving(answer) as provider:
        experiment = Experiment(tmp_path, api_base=provider.url, task=EMBED)
        report = await experiment(texts(8))
        rows = read_rows(experiment.folder)

    summary = report.summary
    assert (summary["succeeded"], summary["retries"]) == (8, 2)
    assert summary["attempts_of_unknown_cost"] == 2 + 2  # the model has no price, so that answers have no cost either
    assert [deployment["retries"] for deployment in summary["deployments"].values()] == [2]
    assert [row["metrics"]["retries"] for row in rows] == [2] * 4 + [0] * 4
    assert attempts(experiment.folder) == [("InternalServerError", None)] * 8


async def test_a_request_that_failed_for_all_its_texts_is_one_attempt_also_after_it_is_asked_again(
    tmp_path: Path,
) -> None:
    async with serving(lambda asked: refusal(500, "sorry")) as provider:
        experiment = Experiment(tmp_path, api_base=provider.url, task=EMBED, retry=RetryConfig(max_retries=0))
        failed = await experiment(texts(4))
        provider.answer = shout
        again = await experiment()

    assert (failed.summary["failed"], failed.summary["attempts_of_unknown_cost"]) == (4, 1)
    assert (again.summary["succeeded"], again.summary["attempts_of_unknown_cost"]) == (4, 2)


async def test_another_micro_batch_size_goes_on_with_the_same_run(tmp_path: Path) -> None:
    async with serving() as provider:
        experiment = Experiment(tmp_path, api_base=provider.url, task=EMBED)
        await experiment(texts(8))
        more = await experiment(texts(11), task=TaskConfig(kind=TaskKind.embed, micro_batch_size=100))

    assert more.summary["reused"] == 8
    assert [len(asked.body["input"]) for asked in provider.requests] == [4, 4, 3]


async def test_a_wrong_key_costs_a_handful_of_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_LIKE_API_KEY", "wrong-key-1234")
    async with serving(lambda asked: refusal(401, "invalid_api_key")) as provider:
        experiment = Experiment(tmp_path, api_base=provider.url, task=EMBED, limits=LimitsConfig(concurrency=32))
        report = await experiment(texts(400))

    assert (report.exit_code, report.summary["failed"]) == (4, 0)
    assert 4 <= len(provider.requests) <= 12


async def test_one_refused_request_is_not_taken_for_a_wrong_key(tmp_path: Path) -> None:
    refusals = iter([True])

    def answer(asked: Asked) -> web.Response:
        return refusal(401, "invalid_api_key") if next(refusals, False) else shout(asked)

    async with serving(answer) as provider:
        experiment = Experiment(tmp_path, api_base=provider.url, task=EMBED, limits=LimitsConfig(concurrency=1))
        report = await experiment(texts(16))

    assert (report.exit_code, report.summary["failed"], report.summary["succeeded"]) == (3, 4, 12)


async def test_an_interrupt_keeps_what_came_and_books_what_did_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runner.run.GRACE_S", 0.2)

    def answer(asked: Asked) -> web.Response | float:
        if "text 4" in asked.body["input"]:
            os.kill(os.getpid(), signal.SIGINT)
            return 600.0
        return shout(asked)

    async with serving(answer) as provider:
        experiment = Experiment(tmp_path, api_base=provider.url, task=EMBED, limits=LimitsConfig(concurrency=1))
        async with asyncio.timeout(10):
            interrupted = await experiment(texts(20))
        provider.answer = shout
        finished = await experiment()

    assert (interrupted.exit_code, interrupted.summary["succeeded"]) == (130, 4)
    assert attempts(experiment.folder) == [("Lost", None)] * 4
    assert (finished.exit_code, finished.summary["reused"]) == (0, 4)


async def test_an_interrupt_while_a_batch_is_split_sends_nothing_more(tmp_path: Path) -> None:
    def answer(asked: Asked) -> web.Response:
        os.kill(os.getpid(), signal.SIGINT)
        return refusal(400, "bad")

    async with serving(answer) as provider:
        experiment = Experiment(tmp_path, api_base=provider.url, task=EMBED, limits=LimitsConfig(concurrency=1))
        async with asyncio.timeout(5):
            report = await experiment(texts(4))

    assert report.exit_code == 130
    assert len(provider.requests) == 1
    assert attempts(experiment.folder) == [("BadRequestError", 0.0)] * 4


# Transcriptions


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    folder = tmp_path / "recordings"
    folder.mkdir()
    for name in ("a.wav", "b.mp3", "c.flac"):
        (folder / name).write_text(f"voice of {name}", encoding="utf-8")
        os.utime(folder / name, ns=(10**18, 10**18))
    return folder


def files(path: Path) -> DatasetConfig:
    return DatasetConfig(kind=DatasetKind.files, path=str(path))


def heard(folder: Path) -> list[str | None]:
    return [row["text"] for row in read_rows(folder)]


async def test_every_file_of_a_folder_is_transcribed(tmp_path: Path, recordings: Path) -> None:
    async with serving() as provider:
        experiment = Experiment(tmp_path, api_base=provider.url, task=TRANSCRIBE, dataset=files(recordings))
        report = await experiment(request={"response_format": "verbose_json", "language": "en"})

    assert report.exit_code == 0
    rows = read_rows(experiment.folder)
    assert [row["text"] for row in rows] == [f"{name}: voice of {name}" for name in ("a.wav", "b.mp3", "c.flac")]
    assert [(row["language"], row["duration_s"]) for row in rows] == [("english", 1.5)] * 3
    assert rows[0]["metadata"]["path"] == str(recordings / "a.wav")
    body = provider.requests[0].body
    assert (body["model"], body["response_format"], body["language"]) == ("m", "verbose_json", "en")


async def test_other_files_beside_the_recordings_are_skipped_and_counted_once(
    tmp_path: Path, recordings: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in (".DS_Store", "notes.txt", "cover.JPG"):
        (recordings / name).write_text("no audio")
    async with serving() as provider:
        experiment = Experiment(tmp_path, api_base=provider.url, task=TRANSCRIBE, dataset=files(recordings))
        report = await experiment()
        assert (report.exit_code, report.summary["rows"]) == (0, 3)
        assert capfd.readouterr().err.count(f"dataset.path={recordings}: 2 of 5 files skipped: their names") == 1

        in_glob = files(recordings / "[bn]*")
        assert (await experiment(dataset=in_glob)).summary["rows"] == 1
        named = await experiment(dataset=files(recordings / "notes.txt"))
        with pytest.raises(DatasetError, match=r"no file there ends with \.flac, \.m4a,"):
            await experiment(dataset=files(recordings / "*.txt"))

    assert (named.exit_code, named.summary["failed"]) == (3, 1)
    [failed] = read_rows(experiment.folder)
    assert "is no audio file" in failed["error"]["message"]


async def test_a_rows_path_leads_from_the_folder_of_its_dataset(tmp_path: Path, recordings: Path) -> None:
    spoken = base64.b64encode(b"spoken").decode()
    rows: list[Json] = [
        {"path": "recordings/a.wav", "speaker": "Ada"},
        {"audio": str(recordings / "b.mp3"), "path": "other.wav"},
        {"audio": {"bytes": spoken, "path": "inside.wav"}, "id": 3},
        {"audio": "recordings/none.wav"},
        {"path": "rows.jsonl"},
    ]
    async with serving() as provider:
        experiment = Experiment(tmp_path, api_base=provider.url, task=TRANSCRIBE)
        report = await experiment(rows, prompt="Names: {{ speaker | default('none') }}")

    assert (report.exit_code, report.summary["failed"]) == (3, 2)
    assert heard(experiment.folder)[:3] == ["a.wav: voice of a.wav", "b.mp3: voice of b.mp3", "inside.wav: spoken"]
    results = read_rows(experiment.folder)
    assert results[0]["metadata"] == {"path": "recordings/a.wav", "speaker": "Ada"}
    assert results[2]["metadata"] == {"id": 3}
    assert "recordings/none.wav cannot be read: No such file" in results[3]["error"]["message"]
    assert "rows.jsonl:5: 'rows.jsonl' is no audio file" in results[4]["error"]["message"]
    assert {asked.body["prompt"] for asked in provider.requests} == {"Names: Ada", "Names: none"}


@pytest.mark.parametrize(
    ("content", "error", "problem"),
    [
        ("A" * 20, "RequestTooLargeError", "rows.jsonl:1: the audio has more than 10 bytes"),
        ("no base64", "RowError", "the bytes of audio are not in base64"),
    ],
)
async def test_audio_in_a_row_that_cannot_be_sent_fails_alone(
    tmp_path: Path, content: str, error: str, problem: str
) -> None:
    rows: list[Json] = [{"audio": {"bytes": each}} for each in (content, base64.b64encode(b"fine").decode())]
    async with serving() as provider:
        experiment = Experiment(
            tmp_path, api_base=provider.url, task=TaskConfig(kind=TaskKind.transcribe, max_bytes=10)
        )
        await experiment(rows)

    assert heard(experiment.folder) == [None, "audio.wav: fine"]
    failed = read_rows(experiment.folder)[0]["error"]
    assert failed["type"] == error
    assert problem in failed["message"]


async def test_a_recording_is_known_by_what_it_holds(tmp_path: Path, recordings: Path) -> None:
    async with serving() as provider:
        experiment = Experiment(tmp_path, api_base=provider.url, task=TRANSCRIBE, dataset=files(recordings))
        await experiment()
        (recordings / "a.wav").rename(recordings / "z.wav")
        os.utime(recordings / "b.mp3")
        (recordings / "c.flac").write_text("another voice", encoding="utf-8")
        changed = await experiment()

    assert changed.summary["reused"] == 2
    assert heard(experiment.folder) == ["b.mp3: voice of b.mp3", "c.flac: another voice", "a.wav: voice of a.wav"]
    assert len(provider.requests) == 4


async def test_a_file_that_is_too_large_is_not_read(tmp_path: Path, recordings: Path) -> None:
    with (recordings / "b.mp3").open("wb") as file:
        file.truncate(2**40)
    async with serving() as provider:
        experiment = Experiment(tmp_path, api_base=provider.url, task=TRANSCRIBE, dataset=files(recordings))
        report = await experiment()

    assert report.summary["succeeded"] == 2
    error = read_rows(experiment.folder)[1]["error"]
    assert error["type"] == "RequestTooLargeError"
    assert "at most 26,214,400 are sent: cut it, or raise task.max_bytes" in error["message"]


async def test_a_file_that_changes_while_the_run_goes_on_is_not_mistaken(tmp_path: Path, recordings: Path) -> None:
    def answer(asked: Asked) -> web.Response:
        (recordings / "b.mp3").write_text("changed", encoding="utf-8")
        return shout(asked)

    async with serving(answer) as provider:
        experiment = Experiment(
            tmp_path,
            api_base=provider.url,
            task=TRANSCRIBE,
            dataset=files(recordings),
            limits=LimitsConfig(concurrency=1),
        )
        first = await experiment()
        provider.answer = shout
        second = await experiment()

    assert (first.exit_code, first.summary["failed"]) == (3, 1)
    assert (second.exit_code, second.summary["reused"]) == (0, 2)
    assert heard(experiment.folder)[1] == "b.mp3: changed"


async def test_transcripts_are_scored_like_any_text(tmp_path: Path, recordings: Path) -> None:
    rows = [{"path": "recordings/a.wav", "target": "a.wav: voice of a.wav"}]
    async with serving() as provider:
        experiment = Experiment(tmp_path, api_base=provider.url, task=TRANSCRIBE)
        report = await experiment(rows, scorers={"exact": ScorerConfig()})

    assert report.summary["scores"] == {"exact": {"mean": 1.0, "n": 1}}


# Images


PNG = base64.b64encode(b"\x89PNG picture").decode()


async def test_an_image_goes_with_the_prompt(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG picture")
    rows: list[Json] = [
        {"pic": "a.png", "n": 1},
        {"pic": "https://example.org/b.jpg", "n": 2},
        {"pic": ["a.png", {"bytes": PNG, "path": None}], "n": 3},
        {"pic": [], "n": 4},
        {"pic": "rows.jsonl", "n": 5},
        {"n": 6},
    ]
    async with serving(lambda asked: shout(Asked(path=asked.path, headers={}, body={"prompt": "ok"}))) as provider:
        experiment = Experiment(tmp_path, api_base=provider.url, task=TaskConfig(image="pic"))
        report = await experiment(rows, prompt="Number {{ n }}", system="Look.")

    assert report.summary["failed"] == 2
    asked = {
        request.body["messages"][1]["content"][0]["text"]: request.body["messages"] for request in provider.requests
    }
    assert {len(messages) for messages in asked.values()} == {2}
    png = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}}
    assert asked["Number 1"][1]["content"][1:] == [png]
    assert asked["Number 2"][1]["content"][1:] == [
        {"type": "image_url", "image_url": {"url": "https://example.org/b.jpg"}}
    ]
    assert asked["Number 3"][1]["content"][1:] == [png, png]
    assert asked["Number 4"][1]["content"][1:] == []
    results = read_rows(experiment.folder)
    assert results[0]["metadata"] == {"pic": "a.png", "n": 1}
    assert results[2]["metadata"] == {"n": 3}
    assert "'rows.jsonl' is no image" in results[4]["error"]["message"]
    assert "the field 'pic' is null or missing" in results[5]["error"]["message"]


async def test_the_responses_endpoint_has_images_in_its_own_form(tmp_path: Path) -> None:
    async with serving() as provider:
        experiment = Experiment(
            tmp_path, api_base=provider.url, task=TaskConfig(image="pic"), endpoint=Endpoint.responses
        )
        await experiment([{"prompt": "Who?", "pic": "https://example.org/b.jpg"}], system="Look.")

    [asked] = provider.requests
    assert asked.body["instructions"] == "Look."
    assert asked.body["input"] == [
        {
            "role": "user",
            "content": [
                {"type": "input_text", "text": "Who?"},
                {"type": "input_image", "image_url": "https://example.org/b.jpg"},
            ],
        }
    ]


async def test_another_picture_under_the_same_name_is_asked_about(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"one")
    async with serving(lambda asked: shout(Asked(path=asked.path, headers={}, body={"prompt": "ok"}))) as provider:
        experiment = Experiment(tmp_path, api_base=provider.url, task=TaskConfig(image="pic"), prompt="What is it?")
        await experiment([{"pic": "a.png"}])
        await experiment()
        (tmp_path / "a.png").write_bytes(b"two")
        await experiment()

    assert len(provider.requests) == 2


async def test_a_field_that_no_row_has_is_no_image(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"task.image='pic': the first rows have no such field. The fields: prompt"):
        await Experiment(tmp_path, task=TaskConfig(image="pic"))([{"prompt": "Who?"}])


# Structured output


class Label(BaseModel):
    label: str
    sure: bool = True


SCHEMA = {"type": "object", "properties": {"label": {"type": "string"}}, "required": ["label"]}


@pytest.mark.parametrize("form", ["inline", "file", "model"])
async def test_answers_in_a_schema_are_parsed(tmp_path: Path, form: str) -> None:
    path = tmp_path / "label.json"
    path.write_text(json.dumps(SCHEMA), encoding="utf-8")
    layout: dict[str, Any] = {"inline": SCHEMA, "file": str(path), "model": f"{__name__}:Label"}
    async with Simulator(SimulatorConfig(latency_s=0)) as simulator:
        experiment = Experiment(tmp_path, api_base=simulator.url, response_format=layout[form])
        report = await experiment([{"prompt": "One?"}, {"prompt": "Two?"}])

    assert (report.exit_code, report.summary["unparsed"]) == (0, 0)
    for row in read_rows(experiment.folder):
        assert row["output_parsed"] == json.loads(row["output_text"])
        assert set(row["output_parsed"]) == ({"label", "sure"} if form == "model" else {"label"})


async def test_an_answer_that_does_not_fit_is_counted_and_null(tmp_path: Path) -> None:
    async with serving() as provider:
        experiment = Experiment(tmp_path, api_base=provider.url, response_format=SCHEMA)
        report = await experiment([{"prompt": '{"label": 1}'}, {"prompt": "no json"}])

    assert (report.exit_code, report.summary["unparsed"], report.summary["succeeded"]) == (0, 2, 2)
    rows = read_rows(experiment.folder)
    assert [row["output_parsed"] for row in rows] == [None, None]
    assert "the answer is no JSON" in rows[1]["parse_error"]
    layout = provider.requests[0].body["response_format"]
    assert (layout["type"], layout["json_schema"]["schema"]) == ("json_schema", SCHEMA)


async def test_a_schema_file_that_changed_asks_something_else(tmp_path: Path) -> None:
    path = tmp_path / "label.json"
    path.write_text(json.dumps(SCHEMA), encoding="utf-8")
    async with serving() as provider:
        experiment = Experiment(tmp_path, api_base=provider.url, response_format=str(path))
        await experiment([{"prompt": "One?"}])
        await experiment()
        path.write_text(json.dumps({**SCHEMA, "title": "other"}), encoding="utf-8")
        await experiment()

    assert len(provider.requests) == 2


@pytest.mark.parametrize(
    ("layout", "problem"),
    [
        ("none.json", "response_format=none.json: there is no such file"),
        (f"{__name__}:Labels", "Did you mean 'Label'"),
        (f"{__name__}:shouted", "response_format=.* give a Pydantic model class or a JSON schema"),
        ({"type": "objekt"}, "response_format is no JSON schema"),
    ],
)
async def test_a_format_that_cannot_be_used_is_refused(tmp_path: Path, layout: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        await Experiment(tmp_path, response_format=layout)([{"prompt": "One?"}])
