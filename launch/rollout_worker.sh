#!/usr/bin/env bash
# Serve rollouts to trainers with rollout.placement=workers:
#   launch/rollout_worker.sh --config configs/NAME.yaml [--host H] [--port P] [section.key=value ...]
# The config is the trainer's own. On a machine with GPUs each `rollout.tensor` of the visible ones get a
# worker; with --port P they listen on P, P + 1, ... A worker that dies is started again, up to RESTARTS
# times, but not one that refuses its config or was asked to stop. To listen anywhere but on 127.0.0.1, set
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
export MEGATRON_VRL_PARENT=$$ # the workers end with this script
RESTARTS="${RESTARTS:-100}"
refused=2 # megatron_vrl.errors.EXIT_CODE
arguments=("$@")

groups=("${CUDA_VISIBLE_DEVICES-}") # GPUs of each worker
if has_gpu; then
    listed="$("$PYTHON_EXEC" -m megatron_vrl.cli.worker "$@" --gpu-groups)" || exit $?
    mapfile -t groups <<<"$listed"
fi

port=0
for ((i = 0; i < $#; i++)); do
    case "${arguments[i]}" in
        --port) port="${arguments[i + 1]:-0}" ;;
        --port=*) port="${arguments[i]#--port=}" ;;
    esac
done

workers=() # process ids by worker; "" for one that has ended for good
starts=()
start() { # start INDEX
    local own=("${arguments[@]}")
    ((port == 0)) || own+=(--port $((port + $1)))
    if [[ -n "${groups[$1]}" ]]; then
        CUDA_VISIBLE_DEVICES="${groups[$1]}" "$PYTHON_EXEC" -m megatron_vrl.cli.worker "${own[@]}" &
    else
        "$PYTHON_EXEC" -m megatron_vrl.cli.worker "${own[@]}" &
    fi
    workers[$1]=$!
    starts[$1]=$((${starts[$1]:-0} + 1))
}
exec {silence}<> <(:) # a pipe that nobody writes to
pause() { # pause SECONDS: without a child process beside the workers
    read -rt "$1" -u "$silence" || true
}
running() { # process ids of the workers that run
    local pid
    for pid in "${workers[@]}"; do
        [[ -z "$pid" ]] || echo "$pid"
    done
}
stop() { # stop CODE: end all workers and leave
    trap - TERM INT
    # shellcheck disable=SC2046
    kill -TERM $(running) 2>/dev/null || true
    wait || true
    exit "$1"
}
trap 'stop 0' TERM INT

for i in "${!groups[@]}"; do start "$i"; done
result=0
while [[ -n "$(running)" ]]; do
    pause 0.5 # not `wait -n`, which says of no process which one ended
    for i in "${!workers[@]}"; do
        [[ -n "${workers[i]}" ]] && ! kill -0 "${workers[i]}" 2>/dev/null || continue
        code=0
        wait "${workers[i]}" || code=$?
        workers[i]=
        ((code != refused)) || stop "$refused"
        ((code != 0)) || continue
        if ((starts[i] > RESTARTS)); then
            result=1
            continue
        fi
        echo "worker: ended with exit code $code; starting again (${starts[i]} of $RESTARTS)" >&2
        pause 1
        start "$i"
    done
done
exit "$result"
