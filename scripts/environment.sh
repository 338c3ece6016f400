# Makes .venv at the top of the checkout, with everything in a lock file: by uv where it is there, else by venv and pip.
# requirements.lock is what a run needs, tests/requirements.lock that and what the checks need; what is installed stays.
# Does nothing where it is up to date. Sourced by the scripts beside it with the lock file; sets $python.

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$top"
python=$top/.venv/bin/python
lock=$1
stamp=.venv/.wanted-$(echo "$lock" | tr / -)
wanted=$(cat "$lock" pyproject.toml | cksum)

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

install() {
    if uv --version >/dev/null 2>&1; then
        uv pip install --quiet --python "$python" "$@"
    else
        "$python" -m pip install --quiet --disable-pip-version-check "$@"
    fi
}

if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    if [ ! -e .venv/.made ]; then # none, or half of one
        interpreter=$(find_python) || exit 1
        rm -rf .venv
        if uv --version >/dev/null 2>&1; then
            uv venv --quiet --python "$interpreter" .venv
        else
            "$interpreter" -m venv .venv || {
                echo "venv is missing: install it (Debian: apt-get install python3-venv), or install uv" >&2
                exit 1
            }
        fi
        touch .venv/.made
    fi
    echo "Installing $lock into .venv, with $("$python" --version)" >&2
    install --require-hashes -r "$lock"
    install --no-deps --no-build-isolation -e .
    echo "$wanted" >"$stamp"
fi
