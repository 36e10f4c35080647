"""Memory of one GPU of each pipeline stage, by component.

Two moments are planned: the peak of an update, when all in-flight micro-batches have saved their
activations; and rollout, when a colocated engine is awake beside weights, gradients and optimizer
state. Gradients, main weights and both moments are float32. With the distributed optimizer over d
ranks this is 6 + 12 / d bytes per parameter in bfloat16, as Megatron documents.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_vrl.config import Model, RunConfig
from megatron_vrl.models.activations import (
    FLOAT32,
    Kernels,
    Layer,
    dtype_bytes,
    head_saved,
    head_temporary,
    input_bytes,
    language_layer,
    layers_recomputed,
    layers_saved,
    merger_saved,
    plan_bytes,
    vision_layer,
    vision_saved,
)
from megatron_vrl.models.architecture import Architecture, padded_vocab
from megatron_vrl.models.chunk import Chunk
from megatron_vrl.models.pipeline_split import stage_chunks
from megatron_vrl.models.recompute import vision_level
from megatron_vrl.planner.hardware import GIB
from megatron_vrl.planner.libraries import bucket_bytes, decoder_bytes, graphs_bytes, nccl_bytes
from megatron_vrl.planner.parameters import ParameterCounts, count_stage
from megatron_vrl.planner.rank_sizes import RankSizes, rank_sizes
from megatron_vrl.planner.workload import PackedBatch, forward_passes

MIB = 2**20
RUNTIME = 2 * GIB  # CUDA context, kernels, cuBLAS workspaces; *not measured*
RESERVE = 0.04  # fraction of the GPU left free for allocator fragmentation and the driver


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """Memory of one GPU of a pipeline stage, in bytes."""

    weights: int
    gradients: int
    optimizer: int  # main weights and moments, this rank's shard
    reference: int  # weights of the reference model, for the KL term
    fp8_weights: int  # FP8 copies of weights and their transposes
    activations: int  # language layers, all in-flight micro-batches
    vision: int  # vision tower and merger, all in-flight micro-batches
    log_probs: int  # head: logits of a chunk, the head's gradient, its input rows
    working: int  # temporary memory of one layer's backward pass
    vision_outputs: int  # of a frozen tower, kept for the passes of a step
    inputs: int  # of all micro-batches of an update, but for patches
    messages: int  # buffers that ranks of a tensor group or stages fill for each other
    stepping: int  # temporary memory of the optimizer step
    runtime: int
    decoder: int  # process that decodes videos on this GPU
    nccl: int  # buffers of communicators
    buckets: int  # of a weight sync to workers
    graphs: int  # CUDA graphs of a sleeping colocated engine; awake, the engine counts them

    @property
    def persistent(self) -> int:
        """Return the memory that stays allocated between updates."""
        return (
            self.weights
            + self.gradients
            + self.optimizer
            + self.reference
            + self.fp8_weights
            + self.runtime
            + self.decoder
            + self.nccl
            + self.buckets
        )

    @property
    def checkpoint(self) -> int:
        """Return the peak of a save, which copies to host memory and takes none of the GPU."""
        return self.persistent

    @property
    def update(self) -> int:
        """Return the peak of an update: the passes, in which head and layers run in turn, or the
        optimizer step."""
        return self.persistent + self.graphs + self.before + max(self.passes, self.stepping)

    @property
    def before(self) -> int:
        """Return the bytes of an update's micro-batches that are there before its passes."""
        return self.inputs + self.vision_outputs

    @property
    def passes(self) -> int:
        """Return the peak of forward and backward passes without what is there before them."""
        working = max(self.log_probs, self.working)
        return self.activations + self.vision + self.messages + working


def stage_memory(
    cfg: RunConfig,
    arch: Architecture,
    stage: int,
    dp_ranks: int,
    batches: Sequence[PackedBatch],
    micro_batches: int,
    kernels: Kernels,
) -> StageMemory:
    """Return the memory of a stage for the worst of `batches`; an update has `micro_batches` of
    them.

    `dp_ranks` is the number of ranks that hold the same parameters.
    """
    counts = count_stage(arch, cfg.model, cfg.parallel, stage)
    cases = [_case(cfg, arch, stage, counts, dp_ranks, b, micro_batches, kernels) for b in batches]
    return max(cases, key=lambda memory: memory.update)


