#!/usr/bin/env bash
# Train on one node or many: launch/train.sh --config configs/NAME.yaml [section.key=value ...]
# Many nodes: the same call on each, with NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT set.
# NPROC is the number of ranks on this node; its default is the number of GPUs, or 1.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/launch/env.sh"
if [[ -f "$root/.venv/bin/activate" ]]; then
    source "$root/.venv/bin/activate"
fi
gpus="$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)"
NPROC="${NPROC:-$((gpus > 0 ? gpus : 1))}"
NNODES="${NNODES:-1}"
NODE_RANK="${NODE_RANK:-0}"

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
    rendezvous=(--nnodes "$NNODES" --node-rank "$NODE_RANK"
        --master-addr "${MASTER_ADDR:-localhost}" --master-port "$MASTER_PORT")
fi

# A mistake in the config is one sentence here; inside torchrun it would be one per rank.
WORLD_SIZE=$((NNODES * NPROC)) python3 -m megatron_vrl.train "$@" --dry-run >/dev/null || exit $?
exec python3 "$root/launch/torchrun.py" "${rendezvous[@]}" --nproc-per-node "$NPROC" -m megatron_vrl.train "$@"
