"""``python -m runner.export``: what runs have answered so far, as one file; whether they are at work or not."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections import Counter
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from runner.database import RUN_DATABASE
from runner.database_url import path_of, results_path
from runner.dataset.paths import suggestion
from runner.errors import BAD_CONFIG, ConfigError, StoreError
from runner.progress import printable, say
from runner.prompt_rows import STORE_KIND, holds_rows, read_rows
from runner.recorded import folder_of, labels_of, settings_of
from runner.results import replacing, result_rows
from runner.shards import find_shards, opened
from runner.store import Store
from runner.sweep import Sweep, cell_names, place_of
from runner.tables import Columns, Csv, JsonLines, Parquet, Writer

FORMATS = ("jsonl", "csv", "parquet")


def main(argv: Sequence[str] | None = None) -> int:
    """Export, and return the exit code: 0, or 2 where a run or the file cannot be used."""
    arguments = _parser().parse_args(argv)
    output: str = arguments.output
    try:
        runs = find_runs(map(Path, arguments.runs))
        form = _form(arguments.format, output)
        with _opened(output, runs) as file:
            count = asyncio.run(export_runs(runs, file, form))
    except BrokenPipeError:  # the reader has seen enough; what is buffered would fail once more at the exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ConfigError, StoreError) as error:
        return _complain(str(error))
    except OSError as error:
        return _complain(f"{output}: it cannot be written ({error.strerror or error})")
    except KeyboardInterrupt:
        return 130
    if output != "-":
        say(sys.stderr, f"{count:,} rows of {len(runs):,} {'run' if len(runs) == 1 else 'runs'}: {output}")
    return 0


async def export_jsonl(db_url: str | Path, out: str | Path = "results.jsonl") -> int:
    """Write the answers in a database to ``out``, a JSON object a line; the file is replaced as a whole.

    Those of `prompt_map` are ``{"idx", "prompt", "result"}``; where its cache was torn down, they come from the
    results database beside it. Those of a run are the lines of ``results.jsonl``, failed rows included.

    Args:
        db_url: ``sqlite+aiosqlite:///my_runs.db``, or a path: of a database, or of a run's folder.
        out: The file to write.

    Returns:
        How many lines it has.

    Raises:
        ConfigError, StoreError: There is no such database.
    """
    path = path_of(db_url, key="db_url")
    if path.is_dir():
        path = path / RUN_DATABASE
    table = path if path.exists() else results_path(path)
    count = 0
    with replacing(Path(out)) as file:
        writer = JsonLines(file)
        if holds_rows(table):
            for answer in read_rows(table):
                if answer.result is not None:
                    writer.write({"idx": answer.idx, "prompt": answer.prompt, "result": answer.result})
                    count += 1
            return count
        async with await Store.open_readonly(path) as store:
            ours = (await store.meta()).get("kind") == STORE_KIND
            async with aclosing(_prompt_rows(store) if ours else result_rows(store)) as rows:
                async for row in rows:
                    writer.write(row)
                    count += 1
    return count


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedRun:
    """The databases of a run, and what it is called."""

    name: str  # run id; the whole path where two runs share one; of shards, what sets them apart
    stores: Sequence[Path]  # one, or one a shard


def find_runs(paths: Iterator[Path]) -> list[ExportedRun]:
    """The runs at ``paths``: a run's folder, one with runs below it, a sweep's, or a database.

    The shards of a dataset, which are cells of a sweep, are one run.

    Raises:
        ConfigError: There is none at one of them.
    """
    runs: list[ExportedRun] = []
    stores: dict[Path, str] = {}  # what sets each apart in its sweep
    for path in map(folder_of, paths):
        sharded, found = _of_sweep(path)
        if path.is_file():
            found.setdefault(path, "")
        names = cell_names(path)
        for folder in sorted((store.parent for store in path.rglob(RUN_DATABASE)), key=partial(place_of, names)):
            found.setdefault(folder / RUN_DATABASE, names.get(folder.name, ""))
        if not found and not sharded:
            is_output = path.suffix.removeprefix(".") in FORMATS and not path.is_dir()
            way_out = f" Did you mean -o {path}?" if is_output else suggestion(str(path)) if not path.exists() else ""
            raise ConfigError(
                f"{path}: no run is there; name a run's folder (runs/NAME/RUN_ID), a sweep's (runs/NAME/sweep-ID), or"
                f" one with runs in it (runs/NAME).{way_out}"
            )
        runs += sharded
        stores |= {store: stores.get(store) or name for store, name in found.items()}
    return [*runs, *(ExportedRun(name=name, stores=[store]) for store, name in _named(stores))]


def _named(stores: Mapping[Path, str]) -> Iterator[tuple[Path, str]]:
    """Databases with names that tell them apart."""
    others = [store for store, name in stores.items() if not name and store.name == RUN_DATABASE]
    labels = dict(zip(others, labels_of([store.parent for store in others]), strict=True))
    names = {store: name or labels.get(store, store.stem) for store, name in stores.items()}
    shared = {name for name, count in Counter(names.values()).items() if count > 1}
    for store, name in names.items():
        yield store, str(store) if name in shared else name


def _of_sweep(path: Path) -> tuple[list[ExportedRun], dict[Path, str]]:
    """The runs whose shards are cells of the sweep in this folder, and the databases of its other cells."""
    sweep = Sweep(path)
    sharded = [
        ExportedRun(name=shards.name or path.name, stores=shards.stores)
        for shards in find_shards(sweep)
        if shards.stores
    ]
    others = {Path(cell.folder, RUN_DATABASE): cell.name for cell in sweep.cells() if cell.shard is None}
    return sharded, {store: name for store, name in others.items() if store.is_file()}


async def export_runs(runs: Sequence[ExportedRun], file: BinaryIO, form: str) -> int:
    """Write the settled rows of ``runs``, one run after the other, each in its dataset's order.

    Where there are several runs, the field ``run`` says which one a row is of. A run at work is read as it is at one
    moment, and not disturbed.

    Args:
        form: One of `FORMATS`.

    Returns:
        How many rows there are.

    Raises:
        StoreError: A database cannot be read.
        ConfigError: The form needs a package that is not installed.
    """
    count = 0
    with closing(await _open_writer(runs, file, form)) as writer:
        for run in runs:
            async with opened(run.stores) as stores, aclosing(result_rows(*stores)) as rows:
                async for row in rows:
                    writer.write({"run": run.name, **row} if len(runs) > 1 else row)
                    count += 1
    return count


async def _open_writer(runs: Sequence[ExportedRun], file: BinaryIO, form: str) -> Writer:
    if form == "jsonl":
        return JsonLines(file)
    fields = {"run"} if len(runs) > 1 else set()
    spread: dict[str, dict[str, None]] = {field: {} for field in _SPREAD}
    for run in runs:
        async with opened(run.stores) as stores:
            fields |= {field async for row in result_rows(*stores, limit=1) for field in row}
            fields |= {row["field"] for store in stores async for row in store.query(_RARE_FIELDS)}
            for field, keys in spread.items() if form == "csv" else ():
                for store in stores:
                    keys |= {row["key"]: None async for row in store.query(_KEYS.format(field), (_MOST_KEYS + 1,))}
    if form == "parquet":
        return Parquet(file, Columns(fields))
    few = {field: list(keys) for field, keys in spread.items() if 0 < len(keys) <= _MOST_KEYS}
    return Csv(file, Columns(fields, spread=few))


_SPREAD = ("metadata", "scores")
"""Objects whose keys are columns of a CSV file: a spreadsheet reads no JSON."""

_MOST_KEYS = 200
"""With more, they are no columns but data."""

_KEYS = """
    SELECT entry.key AS key
    FROM rows, json_each(rows.{0}) AS entry
    WHERE json_valid(rows.{0}) AND json_type(rows.{0}) = 'object'
    GROUP BY entry.key
    ORDER BY min(rows.position), min(entry.id)
    LIMIT ?
