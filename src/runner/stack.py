"""The client stack, assembled: ``Retrying(Router({label: Limited(Transport)}))``.

Where the window is found automatically, each transport is an ``Adaptive(Transport)``. Where there is a budget, it is
``Budgeted(Limited(Transport))``.
"""

from __future__ import annotations

from collections.abc import Mapping

from runner.adaptive import Adaptive
from runner.budget import Budget
from runner.concurrency import Window
from runner.config import DeploymentConfig, LimitsConfig, RetryConfig, SimulatorConfig
from runner.estimate import Estimator
from runner.limited import Limited
from runner.limiter import RateLimiter, limits_of
from runner.retry import Retrying
from runner.router import Router
from runner.sharing import open_shared
from runner.transports import open_transport
from runner.transports.prices import price_for
from runner.tuner import Tuner
from runner.types import Client


def open_stack(
    deployments: Mapping[str, DeploymentConfig],
    *,
    limits: LimitsConfig,
    retry: RetryConfig,
    simulator: SimulatorConfig,
    window: Window,
    tuner: Tuner | None = None,
    budget: Budget | None = None,
    timeout_s: float | None = None,
    limiters: Mapping[str, RateLimiter] | None = None,
) -> Client:
    """A client over ``deployments`` with limits, routing and retries. Opens no connection yet.

    Args:
        window: Where requests give their slots back while they wait for a retry or the end of a pause.
        tuner: Sets the window by what comes of the requests; None: nobody does.
        budget: What every attempt is kept to; None: no budget.
        timeout_s: How long an attempt may take where its request does not say; None: `transports.DEFAULT_TIMEOUT_S`.
        limiters: What `open_limiters` gave, for stacks that are to keep the limits together.

    Raises:
        ConfigError: A deployment cannot be served.
    """
    limiters = open_limiters(deployments, limits) if limiters is None else limiters
    limited: dict[str, Client] = {}
    for label, deployment in deployments.items():
        own = deployment.limits or limits
        transport = open_transport(deployment, simulator=simulator, timeout_s=timeout_s)
        client: Client = Limited(
            transport if tuner is None else Adaptive(transport, tuner),
            limiters[label],
            label=label,
            estimator=Estimator.of(
                own.token_estimates, model=deployment.model, default_output_tokens=own.default_output_tokens
            ),
            price=price_for(deployment, simulator),
            slot=window,
        )
        limited[label] = client if budget is None else budget.around(label, client)
    client = next(iter(limited.values()))
    if len(limited) > 1:
        client = Router(limited, weights={label: deployment.weight for label, deployment in deployments.items()})
    return Retrying(client, retry, slot=window)


def open_limiters(deployments: Mapping[str, DeploymentConfig], limits: LimitsConfig) -> dict[str, RateLimiter]:
    """The limiter of each deployment: its own, or one for all that have no limits of their own, but those of the run.

    One that several share reads no headers, since they speak of several quotas.
    """
    limiters: dict[str, RateLimiter] = {}
    of_the_run = {label: deployment for label, deployment in deployments.items() if deployment.limits is None}
    if len(of_the_run) > 1 and limits_of(limits):
        account = RateLimiter.of(limits, reads_headers=False, quota=open_shared(limits, of_the_run))
        limiters = dict.fromkeys(of_the_run, account)
    for label, deployment in deployments.items():
        if label not in limiters:
            own = deployment.limits or limits
            limiters[label] = RateLimiter.of(own, quota=open_shared(own, {label: deployment}))
    return limiters
