"""Transports: clients that speak to a provider. `open_transport` chooses the one for a deployment."""

from __future__ import annotations

import asyncio
import os
import re
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

from runner.config import DeploymentConfig, SimulatorConfig, TransportKind
from runner.errors import ConfigError
from runner.types import Client

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

DEFAULT_TIMEOUT_S = 600.0
_CONNECT_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """A provider whose wire is OpenAI's, unmodified."""

    key_env: str
    base_env: str
    base: str | None = None  # None: the user names it


DIRECT: Mapping[str, Provider] = {
    "openai": Provider(key_env="OPENAI_API_KEY", base_env="OPENAI_API_BASE", base="https://api.openai.com/v1"),
    "hosted_vllm": Provider(key_env="HOSTED_VLLM_API_KEY", base_env="HOSTED_VLLM_API_BASE"),
    "openai_like": Provider(key_env="OPENAI_LIKE_API_KEY", base_env="OPENAI_LIKE_API_BASE"),
    "custom_openai": Provider(key_env="CUSTOM_OPENAI_API_KEY", base_env="CUSTOM_OPENAI_API_BASE"),
    "llamafile": Provider(key_env="LLAMAFILE_API_KEY", base_env="LLAMAFILE_API_BASE", base="http://127.0.0.1:8080/v1"),
    "lm_studio": Provider(key_env="LM_STUDIO_API_KEY", base_env="LM_STUDIO_API_BASE", base="http://127.0.0.1:1234/v1"),
    "simulated": Provider(key_env="SIMULATED_API_KEY", base_env="SIMULATED_API_BASE"),
}
"""Providers that `DirectTransport` serves, under LiteLLM's names and with the variables that LiteLLM reads."""


def open_transport(
    deployment: DeploymentConfig, *, simulator: SimulatorConfig, timeout_s: float | None = None
) -> Client:
    """The client that speaks to ``deployment``. Opens no connection yet.

    Raises:
        ConfigError: The deployment cannot be served: unknown provider, no address, no key.
    """
    timeout_s = DEFAULT_TIMEOUT_S if timeout_s is None else timeout_s
    prefix, _, model = deployment.model.partition("/")
    provider = DIRECT.get(prefix)
    api_base = base_of(deployment)
    if prefix == "simulated" and api_base is None:
        from runner.transports.simulated import SimulatedTransport

        return SimulatedTransport(
            simulator, model=model, api_key=key_of(deployment), params=deployment.extra_kwargs, timeout_s=timeout_s
        )
    if deployment.transport is TransportKind.litellm or (
        deployment.transport is TransportKind.auto and provider is None
    ):
        from runner.transports.litellm import LiteLLMTransport

        return LiteLLMTransport(
            model=deployment.model,
            api_base=deployment.api_base,
            api_key=key_of(deployment),
            params=deployment.extra_kwargs,
            timeout_s=timeout_s,
        )
    if provider is None:
        raise ConfigError(
            f"transport=direct does not speak to {prefix!r}: it serves {', '.join(DIRECT)}; use transport=auto"
        )
    if api_base is None:
        raise ConfigError(
            f"model={deployment.model!r} needs the server's address: api_base=http://HOST:PORT/v1"
            f" (or the variable {provider.base_env})"
        )
    api_key = key_of(deployment)
    if api_key is None and api_base == provider.base and prefix == "openai":
        raise ConfigError(
            f"model={deployment.model!r} needs a key: set {deployment.api_key_env or provider.key_env} in the"
            " environment or in .env, or name another variable with api_key_env=NAME"
        )
    from runner.transports.direct import DirectTransport

    return DirectTransport(
        model=model, api_base=api_base, api_key=api_key, params=deployment.extra_kwargs, timeout_s=timeout_s
    )


