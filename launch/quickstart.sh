#!/usr/bin/env bash
# Go from a clean clone to a report on a machine without a GPU: install, make clips and a tiny model,
# warm the model up, train it with GRPO. Arguments are overrides: launch/quickstart.sh grpo.steps=5
# family=qwen3_vl takes a tiny Qwen3-VL instead of a Qwen2.5-VL, in a run directory of its own.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
source launch/env.sh
config=configs/quickstart.yaml
family=qwen2_5_vl
overrides=()
for argument in "$@"; do
    case "$argument" in
    family=*) family="${argument#family=}" ;;
    *) overrides+=("$argument") ;;
    esac
done
data=runs/quickstart/data
run=runs/quickstart
if [[ "$family" != qwen2_5_vl ]]; then
    run=runs/quickstart-$family
    # A step of a video has its time as text, which takes more tokens.
    overrides=(run.out_dir="$run" model.checkpoint="$run/model-megatron"
        data.max_prompt_tokens=192 ${overrides[@]+"${overrides[@]}"})
fi
model_hf=$run/model-hf             # a Hugging Face checkpoint
model_megatron=$run/model-megatron # the same, as the trainer reads it
ranks=2

export MEGATRON_VRL_PARENT=$$ # the launcher of the ranks ends with this script

# A stage has a process group of its own (set -m): a terminal's Ctrl-C reaches this script alone,
# which forwards it, so that the stage receives every signal once.
group=
signalled=
forward() { # forward SIGNAL CODE
    signalled="$2"
    [[ -z "$group" ]] || kill -"$1" -- "-$group" 2>/dev/null || true
}
trap 'forward INT 130' INT
trap 'forward TERM 143' TERM
trap 'forward USR1 0' USR1

stage() { # stage NAME COMMAND...: run it and say how long it took
    local name="$1" began=$SECONDS code=0
    shift
    echo "quickstart: $name"
    set -m
    "$@" &
    group=$!
    set +m
    wait "$group" 2>/dev/null || code=$?
    while kill -0 -- "-$group" 2>/dev/null; do # a signal ended the wait, not the stage
        code=0
        wait "$group" 2>/dev/null || code=$?
    done
    group=
    if [[ -n "$signalled" ]]; then
        echo "quickstart: '$name' was stopped after $((SECONDS - began)) s; the same command goes on" >&2
        exit "$code"
    fi
    ((code == 0)) || {
        echo "quickstart: stopped at '$name' after $((SECONDS - began)) s" >&2
        exit 2
    }
    [[ "$name" == training && "$(trained)" == "$trained_before" ]] ||
        echo "quickstart: $name took $((SECONDS - began)) s"
}

trained() { # time of the last row of metrics
    stat -c %Y "$run/metrics.jsonl" 2>/dev/null || true
}

make_once() { # make_once PATH COMMAND...: skipped when an earlier call completed PATH
    local made="$1"
    shift
    [[ -f "$made.complete" && -d "$made" ]] && return
    rm -rf "$made"
    "$@"
    touch "$made.complete"
}

mkdir -p "$run" runs/quickstart
trained_before="$(trained)"
stage "install" launch/install.sh
source .venv/bin/activate
stage "synthetic clips" make_once "$data" python tools/make_synthetic.py --out "$data" --num 3200 --seed 1
stage "tiny model" make_once "$model_hf" python tools/make_tiny_model.py \
    --family "$family" --out "$model_hf" --seed 1
stage "checkpoint conversion" make_once "$model_megatron" \
    python tools/convert_checkpoint.py hf-to-megatron "$model_hf" "$model_megatron"
stage "training" python launch/torchrun.py --standalone --nproc-per-node "$ranks" \
    -m megatron_vrl.cli.train --config "$config" ${overrides[@]+"${overrides[@]}"}
echo "quickstart: all in $SECONDS s; open $root/$run/report.html"
