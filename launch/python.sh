# shellcheck shell=bash
# The other scripts source this file after setting `root` and `fail`. It sets PYTHON, the interpreter:
# PYTHON if given, else an active virtual or conda environment, else .venv, else python3.

cpu_only() { # cpu_only FOLDER: whether the environment holds a torch without CUDA
    compgen -G "$1/lib/python3*/site-packages/torch-*+cpu.dist-info" >/dev/null
}

has_gpu() { # without a pipe, which pipefail makes fail when its reader leaves early
    local found
    found="$(nvidia-smi --list-gpus 2>/dev/null)" && [[ -n "$found" ]]
}

if [[ -n "${PYTHON:-}" ]]; then
    command -v "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON is no program: name an interpreter."
elif [[ -n "${VIRTUAL_ENV:-}" && -x "$VIRTUAL_ENV/bin/python3" ]]; then
    PYTHON="$VIRTUAL_ENV/bin/python3"
elif [[ -n "${CONDA_PREFIX:-}" && "${CONDA_DEFAULT_ENV:-}" != base && -x "$CONDA_PREFIX/bin/python3" ]]; then
    PYTHON="$CONDA_PREFIX/bin/python3"
elif [[ -x "$root/.venv/bin/python3" ]]; then
    if cpu_only "$root/.venv" && has_gpu; then
        fail "this machine has a GPU and $root/.venv holds torch for CPUs: activate the environment of the GPU (pip install -e '.[gpu]'), or name its interpreter, PYTHON=...; PYTHON=$root/.venv/bin/python3 trains on the CPU."
    fi
    PYTHON="$root/.venv/bin/python3"
else
    PYTHON=python3
fi
[[ "$PYTHON" != */* ]] || export PATH="$(dirname "$PYTHON"):$PATH" # its programs, too
export PYTHON PYTHON_EXEC="${PYTHON_EXEC:-$PYTHON}"

visible_gpus() { # the number of GPUs that torch sees: nvidia-smi ignores CUDA_VISIBLE_DEVICES
    has_gpu || { echo 0 && return; }
    "$PYTHON_EXEC" -c 'import torch; print(torch.cuda.device_count())' ||
        fail "$PYTHON_EXEC cannot count the GPUs: set NPROC to the number of ranks on this node."
}
