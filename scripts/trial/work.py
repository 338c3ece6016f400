"""Work for a trial: questions whose answers are known, as each task asks them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runner.config import SimulatorConfig
from runner.simulator.model import AnswerKey, Model

GROUP = 8
"""Texts in one embedding request."""


class Generate:
    """Prompts, answered with their echo."""

    arguments: tuple[str, ...] = ("dataset=jsonl", "dataset.path=rows.jsonl", "request.max_tokens=16")
    group = 1
    bounded = True  # what an attempt can cost is known

    def lay(self, folder: Path, prompts: Sequence[str]) -> None:
        """Make ``prompts`` the dataset."""
        rows = "".join(f"{json.dumps({'prompt': prompt, 'name': prompt})}\n" for prompt in prompts)
        (folder / "rows.jsonl").write_text(rows, encoding="utf-8")

    def is_answer(self, row: dict[str, Any], prompt: str) -> bool:
        return bool(row["output_text"] == f"echo: {prompt}")


class Embed(Generate):
    """Texts, each with the vector that is its own."""

    arguments = ("task=embed", f"task.micro_batch_size={GROUP}", "dataset=jsonl", "dataset.path=rows.jsonl")
    group = GROUP
    model = Model(SimulatorConfig(), AnswerKey({}))

    def is_answer(self, row: dict[str, Any], prompt: str) -> bool:
        return bool(row["embedding"] == self.model.vector("echo", prompt))


class Transcribe:
    """Recordings, of which the server repeats the names."""

    arguments = ("task=transcribe", "dataset=files", "dataset.path=recordings")
    group = 1
    bounded = False

    def lay(self, folder: Path, prompts: Sequence[str]) -> None:
        shutil.rmtree(folder / "recordings", ignore_errors=True)
        (folder / "recordings").mkdir()
        for prompt in prompts:
            (folder / "recordings" / prompt).write_text(prompt, encoding="utf-8")

    def is_answer(self, row: dict[str, Any], prompt: str) -> bool:
        return bool(row["text"] == f"echo: {prompt}")


WORK: dict[str, Generate | Transcribe] = {"generate": Generate(), "embed": Embed(), "transcribe": Transcribe()}
