#!/usr/bin/env bash
# Runs all checks: lint, format, types, tests. Needs Python 3.11 or later.
# Arguments go on to pytest: scripts/test.sh tests/test_store.py
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" tests/requirements.lock
"$python" -m ruff check
"$python" -m ruff format --check
"$python" -m mypy
exec "$python" -m pytest -n 2 "$@"
