"""What a model or a row may hold, and that it stays text wherever it goes: nothing of it is run, rendered or obeyed."""

from __future__ import annotations

import asyncio
import csv
import io
import json
from pathlib import Path

import pytest
from aiohttp import web

from harness import Asked, Command, Experiment, read_rows, serving
from runner.errors import ParseError
from runner.export import main as export
from runner.report.__main__ import main as report
from runner.response_format import ResponseFormat

ANSWERS = {
    "html": '</td></pre><script>alert(1)</script><img src=x onerror="alert(1)">',
    "terminal": "\x1b]0;owned\x07\x1b[2J\x1b[31mred\x9b31m\r\n\u202egnp.exe",
    "jinja": "{{ 7 * 7 }}{% for x in ().__class__.__bases__ %}{{ x }}{% endfor %}",
    "interpolation": "${oc.env:HOME} ${now:%Y} $HOME `id` %(asctime)s {0.__class__}",
    "formula": '=cmd|"/c calc"!A1',
    "formula behind a tab": "\t=1+1",
    "instantiation": '{"_target_": "os.system", "_args_": ["touch owned"]}',
    "markup": "[link=file:///etc/passwd]click[/link] [bold]",
    "null character": "a\x00b",
    "lone surrogate": "a\ud800b",
    "line separators": "a\u2028b\x85c\x0bd",
    "nothing": "",
    "deep JSON": "[" * 5_000,
}
"""What models answer here; rows hold the same."""

BIG = 50_000_000


def storable(text: str) -> str:
    """A lone surrogate is no text in UTF-8."""
    return text.encode("utf-8", "replace").decode()


async def test_what_a_model_answers_is_text_everywhere(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"name": name, "text": storable(text), "_target_": "os.system"} for name, text in ANSWERS.items()]
    command.write_rows("rows.jsonl", rows)
    asked: dict[str, str] = {}

    def answer(request: Asked) -> web.Response:
        name, _, asked_text = request.text.partition(": ")
        asked[name] = asked_text
        message = {"role": "assistant", "content": ANSWERS[name]}
        body = {"choices": [{"index": 0, "message": message, "finish_reason": ANSWERS[name]}], "model": ANSWERS[name]}
        return web.Response(body=json.dumps(body).encode(), content_type="application/json")

    async with serving(answer) as provider:
        done = await command(
            *("model=openai_like/m", f"api_base={provider.url}", "name=t", "tracker.mode=offline"),
            *("dataset=jsonl", "dataset.path=rows.jsonl", "prompt={{ name }}: {{ text }}"),
        )

    assert done.exit_code == 0, done.err
    assert asked == {row["name"]: row["text"] for row in rows}  # rendered once
    stored = {row["metadata"]["name"]: row for row in read_rows(command.run())}
    assert {name: row["output_text"] for name, row in stored.items()} == {
        name: storable(text) for name, text in ANSWERS.items()
    }
    for shown in (done.out, done.err, (command.run() / "runner.log").read_text(encoding="utf-8")):
        assert not {"\x1b", "\x9b", "\x07", "\u202e"} & set(shown)
    assert not list(command.folder.rglob("owned"))

    monkeypatch.chdir(command.folder)
    assert await asyncio.to_thread(report, [str(command.run()), "--output", "report.html"]) == 0
    page = Path("report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "<img" not in page
    assert await asyncio.to_thread(export, [str(command.run()), "-o", "rows.csv"]) == 0
    table = list(csv.DictReader(io.StringIO(Path("rows.csv").read_bytes().decode(), newline="")))
    assert [row["output_text"] for row in table if row["output_text"].startswith(("=", "\t"))] == []
    assert len(table) == len(ANSWERS)


async def test_a_refusal_that_acts_on_terminals_does_not_act_on_ours(command: Command) -> None:
    def answer(request: Asked) -> web.Response:
        return web.json_response({"error": {"message": f"no: {ANSWERS['terminal']}"}}, status=401)

    async with serving(answer) as provider:
        done = await command("model=openai_like/m", f"api_base={provider.url}", "prompt=Hi", "name=t", "tracker=none")

    assert done.exit_code == 4
    assert "owned" in done.err
    for shown in (done.out, done.err, (command.run() / "runner.log").read_text(encoding="utf-8")):
        assert not {"\x1b", "\x9b", "\x07", "\u202e"} & set(shown)


async def test_an_answer_of_50_megabytes_is_kept_whole(tmp_path: Path) -> None:
    def answer(request: Asked) -> web.Response:
        return web.json_response({"choices": [{"message": {"content": "x" * BIG}, "finish_reason": "stop"}]})

    async with serving(answer) as provider:
        run = Experiment(tmp_path, api_base=provider.url)
        outcome = await run([{"prompt": "Write much."}])
    assert outcome.exit_code == 0
    [row] = read_rows(run.folder)
    assert len(row["output_text"]) == BIG


@pytest.mark.parametrize("depth", [100, 600, 5_000, 1_000_000])
@pytest.mark.parametrize("schema", [{"type": "json_object"}, {"type": "object"}, {"$ref": "#"}], ids=str)
def test_an_answer_that_is_nested_beyond_measure_is_no_answer_in_a_schema(schema: dict[str, str], depth: int) -> None:
    parse = ResponseFormat.of(schema).parse
    text = '{"a":' * depth + "1" + "}" * depth
    if depth == 100 and schema != {"$ref": "#"}:
        parse(text)
        return
    with pytest.raises(ParseError) as caught:
        parse(text)
    assert len(str(caught.value)) < 500
