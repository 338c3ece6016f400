"""What earlier sessions of a run sent, as far as limits still count it: a quota does not begin anew with a process."""

from __future__ import annotations

import time
from dataclasses import dataclass

from runner.bucket import DAY_S, MINUTE_S, SPANS
from runner.estimate import Estimate
from runner.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """Requests that were sent at about the same time."""

    age_s: float  # how long ago, the last of them
    deployment: str | None  # None: to which is not known
    requests: int
    used: Estimate  # tokens of all of them


async def sent_within(store: Store, window_s: float) -> list[Sent]:
    """What was sent in the last ``window_s`` seconds, the oldest first.

    Attempts of which it is not known what they used, as the process was killed for example, count as much as the
    largest answer.
    """
    now = time.time()
    return [
        Sent(
            age_s=max(0.0, now - row["at"]),
            deployment=row["deployment"],
            requests=row["requests"],
            used=Estimate(prompt_tokens=row["prompt_tokens"], completion_tokens=row["completion_tokens"]),
        )
        async for row in store.query(_SENT, (now - window_s, now - MINUTE_S))
    ]


_SENT = f"""
    WITH sent (at, deployment, counts, prompt_tokens, completion_tokens, is_unknown) AS MATERIALIZED (
        SELECT
            settled_at - service_time_s, deployment, NOT shared, prompt_tokens, completion_tokens,
            prompt_tokens IS NULL AND cost_usd IS NULL
        FROM answers
        WHERE settled_at > ?1 AND deployment IS NOT NULL AND reused_from IS NULL
        UNION ALL
        SELECT started_at, deployment, NOT shared, NULL, NULL, cost_usd IS NULL
        FROM attempts
        WHERE started_at > ?1 AND error_type != 'ConnectError'
    ),
    largest (prompt, completion) AS (SELECT max(prompt_tokens), max(completion_tokens) FROM sent)
    SELECT
        max(at) AS at, deployment, sum(counts) AS requests,
        total(iif(is_unknown, largest.prompt, prompt_tokens)) AS prompt_tokens,
        total(iif(is_unknown, largest.completion, completion_tokens)) AS completion_tokens
    FROM sent, largest
    GROUP BY deployment, at > ?2, CAST(at / iif(at > ?2, {MINUTE_S / SPANS}, {DAY_S / SPANS}) AS INTEGER)
    ORDER BY max(at)
"""
