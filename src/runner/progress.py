"""What a person sees of a run: a live bar on a terminal, plain lines elsewhere, and the closing summary.

Nothing here can stop a run: a terminal that went away is ignored. Texts from models and servers are shown through
`printable`, so that they can neither move the cursor nor be taken for markup.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TextIO

from runner import figures
from runner.layout import blocks, column_widths, laid_out, paragraph, remarks_of, wrapped
from runner.metrics import Snapshot

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

BAR_COLUMNS = 60
"""The narrowest terminal, in columns, that gets a bar; below it there are counts only."""


class Progress(Protocol):
    """Shows how far a run is."""

    def update(self, snapshot: Snapshot) -> None:
        """Show ``snapshot``. May be called as often as one likes."""
        ...

    def note(self, text: str) -> None:
        """Show ``text`` on lines of its own, above the bar."""
        ...

    def close(self) -> None:
        """Show the last snapshot for good. Later calls do nothing."""
        ...


def open_progress(
    title: str,
    *,
    stream: TextIO | None = None,
    interval_s: float = 5.0,
    is_resumed: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> Progress:
    """A live bar where ``stream`` is a terminal, otherwise a plain line now and then.

    Args:
        title: What runs.
        stream: Where to; ``sys.stderr`` by default.
        interval_s: Seconds between two plain lines, at least.
        is_resumed: Whether there were sessions before this one, whose cost and time are not in what is shown.
        clock: Seconds, monotonic.
    """
    stream = sys.stderr if stream is None else stream
    console = _terminal(stream)
    if console is None:
        return _Lines(title, stream, interval_s, is_resumed, clock)
    return _LiveBar(title, console, is_resumed, clock)


def summary_table(
    summary: Mapping[str, Any], *, results: str | PathLike[str] | None = None, stream: TextIO | None = None
) -> None:
    """Print the closing summary: a table where ``stream`` is a terminal, otherwise aligned text.

    Args:
        summary: The content of ``summary.json``; what is missing or null there is left out. A score is its mean, or
            ``{"mean": …, "n": …}``; ``cost_usd_upper_bound`` is the cost if every attempt of unknown cost was charged.
        results: Where the results are.
        stream: Where to; ``sys.stdout`` by default.
    """
    stream = sys.stdout if stream is None else stream
    facts = list(_facts(summary))
    location = None if results is None else printable(str(results))
    console = _terminal(stream)
    lines = [[fact.label, fact.value] for fact in facts]
    widths = None if console is None else column_widths(["", ""], lines, console.width)
    if console is not None and widths is not None:
        with suppress(OSError):
            _draw_table(console, [], lines, widths, [["bold", fact.style] for fact in facts])
        if location is not None:  # outside the table: a path that is broken cannot be copied
            write(stream, f"results  {location}\n")
        return
    if location is not None:
        facts.append(_Fact("results", location))
    width = max((len(fact.label) for fact in facts), default=0)
    write(stream, "".join(f"{fact.label:<{width}}  {fact.value}\n" for fact in facts))


def sweep_table(cells: Sequence[Mapping[str, Any]], *, stream: TextIO | None = None) -> None:
    """Print the cells of a sweep side by side: a table where ``stream`` is a terminal, otherwise aligned text.

    Below it stands why cells failed, once where it is the same for several.

    Args:
        cells: Each with its ``number``, its ``name``, what sets it apart (empty: nothing), its ``exit_code`` (None:
            killed, or not begun, as its message says), the ``summary`` of its run, and the ``message`` that says why it
            failed.
        stream: Where to; ``sys.stdout`` by default.
    """
    stream = sys.stdout if stream is None else stream
    scores = list(dict.fromkeys(name for cell in cells for name in cell["summary"].get("scores") or {}))
    counts = [_counts(cell["summary"]) for cell in cells]
    told = [name for name in _COUNTS if name in ("rows", "failed") or any(each.get(name) for each in counts)]
    header = ["cell", "exit", *told, *(f"score {printable(name)}" for name in scores), "cost", "rate"]
    lines = [
        _cell_line(cell, [f"{each[name]:,}" if name in each else "" for name in told], scores)
        for cell, each in zip(cells, counts, strict=True)
    ]
    styles = {"0": "", "3": "yellow", "": ""}
    show_table(header, lines, styles=[styles.get(line[1], "red") for line in lines], stream=stream)
    for remark in remarks_of([[line[0], _why(cell)] for line, cell in zip(lines, cells, strict=True)]):
        say(stream, remark)


def show_table(
    header: Sequence[str],
    lines: Sequence[Sequence[str]],
    *,
    styles: Sequence[str] | None = None,
    optional: Sequence[str] = (),
    stream: TextIO | None = None,
) -> None:
    """Print lines of cells below a header: a table where ``stream`` is a terminal, otherwise aligned text.

    On a terminal no word and no figure is broken: `runner.layout` says what gives way instead.

    Args:
        styles: Of each line, as rich knows them.
        optional: Columns that a narrow terminal goes without, the first one first.
        stream: Where to; ``sys.stdout`` by default.
    """
    stream = sys.stdout if stream is None else stream
    console = _terminal(stream)
    if console is None:
        widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
        padded = (
            "  ".join(f"{text:<{width}}" for text, width in zip(line, widths, strict=True)) for line in [header, *lines]
        )
        write(stream, "\n" + "".join(f"{line.rstrip()}\n" for line in padded))
        return

    layout = laid_out(header, lines, console.width, optional=optional)
    style_of = styles or [""] * len(lines)
    with suppress(OSError):
        if layout.widths is None:
            console.print()
            for block, style in zip(blocks(layout.header, layout.lines, console.width), style_of, strict=True):
                _print(console, block, style)
        else:
            cell_styles = [[style] * len(layout.header) for style in style_of]
            _draw_table(console, layout.header, layout.lines, layout.widths, cell_styles)
    if layout.left_out:
        say(stream, f"not shown, for want of columns: {', '.join(layout.left_out)}")
    for remark in layout.remarks:
        say(stream, remark)


def say(stream: TextIO | None, text: str) -> None:
    """Write lines of text, which are broken at spaces where ``stream`` is a terminal."""
    console = _terminal(stream)
    lines = text.split("\n")
    if console is not None:
        lines = [part for line in lines for part in paragraph(line, console.width)]
    write(stream, "".join(f"{line}\n" for line in lines))


def _draw_table(
    console: Console,
    header: Sequence[str],
    lines: Sequence[Sequence[str]],
    widths: Sequence[int],
    styles: Sequence[Sequence[str]],  # of each cell
) -> None:
    from rich.box import ROUNDED
    from rich.table import Column, Table
    from rich.text import Text

    def text(cell: str, width: int, style: str = "") -> Text:
        return Text("\n".join(wrapped(cell, width)), style=style, no_wrap=True, overflow="ignore")

    names = header or [""] * len(widths)
    columns = (
        Column(text(name, width), width=width, no_wrap=True, overflow="ignore")
        for name, width in zip(names, widths, strict=True)
    )
    table = Table(*columns, box=ROUNDED, border_style="dim", show_header=bool(header))
    for line, line_styles in zip(lines, styles, strict=True):
        table.add_row(*map(text, line, widths, line_styles))
    console.print(table)


def _print(console: Console, lines: Sequence[str], style: str = "") -> None:
    """Print lines that are as long as they are to be."""
    from rich.text import Text

    for line in lines:
        console.print(Text(line, style=style), soft_wrap=True)


_COUNTS = ("rows", "failed", "left to ask", "truncated")


def _counts(summary: Mapping[str, Any]) -> dict[str, int]:
    """Those of `_COUNTS` that the summary of a cell tells."""
    known = {name: summary[name] for name in _COUNTS if name in summary}
    return known | {"left to ask": figures.left_to_ask(summary)} if "succeeded" in summary else known


def _cell_line(cell: Mapping[str, Any], counts: Sequence[str], scores: Sequence[str]) -> list[str]:
    summary: Mapping[str, Any] = cell["summary"]
    means: Mapping[str, Any] = summary.get("scores") or {}
    cost = figures.closing_cost(summary["cost_usd"], None) if "cost_usd" in summary else ""
    rate = figures.rows_per_s(summary)
    return [
        printable(cell["name"]) or f"#{cell['number']}",
        _ending(cell),
        *counts,
        *(figures.score(means.get(name, {}).get("mean")) if summary else "" for name in scores),
        cost,
        f"{figures.short(rate)}/s" if rate else "",
    ]


def _ending(cell: Mapping[str, Any]) -> str:
    if cell["exit_code"] is None:
        return "" if cell.get("message") else "killed"
    return str(cell["exit_code"])


def _why(cell: Mapping[str, Any]) -> str:
    """Why a cell failed, as far as there is room for it; empty where it did not."""
    message = printable(cell.get("message") or "") if cell["exit_code"] not in (0, 3) else ""
    return message if len(message) <= _WHY_LENGTH else f"{message[: _WHY_LENGTH - 1]}…"


def printable(text: str) -> str:
    """``text`` on one line, with everything that could act on a terminal written as an escape (``\\x1b``).

    These are control characters, line breaks, reversals of the writing direction, and lone surrogates.
    """
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def write(stream: TextIO | None, text: str) -> None:
    """Write and flush. A stream that is closed, full or absent (``pythonw``) is not the run's problem."""
    if stream is None:
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    with suppress(OSError, ValueError):
        try:
            stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            stream.flush()
        except BrokenPipeError:  # what is still buffered would fail once more at the interpreter's exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

