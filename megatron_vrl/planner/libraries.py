"""GPU memory that libraries and other processes take beside the trainer's tensors.

Each function names its source. The sizes that no source gives are constants here, *not measured*.
"""

from megatron_vrl.config import Parallel, RunConfig
from megatron_vrl.config.rollout import BUCKET_BYTES
from megatron_vrl.models.activations import dtype_bytes
from megatron_vrl.models.architecture import Architecture
from megatron_vrl.models.chunk import Chunk
from megatron_vrl.planner.hardware import GIB

CUDA_CONTEXT = GIB // 2  # of a process on a GPU, with its kernels; *not measured*
NCCL_GROUP = GIB // 4  # buffers of a communicator's channels, NVLink SHARP; *not measured*
DECODER_FRAMES = GIB  # MAX_BATCH_BYTES of `video/dali.py`, which the planner need not import
DECODER_SURFACES = GIB // 2  # NVDEC's reference frames and the resized batch; *not measured*
CUDA_GRAPHS = GIB  # of one engine, inside its working memory; *not measured*


def decoder_bytes(cfg: RunConfig) -> int:
    """Return the memory of the process that decodes on this rank's GPU, also during updates.

    The process decodes ahead of use, with its own CUDA context and at most DECODER_FRAMES of
    full-size frames.
    """
    if cfg.video.device != "gpu":
        return 0
    return CUDA_CONTEXT + DECODER_FRAMES + DECODER_SURFACES


def nccl_bytes(cfg: Parallel, dp_ranks: int) -> int:
    """Return the buffers of this rank's communicators. dp_ranks: ranks with the same parameters.

    Megatron makes two groups over data-parallel ranks (without and with context), one over
    tensor-parallel ranks and one with context, and two over pipeline stages (with the embedding's);
    the mesh adds the world and the ranks of a replica. A group communicates from its first use on.
    """
    groups = 2 * (dp_ranks > 1) + 2 * (cfg.tensor > 1) + 2 * (cfg.pipeline > 1)
    replica = cfg.tensor * cfg.context * cfg.pipeline
    groups += (cfg.context > 1) + (replica > 1) + (replica * dp_ranks // cfg.context > 1)
    return groups * NCCL_GROUP


def graphs_bytes(cfg: RunConfig) -> int:
    """Return the CUDA graphs of a colocated engine, which stay while it sleeps.

    vLLM 0.32 frees them only with `sleep_mode_offload_cudagraph`, which is off.
    """
    return CUDA_GRAPHS if cfg.rollout.placement == "colocated" else 0


def bucket_bytes(cfg: RunConfig, arch: Architecture, chunks: list[Chunk]) -> int:
    """Return both buckets of a rank that sends its stage's weights from GPU memory.

    Only `rollout.transport` broadcast and cuda_ipc send from the GPU; auto is taken for broadcast,
    since workers of the trainer's machine need less (`rollout/workers/weight_sender.py`).
    """
    on_gpu = cfg.rollout.transport in ("auto", "broadcast", "cuda_ipc")
    if cfg.rollout.placement != "workers" or not on_gpu:
        return 0
    return 2 * _largest_bucket(cfg, arch, any(c.pre_process or c.post_process for c in chunks))


def first_gpu_bytes(cfg: RunConfig, arch: Architecture) -> int:
    """Return what a weight sync needs on a worker's first GPU, beside the engine's own memory.

    The process that serves HTTP receives each bucket there by NCCL. With several tensor-parallel
    processes it has a CUDA context of its own, and every other process opens that bucket there,
    which costs a context each (`rollout/workers/server.py`, `rollout/buckets.py`).
    """
    contexts = cfg.rollout.tensor * CUDA_CONTEXT if cfg.rollout.tensor > 1 else 0
    return _largest_bucket(cfg, arch, ends=True) + NCCL_GROUP + contexts


def _largest_bucket(cfg: RunConfig, arch: Architecture, ends: bool) -> int:
    """Return the bytes of the largest bucket of a stage: a whole module, at least the default.

    ends: the stage has the embedding or the head.
    """
    module = 2 * arch.mlp * arch.hidden
    if ends:
        module = max(module, arch.vocab * arch.hidden)
    return max(BUCKET_BYTES, dtype_bytes(cfg.model) * module)
