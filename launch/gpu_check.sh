#!/usr/bin/env bash
# Run every test and bench that needs a GPU; write one JSON file and one table (tools/gpu_check.py).
# The row of a part whose library is missing (Transformer Engine, vLLM, DALI) says so.
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
