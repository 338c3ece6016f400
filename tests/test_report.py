from __future__ import annotations

import asyncio
import json
import re
import shutil
import sqlite3
import subprocess
from collections.abc import Mapping
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from harness import Asked, Command, Experiment, progress_of, read_summary, refusal, serving, shout
from runner.charts import Bars, Lines, series_labels
from runner.cli import main as run
from runner.config import Dedupe, DeploymentConfig, LimitsConfig, ScorerConfig
from runner.report import RunFacts, charts_of, read_runs, render
from runner.report.__main__ import main
from runner.store import Claim, Outcome, Store, Terms

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TWO_SERVERS = "deployments={left: {model: simulated/echo}, right: {model: simulated/echo}}"
EVIL = '<script>document.title = "taken over"</script><img src=http://example.com/x onerror=alert(1)>'


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_evil(here: Path) -> Path:
    rows = [{"text": EVIL, "label": EVIL}, {"text": "plain"}, {"other": 1}]
    (here / "evil.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    run(["name=evil", "dataset=jsonl", "dataset.path=evil.jsonl", "prompt={{ text }}", "tracker=none"])
    return Command(here).run()


async def settled_at(path: Path, *times: float) -> None:
    """A run with an answer at each of these times."""
    claims = [Claim(position=n, content=b"%16d" % n, metadata="{}") for n in range(len(times))]
    async with await Store.open(path / "results.sqlite") as store:
        known = await store.claim(claims, Terms())
        await store.save_all(
            (n, Outcome(ticket=known[n].ticket, content=claims[n].content, settled_at=at), None)
            for n, at in enumerate(times)
        )


def run_sweep(here: Path, *arguments: str) -> Path:
    run(["-m", "+experiment=quickstart", "dataset.limit=12", "tracker=none", "simulator.latency_s=0.01", *arguments])
    [folder] = here.glob("runs/quickstart/sweep-*")
    return folder


def written(*paths: Path) -> str:
    assert main([*map(str, paths), "--output", "out.html"]) == 0
    return Path("out.html").read_text(encoding="utf-8")


def test_a_run_s_page_shows_its_figures_failures_rows_and_configuration(here: Path) -> None:
    page = written(run_evil(here))

    assert "finished" in page
    assert "RowError" in page
    assert "evil.jsonl:3" in page
    assert "echo: plain" in page
    assert "simulated/echo" in page


def test_what_a_model_writes_is_text(here: Path) -> None:
    page = written(run_evil(here))

    assert "<script" not in page
    assert "<img" not in page
    assert "&lt;script&gt;" in page


def test_the_page_asks_nobody_for_anything(here: Path) -> None:
    page = written(run_evil(here))

    assert not re.search(r'(?:src|href)\s*=(?!"data:)', page.replace("src=http://example.com", ""))
    assert "default-src 'none'" in page
    assert "@import" not in page
    assert "url(" not in page


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (Debian: apt-get install chromium)")
def test_a_browser_shows_the_page_without_a_complaint(here: Path) -> None:
    written(run_evil(here))
    assert CHROMIUM is not None
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr")
    offline = "--host-resolver-rules=MAP * ~NOTFOUND"

    shown = subprocess.run(
        [CHROMIUM, *options, offline, f"--user-data-dir={here}/profile", "--dump-dom", f"file://{here}/out.html"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )

    assert "CONSOLE" not in shown.stderr
    assert "taken over" not in re.findall("<title>.*?</title>", shown.stdout)[0]
    assert "&lt;script&gt;document.title = " in shown.stdout
    assert shown.stdout.count("<svg") == 1


def test_a_sweep_s_page_compares_its_cells_over_the_number_that_is_swept(here: Path) -> None:
    page = written(run_sweep(here, "limits.concurrency=1,2,4"))

    for label in ("limits.concurrency=1", "limits.concurrency=2", "limits.concurrency=4"):
        assert label in page
    assert "Throughput over limits.concurrency" in page
    assert "Score: accuracy" in page
    assert "91.7% [" in page


@pytest.mark.parametrize(("shortest", "is_told"), [(1, True), (90, False)])
def test_a_sweep_s_page_says_how_many_answers_were_cut_off_where_some_were(
    here: Path, shortest: int, is_told: bool
) -> None:
    page = written(run_sweep(here, f"request.max_tokens={shortest},91"))

    assert ("<th>truncated</th>" in page) is is_told


def test_a_cell_that_never_began_is_in_the_table_with_its_reason(here: Path) -> None:
    page = written(run_sweep(here, "model=simulated/echo,nonsense"))

    assert "model=&#39;nonsense&#39; has no provider" in page


def test_several_runs_and_a_folder_of_runs_are_compared(here: Path) -> None:
    evil = run_evil(here)
    sweep = run_sweep(here, "request.temperature=0,1")

    page = written(evil, sweep)
    of_folder = written(here / "runs" / "quickstart")

    assert f"evil/{evil.name}" in page
    assert "request.temperature=1" in page
    for name in ("request.temperature=0", "request.temperature=1"):
        assert of_folder.count(f"<details><summary>{name}</summary>") == 2  # rows and configuration


def test_a_folder_s_runs_stand_in_the_order_of_its_sweep_before_those_of_none(here: Path) -> None:
    run_sweep(here, "request.temperature=1,0.5,0")
    run(["+experiment=quickstart", "dataset.limit=12", "tracker=none", "request.temperature=0.2"])

    assert main([str(here / "runs" / "quickstart"), "-o", "out.html"]) == 0

    page = Path("out.html").read_text(encoding="utf-8")
    names = ("temperature=1<", "temperature=0.5<", "temperature=0<", "<summary>quickstart/")
    assert [page.index(name) for name in names] == sorted(page.index(name) for name in names)


@pytest.mark.parametrize(("most", "shown"), [("12", "<b>12</b>"), ("5", "<b>12, 7 left to ask</b>")])
def test_a_page_says_how_many_rows_are_left_to_ask(here: Path, most: str, shown: str) -> None:
    run(["+experiment=quickstart", "dataset.limit=12", "tracker=none", f"budget.requests={most}"])

    assert shown in written(here / "runs")


async def test_a_run_that_goes_on_is_read_as_far_as_it_is(command: Command) -> None:
    command.write_rows("rows.jsonl", [{"prompt": f"n{number}"} for number in range(400)])
    arguments = ("dataset=jsonl", "dataset.path=rows.jsonl", "simulator.latency_s=0.2", "tracker=none")
    async with command.running(*arguments, "limits.concurrency=4") as process:
        await progress_of(process)
        await progress_of(process)
        [facts] = await read_runs([command.run()])

    shown = f"{facts.summary['rows']} so far"
    assert facts.state == "running or killed"
    assert 0 < facts.summary["succeeded"] < 400
    assert facts.summary["rows"] < 400
    assert "running or killed" in render([facts], title="now")
    assert f"<b>{shown}</b>" in render([facts], title="now")
    assert f"<td>{shown}</td>" in render([facts, facts], title="now")


@pytest.mark.parametrize("scorer", [ScorerConfig(target="label"), ScorerConfig(kind="test_report:overlap")])
async def test_the_interval_of_a_score_is_that_of_the_answers_that_rows_share(here: Path, scorer: ScorerConfig) -> None:
    rows = [{"prompt": f"n{number}", "label": f"echo: n{number % 5}"} for number in range(8)]
    settings = {"model": "simulated/echo", "scorers": {"right": scorer}}
    alone, shared = (Experiment(here / name, **settings) for name in ("alone", "shared"))
    for each in (alone, shared):
        each.folder.parent.mkdir()
    await alone(rows)
    await shared(rows * 20, dedupe=Dedupe.always)
    [once], [often] = [await read_runs([each.folder]) for each in (alone, shared)]
    expected, score = once.scores["right"], often.scores["right"]

    assert score.n == 160
    assert score.mean == pytest.approx(expected.mean)
    assert score.high - score.low == pytest.approx(expected.high - expected.low, rel=0.1)
    await shared(dedupe=Dedupe.never)
    [apart] = await read_runs([shared.folder])
    assert apart.scores["right"].high - apart.scores["right"].low < (expected.high - expected.low) / 2


def overlap(output_text: str, row: Mapping[str, Any]) -> float:
    """A score with grades."""
    return int(str(row["prompt"])[1:]) / 8


async def test_the_servers_of_a_run_are_shown_and_the_one_that_went_away(here: Path) -> None:
    calls = count(1)

    def dies(asked: Asked) -> web.Response:
        return refusal(503, "gone", "it went away") if next(calls) > 3 else shout(asked)

    async with serving() as steady, serving(dies) as dying:
        servers = {"steady": steady, "dying": dying}
        deployments = {
            name: DeploymentConfig(model="openai_like/m", api_base=each.url) for name, each in servers.items()
        }
        experiment = Experiment(here, deployments=deployments, limits=LimitsConfig(concurrency=2))
        await experiment([{"prompt": f"n{number}"} for number in range(60)])
    with closing(sqlite3.connect(experiment.folder / "results.sqlite")) as store, store:
        store.execute("UPDATE answers SET settled_at = 1e9 WHERE deployment = 'dying'")
        store.execute("UPDATE answers SET settled_at = 1e9 + ticket % 2 * 75 WHERE deployment = 'steady'")

    [facts] = await read_runs([experiment.folder])

    told = facts.summary["deployments"]["dying"]
    assert told["answered"] == 3
    assert told["retries"] > 0
    lines = re.findall(r"<tr><td>(?:steady|dying)</td>.*</tr>", render([facts], title="of servers"))
    dying_cells, steady_cells = ([*re.findall("<td>(.*?)</td>", line)] for line in lines)
    assert dying_cells[:4] == ["dying", "3", "5%", "0"]
    assert dying_cells[6:] == [f"{told['retries']} ({told['retries']} ServiceUnavailableError)", "after 0s"]
    assert (steady_cells[1], steady_cells[6:]) == ("57", ["0", "after 1m 15s"])


def test_the_servers_of_each_run_are_shown_where_there_are_several_runs(here: Path) -> None:
    page = written(run_sweep(here, TWO_SERVERS, "routing.strategy=least-busy", "request.temperature=0,1"))

    assert page.count("<tr><td>left</td>") == page.count("<tr><td>right</td>") == 2
    for name in ("request.temperature=0", "request.temperature=1"):
        assert page.count(f"<details><summary>{name}</summary>") == 3  # servers, rows and configuration


def test_the_servers_of_shards_are_those_of_the_whole(here: Path) -> None:
    sweep = run_sweep(
        here, TWO_SERVERS, "routing.strategy=least-busy", "dataset.shard.index=0,1", "dataset.shard.count=2"
    )

    [facts] = asyncio.run(read_runs([sweep]))

    assert sum(told["answered"] for told in facts.summary["deployments"].values()) == 12
    assert facts.last_answers_s.keys() == {"left", "right"}
    assert written(sweep).count("<tr><td>left</td>") == 1


def test_the_rows_of_a_run_that_saw_them_all_are_its_rows_however_it_ended(here: Path) -> None:
    folder = run_evil(here)
    with closing(sqlite3.connect(folder / "results.sqlite")) as store, store:
        store.execute("UPDATE sessions SET ended_at = NULL")

    page = written(folder)

    assert "running or killed" in page
    assert "<span>rows</span><b>3</b>" in page


def test_the_rows_of_shards_are_known_when_all_of_them_are(here: Path) -> None:
    sweep = run_sweep(here, "dataset.shard.index=0,1", "dataset.shard.count=2")
    finished = written(sweep)
    note = sweep / "cells" / "1.json"
    cell = json.loads(note.read_text())
    note.write_text(json.dumps(cell | {"exit_code": None, "summary": {}}))
    with closing(sqlite3.connect(Path(cell["folder"]) / "results.sqlite")) as store, store:
        store.execute("UPDATE meta SET value = '' WHERE name = 'rows'")

    assert "<span>rows</span><b>12</b>" in finished
    assert "<span>rows</span><b>12 so far</b>" in written(sweep)


def test_a_server_alone_needs_no_table(here: Path) -> None:
    assert "<h2>Servers" not in written(run_evil(here))


@pytest.mark.parametrize(
    "told", ['["a"]', '{"a": 1}', '{"a": {"answered": "many", "failed": 0, "share": 1, "retries": 0, "latency_s": {}}}']
)
def test_a_summary_that_something_else_wrote_is_made_anew(here: Path, told: str) -> None:
    folder = run_evil(here)
    (folder / "summary.json").write_text(f'{{"rows": 77, "deployments": {told}}}')

    assert "<b>77</b>" not in written(folder)


def test_a_key_in_the_configuration_is_not_shown(here: Path) -> None:
    folder = run_evil(here)
    config = folder / ".hydra" / "config.yaml"
    config.write_text(config.read_text() + "\nother:\n  api_key: sk-canary-0123456789\n")

    assert "canary" not in written(folder)


@pytest.mark.parametrize(("seconds", "has_plot"), [(1.9, False), (2.1, True)])
def test_a_plot_of_the_speed_takes_two_seconds(here: Path, seconds: float, has_plot: bool) -> None:
    run(["name=quick", "prompt=Hello.", "samples=3", "tracker=none"])
    folder = Command(here).run()
    with closing(sqlite3.connect(folder / "results.sqlite")) as store, store:
        store.execute("UPDATE answers SET settled_at = 1e9 + ? * (ticket % 4294967296) / 2", (seconds,))

    page = written(folder)

    assert ("answers per second" in page) is has_plot


def test_answers_of_another_run_are_no_speed_and_no_latency_of_this_one(here: Path) -> None:
    run(["name=other", "prompt=Hello.", "samples=3", "tracker=none"])
    run(["name=mine", "prompt=Hello.", "samples=3", "tracker=none", "reuse=true"])
    [taking_over] = here.glob("runs/mine/*")
    with closing(sqlite3.connect(taking_over / "results.sqlite")) as store, store:
        store.execute("UPDATE answers SET settled_at = 1e9 + ticket % 4294967296")

    [facts] = asyncio.run(read_runs([taking_over]))

    assert facts.summary["taken_over"] == 3
    assert (facts.latencies_s, facts.rate) == ([], [])


def test_a_run_has_its_colour_in_all_plots_and_its_name_beside_a_line_alone(here: Path) -> None:
    run(["name=other", "prompt=Hello.", "samples=3", "tracker=none"])
    run(["-m", "name=mine", "prompt=Hello.,Goodbye.", "samples=3", "tracker=none", "reuse=true"])

    page = written(next(here.glob("runs/mine/sweep-*")))

    [latency] = re.findall(r"<h3>Latency</h3>.*?</section>", page, re.DOTALL)
    assert 'class="line c1"' in latency
    assert 'class="line c0"' not in latency
    assert '<i class="key c1"></i>prompt=Goodbye.' in latency
    assert 'class="bar c1"' in page


def test_rows_that_are_not_on_the_page_are_said_to_be_elsewhere(here: Path) -> None:
    run(["name=quick", "prompt=Hello.", "samples=25", "tracker=none"])

    page = written(Command(here).run())

    assert "The first 20 rows of a run that were answered" in page
    assert "results.jsonl holds all of them" in page


def test_a_folder_without_a_run_is_one_message(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(here)]) == 2
    assert "there is no run" in capsys.readouterr().err
    (here / "runs" / "labels").mkdir(parents=True)
    assert main([str(here / "runs" / "lables")]) == 2
    assert f"Did you mean '{here}/runs/labels'?" in capsys.readouterr().err
    assert main([str(here / "page.html")]) == 2
    assert f"Did you mean -o {here}/page.html?" in capsys.readouterr().err
    (here / "results.sqlite").write_text("not a database at all, but a text")
    assert main([str(here)]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_report_is_not_written_as_another_kind_of_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run_evil(here)), "--output", "out.pdf"]) == 2
    assert "report: --output out.pdf: a report is one HTML file: name it out.html" in capsys.readouterr().err
    assert not (here / "out.pdf").exists()


