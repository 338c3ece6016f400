#!/usr/bin/env bash
# Runs the quickstart: real questions, a simulated model, scores, cost and speed. Needs Python 3.11 or later, no key.
# Arguments go on to the command: scripts/quickstart.sh model=openai/gpt-4.1-mini
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" requirements.lock
exec "$python" -m runner +experiment=quickstart "$@"
