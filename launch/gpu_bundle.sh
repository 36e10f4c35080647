#!/usr/bin/env bash
# Pack what launch/gpu_check.sh needs on a machine without network: this commit of the repository, the wheels
# of launch/locks/gpu.txt, and rollouts recorded here by vLLM on a CPU. Writes pieces of at most 60 MiB.
#   launch/gpu_bundle.sh OUT [--wheels DIR] [--replay DIR]
# --wheels: wheels already at hand, instead of a download. --replay: a folder of tools/gpu_checks/record.py.
# Move OUT's files to the machine, in any number of transfers, and run `bash join.sh DIR` beside them.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
piece_mib=60

fail() {
    echo "gpu_bundle: $1" >&2
    exit 2
}

download_wheels() { # download_wheels DIR: for Python 3.12, glibc 2.35 and x86_64, as the lock was resolved
    local platforms=() minor
    for minor in $(seq 35 -1 5); do
        platforms+=(--platform "manylinux_2_${minor}_x86_64")
    done
    platforms+=(--platform manylinux2014_x86_64 --platform manylinux2010_x86_64 --platform manylinux1_x86_64)
    "$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: --require-hashes --dest "$1" \
        --python-version 3.12 --implementation cp "${platforms[@]}" -r "$root/launch/locks/gpu.txt" ||
        fail "pip could not download the lock's wheels. Check the network, or name a folder that has them: --wheels."
}

write_join() { # write_join FILE: the script that puts the pieces together again
    cat >"$1" <<'JOIN'
#!/usr/bin/env bash
# Check the pieces beside this script and unpack them into DIR: `bash join.sh DIR`.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
[[ $# == 1 ]] || { echo "join: name the folder to unpack into: bash join.sh DIR" >&2 && exit 2; }
mkdir -p "$1"
(cd "$here" && sha256sum --check --quiet --strict SHA256SUMS) ||
    { echo "join: a piece is missing or damaged, see above. Move it here again." >&2 && exit 2; }
cat "$here"/piece-* | tar -x -C "$1"
echo "Unpacked into $1. Then:"
echo "    cd $1/repository && PIP_NO_INDEX=1 PIP_FIND_LINKS=../wheels launch/install.sh gpu"
echo "    launch/gpu_check.sh --replay ../replay"
JOIN
}

main() {
    local out="" wheels="" replay=""
    while (($#)); do
        case "$1" in
            --wheels) wheels="${2:?--wheels needs a folder}" && shift 2 ;;
            --replay) replay="${2:?--replay needs a folder}" && shift 2 ;;
            -*) fail "unknown option '$1'. Run launch/gpu_bundle.sh OUT [--wheels DIR] [--replay DIR]." ;;
            *) out="$1" && shift ;;
        esac
    done
    [[ -n "$out" ]] || fail "name the folder to write: launch/gpu_bundle.sh OUT."
    [[ ! -e "$out" || -z "$(ls -A "$out")" ]] || fail "$out is not empty. Name a new folder."
    [[ -z "$wheels" ]] || compgen -G "$wheels/*.whl" >/dev/null || fail "$wheels holds no wheel (*.whl)."
    [[ -z "$replay" || -d "$replay/rollouts" ]] || fail "$replay holds no rollouts. Run tools/gpu_checks/record.py."
    mkdir -p "$out"
    stage="$(mktemp -d)"
    trap 'rm -rf "$stage"' EXIT
    if [[ -z "$wheels" || -z "$replay" ]]; then
        source "$root/launch/env.sh"
        source "$root/launch/python.sh"
    fi
    mkdir "$stage/repository"
    git -C "$root" archive HEAD | tar -x -C "$stage/repository"
    if [[ -z "$wheels" ]]; then
        wheels="$stage/wheels"
        download_wheels "$wheels"
    fi
    if [[ -z "$replay" ]]; then
        replay="$stage/replay"
        PYTHONPATH="$root:$root/tools" "$PYTHON" -m gpu_checks.record "$replay"
    fi
    # Links lead to the folders, whose files are packed as they are: wheels are compressed already.
    [[ -e "$stage/wheels" ]] || ln -s "$(realpath "$wheels")" "$stage/wheels"
    [[ -e "$stage/replay" ]] || ln -s "$(realpath "$replay")" "$stage/replay"
    tar -c --dereference -C "$stage" repository wheels replay |
        split --bytes "${piece_mib}M" --numeric-suffixes --suffix-length 4 - "$out/piece-"
    write_join "$out/join.sh"
    (cd "$out" && sha256sum piece-* >SHA256SUMS)
    echo "$(find "$out" -name 'piece-*' | wc -l) pieces in $out; unpack them by: bash join.sh DIR"
}

main "$@"
