from __future__ import annotations

import errno
import io
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runner.metrics import DeploymentSnapshot, Snapshot
from runner.progress import open_progress, printable, say, show_table, summary_table, sweep_table

HALF_WAY = Snapshot(
    total=240,
    done=120,
    failed=0,
    reused=0,
    in_flight=32,
    window=32,
    elapsed_s=5.2,
    requests_per_s=20.0,
    rows_per_s=23.1,
    tokens_per_s=1_234.0,
    prompt_tokens=100,
    completion_tokens=50,
    cached_tokens=0,
    reasoning_tokens=0,
    cost_usd=0.0031,
    cost_unknown=0,
    latency_p50_s=0.1,
    latency_p95_s=0.2,
    latency_p99_s=0.3,
    queue_wait_p95_s=0.0,
    retries=0,
    errors={},
    eta_s=5.19,
    scores={},
)

SUMMARY: dict[str, Any] = {
    "rows": 1_240,
    "succeeded": 1_237,
    "failed": 3,
    "reused": 0,
    "tokens": {"prompt": 9_400, "completion": 5_640, "total": 15_040, "cached": None, "reasoning": None},
    "cost_usd": 0.0031,
    "cost_usd_upper_bound": 0.0052,
    "elapsed_s": 75.0,
    "requests_per_s": 20.0,
    "rows_per_s": 21.4,
    "tokens_per_s": 1_234.0,
    "latency_s": {"p50": 0.143, "p95": 1.5, "p99": None},
    "queue_wait_s": {"p50": 0.0, "p95": 0.0, "p99": None},
    "retries": 12,
    "errors": {"RowError": 1, "Timeout": 2},
    "scores": {"exact": {"mean": 0.8333, "n": 1_200}, "words": 37.5, "empty": {"mean": None, "n": 0}},
    "stopped": None,
}

HOSTILE = "[bold red]x[/] \x1b[2J\x1b]0;title\x07 \x9b31m \u202eabc \ud800 [/nothing]"


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        """What was drawn, without styles: every frame of the bar is one line."""
        return [line for line in re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.getvalue())) if line]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "140")
    return Terminal()


def final_line(terminal: Terminal, snapshot: Snapshot, title: str = "quickstart") -> str:
    progress = open_progress(title, stream=terminal)
    progress.update(snapshot)
    progress.close()
    return terminal.lines()[-1].rstrip()


# Plain lines


def test_a_pipe_gets_one_plain_line(clock: Clock) -> None:
    stream = io.StringIO()
    open_progress("quickstart", stream=stream, clock=clock).update(HALF_WAY)
    assert stream.getvalue() == (
        "quickstart  120/240 (50%)  failed 0  23.1 rows/s  1.2k tok/s  $0.0031  in flight 32/32  retries 0  left 5s\n"
    )


def test_plain_lines_keep_their_distance(clock: Clock) -> None:
    stream = io.StringIO()
    progress = open_progress("quickstart", stream=stream, interval_s=5.0, clock=clock)
    for _ in range(100):
        progress.update(HALF_WAY)
        clock.now += 0.125
    assert len(stream.getvalue().splitlines()) == 3


def test_closing_writes_the_last_snapshot_once_and_ends_the_output(clock: Clock) -> None:
    stream = io.StringIO()
    progress = open_progress("quickstart", stream=stream, clock=clock)
    progress.update(HALF_WAY)
    progress.update(replace(HALF_WAY, done=240, eta_s=0.0, elapsed_s=11.4))
    progress.close()
    progress.close()
    progress.update(HALF_WAY)
    progress.note("too late")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("quickstart  240/240 (100%)")
    assert lines[1].endswith("in 11s")


def test_the_closing_line_has_the_rate_of_the_whole_time(clock: Clock) -> None:
    stream = io.StringIO()
    progress = open_progress("quickstart", stream=stream, clock=clock)
    progress.update(replace(HALF_WAY, done=240, reused=40, elapsed_s=10.0, rows_per_s=3.0))
    progress.close()
    last = stream.getvalue().splitlines()[-1]
    assert "20.0 rows/s" in last
    assert "tok/s" not in last


def test_closing_before_the_first_update_writes_nothing(terminal: Terminal) -> None:
    stream = io.StringIO()
    open_progress("quickstart", stream=stream).close()
    open_progress("quickstart", stream=terminal).close()
    assert stream.getvalue() == terminal.getvalue() == ""


