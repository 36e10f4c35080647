"""The engine: what it needs of a GPU's memory, and how long answers and the phases beside take.

A token costs one reading of the weights for all sequences that are decoded together, one reading of
every sequence's keys and values, and the engine's own time between two steps, which for a small
model is the longest. Speculation and quantised weights are left out.
"""

from dataclasses import dataclass

from megatron_vrl.config import RunConfig
from megatron_vrl.models.architecture import Architecture
from megatron_vrl.models.qwen2_5_vl.flops import work_of_sizes
from megatron_vrl.planner.activations import number_bytes
from megatron_vrl.planner.hardware import GIB
from megatron_vrl.planner.parameters import count_all
from megatron_vrl.planner.speed import Machine, Phase
from megatron_vrl.planner.workload import FILM_FPS, Sizes

ENGINE_WORKING = 3 * GIB  # its activations, CUDA graphs and sampler; *not measured*
ENGINE_STEP = 0.004  # seconds between two tokens besides the GPU's; *not measured*
# Pictures of 1280 x 720 that are decoded in a second, when all up to the last sampled one are: by a
# process (docs/results/video.md: 1350 in 4 to 5 s of a core) and by a GPU's NVDEC (*not measured*).
PICTURES = {"cpu": 300.0, "gpu": 1000.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineMemory:
    """Of one GPU of an engine, bytes."""

    weights: int
    working: int
    kv_cache: int  # what is left of its share; negative if nothing is
    sequence: int  # keys and values of one answer, its prompt shared by the group
    longest: int  # of the longest prompt with the longest answer

    @property
    def share(self) -> int:
        return self.weights + self.working + self.kv_cache

    @property
    def sequences(self) -> int:
        """Answers that fit at a time."""
        return max(0, self.kv_cache // self.sequence)


def engine_memory(
    cfg: RunConfig, arch: Architecture, sizes: Sizes, gpu_memory: int
) -> EngineMemory:
    """A colocated engine is whole on every GPU; a worker's is shared by `rollout.tensor`."""
    ranks = 1 if cfg.rollout.placement == "colocated" else cfg.rollout.tensor
    number = number_bytes(cfg.model)
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
    )


def rollout_phase(
    cfg: RunConfig,
    arch: Architecture,
    sizes: Sizes,
    engine: EngineMemory,
    engines: int,
    machine: Machine,
) -> Phase:
    """A step's prompts read and its answers sampled, on the engine with the most to do."""
    ranks = 1 if cfg.rollout.placement == "colocated" else cfg.rollout.tensor
    prompts = -(-cfg.rollout.prompts_per_step // engines)
    answers = prompts * sizes.answers
    at_once = max(1, min(answers, cfg.rollout.max_num_seqs, engine.sequences))
    read = work_of_sizes(arch, sizes.prompt, [1], [sizes.grid] if sizes.grid else [])
    token = work_of_sizes(arch, 1, [1], [])
    steps = -(-answers // at_once) * sizes.response
    # An answer's own keys and values grow from its prompt's to its end; a kernel reads them anew.
    per_token = engine.sequence / (sizes.prompt // sizes.answers + sizes.response)
    seen = at_once * (sizes.prompt + sizes.response / 2) * per_token
    memory = machine.hbm(engine.weights + seen)
    compute = machine.compute(at_once * token.flops / ranks, cfg.model.dtype)
    return Phase(
        parts={
            "compute": machine.compute(prompts * read.flops / ranks, cfg.model.dtype)
            + steps * max(0.0, compute - memory),
            "HBM": steps * memory,
            "engine": steps * ENGINE_STEP,
        }
    )


def sync_phase(cfg: RunConfig, arch: Architecture, machine: Machine) -> Phase:
    """Weights to the engine.

    Colocated: every rank gathers all layers; the engine's old weights, which lay in host memory
    while the trainer worked, come back first and go there again after the answers. Workers: through
    host memory, each pipeline stage its own layers at the same time.
    """
    num_bytes = number_bytes(cfg.model) * count_all(arch).all
    parallel = cfg.parallel
    ranks = parallel.tensor * parallel.pipeline
    if cfg.rollout.placement == "workers":
        own = 2 * num_bytes / parallel.pipeline  # to host memory and from there
        return Phase(parts={"host link": own / machine.gpu.host})
    parts = {"host link": 2 * num_bytes / machine.gpu.host, "HBM": machine.hbm(2 * num_bytes)}
    if ranks > 1:
        span = parallel.tensor if parallel.pipeline == 1 else machine.gpus
        name, seconds = machine.link(num_bytes * (1 - 1 / ranks), span)
        parts[name] = seconds
    return Phase(parts=parts)


def encode_phase(cfg: RunConfig, clip_s: float | None, machine: Machine) -> Phase:
    """Decoding the videos of a step that no store holds yet, all pictures of each.

    `clip_s` None: as long as may be sampled at `video.fps`.
    """
    if clip_s is None:
        clip_s = (cfg.video.num_frames or cfg.video.max_frames) / cfg.video.fps
    videos = -(-cfg.rollout.prompts_per_step // machine.gpus)
    at_once = 1 if cfg.video.device == "gpu" else min(cfg.video.workers, videos)
    speed = PICTURES[cfg.video.device] * at_once
    return Phase(parts={"decoder": videos * clip_s * FILM_FPS / speed})