_WHY_LENGTH = 500
_HELD_UP_S = 2.0
"""A longer wait for a limit, or the end of a pause, is shown."""

_NOTE_CHARACTERS = 2_000  # of a note: servers answer with whole pages


class _LiveBar:
    """One line at the bottom of a terminal, redrawn in place."""

    _REDRAW_S = 0.1

    def __init__(self, title: str, console: Console, is_resumed: bool, clock: Callable[[], float]) -> None:
        from rich.live import Live

        self._title = printable(title)
        self._is_resumed = is_resumed
        self._console = console
        self._clock = clock
        self._live = Live(
            console=console,
            auto_refresh=False,
            # prints of others go above the bar, but only where they would have met it: a piped stdout stays a pipe
            redirect_stdout=_is_terminal(sys.stdout),
            redirect_stderr=_is_terminal(sys.stderr),
        )
        self._widths: list[int] = []
        self._last: Snapshot | None = None
        self._drawn = float("-inf")
        self._closed = False

    def update(self, snapshot: Snapshot) -> None:
        if self._closed:
            return
        self._last = snapshot
        now = self._clock()
        if now - self._drawn >= self._REDRAW_S:
            self._drawn = now
            self._draw(snapshot)

    def note(self, text: str) -> None:
        if self._closed:
            return
        with suppress(OSError):
            for line in _note_lines(text):
                _print(self._console, paragraph(line, self._console.width))

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._last is not None:
            self._draw(self._last, closing=True)
        with suppress(OSError):
            self._live.stop()

    def _draw(self, snapshot: Snapshot, *, closing: bool = False) -> None:
        columns = _columns(snapshot, closing=closing, is_resumed=self._is_resumed)
        # a column keeps the width it once had, or the bar would jump with every digit
        if len(self._widths) != len(columns):
            self._widths = [0] * len(columns)
        self._widths = [max(width, len(column.text)) for width, column in zip(self._widths, columns, strict=True)]
        padded = [column._replace(text=f"{column.text:<{self._widths[i]}}") for i, column in enumerate(columns)]
        try:
            self._live.start()
            self._live.update(_Line(self._title, padded, snapshot.done, snapshot.total), refresh=True)
        except OSError:  # hung up
            self._closed = True
            with suppress(OSError):
                self._live.stop()


