# Makes .venv at the top of the checkout, with everything in requirements.lock: by uv where it is there, else by venv
# and pip. Does nothing where it is up to date. Sourced by the scripts beside it; sets $python.

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$top"
python=$top/.venv/bin/python
wanted=$(cat requirements.lock pyproject.toml | cksum)

# The first interpreter that is new enough and really starts.
find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 python; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    echo "runner needs Python 3.11 or later: install it, or name one with PYTHON=/path/to/python" >&2
    return 1
}

if [ "$(cat .venv/.wanted 2>/dev/null)" != "$wanted" ]; then
    interpreter=$(find_python) || exit 1
    echo "Making .venv with $("$interpreter" --version)" >&2
    rm -rf .venv
    if uv --version >/dev/null 2>&1; then
        uv venv --quiet --python "$interpreter" .venv
        uv pip install --quiet --python "$python" --require-hashes -r requirements.lock
        uv pip install --quiet --python "$python" --no-deps --no-build-isolation -e .
    else
        "$interpreter" -m venv .venv || {
            echo "venv is missing: install it (Debian: apt-get install python3-venv), or install uv" >&2
            exit 1
        }
        "$python" -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
        "$python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
    fi
    echo "$wanted" >.venv/.wanted
fi
