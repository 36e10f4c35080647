"""Section `rollout` of the config: generation and weight sync."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from megatron_vrl.config.base import SECTION, Fraction, Positive

BUCKET_BYTES = 128 << 20  # of one bucket of a weight sync, unless a module is larger
Transport = Literal["auto", "shared_memory", "cuda_ipc", "broadcast", "http"]


class RolloutConfig(BaseModel):
    model_config = SECTION

    placement: Literal["colocated", "workers", "replay"] = "colocated"
    """Location of the engines. colocated: an engine in every trainer process; workers: engines in
    processes of their own, started with launch/rollout_worker.sh; replay: stored rollouts in
    `replay_dir`, without an engine."""
    backend: Literal["vllm"] = "vllm"
    """Inference engine of `colocated` and `workers`."""
    replay_dir: str = ""
    """Directory of stored rollouts for `replay`: OUT/rollouts of another run."""
    visual_input: Literal["pixels", "embeddings"] = "pixels"
    """Input of videos to the engine. embeddings: the trainer's frozen vision tower encodes each
    video once, for the engine and the trainer."""
    embedding_cache_mib: Positive = 1024
    """Host memory of one trainer process for cached vision embeddings, MiB."""
    save: bool = True
    """Write every group of rollouts with its rewards to OUT/rollouts."""
    workers: list[str] = []
    """Addresses of workers, host:port."""
    discovery_dir: str = ""
    """Directory shared by workers and trainer, where workers announce their addresses."""
    tensor: Positive = 1
    """Tensor-parallel processes of one worker."""
    min_workers: Positive = 1
    """Number of workers that the first weight sync waits for. Others may join at a later step."""
    worker_wait_timeout_s: Annotated[float, Field(gt=0)] = 300.0
    """Longest wait for workers, at the start and when none is left. Then the run stops."""
    heartbeat_timeout_s: Annotated[float, Field(gt=0)] = 30.0
    """A worker that answers no health check for this time, seconds, is lost."""
    request_timeout_s: Annotated[float, Field(gt=0)] = 1800.0
    """A worker that takes longer than this, seconds, for the rollouts of one prompt is lost."""
    max_staleness: Annotated[int, Field(ge=0)] = 0
    """Maximum policy lag: a prompt is submitted at most this many training steps before its
    rollouts are trained on. 0: synchronous. More: workers generate for later steps during an
    update."""
    group_size: Positive = 8
    """Rollouts per prompt."""
    prompts_per_step: Positive = 16
    """Prompts of one step, over all ranks."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Fraction = 1.0
    max_response_tokens: Positive = 2048
    max_num_seqs: Annotated[int, Field(ge=0)] = 0
    """Sequences that one engine decodes at a time. 0: 256 on a GPU, 64 on a CPU."""
    max_num_batched_tokens: Annotated[int, Field(ge=0)] = 0
    """Tokens that one engine computes in one forward pass; at least the longest prompt with its
    response. 0: 8192 on a GPU, 2048 on a CPU."""
    kv_cache_mib: Positive = 1024
    """KV cache of one engine on a CPU, MiB. On a GPU see gpu_memory_utilization."""
    gpu_memory_utilization: Fraction = 0.5
    """Fraction of a GPU's memory that one engine may take."""
    check_weights_every: Positive = 50
    """Compare checksums of engine and trainer weights at the first and every k-th weight sync."""
    transport: Transport = "auto"
    """Transport of weights to workers. auto: cuda_ipc on one GPU, shared_memory on one machine,
    otherwise broadcast (NCCL between GPUs, gloo without). http: bytes over the worker's port."""
    cpu_prepack_weights: bool = False
    """CPU only: prepack weights for oneDNN after each weight sync. Decoding is faster, and a sync
    takes about 10 times longer."""
    quantization: Literal["none", "fp8", "fp8_emulated"] = "none"
    """FP8 of the language layers. fp8: the engine quantises and computes in FP8, on a GPU.
    fp8_emulated: the engine gets weights rounded to FP8 and computes in `model.dtype`. Both need
    algorithm.rollout_is."""

    def num_seqs(self, on_gpu: bool) -> int:
        """Return `max_num_seqs`, or its default for the engine's device."""
        return self.max_num_seqs or (256 if on_gpu else 64)

    def batched_tokens(self, on_gpu: bool) -> int:
        """Return `max_num_batched_tokens`, or its default for the engine's device."""
        return self.max_num_batched_tokens or (8192 if on_gpu else 2048)
