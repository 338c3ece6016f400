"""The provider's limits: requests and tokens in a sliding minute."""

from __future__ import annotations

import math
from collections import deque

WINDOW_S = 60.0


class SlidingMinute:
    """The requests and tokens admitted in the last 60 seconds. ``now`` is in seconds, on any one clock."""

    def __init__(self) -> None:
        self._admitted: deque[tuple[float, int]] = deque()
        self._tokens = 0

    def wait_s(self, now: float, tokens: int, *, rpm: int | None, tpm: int | None) -> float:
        """Seconds until a request of so many tokens fits, if no other comes: 0 at once, infinity never."""
        self._forget(now)
        if tpm is not None and tokens > tpm:
            return math.inf
        requests_over = 0 if rpm is None else len(self._admitted) + 1 - rpm
        tokens_over = 0 if tpm is None else self._tokens + tokens - tpm
        freed_at = now
        for admitted_at, spent in self._admitted:
            if requests_over <= 0 and tokens_over <= 0:
                break
            requests_over -= 1
            tokens_over -= spent
            freed_at = admitted_at + WINDOW_S
        return freed_at - now

    def add(self, now: float, tokens: int) -> None:
        """Count an admitted request."""
        self._admitted.append((now, tokens))
        self._tokens += tokens

    def headers(self, now: float, *, rpm: int | None, tpm: int | None) -> dict[str, str]:
        """OpenAI's rate-limit headers. A reset is the time until the window is empty, as OpenAI's is."""
        self._forget(now)
        reset = duration_text(self._admitted[-1][0] + WINDOW_S - now) if self._admitted else "0s"
        headers = {}
        for name, limit, used in (("requests", rpm, len(self._admitted)), ("tokens", tpm, self._tokens)):
            if limit is not None:
                headers[f"x-ratelimit-limit-{name}"] = str(limit)
                headers[f"x-ratelimit-remaining-{name}"] = str(max(0, limit - used))
                headers[f"x-ratelimit-reset-{name}"] = reset
        return headers

    def _forget(self, now: float) -> None:
        while self._admitted and self._admitted[0][0] + WINDOW_S <= now:
            self._tokens -= self._admitted.popleft()[1]


def duration_text(seconds: float) -> str:
    """A duration in OpenAI's notation, rounded up to milliseconds: ``120ms``, ``1.5s``, ``6m0s``."""
    milliseconds = math.ceil(round(seconds * 1000, 6))
    if 0 < milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    return (f"{hours}h" if hours else "") + (f"{minutes}m" if hours or minutes else "") + f"{rest / 1000:.10g}s"
