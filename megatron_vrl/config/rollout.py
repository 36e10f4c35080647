"""The section `rollout`: who answers, how much, and how the weights get there."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from megatron_vrl.config.base import SECTION, Fraction, Positive

Transport = Literal["auto", "shared_memory", "cuda_ipc", "broadcast", "http"]


class Rollout(BaseModel):
    model_config = SECTION

    placement: Literal["colocated", "workers", "replay"] = "colocated"
    """colocated: one vLLM engine in every trainer process; workers: separate processes, started
    with launch/rollout_worker.sh; replay: none, answers come from `replay_dir`."""
    replay_dir: str = ""
    """Directory of stored rollouts, OUT/rollouts of another run."""
    visual_input: Literal["pixels", "embeddings"] = "pixels"
    """embeddings: the trainer's vision tower, frozen, sees each video once, for the engine too."""
    embedding_cache_mib: Positive = 1024
    """Host memory of one process for embeddings that later steps may use again, MiB."""
    save: bool = True
    """Write every group of answers with its rewards to OUT/rollouts."""
    workers: list[str] = []
    """Addresses of workers, host:port."""
    discovery_dir: str = ""
    """Directory that workers and trainer share, where workers announce their addresses."""
    tensor: Positive = 1
    """Processes that share the model in one worker."""
    min_workers: Positive = 1
    """The run begins when so many workers are there; any others join at a later step."""
    worker_wait_timeout_s: Annotated[float, Field(gt=0)] = 300.0
    """How long to wait for workers, at the start and when none is left, before the run stops."""
    heartbeat_timeout_s: Annotated[float, Field(gt=0)] = 30.0
    """A worker that does not answer its health check for so long is lost."""
    request_timeout_s: Annotated[float, Field(gt=0)] = 1800.0
    """A worker that takes longer for one prompt's answers is lost."""
    max_staleness: Annotated[int, Field(ge=0)] = 0
    """Updates that the weights may be ahead of those that an answer was sampled with. 0: the loop
    is synchronous; more: workers generate the next steps' answers while this one trains."""
    group_size: Positive = 8
    """Answers sampled for one prompt."""
    prompts_per_step: Positive = 16
    """Prompts of one step, over all ranks."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Fraction = 1.0
    max_response_tokens: Positive = 2048
    max_num_seqs: Positive = 64
    """Sequences one engine decodes at a time."""
    kv_cache_mib: Positive = 1024
    """Memory of one engine's KV cache, MiB (CPU; on a GPU see gpu_memory_utilization)."""
    gpu_memory_utilization: Fraction = 0.5
    """Share of a GPU's memory that a colocated engine may take."""
    check_weights_every: Positive = 50
    """Compare checksums of engine and trainer at the first and every k-th hand-over."""
    transport: Transport = "auto"
    """How workers get the weights. auto: through memory that both see (the GPU's, if both use the
    same one, or the machine's), else by broadcast (NCCL between GPUs, gloo without); http: as
    bytes, over the worker's one port."""
    cpu_prepack_weights: bool = False
    """On a CPU, lay every matrix out for oneDNN at each hand-over, which takes ten copies' time."""
    quantization: Literal["none", "fp8", "fp8_emulated"] = "none"
    """fp8: the engine computes the language layers in FP8 (a GPU); rounded: it gets their matrices
    rounded to FP8 and computes as ever (anywhere). Both want algorithm.importance."""
