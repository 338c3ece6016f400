"""What a deployment offers: the models its server lists, or the keys that LiteLLM misses for it."""

from __future__ import annotations

import os
from collections.abc import Sequence

import orjson

from runner import errors
from runner.transports import wire

_TIMEOUT_S = 10.0


async def listed_models(api_base: str, api_key: str | None) -> list[str]:
    """The ids that ``GET /models`` of an OpenAI-compatible server lists. Costs nothing.

    Raises:
        RequestError: Nobody answers, or with a refusal, or without a list.
    """
    import aiohttp

    from runner.transports.direct import proxy_of

    base = api_base.rstrip("/")
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout, headers=headers, proxy=proxy_of(base)) as session,
            session.get(f"{base}/models", allow_redirects=False) as answer,
        ):
            payload = await answer.content.read(2**22)
            if answer.status != 200:
                raise wire.error_from(
                    answer.status, wire.redacted(payload, [api_key] if api_key else []), answer.headers
                )
    except TimeoutError:
        raise errors.Timeout(f"no answer from {base}/models within {_TIMEOUT_S:g} s") from None
    except (aiohttp.ClientError, OSError) as error:
        raise errors.APIConnectionError(f"{base}/models cannot be read ({type(error).__name__})") from None
    try:
        return [str(entry["id"]) for entry in orjson.loads(payload)["data"]]
    except (ValueError, TypeError, KeyError):
        raise errors.APIResponseError(f"{base}/models answers with something else than a list of models") from None


def missing_keys(model: str) -> Sequence[str]:
    """The environment variables that LiteLLM would need for ``model`` and that are not set. Imports LiteLLM."""
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    import litellm

    return [str(key) for key in litellm.validate_environment(model)["missing_keys"]]
