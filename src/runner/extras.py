"""Extras: packages that only some features need, and how they are installed."""

from __future__ import annotations

from runner.errors import ConfigError


def missing(what: str, extra: str) -> ConfigError:
    """The error that ``what`` cannot be done here: it needs an extra of pyproject.toml that is not installed."""
    return ConfigError(f"{what} needs an extra: {installation(extra)}")


def installation(extra: str) -> str:
    """How to install an extra: from the checkout, as the package index has a stranger's package of our name."""
    return f"pip install -e '.[{extra}]' in runner's checkout"