def test_it_is_100_percent_only_at_the_end(clock: Clock) -> None:
    stream = io.StringIO()
    open_progress("x", stream=stream, clock=clock).update(replace(HALF_WAY, total=1_000, done=999))
    assert "999/1,000 (99%)" in stream.getvalue()


def test_without_a_total_there_are_counts_and_no_percentage(clock: Clock) -> None:
    stream = io.StringIO()
    open_progress("x", stream=stream, clock=clock).update(replace(HALF_WAY, total=None, eta_s=None))
    assert "x  120 rows  failed 0" in stream.getvalue()
    assert "%" not in stream.getvalue()
    assert "left" not in stream.getvalue()


@pytest.mark.parametrize(
    ("known", "unknown", "shown"),
    [
        (0.0, 0, "$0"),
        (0.0, 3, "cost ?"),
        (0.0031, 3, "$0.0031 + ?"),
        (0.000013, 0, "$0.000013"),
        (1_234.5, 0, "$1,234.50"),
    ],
)
def test_the_cost_says_what_is_not_known(clock: Clock, known: float, unknown: int, shown: str) -> None:
    stream = io.StringIO()
    open_progress("x", stream=stream, clock=clock).update(replace(HALF_WAY, cost_usd=known, cost_unknown=unknown))
    assert f"  {shown}  " in stream.getvalue()


@pytest.mark.parametrize(
    ("eta_s", "shown"),
    [
        (0.2, "left 0s"),
        (59.7, "left 1m 00s"),
        (125, "left 2m 05s"),
        (3_780, "left 1h 03m"),
        (200_000, "left 2d 07h"),
        (None, "left ?"),
    ],
)
def test_the_time_left_is_readable_at_every_scale(clock: Clock, eta_s: float | None, shown: str) -> None:
    stream = io.StringIO()
    open_progress("x", stream=stream, clock=clock).update(replace(HALF_WAY, eta_s=eta_s))
    assert stream.getvalue().rstrip().endswith(shown)


@pytest.mark.parametrize(
    ("rate", "shown"),
    [(0, "0"), (0.0461, "0.05"), (0.999, "1.0"), (9.96, "10.0"), (99.96, "100"), (999.7, "1.0k"), (1.5e6, "1.5M")],
)
def test_rates_are_short(clock: Clock, rate: float, shown: str) -> None:
    stream = io.StringIO()
    open_progress("x", stream=stream, clock=clock).update(replace(HALF_WAY, rows_per_s=rate))
    assert f"  {shown} rows/s  " in stream.getvalue()


def test_reused_rows_are_mentioned_where_there_are_some(clock: Clock) -> None:
    stream = io.StringIO()
    open_progress("x", stream=stream, clock=clock).update(replace(HALF_WAY, reused=64, deduplicated=1_200))
    assert "reused 64  deduplicated 1,200" in stream.getvalue()


def test_a_session_that_goes_on_says_that_its_figures_are_its_own(clock: Clock) -> None:
    stream = io.StringIO()
    open_progress("x", stream=stream, clock=clock, is_resumed=True).update(replace(HALF_WAY, reused=64))
    assert "reused 64  this session:  23.1 rows/s  1.2k tok/s  $0.0031  " in stream.getvalue()


# A terminal


def test_a_terminal_gets_a_bar_that_is_redrawn_in_place(terminal: Terminal, clock: Clock) -> None:
    progress = open_progress("quickstart", stream=terminal, clock=clock)
    for done in (60, 120, 240):
        progress.update(replace(HALF_WAY, done=done))
        clock.now += 1
    assert "\n" not in terminal.getvalue()
    progress.close()
    assert terminal.getvalue().count("\n") == 1
    last = terminal.lines()[-1]
    assert "━━━━" in last
    assert "240/240 (100%)" in last
    assert "in 5s" in last


def test_a_terminal_is_redrawn_ten_times_a_second_at_most(terminal: Terminal, clock: Clock) -> None:
    progress = open_progress("quickstart", stream=terminal, clock=clock)
    for _ in range(1_024):
        progress.update(HALF_WAY)
        clock.now += 1 / 1_024
    assert len([line for line in terminal.lines() if "120/240" in line]) <= 10


