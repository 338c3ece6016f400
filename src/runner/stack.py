"""The client stack, assembled: ``Retrying(Router({label: Limited(Transport)}))``, and what may stand between these."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from runner.account import Account
from runner.concurrency import Window
from runner.config import DeploymentConfig, LimitsConfig, RetryConfig, RoutingConfig, SimulatorConfig
from runner.limiter import Limited, RateLimiter, estimate_of
from runner.metrics import DeploymentSnapshot
from runner.retry import Retrying
from runner.router import Circuit, Hedged, Recallable, Replica, Router, strategy_of
from runner.transports import open_transport
from runner.transports.prices import price_of
from runner.types import Client, Request, Response, TokenPrice


class Stack:
    """A `Client` with all its layers, and what is to be known of the deployments below. Made by `open_stack`."""

    def __init__(self, client: Client, router: Router) -> None:
        self._client = client
        self._router = router

    async def send(self, request: Request) -> Response:
        return await self._client.send(request)

    async def aclose(self) -> None:
        await self._client.aclose()

    def deployments(self) -> Mapping[str, DeploymentSnapshot]:
        """How each of them does, by label."""
        return self._router.snapshot()

    def listen(self, listener: Callable[[str], None]) -> None:
        """Have ``listener`` told what somebody who watches should know: that all deployments are out, or back."""
        self._router.listen(listener)


def open_stack(
    deployments: Mapping[str, DeploymentConfig],
    *,
    limits: LimitsConfig,
    retry: RetryConfig,
    simulator: SimulatorConfig,
    window: Window,
    routing: RoutingConfig | None = None,
    timeout_s: float | None = None,
) -> Stack:
    """A client over ``deployments`` with limits, routing and retries. Opens no connection yet.

    Args:
        deployments: By label.
        limits: The account's, which hold for all deployments together; a deployment may have its own beside them.
        window: What a request has a slot of, and gives back while it waits for a retry.
        timeout_s: Seconds that a request may take. None: 600.

    Raises:
        ConfigError: A deployment cannot be served.
    """
    routing = routing or RoutingConfig()
    account = RateLimiter.of(limits)
    alone = len(deployments) == 1 and not any(deployment.limits for deployment in deployments.values())

    def replica_of(label: str, deployment: DeploymentConfig) -> Replica:
        own = deployment.limits
        transport = open_transport(deployment, simulator=simulator, timeout_s=timeout_s)
        recall = Recallable(transport) if len(deployments) > 1 else None
        price = _price_of(deployment, simulator)
        client: Client = Limited(
            recall or transport,
            account if alone else RateLimiter.of(own) if own else RateLimiter(),
            label=label,
            price=price,
            default_output_tokens=(own or limits).default_output_tokens,
        )
        if not alone and any(getattr(limits, key) is not None for key in _QUOTAS):
            client = Account(client, account, partial(estimate_of, default_output_tokens=limits.default_output_tokens))
        return Replica(
            label,
            client,
            weight=deployment.weight,
            order=deployment.order,
            price=price,
            limits=own,
            window=Window(own.concurrency) if own and own.concurrency else None,
            circuit=Circuit(budget=retry.budget, cooldown_s=routing.cooldown_s),
            recall=recall,
        )

    replicas = [replica_of(label, deployment) for label, deployment in deployments.items()]
    router = Router(
        replicas,
        strategy=strategy_of(routing.strategy, replicas),
        failover=routing.failover,
        max_wait_s=routing.max_wait_s,
        is_full=lambda: window.active >= window.limit,
    )
    client: Client = router
    if routing.hedge and len(replicas) > 1:
        client = Hedged(router)
    client = Retrying(client, retry, slot=window, max_wait_s=routing.max_wait_s)
    return Stack(client, router)


_QUOTAS = ("rpm", "tpm", "rpd", "tpd", "itpm", "otpm")


def _price_of(deployment: DeploymentConfig, simulator: SimulatorConfig) -> TokenPrice | None:
    if deployment.model.startswith("simulated/"):
        return TokenPrice(
            prompt=simulator.usd_per_million_prompt_tokens / 1e6,
            completion=simulator.usd_per_million_completion_tokens / 1e6,
        )
    return price_of(deployment.model)
