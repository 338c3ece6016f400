"""A shared quota in Redis: processes of many hosts."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

from runner.bucket import DAY_S, HEARD_S, ROUNDING, SPANS, TRAVEL_S, Bucket, Limit
from runner.errors import ConfigError
from runner.extras import missing
from runner.sharing.ledger import LEASE_S, LONGEST_POLL_S, POLL_S, SLICE_S, TICKET_S, Order, Slice

_TIMEOUT_S = 2.0


class RedisQuota:
    """A `SharedQuota` in Redis: one script does an exchange, on the server's time.

    Args:
        url: ``redis://HOST:PORT/DB``, or ``unix://PATH``.
        account: What names the quota.
        password: The server's, if it wants one.
        clock: Seconds; None: the server's.

    Raises:
        ConfigError: The package is missing, or the URL is none.
    """

    def __init__(
        self,
        url: str,
        account: str,
        limits: Sequence[Limit],
        *,
        password: str | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.limits = limits
        self._where = f"Redis at {urlsplit(url).hostname or urlsplit(url).path}"
        self._clock = clock
        try:
            redis = importlib.import_module("redis")
        except ImportError:
            raise missing("limits.shared=redis", "redis") from None
        self._trouble: type[Exception] = redis.RedisError
        options: dict[str, Any] = {"socket_timeout": _TIMEOUT_S, "socket_connect_timeout": _TIMEOUT_S}
        if password:
            options["password"] = password
        try:
            self._redis = redis.Redis.from_url(url, **options)
        except ValueError as error:
            raise ConfigError(f"limits.redis_url={url}: {error}") from None
        self._draw = self._redis.register_script(files("runner.sharing").joinpath("draw.lua").read_text("utf-8"))
        self._key = f"runner:limits:{account}"
        longest_s = max((limit.window_s for limit in limits), default=0.0)
        self._constants = {
            "limits": [_as_json(limit) for limit in limits],
            "spans": SPANS,
            "keep_longer_s": TRAVEL_S + LEASE_S,
            "heard_s": HEARD_S,
            "rounding": ROUNDING,
            "day_s": DAY_S,
            "slice_s": SLICE_S,
            "poll_s": POLL_S,
            "longest_poll_s": LONGEST_POLL_S,
            "ticket_s": TICKET_S,
            "keep_key_s": int(2 * longest_s) + 1,
        }

    def exchange(self, order: Order) -> Slice:
        now = None if self._clock is None else self._clock()
        message = json.dumps({**self._constants, **asdict(order), "now": now})
        try:
            reply: dict[str, Any] = json.loads(self._draw(keys=[self._key], args=[message]))
        except self._trouble as error:
            raise OSError(f"{self._where} does not answer ({error}): start it, or correct limits.redis_url") from None
        return Slice(**{**reply, "charged": reply["charged"] or []})

    def close(self) -> None:
        self._redis.close()


def _as_json(limit: Limit) -> dict[str, Any]:
    burst = Bucket(limit, least_burst_s=2 * LEASE_S).burst
    return {"name": limit.name, "amount": limit.amount, "window_s": limit.window_s, "burst": burst}
