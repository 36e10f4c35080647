# shellcheck shell=bash
# The other scripts source this file: environment of every process that they start.

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # one thread per rank: the ranks share the cores
case "$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null || true)" in
    1[0-9].*) ;;                               # Blackwell and later: Megatron wants CUDA's default
    *) export CUDA_DEVICE_MAX_CONNECTIONS=1 ;; # before: it overlaps kernels by their launch order
esac
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 # checkpoints are folders; nothing is downloaded
export WANDB_DISABLE_WEAVE=true                # no advertisement in the output
export TOKENIZERS_PARALLELISM=false             # its threads do not survive a fork
export TORCH_CPP_LOG_LEVEL=ERROR                # no warnings about NUMA nodes
export PYTHONUNBUFFERED=1                       # lines appear when they are printed
export PIP_DISABLE_PIP_VERSION_CHECK=1
export CUBLAS_WORKSPACE_CONFIG=":4096:8"           # run.deterministic needs it; costs 24 MiB
