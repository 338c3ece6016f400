"""The client stack, assembled: ``Retrying(Router({label: Limited(Transport)}))``.

Where the window is found automatically, each transport is an ``Adaptive(Transport)``.
"""

from __future__ import annotations

from collections.abc import Mapping

from runner.adaptive import Adaptive
from runner.concurrency import Window
from runner.config import DeploymentConfig, LimitsConfig, RetryConfig, SimulatorConfig
from runner.limiter import Limited, RateLimiter
from runner.retry import Retrying
from runner.router import Router
from runner.transports import open_transport
from runner.transports.prices import price_of
from runner.tuner import Tuner
from runner.types import Client, TokenPrice


def open_stack(
    deployments: Mapping[str, DeploymentConfig],
    *,
    limits: LimitsConfig,
    retry: RetryConfig,
    simulator: SimulatorConfig,
    window: Window,
    tuner: Tuner | None = None,
    timeout_s: float | None = None,
) -> Client:
    """A client over ``deployments`` with limits, routing and retries. Opens no connection yet.

    Args:
        window: Where requests give their slots back while they wait for a retry.
        tuner: Sets the window by what comes of the requests; None: nobody does.
        timeout_s: How long an attempt may take where its request does not say; None: `transports.DEFAULT_TIMEOUT_S`.

    Raises:
        ConfigError: A deployment cannot be served.
    """
    account = RateLimiter.of(limits)
    limited: dict[str, Client] = {
        label: Limited(
            _observed(open_transport(deployment, simulator=simulator, timeout_s=timeout_s), tuner),
            account if deployment.limits is None else RateLimiter.of(deployment.limits),
            label=label,
            price=_price_of(deployment, simulator),
            default_output_tokens=(deployment.limits or limits).default_output_tokens,
        )
        for label, deployment in deployments.items()
    }
    client = next(iter(limited.values()))
    if len(limited) > 1:
        client = Router(limited, weights={label: deployment.weight for label, deployment in deployments.items()})
    return Retrying(client, retry, slot=window)


def _observed(client: Client, tuner: Tuner | None) -> Client:
    return client if tuner is None else Adaptive(client, tuner)


def _price_of(deployment: DeploymentConfig, simulator: SimulatorConfig) -> TokenPrice | None:
    if deployment.model.startswith("simulated/"):
        return TokenPrice(
            prompt=simulator.usd_per_million_prompt_tokens / 1e6,
            completion=simulator.usd_per_million_completion_tokens / 1e6,
        )
    return price_of(deployment.model)