def _case(
    cfg: RunConfig,
    arch: Architecture,
    stage: int,
    counts: ParameterCounts,
    dp_ranks: int,
    batch: PackedBatch,
    micro_batches: int,
    kernels: Kernels,
) -> StageMemory:
    """Return the memory of a stage for one micro-batch size."""
    model, parallel = cfg.model, cfg.parallel
    chunks = stage_chunks(arch, model, parallel, stage)
    sizes = rank_sizes(model, parallel, batch)
    layer = language_layer(arch, model, parallel, sizes.rows, sizes.attention, kernels)
    block = vision_layer(arch, model, sizes.patches, kernels)
    language = [chunk_saved(chunk, layer, model) for chunk in chunks]
    tower = 0
    if chunks[0].pre_process:
        tower = vision_saved(arch, model, block, sizes.all_patches, sizes.vision_tokens)
    activations, vision = max(
        (
            (sum(n * kept for n, kept in zip(running, language, strict=True)), running[0] * tower)
            for running in in_flight(stage, parallel.pipeline, parallel.virtual, micro_batches)
        ),
        key=sum,
    )
    head = 0
    if any(chunk.post_process for chunk in chunks):
        vocab_shard = padded_vocab(arch, parallel) // parallel.tensor
        head = head_temporary(arch, model, vocab_shard, sizes.targets, kernels)
        head += head_saved(arch, model, layer, sizes.targets)
    outputs = 0
    if chunks[0].pre_process:
        outputs = vision_output_bytes(cfg, arch, batch, micro_batches * cfg.grpo.mini_batches)
        outputs = min(outputs, model.vision_output_cache_mib * MIB)
    messages = layer.gather_buffer()
    if stage > 0:  # the gradient that was sent last, and the reference model's last input
        messages += layer.layer_input() * ((micro_batches > 1) + (cfg.algorithm.kl > 0))
    number = dtype_bytes(model)
    refers = cfg.algorithm.kl > 0 and not model.lora.rank  # else the base is the reference
    matrices = 2 * counts.matrices * (model.fp8 != "none")
    return StageMemory(
        weights=number * counts.all,
        gradients=FLOAT32 * counts.trained(model),
        optimizer=optimizer_bytes(cfg, counts, dp_ranks),
        reference=number * counts.all * refers,
        fp8_weights=matrices * (1 + refers),
        activations=activations,
        vision=vision,
        log_probs=head,
        working=_working(cfg, arch, chunks, sizes, layer, block),
        vision_outputs=outputs,
        inputs=micro_batches * input_bytes(layer, block, sizes.targets, sizes.vision_tokens),
        messages=messages,
        stepping=stepping_bytes(cfg, counts, dp_ranks, kernels),
        runtime=RUNTIME * kernels.on_gpu,
        decoder=decoder_bytes(cfg) * kernels.on_gpu,
        nccl=nccl_bytes(parallel, dp_ranks) * kernels.on_gpu,
        buckets=bucket_bytes(cfg, arch, chunks) * kernels.on_gpu,
        graphs=graphs_bytes(cfg) * kernels.on_gpu,
    )


def _working(
    cfg: RunConfig,
    arch: Architecture,
    chunks: list[Chunk],
    sizes: RankSizes,
    layer: Layer,
    block: Layer,
) -> int:
    """Return the temporary memory of the backward pass of a language layer or of a block of the
    tower, whichever needs more, with what autograd keeps at that time.

    When the tower's first block runs backward, the language layers of its micro-batch have freed
    what they saved, and the gradient of the word embeddings still waits. A head that is tied to the
    embedding of its own rank has a gradient which waits until the embedding has its own.
    """
    model, number, first = cfg.model, dtype_bytes(cfg.model), chunks[0]
    again = max(layers_recomputed(layer, model, len(chunk.layers)) for chunk in chunks)
    working = layer.temporary() + again
    if first.pre_process and not model.freeze_vision:
        waiting = number * layer.rows * layer.channels * model.trains_language
        at_block = block.temporary() + block.recomputed(vision_level(model)) + waiting
        gone = chunk_saved(first, layer, model)
        gone += merger_saved(arch, model, block, sizes.vision_tokens)
        working = max(working, at_block - gone)
    if first.pre_process and first.post_process and arch.tied_head and model.trains_language:
        working += number * padded_vocab(arch, cfg.parallel) // cfg.parallel.tensor * arch.hidden
    return working