def test_a_report_that_cannot_be_written_says_where(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run_evil(here)), "--output", "nowhere/out.html"]) == 2
    assert "nowhere/out.html cannot be written" in capsys.readouterr().err


def test_a_benchmark_s_page_shows_its_levels_and_what_follows(here: Path) -> None:
    run(["name=b", "task=bench", "prompt=hi", "bench.levels=[1,2]", "bench.requests=12", "tracker=none"])

    page = written(*here.glob("runs/b/*"))

    assert "recommended_max_parallel_requests=" in page
    assert "Throughput over load" in page
    assert "Latency over load" in page
    assert "<h2>Rows" not in page


async def test_the_speed_over_time_counts_every_answer_to_the_last(tmp_path: Path) -> None:
    await settled_at(tmp_path / "run", *(1_000 + n for n in range(100)), *(1_450.2 + n / 100 for n in range(76)))
    [facts] = await read_runs([tmp_path / "run"])

    (first, _), (second, _), *_ = facts.rate
    assert sum(rate for _, rate in facts.rate) * (second - first) == pytest.approx(176)
    assert facts.rate[-1][1] > 1


def test_rates_and_latencies_of_a_benchmark_say_their_level(here: Path) -> None:
    options = ("bench.requests=12", "bench.repeats=1", "simulator.latency_s=0.01", "tracker=none")
    run(["name=b", "task=bench", "prompt=hi", "bench.levels=[1,2]", *options])
    [folder] = here.glob("runs/b/*")
    summary = read_summary(folder)
    rates = {level["level"]: level["requests_per_s"]["value"] for level in summary["bench"]["levels"]}

    page = written(folder)

    assert summary["requests_per_s"] == rates[summary["level"]]
    for figure in ("rows/s", "total tokens/s", "latency p50"):
        assert f"<span>{figure} at level {summary['level']:g}</span>" in page
    assert "<span>rows</span><b>24</b>" in page


