#!/usr/bin/env bash
# Serve rollouts to trainers with rollout.placement=workers:
#   launch/rollout_worker.sh --config configs/NAME.yaml [--host H] [--port P] [section.key=value ...]
# The config is the trainer's own. A worker that dies is started again, up to RESTARTS times,
# but not one that refuses its config or was asked to stop. To listen anywhere but on 127.0.0.1, set
# MEGATRON_VRL_ROLLOUT_TOKEN here and for the trainer. PYTHON_EXEC names another interpreter, as it
# does for the ranks of torchrun.
set -euo pipefail

fail() {
    echo "worker: $1" >&2
    exit 2
}

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/launch/env.sh"
source "$root/launch/python.sh"
export MEGATRON_VRL_PARENT=$$ # the worker ends with this script
RESTARTS="${RESTARTS:-100}"
refused=2 # megatron_vrl.errors.EXIT_CODE

worker=
trap 'trap - TERM INT; [[ -z "$worker" ]] || kill -TERM "$worker"; wait || true; exit 0' TERM INT
for ((start = 0; start <= RESTARTS; start++)); do
    "$PYTHON_EXEC" -m megatron_vrl.cli.worker "$@" &
    worker=$!
    code=0
    wait "$worker" || code=$?
    ((code != 0 && code != refused)) || exit "$code"
    echo "worker: ended with exit code $code; starting again ($((start + 1)) of $RESTARTS)" >&2
    sleep 1
done
exit 1
