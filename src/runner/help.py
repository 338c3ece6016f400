"""What ``--help`` and ``--version`` print. Hydra's own help takes a second to list the groups."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import version as installed_version
from pathlib import Path

_HELP = """\
runner: throttled, resumable, measured LLM jobs.

python -m runner [-m] [+experiment=NAME] [key=value ...]

Try
  python -m runner prompt="Say hello in one sentence."                   simulated model: no key, no network
  python -m runner +experiment=quickstart                                dataset in, scored results out
  python -m runner model=openai/gpt-4.1-mini prompt="Say hello."         any LiteLLM model
  python -m runner model=hosted_vllm/llama api_base=http://localhost:8000/v1 \\
      dataset=jsonl dataset.path=rows.jsonl prompt="Summarize: {{ text }}" limits.concurrency=64
  python -m runner -m +experiment=quickstart request.temperature=0,0.7   a sweep: one run a cell
  python -m runner.doctor +experiment=quickstart                         keys, servers, rows, disk: what to change

Keys
  model, api_base, api_key_env       what answers
  dataset, dataset.path, .limit      what is asked: the rows of a file (jsonl, csv, parquet), files, a function
  task=embed|transcribe              vectors of texts, texts of recordings, instead of answers
  prompt, system, request.KEY        how: Jinja2 templates over the row's fields; temperature, max_tokens, …
  limits.concurrency, .rpm, .tpm     how fast
  scorers.NAME.kind, .target         how answers are scored against the row
  name, runs_dir                     where results go: runs/NAME/RUN_ID/
  tracker=wandb|none                 where metrics go

The same command goes on where it was interrupted. Exit codes: 0 finished, 2 bad configuration, 3 some rows
failed, 4 stopped (wrong key, disk full), 130 or 143 interrupted.

Groups (GROUP=OPTION; each file in conf/ says what its keys mean)
"""

_MORE = """
More: --cfg job (the configuration as composed), --info searchpath (where it is looked for), --hydra-help, and the
README.
"""


_ADDED = {"experiment", "scale"}
"""Groups that have no default, so that they are chosen with a plus sign."""


def help_text(folders: Iterable[Path]) -> str:
    """The help, with the groups and options that are found in these configuration folders."""
    options: dict[str, set[str]] = {}
    for folder in folders:
        for file in folder.glob("*/*.yaml"):
            options.setdefault(file.parent.name, set()).add(file.stem)
    groups = [
        f"  {'+' if group in _ADDED else ''}{group}={'|'.join(sorted(names))}"
        for group, names in sorted(options.items())
    ]
    return _HELP + "\n".join(groups) + "\n" + _MORE


def version_text() -> str:
    """``runner`` and its version."""
    return f"runner {installed_version('runner')}\n"
