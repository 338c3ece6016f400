from __future__ import annotations

import logging

import pytest

from runner.transports.locality import is_local, warn_of_plain_http

LOCAL = [
    "localhost",
    "LOCALHOST.",
    "box.localhost",
    "127.0.0.1",
    "127.9.9.9",
    "::1",
    "10.1.2.3",
    "172.16.0.1",
    "172.31.255.1",
    "192.168.1.1",
    "169.254.1.1",
    "100.64.0.1",
    "fd00::1",
    "fe80::1%eth0",
    "gpu-0",
    "nas.local",
    "vllm.default.svc.cluster.local",
    "models.internal",
    "box.lan",
    "box.home.arpa",
]
ELSEWHERE = [
    "api.openai.com",
    "8.8.8.8",
    "172.32.0.1",
    "2606:4700::1111",
    "local.example.com",
    "localhost.example.com",
]


@pytest.mark.parametrize("host", LOCAL)
def test_this_machine_and_its_network_are_local(host: str) -> None:
    assert is_local(host)


@pytest.mark.parametrize("host", ELSEWHERE)
def test_the_rest_of_the_world_is_not(host: str) -> None:
    assert not is_local(host)


def test_plain_http_to_a_host_elsewhere_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    for path in ("/v1", "/v2"):
        warn_of_plain_http(f"http://models.example.com:8000{path}")
        warn_of_plain_http(f"http://me:hunter2@other.example.com{path}")
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert "http://models.example.com is not encrypted" in caplog.text
    assert "hunter2" not in caplog.text


@pytest.mark.parametrize("url", ["https://safe.example.com/v1", "http://localhost:8000/v1", "http://[::1]:8000/v1"])
def test_what_is_encrypted_or_local_is_fine(url: str, caplog: pytest.LogCaptureFixture) -> None:
    warn_of_plain_http(url)
    assert not caplog.records
