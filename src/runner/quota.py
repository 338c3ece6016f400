"""What a provider's answer says about its quota: what is left, when to try again. Pure functions over what it sent.

Sources: RFC 9110 section 10.2.3 (Retry-After), OpenAI's and Azure's ``retry-after-ms``, Google's ``RetryInfo``
error detail, OpenAI's ``x-ratelimit-*`` (resets as ``1s``, ``6m0s``, ``120ms``), which Azure and Groq send too (resets
in seconds; Groq's requests are of the day), Anthropic's ``anthropic-ratelimit-*`` (resets as RFC 3339 times).
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

_DURATION = re.compile(r"(\d{1,12}(?:\.\d{1,12})?)(ms|s|m|h|d)")
_UNIT_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_EARLIEST_UNIX_TIME = 1e9  # 2001; a smaller number is a duration
_EARLIEST_UNIX_TIME_MS = 1e12

_HEADERS = (
    ("requests", *(f"x-ratelimit-{fact}-requests" for fact in ("remaining", "limit", "reset"))),
    ("tokens", *(f"x-ratelimit-{fact}-tokens" for fact in ("remaining", "limit", "reset"))),
    ("requests", *(f"anthropic-ratelimit-requests-{fact}" for fact in ("remaining", "limit", "reset"))),
    ("tokens", *(f"anthropic-ratelimit-tokens-{fact}" for fact in ("remaining", "limit", "reset"))),
    ("input", *(f"anthropic-ratelimit-input-tokens-{fact}" for fact in ("remaining", "limit", "reset"))),
    ("output", *(f"anthropic-ratelimit-output-tokens-{fact}" for fact in ("remaining", "limit", "reset"))),
)
"""What is counted, and the headers that say how much of it is left, of how much, and when all of it is there again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What the headers of one answer say about one quota."""

    kind: str  # requests, tokens, input, output
    remaining: float
    limit: float | None  # None: they do not say
    reset_s: float | None  # until all of it is there again

    @property
    def is_of_a_day(self) -> bool:
        """Whether this is a quota per day rather than per minute, as far as one can tell.

        A reset beyond two minutes is a day's. One that fills up steadily (Groq's) is soon full again while little is
        used: then the time in which it would fill up from nothing tells.
        """
        if self.reset_s is None:
            return False
        if self.reset_s > _LONGEST_MINUTE_S:
            return True
        used = 0.0 if self.limit is None else self.limit - self.remaining
        return used > 0 and self.limit is not None and 0.9 < self.reset_s * self.limit / used / _UNIT_S["d"] < 1.1


_LONGEST_MINUTE_S = 120.0


def readings(headers: Mapping[str, str], *, now: float | None = None) -> list[Reading]:
    """What the ``headers`` of an answer say about the quotas it came under. Nonsense is left out.

    Args:
        headers: Names in lower case or case-insensitive.
        now: Unix time, for resets that are points in time; None: as `clock_of` has it.
    """
    present = [names for names in _HEADERS if names[1] in headers]
    if not present:
        return []
    now = clock_of(headers) if now is None else now
    found = []
    for kind, remaining_name, limit_name, reset_name in present:
        remaining = _number(headers[remaining_name], 1.0)
        limit = _number(headers.get(limit_name), 1.0)
        if remaining is not None and limit != 0 and (limit is None or remaining <= limit):
            reset_s = duration_s(headers.get(reset_name), now=now)
            found.append(Reading(kind=kind, remaining=remaining, limit=limit, reset_s=reset_s))
    return found


def retry_after_s(headers: Mapping[str, str], body: Any, *, now: float) -> float | None:
    """Seconds until the server wants to be asked again, or None where it does not say.

    The first that is given counts: ``retry-after-ms``, ``Retry-After``, the body's ``retryDelay``, the reset of a
    quota that the headers call empty.

    Args:
        headers: The answer's headers; names in lower case or case-insensitive.
        body: The decoded body, whatever it is.
        now: Unix time, for hints that are points in time.
    """
    hints = (
        _number(headers.get("retry-after-ms"), 0.001),
        duration_s(headers.get("retry-after"), now=now),
        duration_s(_retry_delay(body), now=now),
        _longest_reset_s(headers, now=now),
    )
    return next((hint for hint in hints if hint is not None), None)


def clock_of(headers: Mapping[str, str]) -> float:
    """Unix time by the clock that a provider's times are of: its own, where the answer has a ``Date``, or else ours."""
    sent = _moment(headers["date"]) if "date" in headers else None
    return time.time() if sent is None else sent


def duration_s(text: Any, *, now: float) -> float | None:
    """Seconds in any notation that providers use: ``12``, ``1.5``, ``6m0s``, ``120ms``, an HTTP date, RFC 3339, Unix
    time in seconds or milliseconds.

    Negative and nonsensical values are None, a time that has passed is 0.
    """
    if text is None:
        return None
    text = str(text).strip().lower()
    seconds = _number(text, 1.0)
    if seconds is not None:
        if seconds < _EARLIEST_UNIX_TIME:
            return seconds
        return max(0.0, (seconds / 1000 if seconds >= _EARLIEST_UNIX_TIME_MS else seconds) - now)
    parts = _DURATION.findall(text)
    if parts and "".join(number + unit for number, unit in parts) == text:
        return sum(float(number) * _UNIT_S[unit] for number, unit in parts)
    moment = _moment(text)
    return None if moment is None else max(0.0, moment - now)


def _number(text: Any, unit_s: float) -> float | None:
    try:
        value = float(text) * unit_s
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) and value >= 0 else None


def _moment(text: str) -> float | None:
    for parse in (parsedate_to_datetime, lambda value: datetime.fromisoformat(value.replace("z", "+00:00"))):
        try:
            moment = parse(text.upper() if parse is not parsedate_to_datetime else text)
        except (TypeError, ValueError, OverflowError):
            continue
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        return moment.timestamp()
    return None


def _retry_delay(body: Any) -> Any:
    """Google's ``error.details[].retryDelay``."""
    error = body.get("error") if isinstance(body, dict) else None
    details = error.get("details") if isinstance(error, dict) else None
    for detail in details if isinstance(details, list) else ():
        if isinstance(detail, dict) and "retryDelay" in detail:
            return detail["retryDelay"]
    return None


def _longest_reset_s(headers: Mapping[str, str], *, now: float) -> float | None:
    resets = [reading.reset_s for reading in readings(headers, now=now) if reading.remaining == 0]
    return max((reset for reset in resets if reset is not None), default=None)
