#!/usr/bin/env bash
# Train on one node or many: launch/train.sh --config configs/NAME.yaml [section.key=value ...]
# Many nodes: the same call on each, with NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT set, the
# address where the nodes meet. NPROC is the number of ranks on this node; its default is the number of
# GPUs that torch sees (CUDA_VISIBLE_DEVICES), or 1. RESTARTS (default 0): how often all ranks start again from the newest
# checkpoint after one has died. A lost node may be started again by the same call. LOCAL_ADDR is this
# node's address where its host name is not one. PYTHON is the interpreter; its default is that of an
# active environment, then that of .venv. SIGUSR1, Ctrl-C or SIGTERM to this script finishes the step,
# saves and ends with exit code 0; a second Ctrl-C or SIGTERM ends all at once.
set -euo pipefail

fail() {
    echo "train: $1" >&2
    exit 2
}

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/launch/env.sh"
source "$root/launch/python.sh"
# Restarted ranks meet in a new store: the launchers' store still has the addresses of dead ranks,
# for which gloo waits for ever (torch 2.13).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
NPROC="${NPROC:-$(visible_gpus)}"
((NPROC > 0)) || NPROC=1
NNODES="${NNODES:-1}"
NODE_RANK="${NODE_RANK:-0}"
RESTARTS="${RESTARTS:-0}"

port_is_free() { # the same bind that torchrun's store would do
    "$PYTHON" -c 'import socket, sys
with socket.socket() as s:
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    s.bind(("", int(sys.argv[1])))' "$1" 2>/dev/null
}

((NNODES == 1)) || [[ -n "${MASTER_ADDR:-}" && -n "${MASTER_PORT:-}" ]] ||
    fail "NNODES=$NNODES needs MASTER_ADDR and MASTER_PORT, the address of the node with NODE_RANK=0."
if [[ -z "${MASTER_PORT:-}" ]]; then
    rendezvous=(--standalone) # torchrun picks a free port
else
    ((NODE_RANK != 0)) || port_is_free "$MASTER_PORT" ||
        fail "port $MASTER_PORT is taken or not allowed. Set MASTER_PORT to another one, the same on every node."
    rendezvous=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-id "${RUN_ID:-megatron_vrl}"
        --rdzv-endpoint "${MASTER_ADDR:-localhost}:$MASTER_PORT"
        --rdzv-conf "is_host=$((NODE_RANK == 0))")
    [[ -z "${LOCAL_ADDR:-}" ]] || rendezvous+=(--local-addr "$LOCAL_ADDR")
fi

# A dry run reports a user's error in one sentence before an engine starts. It runs in the background,
# so that traps run at once. PYTHON_EXEC is torchrun's name for the interpreter of the ranks.
leave() { # leave CODE
    trap '' INT TERM USR1
    kill -KILL "$check" 2>/dev/null || true
    echo "Interrupted before the first step: nothing was trained." >&2
    exit "$1"
}
check=
trap 'leave 130' INT
trap 'leave 143' TERM
trap 'leave 0' USR1
WORLD_SIZE=$((NNODES * NPROC)) "$PYTHON_EXEC" -m megatron_vrl.cli.train "$@" --dry-run --strict \
    >/dev/null &
check=$!
wait "$check" || exit $?
trap - INT TERM USR1

# exec: a signal has one receiver, and the ranks end with this process however it ends.
exec "$PYTHON" "$root/launch/torchrun.py" "${rendezvous[@]}" --max-restarts "$RESTARTS" \
    --nproc-per-node "$NPROC" -m megatron_vrl.cli.train "$@"
