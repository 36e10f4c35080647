"""Bytes on one GPU of each pipeline stage, by what holds them.

Two moments are looked at: the fullest of an update, when the micro-batches in flight have kept
what their backward passes need; and rollout, when a colocated engine is awake beside weights,
gradients and optimizer. Gradients are float32, main weights and both moments too, over the ranks
that hold the same parameters with a distributed optimizer: 6 + 12 / d bytes a number in bfloat16,
as Megatron documents it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_vrl.config import RunConfig
from megatron_vrl.models.architecture import Architecture, padded_vocab
from megatron_vrl.models.pipeline_split import Chunk, stage_chunks
from megatron_vrl.planner.activations import (
    FLOAT32,
    Kernels,
    Layer,
    head_kept,
    head_working,
    language_layer,
    merger_kept,
    number_bytes,
    plan_bytes,
    recompute_of_tower,
    vision_kept,
    vision_layer,
)
from megatron_vrl.planner.hardware import GIB
from megatron_vrl.planner.parameters import Numbers, count_stage
from megatron_vrl.planner.workload import Packed

RUNTIME = 2 * GIB  # CUDA context, NCCL's buffers, cuBLAS workspaces; *not measured*
RESERVE = 0.04  # of the GPU: fragments of torch's allocator, and what the driver keeps


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """Of one GPU of a pipeline stage, bytes."""

    weights: int
    gradients: int
    optimizer: int  # main weights and moments, this rank's share
    reference: int  # the first model's weights, for the KL term
    fp8_weights: int  # copies in FP8 and their transposes
    activations: int  # language layers, all micro-batches in flight
    vision: int  # tower and merger, likewise
    log_probs: int  # the head: logits of a chunk, its gradient, the rows it reads
    working: int  # what one layer's backward pass needs besides, at the most
    stepping: int  # what the optimizer's update needs for a moment
    runtime: int

    @property
    def lasting(self) -> int:
        """What stays between updates."""
        return (
            self.weights
            + self.gradients
            + self.optimizer
            + self.reference
            + self.fp8_weights
            + self.runtime
        )

    @property
    def update(self) -> int:
        """The most of an update: head and layers work one after the other, then the optimizer."""
        passes = self.activations + self.vision + max(self.log_probs, self.working)
        return self.lasting + max(passes, self.stepping)


def stage_memory(
    cfg: RunConfig,
    arch: Architecture,
    stage: int,
    sharers: int,
    batches: Sequence[Packed],
    micro_batches: int,
    kernels: Kernels,
) -> StageMemory:
    """At the worst of `batches`, `micro_batches` of which make an update.

    `sharers`: ranks that hold the same parameters.
    """
    numbers = count_stage(arch, cfg.model, cfg.parallel, stage)
    cases = [_case(cfg, arch, stage, numbers, sharers, b, micro_batches, kernels) for b in batches]
    return max(cases, key=lambda memory: memory.update)


def _case(
    cfg: RunConfig,
    arch: Architecture,
    stage: int,
    numbers: Numbers,
    sharers: int,
    batch: Packed,
    micro_batches: int,
    kernels: Kernels,
) -> StageMemory:
    model, parallel = cfg.model, cfg.parallel
    chunks = stage_chunks(arch, model, parallel, stage)
    layer = language_layer(arch, model, parallel, batch, kernels)
    language = [kept_by(chunk, layer, model.recompute) for chunk in chunks]
    tower = vision_kept(arch, model, parallel, batch, kernels) if chunks[0].embeds else 0
    activations, vision = max(
        (
            (sum(n * kept for n, kept in zip(counts, language, strict=True)), counts[0] * tower)
            for counts in in_flight(stage, parallel.pipeline, parallel.virtual, micro_batches)
        ),
        key=sum,
    )
    ends = any(chunk.ends for chunk in chunks)
    words = padded_vocab(arch, parallel) // parallel.tensor
    working = layer.working() + layer.again(model.recompute)
    if chunks[0].embeds and not model.freeze_vision:
        block = vision_layer(arch, model, parallel, batch, kernels)
        at_block = block.working() + block.again(recompute_of_tower(model))
        gone = language[0] + merger_kept(arch, model, parallel, batch, block)
        working = max(working, at_block - gone)
    head = 0
    if ends:
        head = head_working(words, arch, model, batch, parallel.context)
        head += head_kept(arch, model, batch, layer, parallel.context)
    number = number_bytes(model)
    matrices = 2 * numbers.matrices * (model.fp8 != "none")
    refers = cfg.algorithm.kl > 0
    return StageMemory(
        weights=number * numbers.all,
        gradients=FLOAT32 * numbers.trained(model),
        optimizer=optimizer_bytes(cfg, numbers, sharers),
        reference=number * numbers.all * refers,
        fp8_weights=matrices * (1 + refers),
        activations=activations,
        vision=vision,
        log_probs=head,
        working=working,
        stepping=stepping_bytes(cfg, numbers, sharers, kernels),
        runtime=RUNTIME * kernels.on_gpu,
    )


def optimizer_bytes(cfg: RunConfig, numbers: Numbers, sharers: int) -> int:
    """Two moments, and main weights where the model's own are not float32."""
    each = 2 * FLOAT32 + (FLOAT32 if cfg.model.dtype == "bfloat16" else 0)
    shares = sharers if cfg.parallel.distributed_optimizer else 1
    return each * -(-numbers.trained(cfg.model) // shares)


def stepping_bytes(cfg: RunConfig, numbers: Numbers, sharers: int, kernels: Kernels) -> int:
    """Denominators of AdamW: FusedAdam, which comes with Transformer Engine, makes none, torch's
    one list of tensors, and ours on a CPU two."""
    lists = 1 if cfg.model.layers == "megatron" else 0
    if not kernels.on_gpu:
        lists = 2
    shares = sharers if cfg.parallel.distributed_optimizer else 1
    return lists * FLOAT32 * -(-numbers.trained(cfg.model) // shares)


def kept_by(chunk: Chunk, layer: Layer, recompute: str) -> int:
    """Of one micro-batch. The schedule holds a chunk's output until its backward pass."""
    output = 0 if chunk.ends else layer.full()
    return len(chunk.layers) * layer.kept(recompute) + plan_bytes(layer) + output


def in_flight(
    stage: int, pipeline: int, virtual: int, micro_batches: int
) -> Iterator[tuple[int, ...]]:
    """Micro-batches of each chunk of a stage that have gone forward and not back, at the moments
    when there are the most of all.

    1F1B (arXiv 2006.09503) fills the pipeline: stage p holds pipeline - p. Interleaved (arXiv
    2104.04473) a stage runs ahead by two rounds and a chunk for each further virtual stage, and
    micro-batches go through a chunk in rounds of the pipeline's size.
    """
    total = micro_batches * virtual
    ahead = pipeline - stage - 1
    if virtual > 1:
        ahead = 2 * ahead + (virtual - 1) * pipeline
    ahead = min(ahead, total - 1)
    counts = [0] * virtual
    for step in range(min(total, ahead + 1 + pipeline * virtual)):  # after that it repeats
        counts[step // pipeline % virtual] += 1
        if step >= ahead:
            yield tuple(counts)
            counts[virtual - 1 - (step - ahead) // pipeline % virtual] -= 1
