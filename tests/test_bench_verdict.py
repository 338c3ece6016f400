from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runner.bench.ladder import interleaved, next_level
from runner.bench.levels import Audit, Figure, LevelFacts, Mode
from runner.bench.table import evidence, level_line, show_levels, verdict_line, wanted_columns
from runner.bench.verdict import Standing, Verdict, verdict_on
from runner.config import BenchConfig, SloConfig
from runner.intervals import Interval


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


CLEAN = Audit(in_flight=1, at_server=1, lag_mean_s=0, lag_p99_s=0, cpu_share=0.1)
CLIENT = replace(CLEAN, limited_by="client", notes=("the client's thread is busy (99% of a core)",))


def facts(level: float, rate: float, **changes: Any) -> LevelFacts:
    """A level with this throughput, known to 1 %, where requests take as long as Little's law says."""
    latency = Figure(value=level / rate, interval=Interval(low=level / rate, high=level / rate))
    values: dict[str, Any] = {
        "level": level,
        "mode": Mode.closed,
        "repeats": 1,
        "requests": 100,
        "failed": 0,
        "errors": {},
        "retries": 0,
        "elapsed_s": 100 / rate,
        "requests_per_s": Figure(value=rate, interval=Interval(low=0.99 * rate, high=1.01 * rate)),
        "goodput_per_s": None,
        "tokens_per_s": None,
        "tokens_per_s_per_user": None,
        "latency_s": {"p50": latency, "p95": latency, "p99": None},
        "latency_with_failures_s": {"p50": latency, "p95": latency, "p99": None},
        "service_time_s": {"p50": latency, "p95": latency, "p99": None},
        "queue_wait_s": {"p50": Figure(value=0), "p95": Figure(value=0), "p99": None},
        "ttft_s": {"p50": None, "p95": None, "p99": None},
        "itl_s": {"p50": None, "p95": None, "p99": None},
        "tokens": {"prompt": 0, "completion": 0, "cached": 0},
        "cost_usd": None,
        "audit": CLEAN,
    }
    return LevelFacts(**{**values, **changes})


def saturating(level: float) -> LevelFacts:
    """A server with 8 slots of a second each."""
    return facts(level, min(level, 8.0))


def on(rates: Mapping[float, float], **settings: Any) -> Verdict:
    return verdict_on([facts(level, rate) for level, rate in rates.items()], BenchConfig(**settings))


def test_the_smallest_level_on_the_plateau_is_recommended() -> None:
    verdict = verdict_on([saturating(level) for level in (32, 1, 2, 16, 4, 8)], BenchConfig())

    assert (verdict.level, verdict.standing, verdict.binding) == (8, Standing.found, "throughput")
    assert (verdict.highest_pass, verdict.first_fail, verdict.monotone) == (32, None, True)
    assert verdict.override == "limits.concurrency=8"


def test_a_level_whose_interval_overlaps_the_plateau_s_is_on_it() -> None:
    levels = [
        replace(facts(8, 89), requests_per_s=Figure(value=89, interval=Interval(low=82, high=96))),
        replace(facts(16, 100), requests_per_s=Figure(value=100, interval=Interval(low=95, high=105))),
    ]

    assert verdict_on(levels, BenchConfig()).level == 8


def test_one_level_above_that_is_well_known_shows_that_throughput_no_longer_rises() -> None:
    """Few requests at high levels are too few for an interval."""
    levels = [facts(4, 4), facts(8, 8), facts(16, 8), facts(32, 8.1, requests_per_s=Figure(value=8.1))]
    verdict = verdict_on(levels, BenchConfig())

    assert (verdict.level, verdict.standing) == (8, Standing.found)
    assert verdict_on([*levels[:2], levels[3]], BenchConfig()).standing is Standing.unresolved


def test_a_level_below_that_the_client_limited_is_named() -> None:
    verdict = verdict_on([facts(4, 2), facts(8, 3, audit=CLIENT), facts(16, 8), facts(32, 8)], BenchConfig())

    assert verdict.level == 16
    assert "the client is the bottleneck at 8: a smaller level may do as well" in verdict.reasons


def test_a_wide_interval_resolves_nothing() -> None:
    wide = [
        replace(facts(level, rate), requests_per_s=Figure(value=rate, interval=Interval(low=1, high=200)))
        for level, rate in ((4, 50), (8, 99), (16, 100))
    ]
    verdict = verdict_on(wide, BenchConfig())

    assert (verdict.level, verdict.standing) == (8, Standing.unresolved)


def test_a_throughput_that_still_rises_is_at_the_edge() -> None:
    verdict = on({1: 1, 2: 2, 4: 4})

    assert (verdict.level, verdict.standing) == (4, Standing.at_edge)


