#!/usr/bin/env bash
# Every test and bench that needs a GPU, into one JSON file and one table: see tools/gpu_check.py.
# What is missing on the machine (Transformer Engine, vLLM, DALI) is said in its row.
#   launch/gpu_check.sh [--out DIR] [--only tests,update,...] [--model configs/models/NAME.json]
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
source launch/env.sh
unset OMP_NUM_THREADS # no ranks share this machine's cores
if [[ -f .venv/bin/activate ]]; then
    source .venv/bin/activate
fi
if ! python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu_check: torch sees no GPU here; run it on a machine with one." >&2
    exit 2
fi
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec python3 tools/gpu_check.py "$@"