"""

_RARE_FIELDS = """
    SELECT entry.key AS field FROM answers, json_each(answers.details) AS entry
    UNION SELECT 'reused_from' FROM answers WHERE reused_from IS NOT NULL
    UNION SELECT 'deduplicated_from' FROM rows GROUP BY ticket HAVING count(*) > 1
"""
"""Fields that only some rows have."""


async def _prompt_rows(store: Store) -> AsyncGenerator[dict[str, Any], None]:
    async with aclosing(result_rows(store, failed=False)) as rows:
        async for row in rows:
            yield orjson.loads(orjson.dumps(row["metadata"])) | {"result": row["output_text"]}


@contextmanager
def _opened(output: str, runs: Sequence[ExportedRun]) -> Iterator[BinaryIO]:
    """Where to write: standard output, a device or a pipe as it is, a file that is replaced as a whole."""
    path = Path(output).resolve()
    if output == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
    elif path.exists() and not path.is_file():
        with path.open("wb") as file:
            yield file
    else:
        if path in {store.resolve() for run in runs for store in run.stores}:
            raise ConfigError(f"--output {output} is the run's own database: name another file")
        if path in _datasets(runs):
            raise ConfigError(f"--output {output} is the dataset that the run asked about: name another file")
        if not path.parent.is_dir():
            raise ConfigError(f"--output {output}: there is no folder {path.parent}")
        with replacing(path) as file:
            yield file


def _datasets(runs: Sequence[ExportedRun]) -> set[Path]:
    """The files that the rows of ``runs`` came from, where that is recorded."""
    files = set()
    for store in (store for run in runs for store in run.stores):
        dataset = settings_of(store.parent).get("dataset")
        path = dataset.get("path") if isinstance(dataset, dict) else None
        if path and isinstance(path, str):
            with suppress(ValueError):  # no path at all
                files.add(Path(os.path.realpath(path)))
    return files


def _form(form: str | None, output: str) -> str:
    """The form that was asked for, or that the file's name says; JSON lines where it says nothing."""
    suffix = Path(output).suffix.removeprefix(".").lower()
    if form is None and suffix and suffix not in FORMATS:
        raise ConfigError(
            f"--output {output}: rows are not written as .{suffix}; name it .jsonl, .csv (spreadsheets open it) or"
            " .parquet, or add --format"
        )
    form = form or suffix or "jsonl"
    if form == "parquet" and output == "-":
        raise ConfigError("--format parquet needs a file: --output rows.parquet")
    return form


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m runner.export",
        description="Write the rows that runs have settled so far as one file. Runs may be at work meanwhile.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, a sweep's, or a database file")
    parser.add_argument("--format", choices=FORMATS, help="default: what the name of the file says, or jsonl")
    parser.add_argument("--output", "-o", default="-", metavar="FILE", help="default: standard output")
    return parser


def _complain(message: str) -> int:
    say(sys.stderr, f"runner.export: {printable(message)}")
    return BAD_CONFIG


if __name__ == "__main__":
    sys.exit(main())
