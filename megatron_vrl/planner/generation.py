"""Rollout engine in the planner: its memory, and seconds of the phases around generation.

One decoding step reads the weights once for all running sequences, reads the keys and values of
every sequence, and adds the engine's fixed overhead, which is the largest part for a small model.
Speculative decoding and quantised weights are not modelled.
"""

from dataclasses import dataclass

from megatron_vrl.config import RunConfig
from megatron_vrl.models.activations import dtype_bytes
from megatron_vrl.models.architecture import Architecture
from megatron_vrl.models.flops import flops_of_sizes
from megatron_vrl.planner.hardware import GIB
from megatron_vrl.planner.libraries import first_gpu_bytes
from megatron_vrl.planner.parameters import count_all
from megatron_vrl.planner.speed import Machine, Phase
from megatron_vrl.planner.workload import FILM_FPS, GroupSizes, shuffled_answers

ENGINE_WORKING = 3 * GIB  # activations, CUDA graphs and sampler; *not measured*
ENGINE_STEP = 0.004  # overhead of a decoding step in seconds; *not measured*
# Frames of 1280 x 720 decoded per second, with all frames up to the last sampled one decoded: by a
# process (docs/results/video.md: 1350 in 4 to 5 s of one core) and by a GPU's NVDEC (*not
# measured*).
PICTURES = {"cpu": 300.0, "gpu": 1000.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineMemory:
    """Memory of an engine on one GPU, in bytes."""

    weights: int
    working: int
    kv_cache: int  # rest of the engine's memory; negative if too small
    sequence: int  # keys and values of one answer; the group shares the prompt
    longest: int  # keys and values of the longest prompt with the longest answer
    sync: int  # of a weight sync on a worker's first GPU, beside the engine; 0 if colocated

    @property
    def total(self) -> int:
        """Return all memory of the engine."""
        return self.weights + self.working + self.kv_cache

    @property
    def sequences(self) -> int:
        """Return the number of answers whose keys and values fit at the same time."""
        return max(0, self.kv_cache // self.sequence)


def engine_memory(
    cfg: RunConfig, arch: Architecture, sizes: GroupSizes, gpu_memory: int
) -> EngineMemory:
    """Return the memory of an engine.

    A colocated engine holds the whole model on every GPU; a worker splits it over `rollout.tensor`
    GPUs.
    """
    ranks = 1 if cfg.rollout.placement == "colocated" else cfg.rollout.tensor
    number = dtype_bytes(cfg.model)
    token = 2 * arch.layers * arch.kv_heads * arch.head_dim * number // ranks
    weights = number * count_all(arch).all // ranks
    kv_cache = int(cfg.rollout.gpu_memory_utilization * gpu_memory) - weights - ENGINE_WORKING
    answer = max(cfg.rollout.max_response_tokens, cfg.evaluation.max_response_tokens)
    return EngineMemory(
        weights=weights,
        working=ENGINE_WORKING,
        kv_cache=kv_cache,
        sequence=token * (sizes.prompt // sizes.answers + sizes.response),
        longest=token * (cfg.data.max_prompt_tokens + answer),
        sync=0 if cfg.rollout.placement == "colocated" else first_gpu_bytes(cfg, arch),
    )


def rollout_phase(
    cfg: RunConfig,
    arch: Architecture,
    sizes: GroupSizes,
    engine: EngineMemory,
    engines: int,
    machine: Machine,
) -> Phase:
    """Return the seconds of prefill and decoding of a step's answers, on the engine with the most
    prompts."""
    ranks = 1 if cfg.rollout.placement == "colocated" else cfg.rollout.tensor
    prompts = -(-cfg.rollout.prompts_per_step // engines)
    shuffled = shuffled_answers(cfg)
    answers = prompts * (sizes.answers + shuffled)
    reads = prompts * (2 if shuffled else 1)  # prefills; shuffled frames are a prompt of their own
    at_once = max(1, min(answers, cfg.rollout.num_seqs(on_gpu=True), engine.sequences))
    read = flops_of_sizes(arch, sizes.prompt, [1], [sizes.grid] if sizes.grid else [])
    token = flops_of_sizes(arch, 1, [1], [])
    steps = -(-answers // at_once) * sizes.response
    # On average an answer is half decoded; each step reads all keys and values.
    per_token = engine.sequence / (sizes.prompt // sizes.answers + sizes.response)
    seen = at_once * (sizes.prompt + sizes.response / 2) * per_token
    memory = machine.hbm(engine.weights + seen)
    compute = machine.compute(at_once * token.flops / ranks, cfg.model.dtype)
    return Phase(
        parts={
            "compute": machine.compute(reads * read.flops / ranks, cfg.model.dtype)
            + steps * max(0.0, compute - memory),
            "HBM": steps * memory,
            "engine": steps * ENGINE_STEP,
        }
    )


def sync_phase(cfg: RunConfig, arch: Architecture, machine: Machine) -> Phase:
    """Return the seconds of a weight sync.

    Colocated: every rank gathers all layers and copies them on its GPU. Workers: weights pass
    through host memory, and pipeline stages send their own layers in parallel.
    """
    num_bytes = dtype_bytes(cfg.model) * count_all(arch).all
    parallel = cfg.parallel
    ranks = parallel.tensor * parallel.pipeline
    if cfg.rollout.placement == "workers":
        own = 2 * num_bytes / parallel.pipeline  # to host memory and back
        return Phase(parts={"host link": own / machine.gpu.host})
    parts = {"HBM": machine.hbm(2 * num_bytes)}
    if ranks > 1:
        span = parallel.tensor if parallel.pipeline == 1 else machine.gpus
        name, seconds = machine.link(num_bytes * (1 - 1 / ranks), span)
        parts[name] = seconds
    return Phase(parts=parts)


def encode_phase(cfg: RunConfig, clip_s: float | None, machine: Machine) -> Phase:
    """Return the seconds of decoding a step's videos, with an empty frame store.

    `clip_s` is the length of a video; None means the longest that `video.fps` samples completely.
    """
    if clip_s is None:
        clip_s = (cfg.video.num_frames or cfg.video.max_frames) / cfg.video.fps
    videos = -(-cfg.rollout.prompts_per_step // machine.gpus)
    at_once = 1 if cfg.video.device == "gpu" else min(cfg.video.workers, videos)
    speed = PICTURES[cfg.video.device] * at_once
    return Phase(parts={"decoder": videos * clip_s * FILM_FPS / speed})
