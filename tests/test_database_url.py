from __future__ import annotations

from pathlib import Path

import pytest

from runner.database_url import DB_URL_DEFAULT, path_of, results_path
from runner.errors import ConfigError


@pytest.mark.parametrize(
    ("url", "path"),
    [
        (DB_URL_DEFAULT, ".llm_batch_cache/runs.db"),
        ("sqlite+aiosqlite:///my_runs.db", "my_runs.db"),
        ("sqlite:///a/b.sqlite?timeout=5", "a/b.sqlite"),
        ("sqlite:////tmp/my_runs.db", "/tmp/my_runs.db"),
        ("my_runs.db", "my_runs.db"),
        (Path("a/my_runs.db"), "a/my_runs.db"),
    ],
)
def test_a_url_names_a_file(url: str | Path, path: str) -> None:
    assert path_of(url, key="cache_db_url") == Path(path)


@pytest.mark.parametrize("url", ["sqlite://", "sqlite+aiosqlite:///:memory:", "sqlite://host/a.db"])
def test_a_database_without_a_file_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"cache_db_url=.* names no file"):
        path_of(url, key="cache_db_url")


def test_another_kind_of_database_is_refused_and_its_password_not_shown() -> None:
    with pytest.raises(ConfigError, match=r"cache_db_url=postgresql://…: only SQLite") as caught:
        path_of("postgresql://me:secret@host/db", key="cache_db_url")

    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("cache", "results"),
    [("a/runs.db", "a/runs-results.db"), ("runs", "runs-results.db"), ("r.sqlite", "r-results.sqlite")],
)
def test_the_results_are_beside_the_cache(cache: str, results: str) -> None:
    assert results_path(Path(cache)) == Path(results)
