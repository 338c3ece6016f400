"""The product through its command: what a user types, sees and finds in the folder."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markupsafe import escape
from omegaconf import OmegaConf

from harness import SOURCES, Asked, Command, get, progress_of, read_rows, read_summary, refusal, serving, shout
from runner.arguments import friendly
from runner.cli import main
from runner.config import RunnerConfig, SimulatorConfig
from runner.errors import ConfigError
from runner.progress import sweep_table
from runner.report import read_runs, render
from runner.run import GRACE_S
from runner.simulator import Simulator
from wandb_offline import read_offline_run

ROW_KEYS = [
    "_index",
    "output_text",
    "output_parsed",
    "token_usage",
    "request_id",
    "model_id",
    "finish_reason",
    "tool_calls",
    "error",
    "metadata",
    "scores",
    "metrics",
]


async def test_a_jsonl_file_becomes_results_in_its_order(command: Command) -> None:
    rows: list[dict[str, Any]] = [{"id": index, "prompt": f"question {index}"} for index in range(60)]
    rows[1] = {"id": 1, "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]}
    rows[2] = {"id": 2, "responses_input": "what now?"}
    command.write_rows("rows.jsonl", rows)

    async with serving() as provider:
        done = await command(
            "model=hosted_vllm/m",
            f"api_base={provider.url}",
            "dataset=jsonl",
            "dataset.path=rows.jsonl",
            "limits.concurrency=64",
            "name=t",
            "tracker=none",
        )

    assert (done.exit_code, "Traceback" in done.err) == (0, False), done.err
    results = read_rows(command.run())
    assert [row["_index"] for row in results] == list(range(60))
    assert [row["metadata"] for row in results] == [{"id": index} for index in range(60)]
    assert [row["output_text"] for row in results] == [
        f"QUESTION {index}" if index not in (1, 2) else ["HI", "WHAT NOW?"][index - 1] for index in range(60)
    ]
    assert {json.dumps(asked.body["messages"]) for asked in provider.requests if asked.text == "hi"} == {
        json.dumps(rows[1]["messages"])
    }
    assert {asked.body["model"] for asked in provider.requests} == {"m"}
    assert len(provider.requests) == 60

    first = results[0]
    assert list(first) == ROW_KEYS
    metrics = first.pop("metrics")
    assert first == {
        "_index": 0,
        "output_text": "QUESTION 0",
        "output_parsed": None,
        "token_usage": {
            "prompt_tokens": 3,
            "completion_tokens": 2,
            "total_tokens": 5,
            "reasoning_tokens": None,
            "cached_tokens": None,
        },
        "request_id": "chat-1",
        "model_id": "m-1",
        "finish_reason": "stop",
        "tool_calls": [],
        "error": None,
        "metadata": {"id": 0},
        "scores": {},
    }
    assert set(metrics) == {
        "queue_wait_s",
        "service_time_s",
        "end_to_end_s",
        "deployment",
        "retries",
        "cost_usd",
        "ttft_s",
    }
    assert metrics["deployment"] == "hosted_vllm/m"
    assert 0 <= metrics["queue_wait_s"] <= metrics["end_to_end_s"]
    assert 0 < metrics["service_time_s"] <= metrics["end_to_end_s"] < 10

    summary = read_summary(command.run())
    measured = {key: summary.pop(key) for key in ("elapsed_s", "requests_per_s", "rows_per_s", "tokens_per_s")}
    quantiles = {key: summary.pop(key) for key in ("latency_s", "queue_wait_s")}
    assert all(value > 0 for value in measured.values())
    assert all(set(values) == {"p50", "p95", "p99"} for values in quantiles.values())
    [(label, deployment)] = summary.pop("deployments").items()
    assert (label, deployment["answered"], deployment["share"]) == ("hosted_vllm/m", 60, 1.0)
    assert summary == {
        "rows": 60,
        "succeeded": 60,
        "failed": 0,
        "reused": 0,
        "sessions": 1,
        "concurrency": {"window": 64, "why": None},
        "tokens": {"prompt": 180, "completion": 120, "total": 300, "cached": 0, "reasoning": 0},
        "cost_usd": None,
        "cost_usd_upper_bound": None,
        "cost_usd_former": 0.0,
        "attempts_of_unknown_cost": 60,
        "attempts_without_bound": 60,
        "deduplicated": 0,
        "taken_over": 0,
        "retries": 0,
        "truncated": 0,
        "unparsed": 0,
        "errors": {},
        "scores": {},
        "stopped": None,
        "why": None,
    }

    assert {path.name for path in command.run().iterdir()} == {
        ".hydra",
        ".lock",
        "metrics.jsonl",
        "results.jsonl",
        "results.sqlite",
        "runner.log",
        "summary.json",
    }
    assert command.run().parent == command.folder / "runs" / "t"
    assert str(command.run().relative_to(command.folder) / "results.jsonl") in done.out


# What cannot be run


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to call `main` in, with some files; what Hydra changes in this process is put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["runner"])
    for name in [name for name in os.environ if name.endswith("_API_KEY") or name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    environment = dict(os.environ)
    root = logging.getLogger()
    before = root.handlers[:], root.level
    command = Command(tmp_path)
    command.write_rows("rows.jsonl", [{"question": "why?"}, {"question": "how?"}])
    yield tmp_path
    for handler in set(root.handlers) - set(before[0]):
        handler.close()
    root.handlers[:], root.level = before
    os.environ.clear()
    os.environ.update(environment)


ROWS = ("dataset=jsonl", "dataset.path=rows.jsonl")

BAD_INPUT = {
    "a missing file": (["dataset=jsonl", "dataset.path=row.jsonl", "prompt=x"], "'rows.jsonl'"),
    "no path": (["dataset=jsonl", "prompt=x"], "dataset.path must be set"),
    "a section that is null": (["prompt=x", "scorers=null"], "'~scorers' leaves it out, and in a file its keys are"),
    "no name": (["prompt=x", "name=null"], "name=null: it cannot be null"),
    "no scorer": (["prompt=x", "scorers.a.kind=number", "scorers.a=null"], "'~scorers.a' leaves it out"),
    "no JSONL": (["dataset=jsonl", "dataset.path=notes.txt", "prompt=x"], "notes.txt:1: no JSONL"),
    "nothing to ask": ([*ROWS], "fields: question"),
    "no prompt at all": ([], "set prompt"),
    "a field that is not there": ([*ROWS, "prompt={{ qestion }}"], "Did you mean {{ question }}?"),
    "a broken template": ([*ROWS, "prompt={{ question"], "prompt, line 1"),
    "a broken system template": ([*ROWS, "prompt=x", "system={% if %}"], "system, line 1"),
    "an unknown provider": (["model=opnai/gpt", "prompt=x"], "'opnai'"),
    "a model without provider": (["model=gpt", "prompt=x"], "openai/gpt"),
    "a hosted model without key": (["model=openai/gpt", "prompt=x"], "OPENAI_API_KEY"),
    "an unset key variable": (["api_key_env=NOPE_KEY", "model=openai/gpt", "prompt=x"], "NOPE_KEY"),
    "a server without address": (["model=hosted_vllm/m", "prompt=x"], "api_base=http://HOST:PORT/v1"),
    "an address that is no URL": (["model=hosted_vllm/m", "api_base=localhost:1", "prompt=x"], "http://"),
    "an unknown key": (["promt=x"], "unknown key 'promt'. Did you mean 'prompt'?"),
    "a plural for a section": (["requests=3", "prompt=x"], "Did you mean 'request' or 'bench.requests'?"),
    "a plural before a key": (["requests.seed=3", "prompt=x"], "Did you mean 'request.seed'?"),
    "a section that is also a key elsewhere": (["limit=3", "prompt=x"], "Did you mean 'limits' or 'dataset.limit'?"),
    "a deployment without its model": (
        ["deployments.locl.weight=3", "prompt=x"],
        "deployments.locl: there is none of this name, and a new one needs its model: deployments.locl.model=",
    ),
    "no name of deployments": (["deployments=null", "prompt=x"], "deployments=null: choose one of none"),
    "an unknown key behind +": (["+promt=x"], "unknown key 'promt'. Did you mean 'prompt'?"),
    "an unknown key behind ++": (["++limits.rmp=3", "prompt=x"], "Did you mean 'limits.rpm'?"),
    "an unknown nested key": (["limits.rmp=3", "prompt=x"], "Did you mean 'limits.rpm'?"),
    "a key in the wrong place": (["rpm=3", "prompt=x"], "Did you mean 'limits.rpm'?"),
    "an unknown key of a deployment": (["deployments.a.modl=b/c", "prompt=x"], "Did you mean 'deployments.a.model'?"),
    "an unknown key in an own group": (["limits=mine", "prompt=x"], "limits/mine.yaml: unknown key 'limits.rmp'"),
    "an unknown key in an experiment": (["+experiment=misspelt"], "experiment/misspelt.yaml: unknown key 'promt'"),
    "an experiment that is not for the root": (
        ["+experiment=elsewhere"],
        "experiment/elsewhere.yaml: write `# @package _global_` as its first line",
    ),
    "an experiment with a group that is not for the root": (
        ["+experiment=elsewhere_too"],
        "experiment/elsewhere_too.yaml: write `# @package _global_` as its first line",
    ),
    "a default of an experiment without its slash": (
        ["+experiment=slashless"],
        "experiment/slashless.yaml: in its defaults, write `- override /dataset: …`, with the slash",
    ),
    "an overridden default of an experiment without its slash": (
        ["+experiment=slashless_too"],
        "experiment/slashless_too.yaml: in its defaults, write `- override /dataset: …`, with the slash",
    ),
    "a second default for a group": (["+experiment=twice"], "write `- override /dataset: csv`"),
    "a plus before a group that has a default": (["+dataset=csv"], "dataset.path must be set: dataset=csv"),
    "an experiment that is none": (["experiment.x=5", "prompt=x"], "unknown key 'experiment.x'"),
    "a missing value in an own group": (["dataset=mine", "prompt=x"], "dataset.path must be set"),
    "a decimal comma": (["budget.usd=2,5", "prompt=x"], "budget.usd=2,5: these are several values to sweep over"),
    "a text for a whole number": (["samples=two", "prompt=x"], "samples=two: a whole number, as in samples=10"),
    "a text for a number": (["limits.rpm=many", "prompt=x"], "limits.rpm=many: a number, as in limits.rpm=10"),
    "a text for a switch": (["routing.hedge=maybe", "prompt=x"], "routing.hedge=maybe: true or false"),
    "a text for a list": (["tracker.tags=first", "prompt=x"], "tracker.tags: a list, as in 'tracker.tags=[one, two]'"),
    "a text for a parameter": (["request.temperature=hot", "prompt=x"], "request.temperature='hot': a number"),
    "a value for a section": (["budget=2", "prompt=x"], "budget=2: it has keys of its own, as there are budget.usd,"),
    "a number for a group": (["limits=300", "prompt=x"], "limits=300: it has keys of its own, as there are limits."),
    "a list for a group": (["limits=[300]", "prompt=x"], "limits=[300]: it has keys of its own"),
    "numbers for a group": (["-m", "limits=300,200", "prompt=x"], "limits=300,200: it has keys of its own"),
    "a number for the deployments": (["deployments=2", "prompt=x"], "as there are deployments.LABEL.model,"),
    "nothing for a group": (["dataset=null", "prompt=x"], "dataset=null: choose one of csv,"),
    "a number for an experiment": (["experiment=5"], "+experiment=5: choose one of bench,"),
    "a number for a scale": (["scale=5"], "+scale=5: choose one of joblib,"),
    "a value for a mapping": (["request=5", "prompt=x"], "request: it has keys of its own, as in request.KEY=VALUE"),
    "no choice of a key": (
        ["resume=freh", "prompt=x"],
        "choose one of auto, fresh, require. Did you mean resume=fresh?",
    ),
    "a switch for a choice of a key": (["resume=true", "prompt=x"], "choose one of auto, fresh, require.\n"),
    "an unknown strategy": (["routing.strategy=leastbusy", "prompt=x"], "Did you mean routing.strategy=least-busy?"),
    "a schema that is not there": (["response_format=schma.json", "prompt=x"], "Did you mean 'schema.json' or"),
    "a schema that is no file": (["response_format=schema", "prompt=x"], "a JSON schema, the path of a .json file, or"),
    "a wrong type of a deployment": (["deployments.a={model: b/c, weight: x}", "prompt=x"], "weight"),
    "an impossible value": (["samples=0", "prompt=x"], "samples=0: at least 1"),
    "an unknown option": (["dataset=jsnl", "prompt=x"], "Did you mean dataset=jsonl?"),
    "an experiment's path": (["+experiment=conf/experiment/broken.yaml"], "Did you mean +experiment=broken?"),
    "a path of nowhere": (["+experiment=experiment/nowhere"], "+experiment=experiment/nowhere: choose one of bench,"),
    "a file for a kind": (
        ["dataset=a/rows.jsonl", "prompt=x"],
        "dataset=a/rows.jsonl: it names the kind of the rows. Did you mean dataset=jsonl dataset.path=a/rows.jsonl?",
    ),
    "a group's name within its file": (
        ["limits=twofold", "prompt=x"],
        "limits/twofold.yaml: unknown key 'limits.limits'. These are the keys of 'limits' already:",
    ),
    "a list of scorers": (["+experiment=listed"], "listed.yaml: a list stands where names or keys belong: write NAME:"),
    "a list of prompts": (["+experiment=prompts"], "prompts.yaml: prompt: a text, and no list"),
    "an unknown experiment": (["+experiment=quickstrt"], "Did you mean +experiment=quickstart?"),
    "a broken experiment": (["+experiment=broken"], "broken.yaml:3: "),
    "braces without quotes": (["+experiment=braces"], "braces.yaml:2: found unhashable key. Put a text with a brace"),
    "a colon without quotes": (["+experiment=colon"], "in quotes (prompt: 'Label: {{ text }}')"),
    "a quote that is not closed": (["+experiment=quote"], "quote.yaml:2: the quote that begins here is not closed"),
    "a key twice": (["+experiment=doubled"], "doubled.yaml:3: found duplicate key prompt: keep one of them"),
    "no space after a colon": (
        ["+experiment=spaceless"],
        "spaceless.yaml: 'rpm:3' stands where keys belong: write KEY: VALUE, with a space after the colon",
    ),
    "another package": (
        ["+experiment=package"],
        "experiment/package.yaml: write `# @package _global_` as its first line",
    ),
    "a tab": (["+experiment=tab"], "tab.yaml:3: found character '\\t' that cannot start any token: indent with spaces"),
    "an experiment in Latin-1": (
        ["+experiment=latin"],
        "a configuration file is not UTF-8 in its line 2, 'prompt: für': save it as UTF-8",
    ),
    "two values where one belongs": (["name=a,b", "prompt=x"], "name=a,b"),
    "a sweep that belongs in a file": (
        ["-m", "+hydra.sweeper.params={prompt: 'a,b'}"],
        "+hydra.sweeper.params: it is for configuration files; here, write what it sweeps over: -m KEY=ONE,TWO",
    ),
    "a multirun of nothing": (["-m"], "nothing to ask: set prompt"),
    "an unknown flag": (["--verbose", "prompt=x"], "--verbose: there is no such option. `python -m runner --help`"),
    "a misspelt flag": (["--multirn", "prompt=x"], "--multirn: there is no such option. Did you mean --multirun?"),
    "a key with one dash": (["-prompt=x"], "keys have no dashes, write prompt=…"),
    "an experiment with dashes": (["--experiment=quickstart"], "keys have no dashes, write +experiment=…"),
    "a flag with a wrong value": (["--cfg", "prompt=x"], "choose one of job, hydra, all"),
    "a flag without its value": (["prompt=x", "tracker=none", "--config-name="], "--config-name needs a value"),
    "an argument without =": (["labels{}"], "'labels{}': write key=value. `python -m runner --help`"),
    "an experiment's file": (
        ["conf/experiment/quickstart.yaml"],
        "where that is an experiment, +experiment=quickstart",
    ),
    "an argument without = for a plan": (["prompt=x", "plan=true", "limits.rpm", "300"], "write limits.rpm=300"),
    "a key without its value": (["limits.rpm", "prompt=x"], "'limits.rpm': write limits.rpm=…"),
    "a text after a colon": (["prompt:Say hello"], "write 'prompt=Say hello'"),
    "a misspelt group": (["+epxeriment=quickstart"], "unknown key 'epxeriment'. Did you mean +experiment=…?"),
    "an experiment that is null": (["+experiment=null"], "+experiment=null: choose one of"),
    "a colon for =": (["prompt=x", "limits.rpm:300"], "'limits.rpm:300': write limits.rpm=300"),
    "an experiment after a colon": (["experiment:quickstart"], "write +experiment=quickstart"),
    "a text without quotes": (
        ["prompt=Say", "name", "it"],
        "or, as one text with what is before it, 'prompt=Say name'",
    ),
    "a command of its own": (["doctor"], "'doctor': did you mean python -m runner.doctor?"),
    "a price that is null": (
        ["prompt=x", "deployments.a.model=openai_like/a", "deployments.a.price.prompt=null"],
        "deployments.a.price.prompt=null: it cannot be null",
    ),
    "two experiments": (
        ["+experiment=quickstart", "+experiment=bench"],
        "choose one, or, with -m, +experiment=ONE,TWO",
    ),
    "a list of options, one of them none": (["dataset=[csv,jsnl]", "prompt=x"], "dataset=[…]: there is no 'jsnl'"),
    "a word after an experiment": (["+experiment=quickstart", "job"], "where that is an experiment, +experiment=job"),
    "two paths": (["dataset=jsonl", "dataset.path=[a,b]", "prompt=x"], "dataset.path: a text, and no list"),
    "a key in a deployment": (["deployments.a={model: openai/b, api_key: sk-1}", "prompt=x"], "api_key_env"),
    "a key in a header": (["request.extra_headers.Authorization=sk-1", "prompt=x"], "request.extra_headers"),
    "an unknown scorer": ([*ROWS, "prompt=x", "scorers.a.kind=exct"], "scorers.a.kind='exct'"),
    "a target that is not there": ([*ROWS, "prompt=x", "scorers.a.target=anwer"], "scorers.a.target='anwer'"),
    "a folder that cannot be": (["runs_dir=notes.txt", "prompt=x"], "notes.txt"),
}


@pytest.mark.parametrize(("arguments", "told"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_one_message_and_leaves_no_folder(
    here: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    command = Command(here)
    command.write("notes.txt", "These are\nmy notes\n")
    command.write("schema.json", "{}")
    command.write("conf/limits/mine.yaml", "rmp: 3\n")
    command.write("conf/limits/twofold.yaml", "limits:\n  rpm: 3\n")
    command.write("conf/experiment/listed.yaml", "# @package _global_\nprompt: x\nscorers:\n  - target: label\n")
    command.write("conf/experiment/prompts.yaml", "# @package _global_\nprompt: [one, two]\n")
    command.write("conf/dataset/mine.yaml", "kind: jsonl\npath: ???\n")
    command.write("conf/experiment/misspelt.yaml", "# @package _global_\npromt: x\n")
    command.write("conf/experiment/elsewhere.yaml", "prompt: x\n")
    command.write("conf/experiment/elsewhere_too.yaml", "defaults:\n  - override /dataset: csv\n")
    command.write("conf/experiment/slashless.yaml", "# @package _global_\ndefaults:\n  - dataset: csv\n")
    command.write("conf/experiment/slashless_too.yaml", "# @package _global_\ndefaults:\n  - override dataset: csv\n")
    command.write("conf/experiment/twice.yaml", "# @package _global_\ndefaults:\n  - /dataset: csv\n")
    command.write("conf/experiment/broken.yaml", "# @package _global_\nprompt: x\n  request: {\n")
    command.write("conf/experiment/braces.yaml", "# @package _global_\nprompt: {{ text }}\n")
    command.write("conf/experiment/colon.yaml", "# @package _global_\nprompt: Label: {{ text }}\n")
    command.write("conf/experiment/quote.yaml", '# @package _global_\nprompt: "{{ text }}\nname: x\n')
    command.write("conf/experiment/doubled.yaml", "# @package _global_\nprompt: x\nprompt: y\n")
    command.write("conf/experiment/spaceless.yaml", "# @package _global_\nlimits:\n  rpm:3\n")
    command.write("conf/experiment/package.yaml", "# @package _globl_\ndefaults:\n  - override /dataset: csv\n")
    command.write("conf/experiment/tab.yaml", "# @package _global_\nlimits:\n\trpm: 3\n")
    (command.folder / "conf/experiment/latin.yaml").write_bytes("# @package _global_\nprompt: für\n".encode("latin-1"))

    exit_code = main([*arguments, "tracker=none"])

    out, err = capfd.readouterr()
    assert (exit_code, out) == (2, ""), err
    assert err.startswith("runner: ")
    assert err.count("\n") == 1, err
    assert told in err
    assert not (here / "runs").exists()


async def test_an_address_where_nobody_listens_is_told_before_anything_else(command: Command) -> None:
    async with serving() as provider:
        gone = provider.url

    done = await command("model=hosted_vllm/m", f"api_base={gone}", "prompt=x", "tracker=wandb")

    assert (done.exit_code, done.out) == (2, "")
    assert done.err == (f"runner: api_base={gone}: nobody listens there: start the server, or correct the address\n")


def test_a_damaged_database_is_told_and_left_alone(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["prompt=x", "tracker=none"]) == 0
    database = Command(here).run() / "results.sqlite"
    database.write_bytes(b"not a database at all" * 100)
    capfd.readouterr()

    exit_code = main(["prompt=x", "tracker=none"])

    err = capfd.readouterr().err
    assert exit_code == 2
    assert err.count("\n") == 1
    assert "results.sqlite is damaged or no database" in err
    assert database.read_bytes() == b"not a database at all" * 100


async def test_a_second_process_is_kept_out_of_the_folder(command: Command) -> None:
    arguments = ("prompt=x", "simulator.latency_s=30", "tracker=none")
    async with command.running(*arguments) as first:
        await progress_of(first)
        second = await command(*arguments)

        assert second.exit_code == 2
        assert f"in use by another process (pid {first.pid})" in second.err
        assert second.err.count("\n") == 1


def test_a_malformed_line_fails_that_row_only(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Command(here).write("rows.jsonl", '{"q": "a"}\n{"q": \n{"q": "c"}\n[1]\n')

    exit_code = main(["dataset=jsonl", "dataset.path=rows.jsonl", "prompt={{ q }}", "tracker=none"])

    results = read_rows(Command(here).run())
    assert exit_code == 3
    assert [row["output_text"] for row in results] == ["echo: a", None, "echo: c", None]
    assert [row["error"] and row["error"]["type"] for row in results] == [None, "RowError", None, "RowError"]
    assert results[1]["error"]["message"].startswith("rows.jsonl:2: ")
    assert results[3]["error"]["message"].startswith("rows.jsonl:4: ")
    err = capfd.readouterr().err
    assert "Traceback" not in err
    assert err.count("a row that cannot be asked: rows.jsonl:2: ") == 1
    assert "The same command asks these rows, once they are mended." in err


# Interrupts


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
async def test_an_interrupted_run_keeps_what_is_in_flight_and_goes_on(command: Command, signum: signal.Signals) -> None:
    rows = [{"prompt": f"row {index}"} for index in range(60)]
    command.write_rows("rows.jsonl", rows)
    async with Simulator(SimulatorConfig(latency_s=0.3, latency_spread=0)) as simulator:
        ledger = simulator.url.removesuffix("/v1") + "/ledger"
        arguments = (
            *("model=openai_like/echo", f"api_base={simulator.url}", "dataset=jsonl", "dataset.path=rows.jsonl"),
            *("limits.concurrency=8", "tracker=none"),
        )
        async with command.running(*arguments) as process:
            await progress_of(process)
            process.send_signal(signum)
            out, err = await process.communicate()
        interrupted = await get(ledger)
        partial, summary = read_rows(command.run()), read_summary(command.run())

        done = await command(*arguments)
        finished = await get(ledger)

    assert process.returncode == 128 + signum
    assert f"interrupted by {signum.name}" in err.decode()
    assert "The same command goes on from here." in err.decode()
    assert "Traceback" not in err.decode()
    assert 0 < interrupted["requests"] < 60
    assert interrupted["abandoned"] == 0
    assert len(partial) == interrupted["requests"]
    assert (summary["stopped"], summary["succeeded"]) == ("interrupted", len(partial))
    assert b"results.jsonl" in out
    assert done.exit_code == 0
    assert finished["requests"] == 60
    assert [row["output_text"] for row in read_rows(command.run())] == [f"echo: row {index}" for index in range(60)]


KILLS_ITSELF = "import os, time; os.kill(os.getpid(), {signum}); time.sleep(5)"


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("module", ["hydra", "odd"], ids=["while it imports", "while it looks at the rows"])
async def test_a_signal_before_the_run_has_begun_is_one_line(
    command: Command, module: str, signum: signal.Signals
) -> None:
    command.write(f"{module}.py", KILLS_ITSELF.format(signum=signum.value))
    done = await command("dataset=python", "dataset.function=odd:rows", "prompt=x", "tracker=none")

    assert done.exit_code == 128 + signum
    assert done.err == f"runner: interrupted by {signum.name} before anything was sent\n"
    assert command.runs() == []


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
async def test_a_plan_that_is_interrupted_leaves_nothing_behind(command: Command, signum: signal.Signals) -> None:
    command.write("odd.py", f"def rows():\n    yield {{}}\n    {KILLS_ITSELF.format(signum=signum.value)}\n")
    (command.folder / "tmp").mkdir()
    asked = ("dataset=python", "dataset.function=odd:rows", "prompt=x", "plan=true")
    done = await command(*asked, TMPDIR=str(command.folder / "tmp"))

    assert (done.exit_code, done.err) == (128 + signum, f"runner: interrupted by {signum.name}\n")
    assert list((command.folder / "tmp").iterdir()) == []


async def test_a_signal_while_results_are_written_has_them_written(command: Command) -> None:
    command.write_rows("rows.jsonl", [{"prompt": f"row {index}"} for index in range(3000)])
    arguments = ["dataset=jsonl", "dataset.path=rows.jsonl", "simulator.latency_s=0", "tracker=none"]
    assert (await command(*arguments)).exit_code == 0
    written = command.run() / ".results.jsonl.partial"
    is_caught = False
    for _ in range(10):  # on a busy machine it may be written between two looks
        async with command.running(*arguments) as process:
            while process.returncode is None and not is_caught:
                await asyncio.sleep(0.001)
                is_caught = written.exists()
            if is_caught:
                process.send_signal(signal.SIGTERM)
            _, err = await process.communicate()
        assert (process.returncode, "Traceback" in err.decode()) == (0, False), err.decode()
        if is_caught:
            break
    assert is_caught
    assert len(read_rows(command.run())) == 3000
    assert not written.exists()


@pytest.mark.parametrize(("task", "concurrency"), [("generate", 16), ("embed", 2), ("transcribe", 16)])
def test_a_killed_run_loses_nothing_and_asks_nothing_twice(command: Command, task: str, concurrency: int) -> None:
    script = SOURCES.parent / "scripts" / "kill.py"
    arguments = [f"--task={task}", "--kills=4", "--rows=400", f"--concurrency={concurrency}", "--latency-s=0.05"]
    done = subprocess.run(
        [sys.executable, str(script), *arguments], env=command.environment, capture_output=True, text=True, check=False
    )

    found = json.loads(done.stdout)
    assert found["violations"] == []
    assert (done.returncode, found["kills"], found["rows"]) == (0, 4, 400)
    assert found["answers_held_at_kills"][-1] > 0


def test_a_full_disk_stops_the_run_and_the_same_command_goes_on(command: Command) -> None:
    command.write_rows("rows.jsonl", [{"prompt": f"row {index} {'x' * 500}"} for index in range(600)])
    arguments = [sys.executable, "-m", "runner", *ROWS, "simulator.latency_s=0.01", "tracker=none"]
    full = subprocess.run(
        arguments,
        cwd=command.folder,
        env=command.environment,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000)),
        capture_output=True,
        text=True,
        check=False,
    )
    done = subprocess.run(arguments, cwd=command.folder, env=command.environment, capture_output=True, check=False)

    assert full.returncode == 4, full.stderr
    assert f"is the disk of {command.run()} full" in full.stderr
    assert "Once that is mended, the same command goes on from here." in full.stderr
    assert "Traceback" not in full.stderr
    assert done.returncode == 0
    assert 0 < read_summary(command.run())["reused"] < 600
    assert len(read_rows(command.run())) == 600


async def test_a_second_signal_ends_at_once(command: Command) -> None:
    async with Simulator(SimulatorConfig(latency_s=600)) as simulator:
        arguments = ("model=openai_like/echo", f"api_base={simulator.url}", "prompt=x", "tracker=none")
        async with command.running(*arguments) as process:
            await progress_of(process)
            assert process.stderr is not None
            process.send_signal(signal.SIGINT)
            while b"again to end at once" not in (line := await process.stderr.readline()):
                assert line
            await asyncio.sleep(0.5)  # sooner, it would pass for an echo of the first
            process.send_signal(signal.SIGINT)
            async with asyncio.timeout(GRACE_S / 2):
                _, err = await process.communicate()

    assert process.returncode == 130
    assert b"Traceback" not in err


# The folder of a run, and what is in it


def test_what_is_asked_names_the_folder_and_how_fast_does_not(here: Path) -> None:
    asked = ["prompt=a", "tracker=none", "simulator.latency_s=0"]
    main(asked)
    main([*asked, "limits.concurrency=2", "retry.max_retries=1", "request.timeout=9"])
    assert len(Command(here).runs()) == 1

    for count, change in enumerate(["prompt=b", "model=simulated/m", "request.temperature=1"], 2):
        main([*asked, change])
        assert len(Command(here).runs()) == count


CANARY = "canary-4f9a0c2b77"


async def test_a_key_is_used_and_written_nowhere(command: Command) -> None:
    """With the user's own experiment, deployments and .env, and a server that repeats the key in its refusals."""
    command.write(".env", f"FLEET_KEY={CANARY}\nSERVER_NAME=gpu\n")
    command.write("conf/config.yaml", "prompt: of a stranger\n")
    command.write(
        "conf/deployments/fleet.yaml",
        "gpu-0: {model: openai_like/m, api_base: '${oc.env:SERVER}', api_key_env: FLEET_KEY}\n"
        "gpu-1: {model: openai_like/m, api_base: '${oc.env:SERVER}', api_key_env: FLEET_KEY, weight: 2}\n",
    )
    command.write(
        "conf/experiment/mine.yaml",
        "# @package _global_\n"
        "defaults:\n  - override /dataset: jsonl\n  - override /deployments: fleet\n"
        "name: mine\nprompt: '{{ q }} at ${oc.env:SERVER_NAME}'\ndataset:\n  path: rows.jsonl\n",
    )
    command.write_rows("rows.jsonl", [{"q": f"question {index}"} for index in range(60)])

    def answer(asked: Asked) -> web.Response:
        key = asked.headers["authorization"]
        return refusal(400, "bad", f"I do not like {key}") if "question 7 " in asked.text else shout(asked)

    async with serving(answer) as provider:
        done = await command("+experiment=mine", "tracker=wandb", SERVER=provider.url, WANDB_MODE="offline")

    assert done.exit_code == 3, done.err
    assert {asked.headers["authorization"] for asked in provider.requests} == {f"Bearer {CANARY}"}
    results = read_rows(command.run())
    assert results[3]["output_text"] == "QUESTION 3 AT GPU"
    assert {row["metrics"]["deployment"] for row in results} == {"gpu-0", "gpu-1"}
    assert results[7]["error"]["message"] == "HTTP 400: I do not like Bearer ***"
    assert command.run().parent.name == "mine"

    files = [path for path in command.run().rglob("*") if path.is_file()]
    [wandb_folder] = command.run().glob("wandb/offline-run-*")
    tracked = read_offline_run(wandb_folder)
    assert (tracked.exit_code, tracked.name, tracked.summary["succeeded"]) == (3, "mine", 59)
    assert [path.name for path in files if CANARY.encode() in path.read_bytes()] == []
    assert CANARY not in done.out + done.err
    assert CANARY not in repr(tracked)


