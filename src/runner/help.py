"""What ``--help`` and ``--version`` print. Hydra's own help takes a second to list the groups."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator
from importlib.metadata import version as installed_version
from pathlib import Path
from textwrap import wrap
from typing import TypeAlias

Lines: TypeAlias = Iterable[tuple[str, str]]
"""What to write, and what it means."""

_TRY: Lines = (
    ('python -m runner prompt="Say hello in one sentence."', "the simulated model: no key, no network"),
    ("python -m runner +experiment=quickstart", "a dataset in, scored results out"),
    ('python -m runner model=openai/gpt-4.1-mini prompt="Say hello."', "any LiteLLM model; its key in .env"),
    (
        "python -m runner model=hosted_vllm/llama api_base=http://localhost:8000/v1 dataset=jsonl"
        ' dataset.path=rows.jsonl prompt="Summarize: {{ text }}" limits.concurrency=64 name=mine',
        "rows and a server of your own",
    ),
    ("python -m runner -m +experiment=quickstart request.temperature=0,0.7", "a sweep: one run a cell"),
)

_KEYS: Lines = (
    ("model, api_base, api_key_env", "what answers; several servers: deployments.LABEL.model, .api_base"),
    ("dataset, dataset.path, .limit", "what is asked: the rows of a file (jsonl, csv, parquet), files, a function"),
    ("prompt, system, request.KEY", "how: templates over the row's fields, {{ text }}; temperature, max_tokens, …"),
    ("task=embed|transcribe|bench", "vectors, transcripts or a measurement instead of answers"),
    ("limits.concurrency, .rpm, .tpm", "how fast; concurrency=auto finds out"),
    ("budget.usd, .tokens, .seconds", "where to stop"),
    ("plan=true, pilot=50", "what it costs: before it begins, or after a few rows"),
    ("scorers.NAME.kind, .target", "how answers are scored against the row"),
    ("resume, retry_failed, reuse", "whether to go on, ask failed rows again, take over other runs' answers"),
    ("name, runs_dir", "where results go: runs/NAME/RUN_ID/"),
    ("tracker=wandb|none", "where metrics go"),
)

_COMPANIONS: Lines = (
    ("python -m runner.doctor ARGUMENTS", "looks at keys, servers, rows, disk and W&B, and says what to change"),
    ("python -m runner.export runs/NAME -o rows.csv", "results as CSV, Parquet or JSON lines"),
    ("python -m runner.report runs/NAME", "an HTML page with plots, of a run or a sweep"),
    ("python -m runner.simulator --port 8900", "the simulated provider on its own"),
)

_EXIT_CODES: Lines = (
    ("0", "finished"),
    ("1", "a sweep in which not every run finished"),
    ("2", "bad configuration or input, nothing was sent"),
    ("3", "finished, and some rows failed: the same command asks them again"),
    ("4", "stopped (budget, wrong key, dead server, full disk): the same command goes on"),
    ("70", "a fault of runner itself: the run's folder holds a traceback.txt"),
    ("130, 143", "interrupted: the same command goes on"),
)

_MORE: Lines = (
    ("--cfg job", "the configuration as composed"),
    ("--info searchpath", "where it is looked for"),
    ("--version", ""),
    ('eval "$(runner -sc install=bash)"', "completion of keys and options for `runner`; also zsh and fish"),
)

ADDED = {"experiment", "scale"}
"""Groups that have no default, so that they are chosen with a plus sign."""

_WIDEST = 110


def help_text(folders: Iterable[Path], *, width: int | None = None) -> str:
    """The help, with the groups and options that are found in these configuration folders.

    Args:
        width: In columns; None: the terminal's.
    """
    width = min(width or shutil.get_terminal_size((_WIDEST, 24)).columns, _WIDEST)
    sections = {
        "Try": _TRY,
        "Keys (each has a comment in conf/)": _KEYS,
        "Groups: GROUP=OPTION": _groups(folders),
        "Beside it": _COMPANIONS,
        "Exit codes": _EXIT_CODES,
        "More": _MORE,
    }
    parts = [
        "runner: throttled, resumable, measured LLM jobs.",
        "python -m runner [-m] [+experiment=NAME] [KEY=VALUE …]",
    ]
    parts += ["\n".join([title, *_laid_out(lines, width)]) for title, lines in sections.items()]
    return "\n\n".join(parts) + "\n"


def version_text() -> str:
    """``runner`` and its version."""
    return f"runner {installed_version('runner')}\n"


def _groups(folders: Iterable[Path]) -> Lines:
    options: dict[str, set[str]] = {}
    for folder in folders:
        for file in folder.glob("*/*.yaml"):
            options.setdefault(file.parent.name, set()).add(file.stem)
    for group, names in sorted(options.items()):
        yield f"{'+' if group in ADDED else ''}{group}=", " | ".join(sorted(names))


def _laid_out(lines: Lines, width: int) -> Iterator[str]:
    """In two columns; what is too long for the first, or a terminal too narrow for two, has its meaning below."""
    lines = list(lines)
    column = max((len(left) for left, _ in lines if len(left) <= width * 9 // 20), default=0)
    for left, right in lines:
        beside = len(left) <= column
        indent = 4 + column if beside else 6
        meaning = _wrapped(right, max(20, width - indent))
        if beside:
            yield f"  {left:<{column}}  {meaning.pop(0) if meaning else ''}".rstrip()
        else:
            yield from _command(left, width)
        yield from (f"{'':<{indent}}{line}" for line in meaning)


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of ``width``, with ``{{ field }}`` in one piece."""
    whole = re.sub(r"\{\{.*?\}\}", lambda field: field[0].replace(" ", "\0"), text)
    lines = wrap(whole, width, break_long_words=False, break_on_hyphens=False)
    return [line.replace("\0", " ") for line in lines]


def _command(text: str, width: int) -> Iterator[str]:
    """A command line, broken as a shell takes it: not within quotes."""
    whole = re.sub('"[^"]*"', lambda quoted: quoted[0].replace(" ", "\0"), text)
    lines = wrap(whole, width - 4, initial_indent="  ", subsequent_indent="      ", break_on_hyphens=False)
    yield " \\\n".join(lines).replace("\0", " ")
