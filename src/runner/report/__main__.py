"""``python -m runner.report RUN_OR_SWEEP… [-o FILE] [--wandb]``."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

from runner.errors import BAD_CONFIG, FINISHED, ConfigError, RunnerError
from runner.progress import printable, say
from runner.report import read_comparisons, read_runs, render
from runner.results import replace_file


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report and say where it is. A folder without a run is 2, Ctrl-C is 130."""
    parser = argparse.ArgumentParser(
        prog="python -m runner.report",
        description="Write one self-contained HTML file about runs or sweeps: summary, plots, failures, rows.",
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="RUN_OR_SWEEP", help="folder below runs/")
    parser.add_argument("--output", "-o", type=Path, default=Path("report.html"), help="(default: %(default)s)")
    parser.add_argument("--wandb", action="store_true", help="make a W&B Report of them as well")
    parser.add_argument("--title", help="heading (default: the folders' names)")
    given = parser.parse_args(argv)
    title = given.title or ", ".join(f"{path.absolute().parent.name}/{path.absolute().name}" for path in given.paths)
    try:
        if given.output.suffix.lower() not in ("", ".html", ".htm"):
            raise ConfigError(f"--output {given.output}: a report is one HTML file: name it {given.output.stem}.html")
        if given.wandb:
            from runner.report.wandb_report import check_extra, publish

            check_extra()
        runs = asyncio.run(read_runs(given.paths))
        comparisons = asyncio.run(read_comparisons(runs))
        page = render(runs, title=title, comparisons=comparisons)
        replace_file(given.output, page.encode("utf-8", "backslashreplace"))
        print(given.output)
        if given.wandb:
            spec = given.output.with_suffix(".wandb.json")
            published = publish(runs, comparisons, paths=given.paths, title=title, spec=spec)
            print(published.url or f"{published.spec}\n{published.why}. With W&B in reach, the same command saves it.")
    except RunnerError as error:
        say(sys.stderr, f"report: {printable(str(error))}")
        return BAD_CONFIG
    except OSError as error:
        say(sys.stderr, f"report: {given.output} cannot be written: {error.strerror or error}")
        return BAD_CONFIG
    except KeyboardInterrupt:
        return 130
    return FINISHED


if __name__ == "__main__":
    sys.exit(main())