@dataclass(frozen=True, slots=True)
class _Line:
    """The bar's line; it fits itself to the width that the terminal has when it is drawn."""

    title: str
    columns: list[_Column]
    done: int
    total: int | None

    _MIN_BAR = 8
    _MAX_BAR = 40

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.cells import cell_len, set_cell_size
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        width = options.max_width
        room_for_title = width // 4
        title = self.title
        if cell_len(title) > room_for_title:
            title = set_cell_size(title, room_for_title - 1) + "…"
        bar = self._MIN_BAR if self.total and width >= BAR_COLUMNS else 0
        columns = list(self.columns)
        while (taken := cell_len(title) + sum(2 + len(each.text) for each in columns) + (bar and bar + 2)) > width:
            if title and len(columns) <= 2:  # how many failed matters more than what they are called
                title = ""
            elif len(columns) > 1:
                columns.remove(min(columns, key=lambda each: each.rank))
            else:
                break
        text = Text(no_wrap=True, overflow="ellipsis")
        for each in columns:
            text.append("  " if text else "").append(each.text, style=each.style)
        cells: list[Any] = [Text(title, style="bold")] if title else []
        if bar:
            bar = min(self._MAX_BAR, bar + width - taken)
            cells.append(ProgressBar(self.total, self.done, width=bar, complete_style="cyan", finished_style="green"))
        cells.append(text)
        line = Table.grid(padding=(0, 2), pad_edge=False)
        for _ in cells:
            line.add_column(no_wrap=True)
        line.add_row(*cells)
        yield line


