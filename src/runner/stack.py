"""The client stack, assembled: ``Retrying(Router({label: Limited(Transport)}))``, and what may stand between these.

Where the window is found automatically, each transport is an ``Adaptive(Transport)``. Where there is a budget, it is
``Budgeted(Limited(Transport))``.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass

from runner.account import Account
from runner.adaptive import Adaptive
from runner.budget import Budget
from runner.concurrency import Window
from runner.config import (
    DeploymentConfig,
    LimitsConfig,
    RetryConfig,
    RoutingConfig,
    RunnerConfig,
    Shared,
    SimulatorConfig,
    replicas,
)
from runner.earlier import Sent
from runner.errors import ConfigError
from runner.estimate import Estimator
from runner.limited import Limited
from runner.limiter import RateLimiter, limits_of
from runner.metrics import DeploymentSnapshot
from runner.retry import Retrying
from runner.router import Circuit, Hedged, Recallable, Replica, Router, strategy_of
from runner.sharing import open_shared
from runner.transports import open_transport, place_of
from runner.transports.prices import price_for
from runner.tuner import Tuner
from runner.types import Client, Request, Response


class Stack:
    """A `Client` with all its layers, and what is to be known of the deployments below. Made by `open_stack`."""

    def __init__(self, client: Client, router: Router, limiters: Limiters) -> None:
        self._client = client
        self._router = router
        self._limiters = limiters

    async def send(self, request: Request) -> Response:
        return await self._client.send(request)

    async def aclose(self) -> None:
        await self._client.aclose()

    def deployments(self) -> Mapping[str, DeploymentSnapshot]:
        """How each of them does, by label."""
        return self._router.snapshot()

    @property
    def held_up_s(self) -> float:
        """How much longer no request goes out, to any of them, as far as is known."""
        account = self._limiters.account
        own_s = min(limiter.held_up_s for limiter in self._limiters.of.values())
        return max(own_s, account.held_up_s) if account else own_s

    @property
    def memory_s(self) -> float:
        """For how long what is sent counts for a limit; 0 where there is none."""
        return max(limiter.memory_s for limiter in self._limiters)

    def recall(self, sent: Sequence[Sent]) -> None:
        """Count what was sent before there was this stack, the oldest first, as `RateLimiter.recall` does."""
        for each in sent:
            for limiter in self._limiters.over(each.deployment):
                limiter.recall(each.used, requests=each.requests, age_s=each.age_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limiters:
    """What keeps a stack to its limits."""

    of: Mapping[str, RateLimiter]  # each deployment's own, by label
    account: RateLimiter | None = None  # what holds for all of them together

    def __iter__(self) -> Iterator[RateLimiter]:
        return iter([*self.of.values(), *([self.account] if self.account else [])])

    def over(self, label: str | None) -> Iterator[RateLimiter]:
        """Those that a request to this deployment has to pass; None: to any of them."""
        own = self.of.get(label) if label else None
        return (each for each in self if label is None or each in (own, self.account))


def stack_of(
    config: RunnerConfig, window: Window, *, tuner: Tuner | None = None, budget: Budget | None = None
) -> Stack:
    """The client of a run, by `open_stack` with all that its configuration says."""
    return open_stack(
        replicas(config),
        limits=config.limits,
        retry=config.retry,
        routing=config.routing,
        simulator=config.simulator,
        window=window,
        tuner=tuner,
        budget=budget,
        timeout_s=config.request.get("timeout"),
        limiters=open_limiters(replicas(config), config.limits, kept=_KEPT if config.sweep.folder else None),
    )


_KEPT: dict[Hashable, RateLimiter] = {}
"""The quotas of a sweep whose cells follow each other in this process: the next one has what the last one left."""


def open_stack(
    deployments: Mapping[str, DeploymentConfig],
    *,
    limits: LimitsConfig,
    retry: RetryConfig,
    simulator: SimulatorConfig,
    window: Window,
    routing: RoutingConfig | None = None,
    tuner: Tuner | None = None,
    budget: Budget | None = None,
    timeout_s: float | None = None,
    limiters: Limiters | None = None,
) -> Stack:
    """A client over ``deployments`` with limits, routing and retries. Opens no connection yet.

    Args:
        deployments: By label.
        limits: The account's, which hold for all deployments together; a deployment may have its own beside them.
        window: Where requests give their slots back while they wait for a retry or the end of a pause.
        tuner: Sets the window by what comes of the requests; None: nobody does.
        budget: What every attempt is kept to; None: no budget.
        timeout_s: How long an attempt may take where its request does not say; None: `transports.DEFAULT_TIMEOUT_S`.
        limiters: What `open_limiters` gave, for stacks that are to keep the limits together.

    Raises:
        ConfigError: A deployment cannot be served.
    """
    routing = routing or RoutingConfig()
    limiters = limiters or open_limiters(deployments, limits)

    def replica_of(label: str, deployment: DeploymentConfig) -> Replica:
        own = deployment.limits
        try:
            transport = open_transport(deployment, simulator=simulator, timeout_s=timeout_s)
        except ConfigError as error:
            raise ConfigError(f"{place_of(label, deployments)}{error}") from None
        own_window = Window.of(own) if own and own.concurrency else None
        own_tuner = Tuner.of(own, own_window, label=label) if own and own_window else None
        for each in (tuner, own_tuner):
            transport = Adaptive(transport, each) if each else transport
        recall = Recallable(transport) if len(deployments) > 1 else None
        price = price_for(deployment, simulator)
        estimator = Estimator.of(
            (own or limits).token_estimates,
            model=deployment.model,
            default_output_tokens=(own or limits).default_output_tokens,
        )
        client: Client = Limited(
            recall or transport, limiters.of[label], label=label, estimator=estimator, price=price, slot=window
        )
        if limiters.account is not None:
            client = Account(client, limiters.account, own=limiters.of[label], estimator=estimator, slot=window)
        if budget is not None:
            client = budget.around(label, client)
        return Replica(
            label,
            client,
            weight=deployment.weight,
            order=deployment.order,
            price=price,
            limits=own,
            window=own_window,
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
    client: Client = Hedged(router) if routing.hedge and len(replicas) > 1 else router
    return Stack(Retrying(client, retry, slot=window, max_wait_s=routing.max_wait_s), router, limiters)


def open_limiters(
    deployments: Mapping[str, DeploymentConfig],
    limits: LimitsConfig,
    *,
    kept: MutableMapping[Hashable, RateLimiter] | None = None,
) -> Limiters:
    """The limiter of each deployment, and the account's above them.

    Where there is one deployment without limits of its own, the account's are its own. The account's limiter reads no
    headers, since they speak of one deployment.

    Args:
        kept: Limiters of earlier stacks, which go on in this one where limits, address, key and model are the same.
            None: every limiter is new.

    Raises:
        ConfigError: Limits cannot be shared with other processes here.
    """

    def limiter(limits: LimitsConfig, *labels: str, reads_headers: bool = True) -> RateLimiter:
        of = {label: deployments[label] for label in labels}
        if kept is None or limits.shared is not Shared.none:
            return RateLimiter.of(limits, reads_headers=reads_headers, quota=open_shared(limits, of))
        accounts = [(label, each.model, each.api_base, each.api_key, each.api_key_env) for label, each in of.items()]
        quota = (*accounts, *limits_of(limits), limits.header_bucket_scope, reads_headers)
        if quota not in kept:
            kept[quota] = RateLimiter.of(limits, reads_headers=reads_headers)
        return kept[quota]

    alone = len(deployments) == 1 and not any(deployment.limits for deployment in deployments.values())
    if alone:
        return Limiters(of={label: limiter(limits, label) for label in deployments})
    unlimited = LimitsConfig(header_bucket_scope=limits.header_bucket_scope)
    return Limiters(
        of={label: limiter(deployment.limits or unlimited, label) for label, deployment in deployments.items()},
        account=limiter(limits, *deployments, reads_headers=False) if limits_of(limits) else None,
    )
