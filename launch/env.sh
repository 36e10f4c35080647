# shellcheck shell=bash
# Sourced by the other scripts: the environment of every process that they start.

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # one thread per rank: the ranks share the cores
export CUDA_DEVICE_MAX_CONNECTIONS=1            # Megatron overlaps by the order of its launches
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 # checkpoints are folders; nothing is fetched
export WANDB_DISABLE_WEAVE=true                # no advertisement between the lines
export TOKENIZERS_PARALLELISM=false             # its threads do not survive a fork
export TORCH_CPP_LOG_LEVEL=ERROR                # no word about NUMA nodes between the lines
export PYTHONUNBUFFERED=1                       # lines appear when they are printed
export PIP_DISABLE_PIP_VERSION_CHECK=1
export CUBLAS_WORKSPACE_CONFIG=":4096:8"           # run.deterministic asks for it; costs 24 MiB
