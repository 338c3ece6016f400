"""Advice: what to do about an error that every request meets."""

from __future__ import annotations

import os

from runner.config import RunnerConfig, replicas
from runner.errors import (
    AuthenticationError,
    InsufficientQuotaError,
    NotFoundError,
    PermissionDeniedError,
    RequestError,
)
from runner.transports import DIRECT


def way_out(error: RequestError, label: str, config: RunnerConfig) -> str:
    """What to do about an error that every row meets at the deployment ``label``; empty where it is none's."""
    deployment = replicas(config).get(label)
    where = f"deployments.{label}." if config.deployments else ""
    match error:
        case AuthenticationError() | PermissionDeniedError() if deployment is not None:
            provider = DIRECT.get(deployment.model.partition("/")[0])
            variable = deployment.api_key_env or (provider.key_env if provider else "the provider's variable")
            return f"Check the key in {variable}" if os.environ.get(variable) else f"Set the key in {variable}"
        case NotFoundError() if deployment is not None:
            return f"Check {where}model={deployment.model} and {where}api_base"
        case InsufficientQuotaError() if error.retry_after_s:
            return "The same command goes on then"
        case InsufficientQuotaError():
            return "Check the account's balance and limits"
    return "Check the server"