async def test_a_tracker_in_trouble_changes_no_exit_code(command: Command) -> None:
    done = await command(
        *("prompt=x", "tracker=wandb", "tracker.mode=online", "tracker.finish_timeout_s=2"),
        PYTHONWARNINGS="",  # W&B leaves temporary folders open
        WANDB_API_KEY="0" * 40,
        WANDB_BASE_URL="http://127.0.0.1:9",
    )

    assert done.exit_code == 0
    assert "Traceback" not in done.err
    assert read_summary(command.run())["succeeded"] == 1


# Sweeps


def test_the_cells_of_a_sweep_are_runs_of_their_own_and_are_not_asked_twice(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        *("-m", "+experiment=quickstart", "dataset.limit=5", "tracker=none", "simulator.latency_s=0"),
        *("limits.concurrency=1,2", "request.temperature=0,1"),
    ]
    first = main(arguments)
    shown = capfd.readouterr().out
    table = shown[shown.rindex("\ncell ") :].strip().split("\n\n")[0].splitlines()
    folders = Command(here).runs()
    second = main(arguments)

    assert (first, second) == (0, 0)
    assert len(folders) == 4
    assert Command(here).runs() == folders
    assert [read_summary(folder)["reused"] for folder in folders] == [5] * 4
    assert [read_summary(folder)["rows"] for folder in folders] == [5] * 4
    assert table[0].split() == ["cell", "exit", "rows", "failed", "score", "accuracy", "cost", "rate"]
    assert [line.split()[:5] for line in table[1:]] == [
        [f"limits.concurrency={concurrency}", f"request.temperature={temperature}", "0", "5", "0"]
        for concurrency in (1, 2)
        for temperature in (0, 1)
    ]
    assert all("%" in line and "$" in line and line.endswith("/s") for line in table[1:])


