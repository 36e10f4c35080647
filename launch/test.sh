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

if (($#)); then
    exec pytest "$@"
fi
stage "lint" ruff check .
stage "format" ruff format --check .
stage "types" mypy
# Two files at a time: most of a fast test is one busy core, or a wait for a process.
stage "fast tests" pytest -m "not slow and not gpu" -n 2 --dist loadfile
# One at a time: each starts up to eight processes. One of the slow tests needs the environment before it.
stage "newest megatron-core" launch/test_newest.sh
stage "slow tests" pytest -m "slow and not gpu" --durations 10
echo "test: all stages passed in $SECONDS s"
