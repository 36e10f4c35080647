#!/usr/bin/env bash
# Make .venv from the locks in launch/locks. A second call with nothing changed returns at once.
#   launch/install.sh        what a run needs on a CPU (Python 3.11)
#   launch/install.sh test   that, and the tests
#   launch/install.sh gpu    what a run and its tests need on an NVIDIA GPU (Python 3.12, CUDA 13)
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/launch/env.sh"
venv="$root/.venv"
torch="torch==2.13.0+cpu"
torch_index="https://download.pytorch.org/whl/cpu"
what="${1:-cpu}"
version=3.11 disk_mib=4000 download_mib=1500
locks=("$root/launch/locks/cpu.txt")
stamps=("$venv/installed-cpu")
case "$what" in
    cpu) ;;
    test)
        locks+=("$root/launch/locks/test.txt")
        stamps=("$venv/installed-test" "$venv/installed-cpu")
        ;;
    gpu)
        version=3.12 disk_mib=10000 download_mib=8000
        locks=("$root/launch/locks/gpu.txt")
        stamps=("$venv/installed-gpu")
        ;;
    *) echo "Unknown argument '$1'. Run launch/install.sh, launch/install.sh test or launch/install.sh gpu." >&2 && exit 2 ;;
esac

fail() {
    echo "install: $1" >&2
    exit 2
}

is_python() { # is_python NAME: whether NAME is the Python of the lock
    "$1" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$version')" 2>/dev/null
}

find_python() { # the first Python of the lock's version by name, then by version
    local name
    for name in "python$version" python3 python; do
        if is_python "$name"; then
            echo "$name"
            return
        fi
    done
    fail "no Python $version found (python3 is '$(python3 --version 2>&1 || true)'). \
The lock has wheels for $version; install it (apt-get install python$version python$version-venv) and call again."
}

check_machine() {
    [[ "$(uname -sm)" == "Linux x86_64" ]] ||
        fail "this is $(uname -sm); the locks are for Linux x86_64. Use a container of that kind."
    command -v g++ >/dev/null ||
        fail "no C++ compiler: torch compiles fused operators with g++. Run apt-get install g++."
    local free_mib
    free_mib="$(df --output=avail -m "$root" | tail -1 | tr -d ' ')"
    [[ -x "$venv/bin/pip" || "$free_mib" -ge $((disk_mib + download_mib)) ]] ||
        fail "$free_mib MiB are free at $root, the installation takes $disk_mib and its downloads $download_mib. Make room."
    [[ ! -x "$venv/bin/python" ]] || is_python "$venv/bin/python" ||
        fail ".venv has $("$venv/bin/python" --version), the lock is for Python $version. Remove .venv and call again."
    [[ "$what" != gpu ]] || check_driver
}

check_driver() { # CUDA 13 needs NVIDIA's driver 580 or newer; without a driver only an image can be built
    local driver
    driver="$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -1 || true)"
    if [[ -z "$driver" ]]; then
        echo "install: nvidia-smi reports no driver here; the machine that runs needs 580 or newer" >&2
    elif ((${driver%%.*} < 580)); then
        fail "the NVIDIA driver is $driver, CUDA 13 needs 580 or newer. Update the driver."
    fi
}

make_venv() {
    local python="$1" words
    echo "install: making .venv with $("$python" --version)"
    words="$("$python" -m venv "$venv" 2>&1)" ||
        fail "$python cannot make a virtual environment: $(tail -n 1 <<<"$words"). \
Run apt-get install python$version-venv, or make room if the disk is full."
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

add_torchvision_hook() { # for every Python of .venv, see megatron_vrl/rollout/vllm/torchvision_shim.py
    local site
    site="$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    echo "import megatron_vrl.rollout.vllm.torchvision_shim as s; s.install_hook()" >"$site/zz_megatron_vrl.pth"
}

add_triton() { # see the lock
    rm -rf "$venv/share/triton"
    run_pip --target "$venv/share/triton" --require-hashes -r "$root/launch/locks/triton.txt"
}

main() {
    local wanted
    wanted="$(cat "$root"/launch/locks/*.txt "$root"/{pyproject.toml,launch/install.sh} | sha256sum) $root"
    [[ -f "${stamps[0]}" && "$(<"${stamps[0]}")" == "$wanted" ]] && return
    local began=$SECONDS lock index=() python=""
    [[ -x "$venv/bin/pip" ]] || python="$(find_python)" || exit 2
    check_machine
    [[ -z "$python" ]] || make_venv "$python"
    if [[ "$what" != gpu ]] &&
        ! "$venv/bin/python" -m pip install --quiet --dry-run --no-deps "$torch" >/dev/null 2>&1; then
        echo "install: the configured index has no $torch, asking PyTorch's own too"
        index=(--extra-index-url "$torch_index")
    fi
    for lock in "${locks[@]}"; do
        echo "install: $(grep -c == "$lock") packages of ${lock#"$root/"}"
        run_pip --require-hashes "${index[@]}" -r "$lock"
    done
    echo "install: megatron_vrl itself, editable"
    run_pip --no-build-isolation --editable "$root"
    [[ "$what" == gpu ]] || add_torchvision_hook
    [[ "$what" != test ]] || add_triton
    tee "${stamps[@]}" <<<"$wanted" >/dev/null
    echo "install: done in $((SECONDS - began)) s"
}

main
