"""runner: throttled, resumable, measured LLM jobs.

The command is ``python -m runner``; the library is what this module exports, imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runner.client import LMClient
    from runner.config import DeploymentConfig
    from runner.database_url import DB_URL_DEFAULT
    from runner.export import export_jsonl
    from runner.limiter import RateLimiter, RateLimiterAcquisitionHandle
    from runner.media import image_block
    from runner.promptmap import prompt_map
    from runner.types import (
        BatchResult,
        EmbeddingResult,
        GenerationResult,
        RequestMetrics,
        TokenUsage,
        ToolCall,
        TranscriptionResult,
    )

__version__ = "0.1.0"

_HOMES = {
    "LMClient": "runner.client",
    "DB_URL_DEFAULT": "runner.database_url",
    "export_jsonl": "runner.export",
    "prompt_map": "runner.promptmap",
    "DeploymentConfig": "runner.config",
    "RateLimiter": "runner.limiter",
    "RateLimiterAcquisitionHandle": "runner.limiter",
    "BatchResult": "runner.types",
    "EmbeddingResult": "runner.types",
    "GenerationResult": "runner.types",
    "RequestMetrics": "runner.types",
    "TokenUsage": "runner.types",
    "ToolCall": "runner.types",
    "TranscriptionResult": "runner.types",
    "image_block": "runner.media",
}

__all__ = [
    "DB_URL_DEFAULT",
    "BatchResult",
    "DeploymentConfig",
    "EmbeddingResult",
    "GenerationResult",
    "LMClient",
    "RateLimiter",
    "RateLimiterAcquisitionHandle",
    "RequestMetrics",
    "TokenUsage",
    "ToolCall",
    "TranscriptionResult",
    "export_jsonl",
    "image_block",
    "prompt_map",
]


def __dir__() -> list[str]:
    """The public names as well, imported or not: for completion in a notebook."""
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """Import a public name from its module at its first use: ``import runner`` alone costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'runner' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
