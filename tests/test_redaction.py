from __future__ import annotations

import time

import pytest

from runner.redaction import redact


def test_redact_hides_values_under_secret_keys_however_they_are_spelt() -> None:
    assert redact({"api_key": "x", "X-API-Key": "x", "apiKey": "x", "Authorization": "x", "db": {"password": "x"}}) == {
        "api_key": "***",
        "X-API-Key": "***",
        "apiKey": "***",
        "Authorization": "***",
        "db": {"password": "***"},
    }


def test_redact_keeps_what_is_no_secret() -> None:
    settings = {"api_key": None, "max_tokens": 256, "model": "openai/gpt", "tags": ["a", True, 1.5, None]}

    assert redact(settings) == settings


def test_redact_keeps_the_name_of_a_variable_but_no_key_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROVIDER_CREDENTIAL", "a-credential")

    assert redact({"api_key_env": "PROVIDER_CREDENTIAL", "note": "it is a-credential"}) == {
        "api_key_env": "PROVIDER_CREDENTIAL",
        "note": "it is ***",
    }
    assert redact({"api_key_env": "sk-pasted-by-mistake"}) == {"api_key_env": "***"}


def test_redact_hides_the_values_of_variables_that_a_list_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY", "one-credential")
    monkeypatch.setenv("PORTAL", "other-credential")

    shown = redact({"api_key_env": ["GATEWAY", "PORTAL"], "note": "one-credential, other-credential"})

    assert shown["note"] == "***, ***"


@pytest.mark.parametrize("name", ["SOME_KEY", "HF_TOKEN", "client_secret", "DB_PASSWORD"])
def test_redact_hides_the_environments_secrets_within_texts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "a+secret(value")

    assert redact({"text": "<a+secret(value>"}) == {"text": "<***>"}


def test_redact_leaves_short_values_of_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SORT_KEY", "default")

    assert redact({"text": "the default"}) == {"text": "the default"}


@pytest.mark.parametrize(
    ("url", "clean"),
    [
        ("http://me:pa55@host:80/v1", "http://host:80/v1"),
        ("redis://:pa55@host", "redis://host"),
        ("see https://token@host/a@b now", "see https://host/a@b now"),
        ("https://host/v1?key=abc&n=1", "https://host/v1?key=***&n=1"),
        ("https://host/@scope/name", "https://host/@scope/name"),
    ],
)
def test_redact_takes_credentials_out_of_urls(url: str, clean: str) -> None:
    assert redact({"api_base": url}) == {"api_base": clean}


def test_redact_stays_fast_on_hostile_text() -> None:
    began = time.perf_counter()
    for text in ("://" * 100_000, "?key" * 100_000, "a" * 1_000_000, "http://" + "a" * 1_000_000):
        redact({"text": text})

    assert time.perf_counter() - began < 5
