#!/usr/bin/env bash
# Make .venv from the locks: `launch/install.sh` for what a run needs, `launch/install.sh test`
# for the tests too. A second call with nothing changed returns at once.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/launch/env.sh"
venv="$root/.venv"
torch="torch==2.13.0+cpu"
torch_index="https://download.pytorch.org/whl/cpu"
locks=("$root/launch/locks/cpu.txt")
case "${1:-}" in
    "") stamps=("$venv/installed-cpu") ;;
    test)
        locks+=("$root/launch/locks/test.txt")
        stamps=("$venv/installed-test" "$venv/installed-cpu")
        ;;
    *) echo "Unknown argument '$1'. Run launch/install.sh or launch/install.sh test." >&2 && exit 2 ;;
esac

fail() {
    echo "install: $1" >&2
    exit 2
}

find_python() { # the first Python 3.11 by name, then by version
    local name
    for name in python3.11 python3 python; do
        if "$name" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    fail "no Python 3.11 found (python3 is '$(python3 --version 2>&1 || true)'). \
The locks hold wheels for 3.11; install it (apt-get install python3.11 python3.11-venv) and call again."
}

check_machine() {
    [[ "$(uname -sm)" == "Linux x86_64" ]] ||
        fail "this is $(uname -sm); the locks are for Linux x86_64. Use a container of that kind."
    command -v g++ >/dev/null ||
        fail "no C++ compiler: torch compiles fused operators with g++. Run apt-get install g++."
    local free_mib
    free_mib="$(df --output=avail -m "$root" | tail -1 | tr -d ' ')"
    [[ -x "$venv/bin/pip" || "$free_mib" -ge 6000 ]] ||
        fail "$free_mib MiB are free at $root, the installation takes 4000 and its downloads 1500. Make room."
}

make_venv() {
    local python="$1" words
    echo "install: making .venv with $("$python" --version)"
    words="$("$python" -m venv "$venv" 2>&1)" ||
        fail "$python cannot make a virtual environment: $(tail -n 1 <<<"$words"). \
Run apt-get install python3.11-venv, or make room if the disk is full."
}

run_pip() { # prints the end of pip's output only when it fails, and the cause
    local log="$venv/pip.log"
    "$venv/bin/python" -m pip install --quiet --no-deps "$@" >"$log" 2>&1 && return
    tail -5 "$log" >&2
    if grep -qE 'No space left|Errno 28' "$log"; then
        fail "the disk is full. Make room and call again; what is installed is kept."
    elif grep -q 'DO NOT MATCH THE HASHES' "$log"; then
        fail "a package differs from the lock. Do not use it; ask the index's keeper, or run launch/lock.py."
    elif grep -qE 'Could not find a version|ConnectionError|NewConnectionError|ReadTimeout|ProxyError' "$log"; then
        fail "the package index did not offer what the lock names. Check the network and pip's index settings."
    fi
    fail "pip failed; its output is in $log."
}

main() {
    local wanted
    wanted="$(cat "$root"/launch/locks/*.txt "$root"/{pyproject.toml,launch/install.sh} | sha256sum) $root"
    [[ -f "${stamps[0]}" && "$(<"${stamps[0]}")" == "$wanted" ]] && return
    local began=$SECONDS lock index=() python=""
    [[ -x "$venv/bin/pip" ]] || python="$(find_python)" || exit 2
    check_machine
    [[ -z "$python" ]] || make_venv "$python"
    if ! "$venv/bin/python" -m pip install --quiet --dry-run --no-deps "$torch" >/dev/null 2>&1; then
        echo "install: the configured index has no $torch, asking PyTorch's own too"
        index=(--extra-index-url "$torch_index")
    fi
    for lock in "${locks[@]}"; do
        echo "install: $(grep -c == "$lock") packages of ${lock#"$root/"}"
        run_pip --require-hashes "${index[@]}" -r "$lock"
    done
    echo "install: megatron_vrl itself, editable"
    run_pip --no-build-isolation --editable "$root"
    # For every Python of this environment, see megatron_vrl/rollout/vllm/torchvision_shim.py.
    "$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' | {
        read -r site
        echo "import megatron_vrl.rollout.vllm.torchvision_shim as s; s.install_hook()" >"$site/zz_megatron_vrl.pth"
    }
    tee "${stamps[@]}" <<<"$wanted" >/dev/null
    echo "install: done in $((SECONDS - began)) s"
}

main
