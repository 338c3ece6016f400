"""A notebook in a real kernel, whose event loop runs all the time."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from harness import SOURCES

CELLS = [
    'from runner import LMClient\nclient = LMClient(model="simulated/echo", max_parallel_requests=4)',
    'print(client.generate("hello").output_text)',
    'batch = client.generate_batch(f"prompt {n}" for n in range(20))\nprint(len(batch), batch[19].output_text)',
    'print((await client.agenerate("hello again")).output_text)',
    'import asyncio\nprint([str(r) for r in await asyncio.gather(client.agenerate("a"), client.agenerate("b"))])',
    'print(len((await client.aembed_batch(["a", "b", "c"]))[2].embedding), len(client.embed("a").embedding))',
    "print([str(result) for result in (await client.agenerate_batch(['x', 'y'])).results])",
    "client.close()",
    'try:\n    await client.agenerate("too late")\nexcept RuntimeError as error:\n    print(error)',
]

PRINTED = [
    "",
    "echo: hello\n",
    "20 echo: prompt 19\n",
    "echo: hello again\n",
    "['echo: a', 'echo: b']\n",
    "16 16\n",
    "['echo: x', 'echo: y']\n",
    "",
    "this LMClient is closed: make a new one\n",
]


def test_both_twins_work_in_one_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{SOURCES}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    cells = [nbformat.v4.new_code_cell(cell) for cell in CELLS]  # type: ignore[no-untyped-call]
    notebook = nbformat.v4.new_notebook(cells=cells)  # type: ignore[no-untyped-call]

    NotebookClient(notebook, timeout=60, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()

    assert ["".join(output["text"] for output in cell.outputs) for cell in notebook.cells] == PRINTED
    assert {output["name"] for cell in notebook.cells for output in cell.outputs} == {"stdout"}
