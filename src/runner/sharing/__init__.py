"""Limits that several processes share: by a file on one host, by Redis on many."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from runner.config import DeploymentConfig, LimitsConfig, Shared
from runner.errors import ConfigError
from runner.limiter import limits_of
from runner.sharing.leases import Leases
from runner.sharing.ledger import Order, SharedQuota
from runner.transports import base_of, key_of


def open_shared(limits: LimitsConfig, deployments: Mapping[str, DeploymentConfig]) -> Leases | None:
    """The quota that ``deployments`` share with those of other processes, as ``limits.shared`` says; None: with none.

    Processes share a quota where provider, address, key and model are the same.

    Raises:
        ConfigError: It cannot be shared here.
    """
    if limits.shared is Shared.none:
        return None
    amounts = limits_of(limits)
    account = account_of(deployments)
    shared: SharedQuota
    if limits.shared is Shared.file:
        from runner.sharing.file import FileQuota

        shared = FileQuota(folder_of(limits) / f"{account}.sqlite", amounts)
    else:
        from runner.sharing.redis import RedisQuota

        shared = RedisQuota(limits.redis_url, account, amounts, password=os.environ.get(PASSWORD_VARIABLE))
    try:
        shared.exchange(Order(holder=""))  # better now than when the first request waits
    except OSError as error:
        raise ConfigError(f"limits.shared={limits.shared.value}: {error}") from None
    finally:
        shared.close()
    return Leases(shared)


PASSWORD_VARIABLE = "RUNNER_REDIS_PASSWORD"


def folder_of(limits: LimitsConfig) -> Path:
    """Where the files of ``limits.shared=file`` are."""
    if limits.shared_folder is not None:
        return Path(limits.shared_folder).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache, "runner", "limits")


def account_of(deployments: Mapping[str, DeploymentConfig]) -> str:
    """What names the quota of ``deployments``, without telling the key: a hash of address, key and model of each."""
    parts = sorted(
        "\0".join((deployment.model, base_of(deployment) or "", _key_of(deployment)))
        for deployment in deployments.values()
    )
    return hashlib.sha256("\1".join(parts).encode()).hexdigest()[:32]


def _key_of(deployment: DeploymentConfig) -> str:
    provider = deployment.model.partition("/")[0]
    return key_of(deployment) or os.environ.get(f"{provider.upper()}_API_KEY") or ""
