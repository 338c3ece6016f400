"""``python -m runner.report RUN_OR_SWEEP… [--output FILE]``."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

from runner.errors import BAD_CONFIG, FINISHED, RunnerError
from runner.progress import printable
from runner.report import read_comparisons, read_runs, render
from runner.results import replace_file


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report and say where it is. A folder without a run is 2."""
    parser = argparse.ArgumentParser(
        prog="python -m runner.report",
        description="Write one self-contained HTML file about runs or sweeps: summary, plots, failures, rows.",
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="RUN_OR_SWEEP", help="folder below runs/")
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="(default: %(default)s)")
    parser.add_argument("--title", help="heading (default: the folders' names)")
    given = parser.parse_args(argv)
    title = given.title or ", ".join(f"{path.absolute().parent.name}/{path.absolute().name}" for path in given.paths)
    try:
        runs = asyncio.run(read_runs(given.paths))
        page = render(runs, title=title, comparisons=asyncio.run(read_comparisons(runs)))
        replace_file(given.output, page.encode("utf-8", "backslashreplace"))
    except RunnerError as error:
        print(f"report: {printable(str(error))}", file=sys.stderr)
        return BAD_CONFIG
    except OSError as error:
        print(f"report: {given.output} cannot be written: {error.strerror or error}", file=sys.stderr)
        return BAD_CONFIG
    print(given.output)
    return FINISHED


if __name__ == "__main__":
    sys.exit(main())
