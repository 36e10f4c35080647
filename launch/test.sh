#!/usr/bin/env bash
# Run everything that a change must pass: lint, format, types, fast tests, slow tests, and a few tests on
# the newest megatron-core (launch/test_newest.sh). It stops at the first stage that fails. With arguments
# only pytest runs, with them: launch/test.sh tests/rewards -k iou
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
source launch/env.sh
launch/install.sh test
source .venv/bin/activate

stage() { # stage NAME COMMAND...
    local name="$1" began=$SECONDS
    shift
    echo "test: $name"
    "$@" || {
        echo "test: FAILED at '$name' after $SECONDS s" >&2
        exit 1
    }
    echo "test: $name took $((SECONDS - began)) s"
}

ended() { # ended PROCESS LOG: wait for it, print its output, return its exit code
    local code=0
    wait "$1" || code=$?
    cat "$2"
    return "$code"
}

if (($#)); then
    exec pytest "$@"
fi
stage "lint" ruff check .
stage "format" ruff format --check .
# Its first call makes an environment. Types need one core meanwhile.
newest_log="$(mktemp)"
launch/test_newest.sh >"$newest_log" 2>&1 &
newest=$!
trap 'kill "$newest" 2>/dev/null || true; rm -f "$newest_log"' EXIT
stage "types" mypy
stage "newest megatron-core" ended "$newest" "$newest_log"
# Two files at a time: most of a fast test is one busy core, or a wait for a process.
stage "fast tests" pytest -m "not slow and not gpu" -n 2 --dist loadfile
# One at a time: each starts up to eight processes.
stage "slow tests" pytest -m "slow and not gpu" --durations 10
echo "test: all stages passed in $SECONDS s"
