from __future__ import annotations

import math
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.quota import Reading, clock_of, duration_s, readings, retry_after_s

NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC).timestamp()


def hint(headers: Mapping[str, str], body: Any = None) -> float | None:
    return retry_after_s(headers, body, now=NOW)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("12", 12.0),
        ("1.5", 1.5),
        (" 3 ", 3.0),
        (7, 7.0),
        ("0", 0.0),
        ("1s", 1.0),
        ("1.203608125s", 1.203608125),
        ("120ms", 0.12),
        ("6m0s", 360.0),
        ("1h2m3s", 3723.0),
        ("2d", 172_800.0),
        ("Sun, 01 Mar 2026 12:00:30 GMT", 30.0),
        ("2026-03-01T12:00:30Z", 30.0),
        ("2026-03-01T13:00:30+01:00", 30.0),
        ("2026-03-01T12:00:30.500Z", 30.5),
        (str(int(NOW) + 30), 30.0),
        (str(int(NOW + 30) * 1000), 30.0),
    ],
)
def test_every_notation_that_providers_use_is_read(text: Any, seconds: float) -> None:
    assert duration_s(text, now=NOW) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["Sun, 01 Mar 2026 11:00:00 GMT", "2026-03-01T11:00:00Z", "0001-01-01T00:00:00Z"])
def test_a_time_that_has_passed_is_no_wait(text: str) -> None:
    assert duration_s(text, now=NOW) == 0.0


@pytest.mark.parametrize(
    "text", [None, "", "soon", "-5", "-1s", "nan", "inf", "1e999", "5 apples", "s", "1x2s", "1s later", "Mon, 99 Foo"]
)
def test_nonsense_is_no_hint(text: Any) -> None:
    assert duration_s(text, now=NOW) is None


def test_times_are_read_by_the_clock_of_who_wrote_them() -> None:
    headers = {
        "date": "Sun, 01 Mar 2026 12:00:00 GMT",
        "anthropic-ratelimit-requests-remaining": "3",
        "anthropic-ratelimit-requests-reset": "2026-03-01T12:00:09Z",
    }
    assert clock_of(headers) == NOW
    assert [reading.reset_s for reading in readings(headers)] == [9.0]


@pytest.mark.parametrize("date", [{}, {"date": "today"}])
def test_without_a_date_our_own_clock_has_to_do(date: Mapping[str, str]) -> None:
    assert clock_of(date) == pytest.approx(time.time(), abs=60)


def test_a_date_without_a_zone_is_utc() -> None:
    assert duration_s("2026-03-01T12:00:05", now=NOW) == 5.0


@settings(deadline=None)
@given(text=st.text() | st.floats() | st.integers() | st.binary() | st.lists(st.integers(), max_size=2))
def test_anything_is_a_wait_of_at_least_nothing_or_no_hint(text: Any) -> None:
    seconds = duration_s(text, now=NOW)
    assert seconds is None or 0 <= seconds < math.inf


@settings(deadline=None)
@given(text=st.from_regex(r"[\d.]{1,20}(ms|s|m|h|d)([\d.]{1,20}(ms|s|m|h|d))?", fullmatch=True))
def test_any_sum_of_units_is_finite_or_no_hint(text: str) -> None:
    seconds = duration_s(text, now=NOW)
    assert seconds is None or 0 <= seconds < math.inf


@settings(deadline=None)
@given(text=st.datetimes(timezones=st.timezones()).map(datetime.isoformat))
def test_any_point_in_time_is_a_wait(text: str) -> None:
    seconds = duration_s(text, now=NOW)
    assert seconds is not None
    assert seconds >= 0


def test_the_more_exact_header_counts() -> None:
    assert hint({"retry-after-ms": "1500", "retry-after": "9"}) == 1.5
    assert hint({"retry-after": "9"}, {"error": {"details": [{"retryDelay": "2s"}]}}) == 9.0


def test_an_unreadable_hint_gives_way_to_the_next() -> None:
    assert hint({"retry-after-ms": "soon", "retry-after": "9"}) == 9.0
    assert hint({"retry-after": "soon"}, {"error": {"details": [{"retryDelay": "2s"}]}}) == 2.0