def test_the_slo_bounds_the_level() -> None:
    """At 16, requests take 2 s; at 8, one."""
    levels = [saturating(level) for level in (1, 2, 4, 8, 16)]
    verdict = verdict_on(levels, BenchConfig(slo=SloConfig(latency_p95_s=1.5)))
    strict = verdict_on([facts(1, 1), facts(2, 2), facts(4, 2)], BenchConfig(slo=SloConfig(latency_p95_s=1.5)))

    assert (verdict.level, verdict.highest_pass, verdict.first_fail) == (8, 8, 16)
    assert (strict.level, strict.binding) == (2, "bench.slo.latency_p95_s=1.5")


def test_nothing_is_recommended_where_no_level_keeps_the_slo() -> None:
    verdict = verdict_on([saturating(level) for level in (1, 2)], BenchConfig(slo=SloConfig(latency_p50_s=0.1)))

    assert (verdict.level, verdict.standing, verdict.first_fail) == (None, Standing.none_passes, 1)
    assert verdict_line(verdict) == "recommended_max_parallel_requests=none"


def test_a_level_above_one_that_fails_does_not_win() -> None:
    levels = [facts(1, 1), facts(2, 2, failed=50, requests=100), facts(4, 4)]

    assert verdict_on(levels, BenchConfig()).level == 1


def test_a_single_failure_among_many_requests_does_not_disqualify_a_level() -> None:
    levels = [facts(1, 1), facts(2, 2, failed=1, requests=100), facts(4, 2)]

    assert verdict_on(levels, BenchConfig()).level == 2


def test_nothing_is_recommended_where_the_client_limits_every_level() -> None:
    verdict = verdict_on([facts(1, 100, audit=CLIENT), facts(2, 150, audit=CLIENT)], BenchConfig())

    assert (verdict.level, verdict.standing) == (None, Standing.client_limited)


def test_nothing_is_recommended_where_the_client_hides_the_plateau() -> None:
    above = verdict_on([facts(1, 100), facts(2, 190), facts(4, 195, audit=CLIENT)], BenchConfig())
    faster = verdict_on([facts(1, 100), facts(2, 100), facts(4, 195, audit=CLIENT)], BenchConfig())

    assert (above.level, above.standing) == (None, Standing.client_limited)
    assert (faster.level, faster.standing) == (None, Standing.client_limited)


def test_a_plateau_that_is_seen_below_the_client_s_limit_stands() -> None:
    levels = [facts(4, 4), facts(8, 8), facts(16, 8), facts(32, 8, audit=CLIENT)]

    assert verdict_on(levels, BenchConfig()).level == 8


def test_configured_limits_that_set_the_pace_are_named() -> None:
    limits = replace(CLEAN, limited_by="limits")
    verdict = verdict_on([facts(1, 1), facts(2, 2, audit=limits), facts(4, 2, audit=limits)], BenchConfig())

    assert (verdict.level, verdict.binding) == (2, "the configured limits")


def test_a_dent_below_the_plateau_is_told() -> None:
    verdict = on({1: 10, 2: 4, 4: 40, 8: 40})

    assert not verdict.monotone
    assert "not monotone" in " ".join(evidence(verdict))


def test_of_rates_the_highest_that_is_kept_is_recommended() -> None:
    def offered(rate: float, kept: float) -> LevelFacts:
        return facts(rate, kept, mode=Mode.open, elapsed_s=100 / rate)

    verdict = verdict_on([offered(10, 10), offered(20, 19), offered(40, 25)], BenchConfig(rate=[10, 20, 40]))

    assert (verdict.level, verdict.first_fail, verdict.override) == (20, 40, "limits.rpm=1200")
    assert verdict_line(verdict) == "recommended_requests_per_second=20"


def test_a_line_is_in_the_form_that_scripts_read() -> None:
    line = level_line(facts(1, 3.14, requests=50, elapsed_s=15.9))

    assert line == (
        "c=1    rps=3.14  p50=0.318s  p95=0.318s  p99=-  svc_p95=0.318s  q_p95=0.000s  err=0/50  elapsed=15.9s"
    )
    assert level_line(facts(32, 5, audit=CLIENT)).endswith("client-limited")


def test_the_readme_says_what_is_in_a_line_and_beside_the_recommendation() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    [section] = re.findall(r"^## Find the right concurrency\n(.*?)^## ", readme, re.M | re.S)
    explained = set(re.findall(r"`([\w-]+)`", section))

    names = set(re.findall(r"(\w+)=", level_line(facts(1, 3.14)))) - {"err", "elapsed"}
    assert names | {Standing.unresolved.value, Standing.at_edge.value} <= explained


def test_a_table_leaves_out_what_nobody_measured() -> None:
    header, lines = wanted_columns([facts(1, 10), facts(2, 20, audit=CLIENT)])

    assert "p99" not in header
    assert "TTFT p95" not in header
    assert lines[1][-1] == "client-limited: the client's thread is busy (99% of a core)"


