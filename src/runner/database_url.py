"""Database URLs, as SQLAlchemy writes them, for the SQLite files that are meant."""

from __future__ import annotations

from pathlib import Path

from runner.errors import ConfigError

DB_URL_DEFAULT = "sqlite+aiosqlite:///.llm_batch_cache/runs.db"
"""Where `prompt_map` keeps what it was answered, below the working directory."""

_SCHEMES = ("sqlite", "sqlite+aiosqlite", "sqlite+pysqlite")


def path_of(url: str | Path, *, key: str) -> Path:
    """The file of ``sqlite+aiosqlite:///relative.db``, ``sqlite:////absolute.db``, or of a plain path.

    Args:
        url: What the user gave.
        key: The argument that it was given for; every error names it.

    Raises:
        ConfigError: Another kind of database, or one in memory.
    """
    if not isinstance(url, str | Path):
        raise ConfigError(f"{key} is of type {type(url).__name__}: a path, or a URL such as {DB_URL_DEFAULT}")
    scheme, found, rest = str(url).partition("://")
    if not found:
        return Path(url)
    if scheme not in _SCHEMES:  # the rest may hold a password
        raise ConfigError(f"{key}={scheme}://…: only SQLite is supported, for example {DB_URL_DEFAULT}")
    host, _, path = rest.partition("?")[0].partition("/")
    if host or path in ("", ":memory:"):
        raise ConfigError(f"{key}={url!r} names no file: write {scheme}:///my_runs.db, or {scheme}:////tmp/my_runs.db")
    return Path(path)


def results_path(cache: Path) -> Path:
    """The results database beside a cache: ``runs-results.db`` beside ``runs.db``."""
    return cache.with_name(f"{cache.stem}-results{cache.suffix or '.db'}")
