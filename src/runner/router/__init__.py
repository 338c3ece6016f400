"""Routing: a fleet of deployments behaves like one reliable server.

    Router([Replica("east", client, weight=2), Replica("west", other)], strategy=LeastBusy())

`Router` gives each request to a `Replica`; a `Strategy` chooses among those that can take it, a `Circuit` says which
can. `Hedged` stands around a router.
"""

from __future__ import annotations

from runner.router.circuit import Circuit
from runner.router.hedge import Hedged
from runner.router.replica import Recallable, Replica
from runner.router.router import Router
from runner.router.strategies import Strategy, strategy_of

__all__ = ["Circuit", "Hedged", "Recallable", "Replica", "Router", "Strategy", "strategy_of"]