def test_a_hint_of_zero_is_a_hint() -> None:
    assert hint({"retry-after": "0", "x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "9s"}) == 0.0


def test_googles_retry_info_is_found_among_the_details() -> None:
    info = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "17s"}
    assert hint({}, {"error": {"code": 429, "details": [{"@type": "other"}, info]}}) == 17.0


def test_the_reset_of_an_empty_quota_is_the_last_resort() -> None:
    headers = {
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "120ms",
        "x-ratelimit-remaining-tokens": "0",
        "x-ratelimit-reset-tokens": "6m0s",
    }
    assert hint(headers) == 360.0
    assert hint(headers | {"x-ratelimit-remaining-tokens": "5"}) == pytest.approx(0.12)


def test_anthropics_reset_times_are_read() -> None:
    headers = {
        "anthropic-ratelimit-input-tokens-remaining": "0",
        "anthropic-ratelimit-input-tokens-reset": "2026-03-01T12:00:20Z",
    }
    assert hint(headers) == 20.0


def test_a_quota_that_is_not_empty_says_nothing() -> None:
    assert hint({"x-ratelimit-remaining-requests": "1", "x-ratelimit-reset-requests": "9s"}) is None


@pytest.mark.parametrize(
    "body", [None, "x", [], {"error": None}, {"error": "x"}, {"error": {"details": 3}}, {"error": {"details": [3]}}]
)
def test_bodies_without_a_hint_are_passed_over(body: Any) -> None:
    assert hint({}, body) is None


def read(headers: Mapping[str, str]) -> list[Reading]:
    return readings(headers, now=NOW)


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        (
            {
                "x-ratelimit-limit-requests": "500",
                "x-ratelimit-remaining-requests": "499",
                "x-ratelimit-reset-requests": "120ms",
                "x-ratelimit-limit-tokens": "30000",
                "x-ratelimit-remaining-tokens": "29000",
                "x-ratelimit-reset-tokens": "2s",
            },
            [
                Reading(kind="requests", limit=500, remaining=499, reset_s=0.12),
                Reading(kind="tokens", limit=30_000, remaining=29_000, reset_s=2),
            ],
        ),
        (  # Azure
            {"x-ratelimit-remaining-requests": "9", "x-ratelimit-remaining-tokens": "900"},
            [
                Reading(kind="requests", limit=None, remaining=9, reset_s=None),
                Reading(kind="tokens", limit=None, remaining=900, reset_s=None),
            ],
        ),
        (
            {
                "anthropic-ratelimit-input-tokens-limit": "40000",
                "anthropic-ratelimit-input-tokens-remaining": "39000",
                "anthropic-ratelimit-input-tokens-reset": "2026-03-01T12:00:02Z",
                "anthropic-ratelimit-output-tokens-limit": "8000",
                "anthropic-ratelimit-output-tokens-remaining": "0",
                "anthropic-ratelimit-output-tokens-reset": "2026-03-01T12:01:00Z",
            },
            [
                Reading(kind="input", limit=40_000, remaining=39_000, reset_s=2),
                Reading(kind="output", limit=8_000, remaining=0, reset_s=60),
            ],
        ),
        ({"x-ratelimit-remaining-requests": "-1"}, []),
        ({"x-ratelimit-remaining-requests": "5", "x-ratelimit-limit-requests": "0"}, []),
        ({"x-ratelimit-remaining-requests": "5", "x-ratelimit-limit-requests": "4"}, []),
        ({"content-type": "application/json"}, []),
    ],
)
def test_what_is_left_is_read(headers: Mapping[str, str], expected: list[Reading]) -> None:
    assert read(headers) == expected


@pytest.mark.parametrize(
    ("limit", "remaining", "reset_s", "of_a_day"),
    [
        (14_400, 14_399, 6.0, True),  # Groq: fills up steadily over a day
        (14_400, 14_370, 179.56, True),
        (200, 199, 432.0, True),  # OpenAI's requests per day
        (500, 499, 0.12, False),
        (500, 100, 48.0, False),
        (500, 499, 59.0, False),  # a window that begins with the minute
        (500, 500, 0.0, False),
        (None, 5, 30.0, False),
        (None, 5, None, False),
        (1_000, 0, 80_000.0, True),
    ],
)
def test_a_days_quota_is_told_from_a_minutes(
    limit: float | None, remaining: float, reset_s: float | None, of_a_day: bool
) -> None:
    reading = Reading(kind="requests", limit=limit, remaining=remaining, reset_s=reset_s)
    assert reading.is_of_a_day is of_a_day


NAMES = st.sampled_from(
    [
        "retry-after",
        "retry-after-ms",
        "x-ratelimit-remaining-requests",
        "x-ratelimit-reset-requests",
        "anthropic-ratelimit-tokens-remaining",
        "anthropic-ratelimit-tokens-reset",
    ]
)


@settings(deadline=None)
@given(headers=st.dictionaries(NAMES, st.text(max_size=12) | st.sampled_from(["0", "-1", "1e308", "nan", "9d9d"])))
def test_nonsense_headers_never_break_an_answer(headers: dict[str, str]) -> None:
    seconds = hint(headers)
    assert seconds is None or 0 <= seconds < math.inf
    assert all(0 <= reading.remaining < math.inf for reading in read(headers))
