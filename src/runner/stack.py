"""The client stack, assembled: ``Retrying(Router({label: Limited(Transport)}))``."""

from __future__ import annotations

from collections.abc import Mapping

from runner.concurrency import Window
from runner.config import DeploymentConfig, LimitsConfig, RetryConfig, SimulatorConfig
from runner.limiter import Limited, RateLimiter
from runner.retry import Retrying
from runner.router import Router
from runner.transports import open_transport
from runner.transports.prices import price_for
from runner.types import Client


def open_stack(
    deployments: Mapping[str, DeploymentConfig],
    *,
    limits: LimitsConfig,
    retry: RetryConfig,
    simulator: SimulatorConfig,
    window: Window,
    timeout_s: float | None = None,
) -> Client:
    """A client over ``deployments`` with limits, routing and retries. Opens no connection yet.

    Raises:
        ConfigError: A deployment cannot be served.
    """
    account = RateLimiter.of(limits)
    limited: dict[str, Client] = {
        label: Limited(
            open_transport(deployment, simulator=simulator, timeout_s=timeout_s),
            account if deployment.limits is None else RateLimiter.of(deployment.limits),
            label=label,
            price=price_for(deployment, simulator),
            default_output_tokens=(deployment.limits or limits).default_output_tokens,
        )
        for label, deployment in deployments.items()
    }
    client = next(iter(limited.values()))
    if len(limited) > 1:
        client = Router(limited, weights={label: deployment.weight for label, deployment in deployments.items()})
    return Retrying(client, retry, slot=window)
