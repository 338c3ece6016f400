"""The public names of infermesh, with the parameters that its documentation gives them."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

import pytest

import runner

GENERATE = "input_data *endpoint *response_format *parse_output **kwargs"
GENERATE_BATCH = (
    "input_batch *endpoint *response_format *parse_output *return_exceptions *on_progress *on_result **kwargs"
)
EMBED = "input_data **kwargs"
EMBED_BATCH = "input_batch *micro_batch_size *return_exceptions *on_progress *on_result **kwargs"
TRANSCRIBE = "input_data *max_transcription_bytes **kwargs"
TRANSCRIBE_BATCH = "input_batch *max_transcription_bytes *return_exceptions *on_progress *on_result **kwargs"

CALLABLES = {
    "LMClient": (
        "*model *api_base *api_key *deployments *endpoint *max_parallel_requests *rpm *tpm *rpd *tpd"
        " *max_request_burst *max_token_burst *header_bucket_scope *default_output_tokens *timeout *max_retries"
        " *default_request_kwargs *routing_strategy *router_kwargs"
    ),
    "LMClient.generate": GENERATE,
    "LMClient.agenerate": GENERATE,
    "LMClient.generate_batch": GENERATE_BATCH,
    "LMClient.agenerate_batch": GENERATE_BATCH,
    "LMClient.embed": EMBED,
    "LMClient.aembed": EMBED,
    "LMClient.embed_batch": EMBED_BATCH,
    "LMClient.aembed_batch": EMBED_BATCH,
    "LMClient.transcribe": TRANSCRIBE,
    "LMClient.atranscribe": TRANSCRIBE,
    "LMClient.transcribe_batch": TRANSCRIBE_BATCH,
    "LMClient.atranscribe_batch": TRANSCRIBE_BATCH,
    "LMClient.close": "",
    "RateLimiter": (
        "requests_per_minute tokens_per_minute requests_per_day tokens_per_day max_request_burst max_token_burst"
        " header_bucket_scope"
    ),
    "RateLimiter.acquire": "estimated_tokens",
    "RateLimiter.adjust": "handle actual_tokens response_headers",
    "image_block": "source *detail *mime_type",
}
"""Parameters in their order: ``*`` before those that need a name, ``**`` before the rest."""

RECORDS = {
    "BatchResult": "results errors",
    "DeploymentConfig": "model api_base api_key extra_kwargs",
    "EmbeddingResult": "model_id embedding token_usage raw_response request_id metrics",
    "GenerationResult": (
        "model_id output_text output_parsed reasoning token_usage finish_reason tool_calls raw_response request_id"
        " cost metrics"
    ),
    "RateLimiterAcquisitionHandle": "estimated_tokens",
    "RequestMetrics": "queue_wait_s service_time_s end_to_end_s deployment retries",
    "TokenUsage": "prompt_tokens completion_tokens total_tokens reasoning_tokens",
    "ToolCall": "id name arguments",
    "TranscriptionResult": "model_id text duration_s language raw_response request_id metrics",
}

DEFAULTS: dict[str, dict[str, Any]] = {
    "LMClient": {
        "endpoint": "chat_completion",
        "max_parallel_requests": None,
        "header_bucket_scope": "auto",
        "default_output_tokens": 0,
        "timeout": None,
        "max_retries": 3,
        "routing_strategy": "simple-shuffle",
    },
    "LMClient.generate": {"endpoint": None, "response_format": None, "parse_output": False},
    "LMClient.generate_batch": {"return_exceptions": True, "on_progress": None, "on_result": None},
    "LMClient.embed_batch": {"micro_batch_size": 32, "return_exceptions": True},
    "LMClient.transcribe": {"max_transcription_bytes": 25 * 1024 * 1024},
    "LMClient.transcribe_batch": {"max_transcription_bytes": 25 * 1024 * 1024, "return_exceptions": True},
    "RateLimiter": {"tokens_per_minute": None, "header_bucket_scope": "auto"},
    "RateLimiter.adjust": {"response_headers": None},
    "image_block": {"detail": None, "mime_type": None},
}


def parameters_of(path: str) -> dict[str, inspect.Parameter]:
    name, *rest = path.split(".")
    found: Any = getattr(runner, name)
    for part in rest:
        found = getattr(found, part)
    return {name: each for name, each in inspect.signature(found).parameters.items() if name != "self"}


def written(parameter: inspect.Parameter) -> str:
    prefix = (
        "*" if parameter.kind is parameter.KEYWORD_ONLY else "**" if parameter.kind is parameter.VAR_KEYWORD else ""
    )
    return prefix + parameter.name


@pytest.mark.parametrize("path", CALLABLES)
def test_a_callable_takes_the_same_parameters(path: str) -> None:
    wanted = CALLABLES[path].split()
    ours = [written(parameter) for parameter in parameters_of(path).values()]

    assert [parameter for parameter in ours if parameter in wanted] == wanted


@pytest.mark.parametrize("path", [path for path in CALLABLES if path.startswith("LMClient.")])
def test_of_two_twins_one_is_asynchronous(path: str) -> None:
    method = getattr(runner.LMClient, path.removeprefix("LMClient."))

    assert inspect.iscoroutinefunction(method) == path.startswith("LMClient.a")


def test_a_limiter_is_asynchronous() -> None:
    assert inspect.iscoroutinefunction(runner.RateLimiter.acquire)
    assert inspect.iscoroutinefunction(runner.RateLimiter.adjust)


@pytest.mark.parametrize("path", DEFAULTS)
def test_what_is_left_out_means_the_same(path: str) -> None:
    parameters = parameters_of(path)

    assert {name: parameters[name].default for name in DEFAULTS[path]} == DEFAULTS[path]


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_has_the_same_fields(name: str) -> None:
    assert set(RECORDS[name].split()) <= {field.name for field in fields(getattr(runner, name))}


@pytest.mark.parametrize("name", runner.__all__)
def test_every_public_name_can_be_imported(name: str) -> None:
    assert hasattr(runner, name)


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        runner.nothing  # noqa: B018


def test_what_completion_offers_are_the_public_names() -> None:
    assert {"LMClient", "prompt_map", "__version__"} <= set(dir(runner))