async def check_addresses(deployments: Mapping[str, DeploymentConfig]) -> None:
    """See whether anybody listens where the deployments are said to be, before the first request.

    Raises:
        ConfigError: Nobody does, at any of them, or not by TLS where the address is of ``https``.
    """
    failures = {label: await _unreachable(deployment) for label, deployment in deployments.items()}
    if all(failures.values()):
        raise ConfigError("; ".join(f"{place_of(label, deployments)}{failure}" for label, failure in failures.items()))


def place_of(label: str, deployments: Mapping[str, DeploymentConfig]) -> str:
    """What a message about a deployment begins with: nothing for the one that ``model`` and ``api_base`` describe."""
    alone = len(deployments) == 1 and label == deployments[label].model
    return "" if alone else f"deployments.{label}: "


def base_of(deployment: DeploymentConfig) -> str | None:
    """The address that a direct deployment is served at, or None where nobody named one."""
    provider = DIRECT.get(deployment.model.partition("/")[0])
    if deployment.api_base or provider is None:
        return deployment.api_base
    return os.environ.get(provider.base_env) or provider.base


def key_of(deployment: DeploymentConfig) -> str | None:
    """The deployment's key: from code, from the variable that it names, or from its provider's usual one.

    Raises:
        ConfigError: The variable that the deployment names is not set, or holds no key.
    """
    provider = DIRECT.get(deployment.model.partition("/")[0])
    variable = deployment.api_key_env or (provider.key_env if provider else None)
    key = deployment.api_key or (os.environ.get(variable) if variable else None)
    if not key:
        if deployment.api_key_env:
            if not _VARIABLE.fullmatch(deployment.api_key_env):
                raise ConfigError("api_key_env: the name of the environment variable that holds the key, not the key")
            raise ConfigError(f"api_key_env={deployment.api_key_env!r}: the environment has no such variable")
        return None
    key = key.strip()  # a line feed at the end is what files and pipes leave
    if not key.isprintable() or not key.isascii():
        raise ConfigError(f"the key in {variable or 'api_key'} holds characters that no key has: set it again")
    return key


async def _unreachable(deployment: DeploymentConfig) -> str | None:
    """Why no connection to a deployment can be made, if that is certain within a few seconds."""
    from runner.transports.direct import proxy_of

    api_base = base_of(deployment)
    if api_base is None or proxy_of(api_base):
        return None
    url = urlsplit(api_base)
    try:
        port = url.port or (443 if url.scheme == "https" else 80)
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            _, writer = await asyncio.open_connection(url.hostname, port)
    except TimeoutError:
        return None
    except ValueError:
        return f"api_base={api_base!r} is no URL: write http://HOST:PORT/v1"
    except socket.gaierror:
        return f"api_base={api_base}: the host {url.hostname!r} is unknown: check the name"
    except ConnectionRefusedError:
        return f"api_base={api_base}: nobody listens there: start the server, or correct the address"
    except OSError as error:
        return f"api_base={api_base}: no connection ({error.strerror or error}): check the address"
    try:
        failure = await _no_tls(writer, url.hostname, deployment) if url.scheme == "https" else None
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
    return f"api_base={api_base}: {failure}" if failure else None


async def _no_tls(writer: asyncio.StreamWriter, host: str | None, deployment: DeploymentConfig) -> str | None:
    """Why this connection cannot go over to TLS, if that is certain. LiteLLM judges certificates by its own rules."""
    import ssl

    context = ssl.create_default_context()
    if deployment.transport is TransportKind.litellm or deployment.model.partition("/")[0] not in DIRECT:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            await writer.start_tls(context, server_hostname=host)
    except ssl.SSLCertVerificationError as error:
        return (
            f"its certificate is refused ({error.verify_message}): correct the address, or name the file of"
            " certificates to trust in the variable SSL_CERT_FILE"
        )
    except ssl.SSLEOFError:
        return None
    except ssl.SSLError as error:
        return f"what listens there speaks no TLS ({error.reason}): write http:// if that is meant"
    except OSError:  # a TimeoutError, too
        return None
    return None
