#!/usr/bin/env bash
# Train on one node or many: launch/train.sh --config configs/NAME.yaml [section.key=value ...]
# Many nodes: the same call on each, with NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT set, which
# say where the nodes meet. NPROC is the number of ranks on this node; its default is the number of
# GPUs, or 1. RESTARTS (default 0): when a rank dies, all start again from the newest checkpoint, at
# most so often; a node that is lost may be started again by the same call. LOCAL_ADDR is this
# node's address where its host name is not one. SIGUSR1 to this script, or to a rank, finishes the
# step, saves and ends with exit code 0.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/launch/env.sh"
if [[ -f "$root/.venv/bin/activate" ]]; then
    source "$root/.venv/bin/activate"
fi
# Ranks that start again meet in a store of their own: in the launchers' store lie the addresses of
# those that have died, and gloo waits for them for ever (torch 2.13).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
gpus="$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)"
NPROC="${NPROC:-$((gpus > 0 ? gpus : 1))}"
NNODES="${NNODES:-1}"
NODE_RANK="${NODE_RANK:-0}"
RESTARTS="${RESTARTS:-0}"

fail() {
    echo "train: $1" >&2
    exit 2
}

port_is_free() { # the same bind that torchrun's store would do
    python3 -c 'import socket, sys
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

# A mistake in the config is one sentence here; inside torchrun it would be one per rank.
# PYTHON_EXEC is torchrun's name for the interpreter of the ranks.
WORLD_SIZE=$((NNODES * NPROC)) "${PYTHON_EXEC:-python3}" -m megatron_vrl.train "$@" --dry-run \
    >/dev/null || exit $?

python3 "$root/launch/torchrun.py" "${rendezvous[@]}" --max-restarts "$RESTARTS" \
    --nproc-per-node "$NPROC" -m megatron_vrl.train "$@" &
agent=$!
trap 'pkill -USR1 -P "$agent" || true' USR1 # its children are the ranks
trap 'kill -TERM "$agent" 2>/dev/null || true' TERM INT
code=0
wait "$agent" || code=$?
while kill -0 "$agent" 2>/dev/null; do # a signal ended the wait, not the agent
    code=0
    wait "$agent" || code=$?
done
exit "$code"
