"""What a provider's answer says about its quota: when to try again. Pure functions over headers and bodies.

Sources: RFC 9110 section 10.2.3 (Retry-After), OpenAI's and Azure's ``retry-after-ms``, Google's ``RetryInfo``
error detail, OpenAI's ``x-ratelimit-reset-*`` (``1s``, ``6m0s``, ``120ms``), Anthropic's RFC 3339 reset times.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

_DURATION = re.compile(r"(\d{1,12}(?:\.\d{1,12})?)(ms|s|m|h|d)")
_UNIT_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_RESET_HEADERS = (
    ("x-ratelimit-remaining-requests", "x-ratelimit-reset-requests"),
    ("x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens"),
    ("anthropic-ratelimit-requests-remaining", "anthropic-ratelimit-requests-reset"),
    ("anthropic-ratelimit-tokens-remaining", "anthropic-ratelimit-tokens-reset"),
    ("anthropic-ratelimit-input-tokens-remaining", "anthropic-ratelimit-input-tokens-reset"),
    ("anthropic-ratelimit-output-tokens-remaining", "anthropic-ratelimit-output-tokens-reset"),
)


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


def duration_s(text: Any, *, now: float) -> float | None:
    """Seconds in any notation that providers use: ``12``, ``1.5``, ``6m0s``, ``120ms``, an HTTP date, RFC 3339.

    Negative and nonsensical values are None, a time that has passed is 0.
    """
    if text is None:
        return None
    text = str(text).strip().lower()
    seconds = _number(text, 1.0)
    if seconds is not None:
        return seconds
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
    resets = [
        duration_s(headers.get(reset), now=now)
        for remaining, reset in _RESET_HEADERS
        if _number(headers.get(remaining), 1.0) == 0
    ]
    known = [reset for reset in resets if reset is not None]
    return max(known) if known else None
