"""What earlier sessions of a run sent, as far as limits still count it: a quota does not begin anew with a process."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from runner.answers import WAS_SENT
from runner.bucket import DAY_S, MINUTE_S, SPANS
from runner.estimate import Estimate
from runner.store import Store

_AHEAD_S = 60.0
"""What was sent so far in the future was sent under another clock, and nobody knows when."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """Requests that were sent at about the same time."""

    age_s: float  # how long ago, the last of them
    deployment: str | None  # None: to which is not known
    requests: int
    used: Estimate  # tokens of all of them


async def sent_within(
    store: Store, window_s: float, *, group_size: int = 1, default_output_tokens: int = 0
) -> list[Sent]:
    """What was sent in the last ``window_s`` seconds, the oldest first.

    Attempts of which it is not known what they used, as the process was killed for example, count as much as the
    largest answer.

    Args:
        group_size: Rows that share a request, of those that were in flight when the process was killed.
        default_output_tokens: What such an attempt counts before there is an answer.
    """
    now = time.time()
    parameters = {
        "begin": now - window_s,
        "last_minute": now - MINUTE_S,
        "end": now + _AHEAD_S,
        "group_size": group_size,
        "output_tokens": default_output_tokens,
    }
    return [
        Sent(
            age_s=max(0.0, now - row["at"]),
            deployment=row["deployment"],
            requests=math.ceil(row["requests"]),
            used=Estimate(prompt_tokens=row["prompt_tokens"], completion_tokens=row["completion_tokens"]),
        )
        async for row in store.query(_SENT, parameters)
    ]


_SENT = f"""
    WITH attempt (at, deployment, requests, prompt_tokens, completion_tokens, error_type, error_status, cost_usd) AS (
        SELECT
            settled_at - service_time_s, deployment, NOT shared,
            prompt_tokens, completion_tokens, error_type, error_status, cost_usd
        FROM answers
        WHERE deployment IS NOT NULL AND reused_from IS NULL
        UNION ALL
        SELECT
            started_at, deployment, iif(error_type = 'Lost', 1.0 / :group_size, NOT shared),
            NULL, NULL, error_type, error_status, cost_usd
        FROM attempts
    ),
    sent AS (
        SELECT
            at, deployment, requests, prompt_tokens, completion_tokens,
            prompt_tokens IS NULL AND (cost_usd IS NULL OR error_type = 'GivenUp') AS is_unknown
        FROM attempt
        WHERE at BETWEEN :begin AND :end AND {WAS_SENT}
    )
    SELECT
        max(at) AS at,
        deployment,
        sum(requests) AS requests,
        total(
            iif(is_unknown, (SELECT max(prompt_tokens) FROM answers), prompt_tokens)
        ) AS prompt_tokens,
        total(
            iif(is_unknown, (SELECT ifnull(max(completion_tokens), :output_tokens) FROM answers), completion_tokens)
        ) AS completion_tokens
    FROM sent
    GROUP BY
        deployment,
        at > :last_minute,
        CAST(at / iif(at > :last_minute, {MINUTE_S / SPANS}, {DAY_S / SPANS}) AS INTEGER)
    ORDER BY max(at)
"""