def test_the_bar_leaves_the_cursor_visible(terminal: Terminal) -> None:
    final_line(terminal, HALF_WAY)
    assert terminal.getvalue().rindex("\x1b[?25h") > terminal.getvalue().rindex("\x1b[?25l")


@pytest.mark.parametrize("columns", [20, 30, 45, 59, 60, 80, 100, 120, 200])
@pytest.mark.parametrize("title", ["quickstart", "a-very-long-name-" * 6, "実験" * 20], ids=["short", "long", "wide"])
def test_the_line_fits_the_terminal(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, columns: int, title: str
) -> None:
    from rich.cells import cell_len

    monkeypatch.setenv("COLUMNS", str(columns))
    snapshot = replace(HALF_WAY, total=1_000_000, done=999_999, failed=1_234, retries=5_678, cost_usd=1_234.5)
    line = final_line(terminal, snapshot, title)
    assert cell_len(line) <= columns
    assert terminal.getvalue().count("\n") == 1
    assert "999,999/" in line
    if columns >= 80:
        assert line.startswith(title[:5])
        assert "failed 1,234  " in line


def test_columns_are_dropped_from_the_least_to_the_most_important(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    line = final_line(terminal, HALF_WAY)
    assert "━" in line
    assert "failed 0  23.1 rows/s" in line
    assert "in 5s" in line
    assert "retries" not in line
    assert "in flight" not in line


@pytest.mark.parametrize("columns", range(20, 140, 5))
def test_a_session_s_cost_never_stands_without_saying_so(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    progress = open_progress("x", stream=terminal, is_resumed=True)
    progress.update(HALF_WAY)
    progress.close()
    assert ("$0.0031" in terminal.lines()[-1]) <= ("this session:" in terminal.lines()[-1])


def test_eighty_columns_have_room_for_the_cost_of_a_run_that_goes_on(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    progress = open_progress("labels", stream=terminal, is_resumed=True)
    progress.update(replace(HALF_WAY, total=500, done=138, reused=60))
    assert re.search(r"138/500 \(27%\) +this session: +[\d.]+ rows/s +\$0.0031 +left \d+s", terminal.lines()[-1])


def test_a_narrow_terminal_gets_counts_and_no_bar(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "59")
    line = final_line(terminal, replace(HALF_WAY, failed=3))
    assert "━" not in line
    assert line.startswith("quickstart  120/240 (50%)  failed 3")


def test_a_terminal_without_a_total_gets_counts_and_no_bar(terminal: Terminal) -> None:
    line = final_line(terminal, replace(HALF_WAY, total=None, eta_s=None))
    assert "━" not in line
    assert line.startswith("quickstart  120 rows  failed 0")


def test_failures_are_red_and_their_absence_is_not(terminal: Terminal) -> None:
    final_line(terminal, HALF_WAY)
    assert "\x1b[31m" not in terminal.getvalue()
    final_line(terminal, replace(HALF_WAY, failed=2))
    assert re.search(r"\x1b\[31mfailed 2", terminal.getvalue())


def test_no_color_is_obeyed(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    final_line(terminal, replace(HALF_WAY, failed=2))
    summary_table(SUMMARY, stream=terminal)
    assert not re.search(r"\x1b\[[0-9;]*[34]\d[;m]", terminal.getvalue())


def test_a_dumb_terminal_gets_plain_lines(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    final_line(terminal, HALF_WAY)
    assert terminal.getvalue().count("\n") == 2
    summary_table(SUMMARY, stream=terminal)
    assert "\x1b" not in terminal.getvalue()


def test_prints_of_others_reach_a_piped_stdout_and_not_the_bar(
    terminal: Terminal, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = open_progress("quickstart", stream=terminal)
    progress.update(HALF_WAY)
    print("a result")
    progress.close()
    assert capsys.readouterr().out == "a result\n"
    assert "a result" not in terminal.getvalue()


# Notes


def test_a_note_stands_above_the_bar(terminal: Terminal, clock: Clock) -> None:
    progress = open_progress("quickstart", stream=terminal, clock=clock)
    progress.update(HALF_WAY)
    progress.note("two\nlines")
    progress.close()
    drawn = [line.split("  ")[0].rstrip() for line in terminal.lines()]
    assert drawn[-2:] != ["two", "lines"]
    assert [line for line in drawn if line in ("two", "lines")] == ["two", "lines"]
    assert drawn[-1] == "quickstart"


def test_a_note_cannot_act_on_the_terminal(terminal: Terminal) -> None:
    plain = io.StringIO()
    for stream in (plain, terminal):
        progress = open_progress(HOSTILE, stream=stream)
        progress.note(HOSTILE)
        progress.update(HALF_WAY)
        progress.close()
        written = stream.getvalue()
        assert r"[bold red]x[/] \x1b[2J\x1b]0;title\x07 \x9b31m \u202eabc \ud800 [/nothing]" in written
        assert not set("\x07\x9b\u202e\ud800") & set(written)
        assert "\x1b[2J" not in written
        assert "\x1b]" not in written


def test_a_page_of_a_note_is_cut(clock: Clock) -> None:
    stream = io.StringIO()
    open_progress("x", stream=stream, clock=clock).note("<html>" * 100_000)
    assert len(stream.getvalue()) < 3_000


@pytest.mark.parametrize("columns", [30, 44, 60, 80, 100])
def test_a_table_breaks_no_word_and_cuts_nothing_off(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    header = ["", "first", "second", "difference", "99 % interval", "rows", ""]
    line = [
        "completion tokens",
        "2.63e-07",
        "$1,234.50",
        "+12.5 pp",
        "[-62.4 pp, 62.4 pp]",
        "1,024",
        "cannot tell: yet",
    ]

    show_table(header, [line], stream=terminal)

    shown = terminal.lines()
    assert max(map(len, shown)) <= columns
    words = {word for text in shown for word in re.split(r"[\s│]+", text)}
    assert words >= {*" ".join(line).split(), "difference", "interval"}


def test_a_summary_on_a_narrow_terminal_breaks_no_word(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "44")

    summary_table(SUMMARY, stream=terminal)

    assert "│ tokens      │ prompt 9,400,              │" in terminal.lines()
    assert "│             │ completion 5,640,          │" in terminal.lines()


def test_what_is_said_is_broken_at_spaces(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    path = "/" + "long" * 20

    say(
        terminal,
        f"runner: choose exact_match, contains, regex, json_valid\n{path}\n\n  by      a guess of what an answer takes",
    )

    assert terminal.getvalue().splitlines() == [
        "runner: choose exact_match, contains,",
        "regex, json_valid",
        path,
        "",
        "  by      a guess of what an answer",
        "          takes",
    ]


def test_a_note_is_broken_at_spaces(terminal: Terminal, monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    progress = open_progress("x", stream=terminal, clock=clock)

    progress.note("the first of these deployments did not answer")

    assert terminal.lines() == ["the first of these deployments did not", "answer"]


def test_printable_keeps_ordinary_text() -> None:
    text = "Größe: 3 × 4 – “ok” 日本語 👩‍🔬 [x]"
    assert printable(text) == text
    assert printable("a\tb\r\nc") == r"a\tb\r\nc"


# Streams that fail


class Gone(io.StringIO):
    """A terminal or pipe whose other end went away."""

    tty = False

    def isatty(self) -> bool:
        return self.tty

    def write(self, text: str) -> int:
        raise OSError(errno.EIO if self.tty else errno.EPIPE, "gone")


@pytest.mark.parametrize("tty", [False, True])
def test_a_stream_that_went_away_does_not_stop_the_run(
    terminal: Terminal, capsys: pytest.CaptureFixture[str], tty: bool
) -> None:
    stream = Gone()
    stream.tty = tty
    progress = open_progress("quickstart", stream=stream)
    progress.update(HALF_WAY)
    progress.note("hello")
    progress.close()
    summary_table(SUMMARY, stream=stream)
    print("still here")
    assert capsys.readouterr().out == "still here\n"


def test_a_closed_or_absent_stream_is_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", None)
    for stream in (closed, None):
        progress = open_progress("quickstart", stream=stream)
        progress.update(HALF_WAY)
        progress.close()


def test_a_stream_of_another_encoding_gets_escapes(terminal: Terminal) -> None:
    raw = io.BytesIO()
    progress = open_progress("Größe", stream=io.TextIOWrapper(raw, encoding="ascii"))
    progress.update(HALF_WAY)
    assert raw.getvalue().startswith(rb"Gr\xf6\xdfe  120/240")


# The summary


@pytest.mark.parametrize(
    ("told", "shown"),
    [({"sessions": 1}, "1m 15s"), ({"sessions": 2}, "1m 15s in 2 sessions"), ({"sessions": 2, "shards": {}}, "1m 15s")],
)
def test_times_of_several_sessions_are_said_to_be(told: dict[str, Any], shown: str) -> None:
    stream = io.StringIO()
    summary_table(SUMMARY | told, results=Path("results.jsonl"), stream=stream)
    assert f"elapsed      {shown}" in stream.getvalue().splitlines()


def test_the_summary_is_aligned_text_in_a_pipe() -> None:
    stream = io.StringIO()
    summary_table(SUMMARY, results=Path("runs/quickstart/abc/results.jsonl"), stream=stream)
    assert stream.getvalue().splitlines() == [
        "rows         1,240",
        "succeeded    1,237",
        "reused       0",
        "failed       3",
        "  Timeout    2",
        "  RowError   1",
        "retries      12",
        "score exact  83.3% (n = 1,200)",
        "score words  37.5",
        "score empty  none (n = 0)",
        "elapsed      1m 15s",
        "rate         21.4 rows/s, 1.2k tokens/s",
        "latency      p50 143 ms, p95 1.50 s",
        "queue wait   p50 0 ms, p95 0 ms",
        "tokens       prompt 9,400, completion 5,640, total 15,040",
        "cost         $0.0031, at most $0.0052",
        "results      runs/quickstart/abc/results.jsonl",
    ]


def test_the_summary_is_a_table_on_a_terminal(terminal: Terminal) -> None:
    summary_table(SUMMARY, results="runs/quickstart/abc/results.jsonl", stream=terminal)
    text = "\n".join(terminal.lines())
    assert "│ score exact │ 83.3% (n = 1,200)" in text
    assert "results  runs/quickstart/abc/results.jsonl" in text


def test_the_path_of_the_results_is_never_folded(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    path = "runs/" + "a" * 100 + "/results.jsonl"
    summary_table(SUMMARY, results=path, stream=terminal)
    assert path in terminal.getvalue()


def test_a_stopped_run_says_so_first() -> None:
    stream = io.StringIO()
    summary_table({**SUMMARY, "stopped": "budget"}, stream=stream)
    assert stream.getvalue().startswith("stopped      budget\n")


def test_what_a_summary_does_not_know_is_left_out() -> None:
    stream = io.StringIO()
    summary_table({"rows": 1, "succeeded": 1, "failed": 0, "cost_usd": None, "tokens": None}, stream=stream)
    assert stream.getvalue().splitlines() == [
        "rows       1",
        "succeeded  1",
        "failed     0",
        "cost       unknown",
    ]


def test_names_in_the_summary_are_data(terminal: Terminal) -> None:
    summary_table({"errors": {HOSTILE: 1}, "scores": {HOSTILE: 1.0}}, results=HOSTILE, stream=terminal)
    assert "\x1b[2J" not in terminal.getvalue()
    assert "\x1b]" not in terminal.getvalue()
    assert terminal.getvalue().count(r"[bold red]x[/] \x1b[2J") == 3


def test_rich_is_not_imported_before_it_is_needed() -> None:
    code = "import sys, runner.progress; sys.exit('rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Deployments


def deployment(state: str) -> DeploymentSnapshot:
    return DeploymentSnapshot(
        state=state,
        answered=10,
        failed=0,
        share=0.5,
        in_flight=1,
        requests_per_s=1.0,
        latency_p50_s=0.1,
        latency_p95_s=0.2,
        errors={},
    )


@pytest.mark.parametrize(("held_up_s", "said"), [(54.2, True), (1.5, False)])
def test_a_long_wait_for_a_limit_or_a_pause_is_shown(held_up_s: float, said: bool) -> None:
    stream = io.StringIO()
    open_progress("x", stream=stream).update(replace(HALF_WAY, held_up_s=held_up_s))
    assert ("next request in 54s" in stream.getvalue()) is said


def test_the_summary_says_how_many_answers_were_cut_off() -> None:
    stream = io.StringIO()
    summary_table({**SUMMARY, "truncated": 1_210}, stream=stream)
    assert re.search(r"^truncated +1,210, cut off at the limit on their length$", stream.getvalue(), re.M)


def test_a_sweep_says_how_many_answers_were_cut_off_where_some_were() -> None:
    stream = io.StringIO()
    cells = [
        {"number": n, "name": f"a={n}", "exit_code": 0, "summary": {"rows": 9, "failed": 0, "truncated": 5 * n}}
        for n in (0, 1)
    ]
    sweep_table(cells, stream=stream)
    sweep_table(cells[:1], stream=stream)
    _, header, *lines, empty, alone, _ = stream.getvalue().splitlines()
    assert header.split() == ["cell", "exit", "rows", "failed", "truncated", "cost", "rate"]
    assert [line.split() for line in lines] == [["a=0", "0", "9", "0", "0"], ["a=1", "0", "9", "0", "5"]]
    assert "truncated" not in empty + alone


def test_a_sweep_that_was_interrupted_says_how_many_rows_are_left_to_ask() -> None:
    stream = io.StringIO()
    done = {"number": 0, "name": "a=0", "exit_code": 0, "summary": {"rows": 9, "succeeded": 8, "failed": 1}}
    cut = {"number": 1, "name": "a=1", "exit_code": 130, "summary": {"rows": 9, "succeeded": 3, "failed": 1}}
    sweep_table([done, cut], stream=stream)
    sweep_table([done], stream=stream)
    _, header, *lines, empty, alone, _ = stream.getvalue().splitlines()
    assert header.split("  ")[2:5] == ["rows", "failed", "left to ask"]
    assert [line.split() for line in lines] == [["a=0", "0", "9", "1", "0"], ["a=1", "130", "9", "1", "5"]]
    assert "left to ask" not in empty + alone


def test_the_summary_says_what_was_paid_for_rows_as_they_were_before() -> None:
    stream = io.StringIO()
    summary_table({**SUMMARY, "cost_usd": 0.034, "cost_usd_former": 0.0161}, stream=stream)
    assert "$0.0340; $0.0161 of it for answers that no row has any more" in stream.getvalue()


def test_a_cell_that_did_not_begin_was_not_killed() -> None:
    stream = io.StringIO()
    cells = [
        {"number": 0, "name": "a=1", "exit_code": None, "summary": {}, "message": "not begun this time"},
        {"number": 1, "name": "a=2", "exit_code": None, "summary": {}},
    ]
    sweep_table(cells, stream=stream)
    _, _, first, second, *remarks = stream.getvalue().splitlines()
    assert first.strip() == "a=1"
    assert second.split() == ["a=2", "killed"]
    assert remarks == ["a=1: not begun this time"]


def test_the_summary_says_why_requests_were_sent_again() -> None:
    alone = {"answered": 60, "failed": 0, "share": 1.0, "latency_s": {}, "retries": 12}
    stream = io.StringIO()
    summary_table(
        {**SUMMARY, "retries": 12, "deployments": {"a": {**alone, "retries_by_error": {"RateLimitError": 12}}}},
        stream=stream,
    )
    assert re.search(r"^retries +12 \(12 RateLimitError\)$", stream.getvalue(), re.M)


def test_several_deployments_are_counted_and_those_that_are_out_named() -> None:
    stream = io.StringIO()
    fleet = {"a": deployment("up"), "b": deployment("out"), "c": deployment("probing")}
    open_progress("fleet", stream=stream).update(replace(HALF_WAY, deployments=fleet))
    assert "servers 2/3  out: b" in stream.getvalue()


def test_the_summary_shows_what_each_of_several_deployments_did() -> None:
    latency_s = {"p50": 0.05, "p95": None}
    east = {"answered": 1_200, "failed": 0, "share": 0.75, "latency_s": latency_s, "retries": 3}
    east["retries_by_error"] = {"Timeout": 2, "RateLimit": 1}
    west = {"answered": 400, "failed": 1, "share": 0.25, "latency_s": {"p50": None, "p95": None}, "retries": 0}
    stream = io.StringIO()
    summary_table({**SUMMARY, "deployments": {"east": east, "west": west}}, stream=stream)
    lines = [" ".join(line.split()) for line in stream.getvalue().splitlines()]
    assert "east 1,200 answered (75%), p50 50 ms, 3 retries (2 Timeout, 1 RateLimit)" in lines
    assert "west 400 answered (25%), 1 failed" in lines


def test_a_single_deployment_needs_no_line_of_its_own() -> None:
    stream = io.StringIO()
    alone = {"answered": 1, "failed": 0, "share": 1.0, "latency_s": {}, "retries": 0}
    summary_table({**SUMMARY, "deployments": {"east": alone}}, stream=stream)
    assert "east" not in stream.getvalue()