def test_a_bad_cell_does_not_stop_the_others(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    exit_code = main(["-m", "prompt=hi", "model=simulated/echo,nonsense,simulated/other", "name=a,b", "tracker=none"])

    out, err = capfd.readouterr()
    assert exit_code == 1
    assert err.count("runner: model='nonsense' has no provider") == 1
    assert "Traceback" not in err
    results = {path.parent.parent.name: len(read_rows(path.parent)) for path in here.glob("runs/*/*/results.jsonl")}
    assert results == {"a": 1, "b": 1}
    assert len(list(here.glob("runs/*/*/results.jsonl"))) == 4
    lines = [line.split() for line in out.splitlines()]
    assert any(line == ["model=nonsense", "name=b", "2"] for line in lines)
    assert "model=nonsense name=a, model=nonsense name=b: model='nonsense' has no provider" in out
    assert any(line[:4] == ["model=simulated/other", "name=b", "0", "1"] for line in lines)


def test_a_later_cell_that_cannot_run_is_told_before_the_first_one_runs(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    prompts = 'prompt="{{ question }}","{{ quesion }}","{{ quesion }}!"'

    assert main(["-m", *ROWS, prompts, "tracker=none", "simulator.latency_s=0"]) == 1

    err = capfd.readouterr().err
    assert err.startswith("""prompt="{{ quesion }}" will not run: prompt names the field 'quesion'""")
    assert err.index("will not run") < err.index("100%")
    assert err.count("will not run") == 1


def test_what_is_wrong_with_all_cells_is_said_once(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    told = "scorers.a.kind='exct'"

    exit_code = main(["-m", *ROWS, "prompt=x", "scorers.a.kind=exct", "model=simulated/a,simulated/b", "tracker=none"])

    out, err = capfd.readouterr()
    assert exit_code == 1
    assert err.count(told) == 1
    assert "runner: as in #0\n" in err
    assert f"model=simulated/a, model=simulated/b: {told}" in out
    assert out.count(told) == 1


def test_a_cell_with_a_wrong_type_does_not_stop_the_others(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    exit_code = main(["-m", "prompt=hi", "tracker=none", "deployments.a.model=simulated/m", "deployments.a.weight=x,2"])

    out, err = capfd.readouterr()
    assert exit_code == 1
    assert "deployments.a.weight=x: a number" in err
    *_, first, second, why = out.splitlines()
    assert first.split()[:2] == ["deployments.a.weight=x", "2"]
    assert second.split()[:2] == ["deployments.a.weight=2", "0"]
    assert why.startswith("deployments.a.weight=x: deployments.a.weight=x: a number")


def test_several_texts_without_m_are_refused(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(['prompt="One: {{ a }}","Two: {{ a }}"', "tracker=none"]) == 2
    assert "add -m" in capfd.readouterr().err


def test_options_may_stand_anywhere(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["prompt=a,b", "-m", "tracker=none"]) == 0
    assert len(list(here.glob("runs/default/sweep-*/cells/*.json"))) == 2

    assert main(["prompt=a", "--info", "searchpath", "--config-dir=."]) == 0
    assert main(["prompt=a", "--info", "tracker=none"]) == 0
    assert "Traceback" not in capfd.readouterr().err


def test_a_sweep_of_one_cell_says_so(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["-m", "prompt=one, two,three", "tracker=none", "simulator.latency_s=0"]) == 0
    out, err = capfd.readouterr()
    assert err.startswith("-m, but one cell")
    assert out.splitlines()[-1].split()[:2] == ["#0", "0"]


@pytest.mark.parametrize("plan", ["plan=false", "plan=true"])
async def test_one_run_of_an_experiment_that_sweeps_says_so(command: Command, plan: str) -> None:
    command.write(
        "conf/experiment/mine.yaml",
        "# @package _global_\nprompt: x\nhydra:\n  sweeper:\n    params:\n      prompt: one,two\n",
    )
    mine = ("+experiment=mine", "tracker=none", plan)
    one = await command(*mine, "+scale=joblib")
    meant = await command(*mine, "prompt=one")

    assert (one.exit_code, meant.exit_code) == (0, 0), one.err
    assert one.err.startswith(
        "this is one run, though the experiment sweeps over prompt: with -m it runs every value\n"
        "hydra/launcher=joblib has no effect without -m: this is one run, in this process\n"
    )
    assert "-m" not in meant.err


def test_a_key_in_place_of_its_variable_is_not_shown(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["prompt=x", "model=openai/m", "api_key_env=sk-canary-0123456789"]) == 2
    err = capfd.readouterr().err
    assert "not the key" in err
    assert "canary" not in err


def test_a_sweep_that_cannot_be_composed_runs_nothing(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    exit_code = main(["-m", "prompt=hi", "limits.rmp=1,2"])

    assert exit_code == 2
    assert capfd.readouterr().err == "runner: unknown key 'limits.rmp'. Did you mean 'limits.rpm'?\n"
    assert Command(here).runs() == []


@pytest.mark.parametrize("launcher", ["basic", "joblib", "submitit_local"])
async def test_no_cell_breaks_a_launcher_whatever_it_raises(command: Command, launcher: str) -> None:
    if launcher != "basic":
        pytest.importorskip(f"hydra_plugins.hydra_{launcher.removesuffix('_local')}_launcher")
    command.write("odd.py", _ODD)
    done = await command(
        *("-m", f"hydra/launcher={launcher}", "dataset=python", "dataset.function=odd:rows", "prompt='{{ q }}'"),
        *("dataset.arguments.way=fine,odd,exit,base", "simulator.latency_s=0", "tracker=none"),
        PYTHONPATH=os.pathsep.join([command.environment["PYTHONPATH"], str(command.folder)]),
    )

    assert done.exit_code == 1, done.err
    assert "Traceback" not in done.err
    lines = [" ".join(line.split()) for line in done.out.splitlines()[-7:]]
    assert lines[0].startswith("dataset.arguments.way=fine 0 2 0 ")
    assert lines[1:4] == [f"dataset.arguments.way={way}" for way in ("odd 2", "exit 70", "base 70")]
    assert lines[4].startswith("dataset.arguments.way=odd: dataset.function=odd:rows raised after row 1: Odd: ")
    assert lines[5].startswith("dataset.arguments.way=exit: SystemExit: 3; a function of yours ends the process")
    assert lines[6].startswith("dataset.arguments.way=base: BaseException: ")


_ODD = """
import sys


class Odd(Exception):
    def __reduce__(self):
        raise TypeError("cannot be pickled")


def rows(way):
    yield {"q": "one"}
    if way == "odd":
        raise Odd("out of the ordinary")
    if way == "exit":
        sys.exit(3)
    if way == "base":
        raise BaseException("of another kind")
    yield {"q": "two"}
"""


async def test_a_launcher_that_gives_up_is_said_beside_the_cells(command: Command) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    command.write("odd.py", "import os\n\n\ndef rows():\n    os.kill(os.getpid(), 9)\n    yield {}\n")
    done = await command(
        *("-m", "hydra/launcher=joblib", "dataset=python", "dataset.function=odd:rows", "prompt=a,b", "tracker=none"),
        PYTHONPATH=os.pathsep.join([command.environment["PYTHONPATH"], str(command.folder)]),
    )

    assert done.exit_code == 1
    assert "the launcher failed with TerminatedWorkerError" in done.err
    assert "Traceback" not in done.err
    assert re.search(r"^prompt=[ab] +killed", done.out, re.M)


async def test_a_launcher_whose_workers_die_of_an_interrupt_has_not_failed(command: Command) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    command.write(
        "odd.py",
        "import os, signal, time\n\n\ndef rows():\n    os.kill(os.getppid(), signal.SIGINT)\n    time.sleep(1)\n"
        "    os.kill(os.getpid(), 9)\n    yield {}\n",
    )
    done = await command(
        *("-m", "hydra/launcher=joblib", "dataset=python", "dataset.function=odd:rows", "prompt=a,b", "tracker=none"),
        PYTHONPATH=os.pathsep.join([command.environment["PYTHONPATH"], str(command.folder)]),
    )

    assert done.exit_code == 130
    assert "interrupted: the same command goes on" in done.err
    assert "launcher failed" not in done.err


async def test_an_interrupt_ends_the_sweep_and_the_same_command_goes_on(command: Command) -> None:
    async with Simulator(SimulatorConfig(latency_s=0.5, latency_spread=0)) as simulator:
        arguments = (
            *("-m", "model=openai_like/echo", f"api_base={simulator.url}", "prompt=hi"),
            *("request.seed=1,2,3", "tracker=none"),
        )
        async with command.running(*arguments) as process:
            await progress_of(process)
            process.send_signal(signal.SIGINT)
            out, err = await process.communicate()
        done = await command(*arguments)
        ledger = await get(simulator.url.removesuffix("/v1") + "/ledger")

    assert process.returncode == 130
    assert b"Traceback" not in err
    assert b"but one cell" not in err
    *_, cell, why = out.decode().splitlines()
    assert cell.split()[:2] == ["request.seed=1", "130"]
    assert why.startswith("request.seed=1: interrupted")
    assert done.exit_code == 0
    assert ledger["requests"] == 3


async def test_the_cells_of_a_sweep_keep_their_limits_together(command: Command) -> None:
    arrivals: list[float] = []

    def answer(asked: Asked) -> web.Response:
        arrivals.append(time.monotonic())
        return shout(asked)

    command.write_rows("rows.jsonl", [{"n": n} for n in range(10)])
    async with serving(answer) as provider:
        done = await command(
            *("-m", "model=openai_like/a", f"api_base={provider.url}", 'prompt="Say {{ n }}","Tell {{ n }}"'),
            *("dataset=jsonl", "dataset.path=rows.jsonl", "tracker=none"),
            *("limits.rpm=300", "limits.max_request_burst=10"),
        )

    assert done.exit_code == 0, done.err
    assert len(arrivals) == 20
    assert arrivals[-1] - arrivals[0] > 1.9  # ten of 300 a minute at once, and the others at their pace


async def test_failures_that_are_left_alone_are_told_with_what_asks_them_again(command: Command) -> None:
    command.write_rows("rows.jsonl", [{"n": n} for n in range(4)])

    def answer(asked: Asked) -> web.Response:
        return refusal(400, "bad") if "3" in asked.text else shout(asked)

    async with serving(answer) as provider:
        asked = (
            *("model=openai_like/a", f"api_base={provider.url}", "prompt=Say {{ n }}", "tracker=none"),
            *("dataset=jsonl", "dataset.path=rows.jsonl"),
        )
        first = await command(*asked)
        again = await command(*asked, "retry_failed=false")

    assert len(provider.requests) == 4
    assert "The same command asks the failed rows again." in first.err
    assert "going on: 3 answers are there, and 1 failures that are left alone" in again.err
    assert "4/4 (100%)  failed 1  reused 3" in again.err
    assert "With retry_failed=true, the same command asks the failed rows again." in again.err
    assert re.search(r"^reused +3\nfailed +1$", again.out, re.M)


async def test_no_deployments_leaves_out_those_of_an_experiment_too(command: Command) -> None:
    command.write(
        "conf/experiment/mine.yaml",
        "# @package _global_\nprompt: x\ndeployments:\n  local: {model: openai_like/a, api_base: 'http://localhost:1/v1'}\n",
    )
    async with serving() as provider:
        mine = ("+experiment=mine", "deployments=none", "tracker=none")
        other = await command(*mine, "model=openai_like/b", f"api_base={provider.url}")
        own = await command(
            *mine, "deployments.far.model=openai_like/c", f"deployments.far.api_base={provider.url}", "name=own"
        )
        planned = await command(*mine, "model=simulated/echo", "plan=true")

    assert (other.exit_code, own.exit_code, planned.exit_code) == (0, 0, 0), other.err + own.err
    assert [asked.body["model"] for asked in provider.requests] == ["b", "c"]
    assert "no effect" not in other.err + planned.out


@pytest.mark.parametrize("swept", ["request.temperature=0,1", "budget.usd=2,50"])
async def test_a_plan_takes_a_sweep_for_one_where_the_run_does(command: Command, swept: str) -> None:
    planned = await command("prompt=x", "tracker=none", swept, "plan=true")
    run = await command("prompt=x", "tracker=none", swept)

    assert (planned.exit_code, planned.out) == (2, "")
    assert planned.err == run.err
    assert planned.err.startswith(f"runner: {swept}: these are several values to sweep over, which takes -m.")


async def test_attempts_that_were_to_be_retried_when_the_run_stopped_are_no_retries(command: Command) -> None:
    command.write_rows("rows.jsonl", [{"n": n} for n in range(4)])

    def answer(asked: Asked) -> web.Response:
        return refusal(500, "down") if "3" in asked.text else shout(asked)

    async with serving(answer) as provider:
        done = await command(
            *("model=openai_like/a", f"api_base={provider.url}", "prompt=Say {{ n }}", "tracker=none"),
            *("dataset=jsonl", "dataset.path=rows.jsonl", "retry.base_s=60", "budget.seconds=1"),
        )

    *_, closing = (line for line in done.err.splitlines() if "3/4 (75%)" in line)
    assert len(provider.requests) == 4
    assert "retries 0" in closing
    assert re.search(r"^left to ask +1\n(.*\n)*retries +0$", done.out, re.M), done.out


async def test_retries_never_fall_and_are_the_same_in_every_place_and_after_another_session(command: Command) -> None:
    command.write_rows("rows.jsonl", [{"n": n} for n in range(30)])
    is_down = True

    def answer(asked: Asked) -> web.Response:
        return refusal(500, "down") if is_down else shout(asked)

    async with serving(answer) as provider:
        arguments = (
            *("model=openai_like/a", f"api_base={provider.url}", "prompt=Say {{ n }}", "tracker=none"),
            *("dataset=jsonl", "dataset.path=rows.jsonl", "limits.concurrency=8", "retry.base_s=0.1"),
        )
        stopped = await command(*arguments, "budget.seconds=3")
        first = read_summary(command.run())["retries"]
        is_down = False
        finished = await command(*arguments)

    told = [int(found) for found in re.findall(r"retries (\d+)  ", stopped.err)]
    assert stopped.exit_code == 4
    assert told == sorted(told)
    assert told[-1] == first > 0
    assert re.search(rf"^retries +{first}\b", stopped.out, re.M)
    assert finished.exit_code == 0
    assert read_summary(command.run())["retries"] == first


async def test_why_a_run_stopped_is_kept_in_its_log_its_summary_and_a_report(command: Command) -> None:
    command.write_rows("rows.jsonl", [{"n": n} for n in range(20)])
    async with serving(lambda asked: refusal(404, "nothing", "no <b>such</b> page")) as provider:
        stopped = await command(
            *("model=openai_like/a", f"api_base={provider.url}", "prompt=Say {{ n }}", "tracker=none"),
            *("dataset=jsonl", "dataset.path=rows.jsonl"),
        )

    why = read_summary(command.run())["why"]
    [facts] = await read_runs([command.run()])
    page = render([facts], title="of a run that stopped")
    assert stopped.exit_code == 4
    assert why.startswith("NotFoundError on one row after the other: ")
    assert why in stopped.err
    assert why in (command.run() / "runner.log").read_text(encoding="utf-8")
    assert f"<p>{escape(why)}</p>" in page


async def test_answers_of_another_run_are_reused_while_the_run_is_on_too(command: Command) -> None:
    rows = "yield from ({'q': n} for n in range(300))\n    time.sleep(1)\n    yield {'q': 'x'}"
    command.write("slow.py", f"import time\ndef rows():\n    {rows}\n")
    asked = ("dataset=python", "dataset.function=slow:rows", "prompt={{ q }}", "tracker=none", "dedupe=always")
    async with serving() as provider:
        model = ("model=openai_like/a", f"api_base={provider.url}")
        await command(*asked, *model, "name=first")
        done = await command(*asked, *model, "name=second", "reuse=true")

    assert len(provider.requests) == 301
    assert "reused" in done.err
    assert "deduplicated" not in done.err


async def test_the_time_that_is_left_is_not_that_of_a_burst(command: Command) -> None:
    command.write_rows("rows.jsonl", [{"n": n} for n in range(40)])
    async with serving() as provider:
        done = await command(
            *("model=openai_like/a", f"api_base={provider.url}", "prompt=Say {{ n }}", "tracker=none"),
            *("dataset=jsonl", "dataset.path=rows.jsonl", "limits.rpm=600", "limits.max_request_burst=30"),
        )

    begun = next(line for line in done.err.splitlines() if "/40 (" in line)
    assert done.exit_code == 0
    assert "left" in begun
    assert "left 0s" not in begun  # ten are left, of ten a second


async def test_a_sweep_that_goes_on_counts_what_its_cells_sent_against_a_day(command: Command) -> None:
    command.write_rows("rows.jsonl", [{"n": n} for n in range(20)])
    async with serving() as provider:
        arguments = (
            *("-m", "model=openai_like/a", f"api_base={provider.url}", 'prompt="Say {{ n }}","Tell {{ n }}"'),
            *("dataset=jsonl", "dataset.path=rows.jsonl", "tracker=none", "limits.rpd=25", "limits.concurrency=4"),
        )
        first = await command(*arguments)
        again = await command(*arguments)

    assert (first.exit_code, again.exit_code) == (1, 1)
    assert len(provider.requests) == 25
    assert "limits.rpd=25 is used up" in again.err


def test_the_sweep_table_on_a_terminal_shows_every_cell() -> None:
    terminal = Terminal()
    summary = {"rows": 8, "failed": 1, "scores": {"exact": {"mean": 0.5, "n": 8}}, "cost_usd": 1.5, "rows_per_s": 9}
    cells = [
        {"name": "model=a", "exit_code": 3, "summary": summary},
        {"name": "model=\x1b[31m[bold]", "exit_code": 2, "summary": {}},
    ]

    sweep_table(cells, stream=terminal)

    lines = re.sub(r"\x1b\[[\d;]*m", "", terminal.getvalue()).splitlines()
    assert [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "model" in line] == [
        ["model=a", "3", "8", "1", "50.0%", "$1.50", "9.0/s"],
        ["model=\\x1b[31m[bold]", "2", "", "", "", "", ""],
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


# What is shown, and what is imported for it


@pytest.mark.parametrize("samples", [1, 3])
def test_a_run_without_a_dataset_shows_its_answers(here: Path, capfd: pytest.CaptureFixture[str], samples: int) -> None:
    main(["prompt=one\n\x1b[2Jtwo", f"samples={samples}", "tracker=none"])

    assert capfd.readouterr().out.startswith("echo: one\n\\x1b[2Jtwo\n\n" * samples + "rows")


def test_more_answers_are_in_the_file_only(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    main(["prompt=one", "samples=4", "tracker=none"])

    assert "echo" not in capfd.readouterr().out


async def test_an_output_without_umlauts_is_no_trouble(command: Command) -> None:
    done = await command("prompt=naïve", "tracker=none", PYTHONIOENCODING="ascii")

    assert (done.exit_code, done.out.splitlines()[0]) == (0, r"echo: na\xefve")


def test_an_output_that_nobody_reads_is_no_trouble(command: Command) -> None:
    line = f"{sys.executable} -m runner prompt=x tracker=none | true"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line],
        cwd=command.folder,
        env=command.environment,
        capture_output=True,
        check=False,
    )

    assert (done.returncode, b"Traceback" in done.stderr) == (0, False)
    assert not list(command.folder.rglob("traceback.txt"))


async def test_a_refused_question_shows_why(command: Command) -> None:
    async with serving(lambda asked: refusal(400, "bad", "this \x1b model cannot")) as provider:
        done = await command("model=openai_like/m", f"api_base={provider.url}", "prompt=x", "tracker=none")

    assert done.exit_code == 3
    assert done.out.startswith("BadRequestError: HTTP 400: this \\x1b model cannot\n")


async def test_a_model_that_a_server_does_not_have_is_told_with_the_keys_that_name_both(command: Command) -> None:
    async with serving(lambda asked: refusal(404, "model_not_found")) as provider:
        alone = await command("model=hosted_vllm/m", f"api_base={provider.url}", "prompt=x", "tracker=none")
        rack = ("deployments.rack.model=hosted_vllm/m", f"deployments.rack.api_base={provider.url}")
        one_of_several = await command(*rack, "prompt=x", "tracker=none")

    assert "Check model=hosted_vllm/m and api_base." in alone.err
    assert "Check deployments.rack.model=hosted_vllm/m and deployments.rack.api_base." in one_of_several.err


async def test_a_wrong_key_is_told_once_with_the_variable_it_comes_from(command: Command) -> None:
    async with serving(lambda asked: refusal(401, "invalid_api_key")) as provider:
        done = await command("model=hosted_vllm/m", f"api_base={provider.url}", "prompt=x", "tracker=none")

    assert done.exit_code == 4
    assert set(re.findall(r"retries +(\d+)", done.out + done.err)) == {"0"}
    assert done.err.count("HTTP 401") == 1
    assert "Set the key in HOSTED_VLLM_API_KEY." in done.err
    assert done.err.endswith("Once that is mended, the same command goes on from here.\n")


HEAVY = {"litellm", "wandb", "aiohttp", "rich", "jinja2", "openai", "pandas", "numpy", "runner.experiment"}


@pytest.mark.parametrize(
    ("arguments", "needed"),
    [
        (["--help"], set()),
        (["--cfg", "job"], set()),
        (["prompt=x", "tracker=none"], {"aiohttp", "jinja2", "runner.experiment"}),
    ],
)
def test_only_what_is_needed_is_imported(here: Path, arguments: list[str], needed: set[str]) -> None:
    code = (
        "import atexit, sys; from runner.cli import main;"
        "atexit.register(lambda: print('\\n' + ' '.join(sys.modules), file=sys.stderr));"
        "sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=Command(here).environment, capture_output=True, check=True
    )

    assert set(done.stderr.decode().splitlines()[-1].split()) & HEAVY == needed


# Texts on the command line

TEXTS = [
    'Hello, {{ name }}: {a} = "b"',
    "It's 5 o'clock, isn't it?",
    "'quoted' and \"quoted\"",
    "a=b, c=[1, 2], (d)",
    "costs ${price}, or $5 \\",
    "C:\\new\\",
    "1, 2, 3",
    "",
    "  spaces  ",
    "two\nlines\tand a tab",
    "naïve – 日本語 🙂",
    "choice(a,b)",
    "# no comment",
]


@pytest.mark.parametrize("key", ["prompt", "system"])
@pytest.mark.parametrize("multirun", [False, True])
@pytest.mark.parametrize("text", TEXTS)
def test_a_text_needs_no_quoting(key: str, multirun: bool, text: str) -> None:
    if multirun and text == "choice(a,b)":
        return

    assert arrived(key, text, multirun=multirun) == text


@settings(deadline=None)
@given(st.text(st.one_of(st.sampled_from("\\${}'\" ,=:[]()#\n\tab?"), st.characters(exclude_categories=["Cs"]))))
@example("null ")
def test_any_text_arrives_as_it_was_written(text: str) -> None:
    if text in ("???", "null") or {text[:1], text[-1:]} <= {"'", '"'}:
        return  # Hydra's own: a missing value, no value, and texts in quotes
    if text.count("{{") > 1:
        return  # it may read like several

    assert arrived("prompt", text) == text


def test_quotes_are_taken_off_as_hydra_does() -> None:
    assert arrived("prompt", "'Hello, you'") == "Hello, you"
    assert arrived("prompt", '"Hello, you"') == "Hello, you"


def test_a_multirun_sweeps_over_quoted_texts() -> None:
    [argument] = [each for each in friendly(["-m", "prompt='Say hi, you','Say bye'"]) if each != "-m"]

    assert OverridesParser.create().parse_override(argument).is_sweep_override()


@pytest.mark.parametrize("multirun", [False, True])
@pytest.mark.parametrize(
    "text",
    [
        "Sort: {{ text }},Label: {{ text }}",
        "Sort {{ a }},\nLabel {{ a }},Name {{ b }}",
        '["Sort: {{ text }}","Label: {{ text }}"]',
        '["Sort: {{ text }}", "Label: {{ text }}"]',
        '"Sort: {{ text }}",Label: {{ text }}',
        "One,{{ text }},Two {{text}}",
        "Label it,please: {{ text }},Sort it: {{ text }}",
        "Delivery,billing or account? {{ text }},Which is it: {{ text }}",
        "{{ text }}: billing,delivery,which?,{{ text }}: one or two?",
    ],
)
def test_a_text_that_reads_like_several_is_refused_with_both_ways_out(text: str, multirun: bool) -> None:
    with pytest.raises(ConfigError) as caught:
        arrived("prompt", text, multirun=multirun)

    compare, one = re.findall(r"'(prompt=.*?)'", str(caught.value))
    _, sweep = friendly(["-m", compare])
    assert str(caught.value).startswith("prompt reads like 2 texts")
    assert OverridesParser.create().parse_override(sweep).is_sweep_override()
    assert arrived("prompt", one.partition("=")[2].replace("…", "a {{ b }},c {{ d }}")) == "a {{ b }},c {{ d }}"


@pytest.mark.parametrize("multirun", [False, True])
def test_quotes_in_a_template_do_not_end_a_quoted_text(multirun: bool) -> None:
    assert arrived("prompt", '"It\'s {{ row["the text"] }}"', multirun=multirun) == 'It\'s {{ row["the text"] }}'
    assert arrived("prompt", '"a" and {{ row["b"] }}', multirun=multirun) == '"a" and {{ row["b"] }}'


@pytest.mark.parametrize(
    "texts",
    [
        ('Sort: {{ row["a b"] }}', '{{ row["a b"] }}: which?'),
        ('{{ d("a","b") }}', "{{ d('a','b') }}"),
        ('{{ text | replace("\\n", " ") }}', 'A:\\n{{ text | replace("\\\\n", "b") }}'),
    ],
)
def test_a_multirun_sweeps_over_quoted_texts_with_quotes_in_their_templates(texts: tuple[str, str]) -> None:
    _, argument = friendly(["-m", f'prompt="{texts[0]}", "{texts[1]}"'])

    override = OverridesParser.create().parse_override(argument)
    assert [getattr(each, "text", each) for each in override.sweep_iterator()] == list(texts)


@pytest.mark.parametrize(
    "text",
    [
        '"Sort: {{ a }}","Label: {{ a }}"',
        "'Sort: {{ a }}', 'Label: {{ a }}'",
        '"Sort: {{ row["a"] }}","{{ row["a"] }}: which?"',
    ],
)
def test_several_texts_without_a_multirun_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="add -m"):
        arrived("prompt", text)


@pytest.mark.parametrize("multirun", [False, True])
@pytest.mark.parametrize(
    "text",
    [
        "Label: {{ subject }}, {{ text }}",
        "{{ a }},{{ b }},{{ c }}",
        '["{{ a }}","{{ b }}"]',
        "[{{ a }} and more, {{ b }} and more]",
        "{{ text }}: Label it billing,delivery,account",
        "{{ labels|join(',') }}: which of them is {{ text }}?",
        "Of billing,delivery,account: {{ text }}",
        "Row: {{ a }},{{ b }},{{ c }} of a table",
        "{% if a %}A{% endif %},{{ b }} {% if c %}C{% endif %},{{ d }} and so on",
        "{% if a %}A,{{ a }} {% endif %}{# of one,{{ b }} #}is {{ c }}",
    ],
)
def test_a_comma_does_not_make_several_texts_of_one(text: str, multirun: bool) -> None:
    assert arrived("prompt", text, multirun=multirun) == text


def test_a_multirun_sweeps_over_names_in_any_script() -> None:
    [argument] = [each for each in friendly(["-m", "model=simulated/a,simulated/実験"]) if each != "-m"]

    override = OverridesParser.create().parse_override(argument)
    assert [getattr(each, "text", each) for each in override.sweep_iterator()] == ["simulated/a", "simulated/実験"]
    assert arrived("name", "a,実験") == "a,実験"


def arrived(key: str, text: str, *, multirun: bool = False) -> Any:
    """What the configuration holds after ``key=text`` on the command line."""
    *_, argument = friendly([*(["-m"] if multirun else []), f"{key}={text}"])
    parser = OverridesParser.create()
    if multirun:  # each cell gets its overrides spelt anew
        argument = f"{key}={parser.parse_override(argument).get_value_element_as_str()}"
    config = OmegaConf.structured(RunnerConfig)
    OmegaConf.update(config, key, parser.parse_override(argument).value())
    return getattr(OmegaConf.to_object(config), key)


def test_what_hydra_would_not_parse_is_taken_as_it_is(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    exit_code = main(["name=a=b", r"prompt=Say {this}: 'it''s' ${x} \\", "tracker=none"])

    out, _ = capfd.readouterr()
    assert exit_code == 0
    assert out.startswith(r"echo: Say {this}: 'it''s' ${x} \\" + "\n\n")
    assert Command(here).run().parent == here / "runs" / "a=b"


def test_a_key_with_dashes_is_shown_the_right_way(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--prompt=hello"]) == 2
    assert "write prompt=" in capsys.readouterr().err