def test_levels_and_verdicts_come_back_from_json() -> None:
    endless = Figure(value=float("inf"), interval=Interval(low=1.0, high=float("inf")))
    level = facts(4, 9, latency_with_failures_s={"p50": endless, "p95": None, "p99": None}, audit=CLIENT)
    verdict = on({1: 1, 2: 2, 4: 2})

    assert LevelFacts.of(json.loads(json.dumps(level.as_json(), allow_nan=False))) == level
    assert Verdict.of(json.loads(json.dumps(verdict.as_json()))) == verdict


# Ladders


def climb(measure: Callable[[float], LevelFacts], **settings: Any) -> list[float]:
    bench = BenchConfig(levels="auto", **settings)
    measured: dict[float, LevelFacts] = {}
    while (level := next_level(measured, bench)) is not None:
        assert level not in measured
        measured[level] = measure(level)
    return list(measured)


def test_a_ladder_doubles_until_nothing_is_gained_and_then_looks_below_the_knee() -> None:
    assert climb(saturating) == [1, 2, 4, 8, 16, 32, 6, 7]


def test_a_ladder_looks_between_the_last_pass_and_the_first_fail() -> None:
    levels = climb(lambda level: facts(level, level / (1 + level / 100)), slo=SloConfig(latency_p95_s=1.24))

    assert levels == [1, 2, 4, 8, 16, 32, 23, 27]
    assert 23 < 24 < 27  # where the latency passes 1.24 s


@pytest.mark.parametrize(("max_level", "levels"), [(8, [1, 2, 4, 8, 6]), (1, [1])])
def test_a_ladder_ends_at_its_highest_level(max_level: int, levels: list[float]) -> None:
    climbed = climb(lambda level: facts(level, level), max_level=max_level)

    assert climbed[: len(levels)] == levels
    assert max(climbed) == max_level


def test_a_ladder_does_not_climb_where_the_client_is_the_limit() -> None:
    assert max(climb(lambda level: facts(level, level, audit=CLIENT if level > 4 else CLEAN))) == 8


def test_a_ladder_ends_where_the_first_level_fails() -> None:
    assert climb(lambda level: facts(level, 1, failed=100)) == [1]


def test_repeats_go_up_and_down_by_turns() -> None:
    assert list(interleaved([1, 2, 4], 3)) == [(1, 1), (2, 1), (4, 1), (4, 2), (2, 2), (1, 2), (1, 3), (2, 3), (4, 3)]


def test_percentiles_with_failures_stand_beside_those_without_them() -> None:
    never = Figure(value=float("inf"), interval=Interval(low=float("inf"), high=float("inf")))
    level = facts(8, 8, failed=10, latency_with_failures_s={"p50": None, "p95": never, "p99": None})
    header, [line] = wanted_columns([level])

    assert level_line(level).endswith("  with_failures_p50=-  with_failures_p95=never  with_failures_p99=-")
    assert "p95" in header
    assert line[header.index("p50, p95, p99 with failures")] == "-, never, -"
    assert not any("failures" in name for name in wanted_columns([facts(8, 8)])[0])


def test_on_a_terminal_the_notes_stand_below_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    terminal = Terminal()
    levels = [facts(4, 4.0), facts(8, 8.0, audit=CLIENT)]
    show_levels(levels, verdict_on(levels, BenchConfig()), stream=terminal)
    assert "\nlevel 8: client-limited: the client's thread is busy (99% of a core)\n" in terminal.getvalue()
    assert terminal.getvalue().count("the client's thread is busy") == 1


@pytest.mark.parametrize(
    ("columns", "left_out"),
    [(75, "p50, ITL p95, queue p95, prompt tokens/s"), (80, "ITL p95, queue p95, prompt tokens/s"), (120, None)],
)
def test_a_narrow_terminal_gets_the_columns_that_matter_whole(
    monkeypatch: pytest.MonkeyPatch, columns: int, left_out: str | None
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", str(columns))
    terminal = Terminal()
    times = {"p50": Figure(value=0.123), "p95": Figure(value=1.25), "p99": Figure(value=2.5)}
    tokens = {"prompt": 12_345.0, "completion": 678.0}
    level = facts(8, 8, tokens_per_s=tokens, latency_s=times, ttft_s=times, itl_s=times, queue_wait_s=times)
    show_levels([level], verdict_on([level], BenchConfig()), stream=terminal)
    shown = re.sub(r"\x1b\[[\d;]*m", "", terminal.getvalue())

    assert max(map(len, shown.splitlines())) <= columns
    assert "│ 2.50 s │" in shown
    assert re.search("completion +│", shown)
    assert re.findall("not shown, for want of columns: (.*)", shown) == ([left_out] if left_out else [])


def test_tokens_per_second_are_named_by_what_they_are_of() -> None:
    header, [line] = wanted_columns([facts(8, 8, tokens_per_s={"prompt": 99.0, "completion": 0.0})])

    assert line[header.index("prompt tokens/s")] == "99.0"
    assert "completion tokens/s" not in header