class _Lines:
    """A line of text now and then, for logs and pipes."""

    def __init__(
        self, title: str, stream: TextIO | None, interval_s: float, is_resumed: bool, clock: Callable[[], float]
    ) -> None:
        self._title = printable(title)
        self._is_resumed = is_resumed
        self._stream = stream
        self._interval_s = interval_s
        self._clock = clock
        self._last: Snapshot | None = None
        self._written = float("-inf")
        self._closed = False

    def update(self, snapshot: Snapshot) -> None:
        if self._closed:
            return
        self._last = snapshot
        now = self._clock()
        if now - self._written >= self._interval_s:
            self._written = now
            self._show(snapshot)

    def note(self, text: str) -> None:
        if not self._closed:
            write(self._stream, "".join(f"{line}\n" for line in _note_lines(text)))

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._last is not None:
            self._show(self._last, closing=True)

    def _show(self, snapshot: Snapshot, *, closing: bool = False) -> None:
        texts = (column.text for column in _columns(snapshot, closing=closing, is_resumed=self._is_resumed))
        write(self._stream, "  ".join([self._title, *texts]) + "\n")


class _Column(NamedTuple):
    text: str
    rank: int  # the lowest goes first where there is no room
    style: str = ""


def _columns(snapshot: Snapshot, *, closing: bool, is_resumed: bool) -> list[_Column]:
    """A snapshot in words, in the order they are read. Closing, it speaks of the whole session."""
    columns = [
        _Column(_rows(snapshot), 9),
        _Column(f"failed {snapshot.failed:,}", 8, "red") if snapshot.failed else _Column("failed 0", 4),
    ]
    if snapshot.reused:
        columns.append(_Column(f"reused {snapshot.reused:,}", 2))
    if snapshot.deduplicated:
        columns.append(_Column(f"deduplicated {snapshot.deduplicated:,}", 2))
    if is_resumed:
        columns.append(_Column("this session:", 7))
    if snapshot.held_up_s >= _HELD_UP_S and not closing:
        columns.append(_Column(f"next request in {figures.duration(snapshot.held_up_s)}", 8, "yellow"))
    if closing:
        columns.append(_Column(f"{figures.short(_mean_rate(snapshot))} rows/s", 5))
    else:
        columns.append(_Column(f"{figures.short(snapshot.rows_per_s)} rows/s", 5))
        columns.append(_Column(f"{figures.short(snapshot.tokens_per_s)} tok/s", 3))
    columns += [
        _Column(_cost(snapshot), 6),
        _Column(f"in flight {snapshot.in_flight}/{snapshot.window}", 3),
        _Column(f"retries {snapshot.retries:,}", 1, "yellow" if snapshot.retries else ""),
    ]
    if snapshot.deployments:
        out = [label for label, deployment in snapshot.deployments.items() if deployment.is_out]
        count = len(snapshot.deployments)
        columns.append(_Column(f"servers {count - len(out)}/{count}", 8 if out else 1, "yellow" if out else ""))
        if out:
            columns.append(_Column(f"out: {printable(', '.join(out))}", 4, "yellow"))
    if snapshot.window_why:
        columns.append(_Column(f"auto: {snapshot.window_why}", 0))
    if closing:
        columns.append(_Column(f"in {figures.duration(snapshot.elapsed_s)}", 8))
    elif snapshot.total is not None:
        columns.append(_Column("left ?" if snapshot.eta_s is None else f"left {figures.duration(snapshot.eta_s)}", 8))
    return columns


def _mean_rate(snapshot: Snapshot) -> float:
    """Rows per second over the whole time, without those that were there before."""
    return (snapshot.asked + snapshot.deduplicated) / snapshot.elapsed_s if snapshot.elapsed_s else 0.0


def _rows(snapshot: Snapshot) -> str:
    if snapshot.total is None:
        return f"{snapshot.done:,} rows"
    share = int(100 * snapshot.done / snapshot.total) if snapshot.total else 100  # never 100 % before the end
    return f"{snapshot.done:,}/{snapshot.total:,} ({share}%)"


def _cost(snapshot: Snapshot) -> str:
    if not snapshot.cost_unknown:
        return figures.dollars(snapshot.cost_usd)
    return f"{figures.dollars(snapshot.cost_usd)} + ?" if snapshot.cost_usd else "cost ?"


class _Fact(NamedTuple):
    """One line of the summary."""

    label: str
    value: str
    style: str = ""


