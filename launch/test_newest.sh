#!/usr/bin/env bash
# Run the tests that prove most about megatron-core on its newest release, with Python 3.12: against
# transformers, all kinds of parallelism, checkpoints, repeated bits, and counted operations.
# The environment holds launch/locks/newest.txt and lies in the user's cache under the hash of that lock.
#   launch/test_newest.sh            make the environment and run these tests in it
#   launch/test_newest.sh TEST ...   the same with other tests
#   launch/test_newest.sh --python   print its interpreter, or nothing if it was not made
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
source launch/env.sh
lock=launch/locks/newest.txt
venv="${XDG_CACHE_HOME:-$HOME/.cache}/megatron_vrl/newest-$(sha256sum "$lock" | cut -c1-12)"
free_mib=8000 # 4.7 GiB installed, and room for the downloads

find_python() { # a Python 3.12 on PATH, else one of pyenv's; nothing if there is none
    local name
    for name in python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12.*/bin/python3.12; do
        if "$name" -c 'import ensurepip' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
}

install() { # install PYTHON: a half-made environment never gets the name of a whole one
    local began=$SECONDS
    echo "newest: making $venv with $("$1" --version)"
    rm -rf "$venv.partial"
    "$1" -m venv "$venv.partial" &&
        "$venv.partial/bin/python" -m pip install --quiet --no-deps --require-hashes -r "$lock" &&
        mv "$venv.partial" "$venv" &&
        echo "newest: made in $((SECONDS - began)) s"
}

if [[ "${1:-}" == --python ]]; then
    [[ ! -d "$venv" ]] || echo "$venv/bin/python"
    exit
fi
if [[ ! -d "$venv" ]]; then
    python="$(find_python)"
    if [[ -z "$python" ]]; then
        echo "newest: no Python 3.12 on PATH or under pyenv, so no test runs on the newest megatron-core."
        exit
    fi
    mkdir -p "$(dirname "$venv")"
    if (($(df --output=avail -m "$(dirname "$venv")" | tail -1) < free_mib)); then
        echo "newest: less than $free_mib MiB are free at $(dirname "$venv"), so no test runs on the newest megatron-core."
        exit
    fi
    install "$python" || {
        rm -rf "$venv.partial"
        echo "newest: $lock could not be installed, so no test runs on the newest megatron-core."
        exit
    }
fi
"$venv/bin/python" -c 'import megatron.core, platform, torch, transformers as t
print("newest: Python", platform.python_version(), "megatron-core", megatron.core.__version__,
      "torch", torch.__version__, "transformers", t.__version__)' 2>/dev/null
(($#)) || set -- \
    tests/models/qwen2_5_vl/test_against_hf.py \
    "tests/models/test_layouts.py::test_layout_equals_one_process[tp2-sp-cp2-pp2-tied]" \
    "tests/checkpoint/test_checkpoint.py::test_training_goes_on_in_another_layout_as_if_unbroken" \
    "tests/policy/test_policy.py::test_deterministic_mode_repeats_every_bit" \
    "tests/models/test_operations.py"
exec "$venv/bin/python" -m pytest -p no:cacheprovider "$@"