def test_a_benchmark_of_one_level_needs_no_word_about_it(here: Path) -> None:
    run(["name=b", "task=bench", "prompt=hi", "bench.levels=[2]", "bench.requests=12", "tracker=none"])

    assert "<span>rows/s</span>" in written(*here.glob("runs/b/*"))


def test_a_sweep_s_page_shows_the_differences_of_its_cells(here: Path) -> None:
    page = written(run_sweep(here, "simulator.accuracy=0.2,1.0"))

    assert "<h2>Differences" in page
    assert "score accuracy" in page
    assert "higher" in page


def test_a_table_of_differences_says_why_some_are_of_fewer_rows(here: Path) -> None:
    page = written(run_sweep(here, "model=simulated/a,simulated/b", "prompt=Same."))

    assert "Rows that share an answer count once in latency, tokens and cost, and widen the other intervals" in page


def test_benchmarks_of_a_sweep_are_one_table_for_each_model(here: Path) -> None:
    options = ("bench.levels=[2]", "bench.requests=12", "bench.repeats=1", "simulator.latency_s=0.01", "tracker=none")
    run(["-m", "+experiment=bench_fleet", "model=simulated/a,simulated/b", *options])

    page = written(*here.glob("runs/bench_fleet/sweep-*"))

    assert page.count("<h3>model=simulated/") >= 3  # two tables, and their differences
    assert "model=simulated/a at 2 → model=simulated/b at 2" in page


