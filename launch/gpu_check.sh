#!/usr/bin/env bash
# Run every test and bench that needs a GPU; write one JSON file and one table (tools/gpu_check.py).
# The row of a part whose library is missing (vLLM, DALI) says so. All parts together take --seconds at
# most, 560 by default. --tiny: small sizes, on a CPU.
#   launch/gpu_check.sh [--out DIR] [--seconds 560] [--only job,large,...] [--replay DIR] [--tiny]
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
source launch/env.sh
unset OMP_NUM_THREADS # no ranks share this machine's cores
if [[ -f .venv/bin/activate ]]; then
    source .venv/bin/activate
fi
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec python3 tools/gpu_check.py "$@"
