"""The audit of what is locked: what it does about the words of pip-audit, which stand here as it says them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

AUDIT = Path(__file__).resolve().parents[1] / ".ci" / "audit"

FINDING = """cat <<'END'
Name   Version ID           Fix Versions
------ ------- ------------ ------------
jinja2 3.1.6   PYSEC-2099-1 99.0
END
echo 'Found 1 known vulnerability in 1 package' >&2; exit 1"""

CLEAN = "echo 'No known vulnerabilities found' >&2"

UNREACHABLE = """echo 'Traceback (most recent call last):' >&2
echo "requests.exceptions.ConnectionError: HTTPSConnectionPool(host='api.osv.dev', port=443): Max" >&2; exit 1"""

WRONG = "echo 'pip-audit: error: unrecognized arguments: --osv' >&2; exit 2"


@pytest.mark.parametrize(
    ("words", "exit_code", "said"),
    [
        (FINDING, 1, "jinja2 3.1.6   PYSEC-2099-1 99.0"),
        (CLEAN, 0, "No known vulnerabilities found"),
        (UNREACHABLE, 0, "audit: not done, the service cannot be reached (requests.exceptions.ConnectionError: "),
        (WRONG, 2, "unrecognized arguments"),
    ],
    ids=["a finding fails", "nothing found passes", "no service passes", "a wrong call fails"],
)
def test_the_audit_fails_for_what_is_found(tmp_path: Path, words: str, exit_code: int, said: str) -> None:
    stub = tmp_path / "pip-audit"
    stub.write_text(f"#!/usr/bin/env bash\n{words}\n", encoding="utf-8")
    stub.chmod(0o755)

    done = subprocess.run(
        ["bash", str(AUDIT)], env={"PATH": "/usr/bin:/bin", "PIP_AUDIT": str(stub)}, capture_output=True, text=True
    )

    assert (done.returncode, done.stderr) == (exit_code, "")
    assert said in done.stdout
    assert words != UNREACHABLE or len(done.stdout.splitlines()) == 1