def test_runs_of_one_name_are_called_by_what_differs(here: Path) -> None:
    for temperature in (0, 1):
        run(["name=same", "prompt=x", f"request.temperature={temperature}", "tracker=none"])

    page = written(here / "runs" / "same")

    assert "request.temperature=0" in page
    assert "request.temperature=1" in page


def test_cells_that_share_a_name_are_told_apart_by_their_folders(here: Path) -> None:
    first = run_sweep(here, "request.temperature=0,1")
    run(["-m", "name=other", "prompt=x", "request.temperature=0,1", "tracker=none"])
    [second] = here.glob("runs/other/sweep-*")

    page = written(first, second)

    assert len(set(re.findall(r"<summary>(request\.temperature=0 \((?:quickstart|other)/\w+\))</summary>", page))) == 2


def test_a_folder_of_several_sweeps_calls_all_cells_by_their_names(here: Path) -> None:
    run_sweep(here, "request.temperature=0,1")
    run(["-m", "name=quickstart", "model=simulated/a,simulated/b", "prompt=hi", "tracker=none"])

    runs = asyncio.run(read_runs([here / "runs" / "quickstart"]))

    assert {each.label for each in runs} == {
        *("request.temperature=0", "request.temperature=1", "model=simulated/a", "model=simulated/b")
    }


def test_a_run_without_a_line_keeps_its_place_and_so_the_others_their_colours() -> None:
    runs = [
        RunFacts(label="quick", folder=Path("a"), state="finished", latencies_s=[0.1, 0.2]),
        RunFacts(label="empty", folder=Path("c"), state="finished"),
        RunFacts(label="slow", folder=Path("b"), state="finished", latencies_s=[0.1, 0.2], rate=[(0, 1), (1, 1)]),
    ]

    latency, speed = charts_of(runs)

    assert isinstance(latency, Lines)
    assert isinstance(speed, Lines)
    assert [series.name for series in latency.series] == ["quick", "slow"]
    assert [series.name for series in speed.series] == ["quick", "slow"]
    assert series_labels(speed.series) == ["quick (too short for a line)", "slow"]


def test_bars_that_differ_have_labels_that_do() -> None:
    runs = [
        RunFacts(label=name, folder=Path(name), state="finished", summary={"cost_usd": cost})
        for name, cost in (("a", 0.00016), ("b", 0.00024))
    ]

    [costs] = [chart for chart in charts_of(runs) if chart.title == "Cost"]

    assert isinstance(costs, Bars)
    assert [bar.text for bar in costs.values] == ["$0.000160", "$0.000240"]