def optimizer_bytes(cfg: RunConfig, counts: ParameterCounts, dp_ranks: int) -> int:
    """Return the bytes of both moments, and of main weights unless the weights are float32."""
    each = 2 * FLOAT32 + (FLOAT32 if cfg.model.dtype == "bfloat16" else 0)
    shares = dp_ranks if cfg.parallel.distributed_optimizer else 1
    return each * -(-counts.trained(cfg.model) // shares)


def checkpoint_bytes(cfg: RunConfig, counts: ParameterCounts, dp_ranks: int) -> int:
    """Return the bytes of a checkpoint that a rank writes. It copies them to host memory first.

    Ranks that hold the same elements divide them; all tensor ranks hold the vision tower.
    """
    model, tensor = cfg.model, cfg.parallel.tensor
    if model.lora.rank:  # adapters alone; at most, since tensor ranks divide what all hold
        each = dtype_bytes(model) + 2 * FLOAT32 + FLOAT32 * (model.dtype == "bfloat16")
        return -(-each * counts.adapters // dp_ranks)
    state = 2 * FLOAT32 + (FLOAT32 if model.dtype == "bfloat16" else 0)
    tower = dtype_bytes(model) * (counts.vision + counts.merger)
    tower += state * counts.vision * (not model.freeze_vision)
    tower += state * counts.merger * (not model.freeze_merger)
    language = dtype_bytes(model) * counts.language
    language += state * counts.language * (not model.freeze_language)
    return -(-(language + tower // tensor) // dp_ranks)


def stepping_bytes(cfg: RunConfig, counts: ParameterCounts, dp_ranks: int, kernels: Kernels) -> int:
    """Return the bytes of AdamW's temporary denominators. The fused kernel of a GPU has none."""
    if kernels.on_gpu:
        return 0
    shares = dp_ranks if cfg.parallel.distributed_optimizer else 1
    return FLOAT32 * -(-counts.trained(cfg.model) // shares)


def vision_output_bytes(
    cfg: RunConfig, arch: Architecture, batch: PackedBatch, micro_batches: int
) -> int:
    """Return the bytes of a frozen tower's outputs for all `micro_batches` of a step; 0 if nothing
    reads them again."""
    passes = len(forward_passes(cfg)) + cfg.grpo.epochs
    if not cfg.model.freeze_vision or cfg.rollout.visual_input == "embeddings" or passes == 1:
        return 0
    patches = rank_sizes(cfg.model, cfg.parallel, batch).patches
    outputs = 1 + len(arch.vision.deepstack_layers)
    return micro_batches * outputs * patches * arch.vision.hidden * dtype_bytes(cfg.model)


def keeps_vision_outputs(
    cfg: RunConfig, arch: Architecture, batch: PackedBatch, micro_batches: int
) -> bool:
    """Return whether a frozen tower runs once for all passes of a step."""
    kept = vision_output_bytes(cfg, arch, batch, micro_batches)
    return 0 < kept <= cfg.model.vision_output_cache_mib * MIB


def chunk_saved(chunk: Chunk, layer: Layer, model: Model) -> int:
    """Return the bytes that a chunk saves for one micro-batch, with the output that the schedule
    holds."""
    output = 0 if chunk.post_process else layer.layer_input()
    if chunk.pre_process:  # the first layer's rows are a view of the embeddings of all tensor ranks
        output += layer.number * (layer.rows - layer.norm_rows) * layer.channels
    return layers_saved(layer, model, len(chunk.layers)) + plan_bytes(layer) + output


def in_flight(
    stage: int, pipeline: int, virtual: int, micro_batches: int
) -> Iterator[tuple[int, ...]]:
    """Yield, for the moments of most memory, the in-flight micro-batches of each chunk of a stage.

    In-flight micro-batches have run forward and not yet backward. 1F1B (arXiv 2006.09503): stage p
    has at most pipeline - p of them. Interleaved schedule (arXiv 2104.04473): a stage runs ahead by
    two rounds, and by one chunk for each further virtual stage; micro-batches pass a chunk in
    rounds of the pipeline size.
    """
    total = micro_batches * virtual
    ahead = pipeline - stage - 1
    if virtual > 1:
        ahead = 2 * ahead + (virtual - 1) * pipeline
    ahead = min(ahead, total - 1)
    counts = [0] * virtual
    for step in range(min(total, ahead + 1 + pipeline * virtual)):  # later steps repeat
        counts[step // pipeline % virtual] += 1
        if step >= ahead:
            yield tuple(counts)
            counts[virtual - 1 - (step - ahead) // pipeline % virtual] -= 1