def _facts(summary: Mapping[str, Any]) -> Iterator[_Fact]:
    if stopped := summary.get("stopped"):
        yield _Fact("stopped", printable(str(stopped)), "yellow")
    for key in ("rows", "succeeded", "reused"):
        if summary.get(key) is not None:
            yield _Fact(key, f"{summary[key]:,}")
    for key in ("deduplicated", "taken_over"):
        if summary.get(key):
            yield _Fact(key.replace("_", " "), f"{summary[key]:,}")
    if summary.get("failed") is not None:
        yield _Fact("failed", f"{summary['failed']:,}", "red" if summary["failed"] else "")
    if left := figures.left_to_ask(summary):
        yield _Fact("left to ask", f"{left:,}", "yellow")
    errors: Mapping[str, int] = summary.get("errors") or {}
    for name, count in sorted(errors.items(), key=lambda entry: -entry[1]):
        yield _Fact(f"  {printable(name)}", f"{count:,}", "red")
    if summary.get("truncated"):
        yield _Fact("truncated", f"{summary['truncated']:,}, cut off at the limit on their length", "yellow")
    if summary.get("unparsed"):
        yield _Fact("unparsed", f"{summary['unparsed']:,}", "yellow")
    deployments: Mapping[str, Any] = summary.get("deployments") or {}
    if summary.get("retries") is not None:
        retried = sum((Counter(each.get("retries_by_error", {})) for each in deployments.values()), Counter())
        yield _Fact("retries", printable(figures.by_name(f"{summary['retries']:,}", dict(retried.most_common()))))
    if len(deployments) > 1:
        for label, deployment in deployments.items():
            yield _Fact(f"  {printable(label)}", _deployment(deployment))
    scores: Mapping[str, Any] = summary.get("scores") or {}
    for name, score in scores.items():
        yield _Fact(f"score {printable(name)}", figures.score(score), "bold")
    if summary.get("elapsed_s") is not None:
        sessions = 1 if "shards" in summary else summary.get("sessions", 1)  # which have sessions each
        span = f" in {sessions:,} sessions" if sessions > 1 else ""
        yield _Fact("elapsed", f"{figures.duration(summary['elapsed_s'])}{span}")
    rates = [
        f"{figures.short(rate)} {unit}"
        for rate, unit in ((figures.rows_per_s(summary), "rows/s"), (summary.get("tokens_per_s"), "tokens/s"))
        if rate is not None
    ]
    if rates:
        yield _Fact("rate", ", ".join(rates))
    for key, label in (("latency_s", "latency"), ("queue_wait_s", "queue wait")):
        known = {name: value for name, value in (summary.get(key) or {}).items() if value is not None}
        if known:
            yield _Fact(label, ", ".join(f"{name} {figures.seconds(value)}" for name, value in known.items()))
    counts = {name: count for name, count in (summary.get("tokens") or {}).items() if count is not None}
    if counts:
        yield _Fact("tokens", ", ".join(f"{name} {count:,}" for name, count in counts.items()))
    if "cost_usd" in summary:
        bounds = summary.get("cost_usd_upper_bound"), summary.get("attempts_without_bound", 0)
        cost = figures.closing_cost(summary["cost_usd"], bounds[0], without_bound=bounds[1])
        if former := summary.get("cost_usd_former"):
            cost += f"; {figures.dollars(former)} of it for answers that no row has any more"
        yield _Fact("cost", cost)


def _deployment(deployment: Mapping[str, Any]) -> str:
    latencies = {name: value for name, value in deployment["latency_s"].items() if value is not None}
    parts = [f"{deployment['answered']:,} answered ({deployment['share']:.0%})"]
    parts += [f"{name} {figures.seconds(value)}" for name, value in latencies.items()]
    if deployment["failed"]:
        parts.append(f"{deployment['failed']:,} failed")
    if deployment["retries"]:
        retries = figures.by_name(f"{deployment['retries']:,} retries", deployment.get("retries_by_error", {}))
        parts.append(printable(retries))
    return ", ".join(parts)


def _note_lines(text: str) -> list[str]:
    if len(text) > _NOTE_CHARACTERS:
        text = text[:_NOTE_CHARACTERS] + "…"
    return [printable(line) for line in text.splitlines()]


def _terminal(stream: TextIO | None) -> Console | None:
    """A console for ``stream``, if it is a terminal that can redraw a line."""
    if stream is None or not _is_terminal(stream):
        return None

    from rich.console import Console

    console = Console(file=stream, markup=False, highlight=False, emoji=False)
    return console if console.is_terminal and not console.is_dumb_terminal else None


def _is_terminal(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # closed
        return False
