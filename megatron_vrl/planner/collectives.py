"""Collectives of an update on one rank, computed from the layout.

Bytes are those of the whole tensor: what an all-gather returns, what a reduce-scatter or an
all-reduce is given, what is sent or received. The count assumes that the language model or its
adapters learn, and leaves out what the host needs to know: metrics, the gradients' norm. The
formulas follow "Reducing Activation Recomputation" (arXiv 2205.05198) and Megatron's schedules;
`tools/rehearse.py` records what the program does.
"""

from collections import Counter
from dataclasses import dataclass, field

from megatron_vrl.config import RunConfig
from megatron_vrl.models.activations import FLOAT32, dtype_bytes
from megatron_vrl.models.architecture import Architecture, padded_vocab
from megatron_vrl.models.chunk import Chunk
from megatron_vrl.models.logprob_head import GPU_CHUNK_BYTES
from megatron_vrl.models.pipeline_split import all_chunks, stage_chunks
from megatron_vrl.models.recompute import layers_in_full
from megatron_vrl.models.vision_inputs import shard_steps
from megatron_vrl.models.weight_layouts import EMBEDDING, HEAD
from megatron_vrl.planner.parameters import (
    ParameterCounts,
    adapted_widths,
    count_stage,
    partial_adapters,
    trained_sizes,
)
from megatron_vrl.planner.rank_sizes import RankSizes, rank_sizes
from megatron_vrl.planner.workload import PackedBatch, forward_passes

# Phase (a forward pass, passes or step), operation, axis of the group.
Collective = tuple[str, str, str]
# Least parameters of a bucket of gradients, and those for each data rank, as in Megatron's
# DistributedDataParallel.
BUCKET, BUCKET_OF_RANK = 40_000_000, 1_000_000


@dataclass
class Collectives:
    """Calls and bytes by collective."""

    calls: Counter[Collective] = field(default_factory=Counter)
    bytes: Counter[Collective] = field(default_factory=Counter)

    def add(self, phase: str, operation: str, axis: str, calls: int, each: float) -> None:
        """Add `calls` collectives of `each` bytes."""
        if calls:
            self.calls[phase, operation, axis] += calls
            self.bytes[phase, operation, axis] += round(calls * each)


def update_collectives(
    cfg: RunConfig,
    arch: Architecture,
    batch: PackedBatch,
    stage: int,
    dp_ranks: int,
    micro_batches: int,
    context_rank: int = 0,
) -> Collectives:
    """Return the collectives of an update of `micro_batches` like `batch`, and of the forward
    passes before it.

    `dp_ranks` is the number of ranks that hold the same parameters.
    """
    out = Collectives()
    chunks = stage_chunks(arch, cfg.model, cfg.parallel, stage)
    counts = count_stage(arch, cfg.model, cfg.parallel, stage)
    sizes = rank_sizes(cfg.model, cfg.parallel, batch, context_rank)
    for phase in ("passes", *forward_passes(cfg)):
        count = micro_batches * (1 if phase == "passes" else cfg.grpo.mini_batches)
        _layers(out, cfg, arch, sizes, chunks, count, phase)
        _vision(out, cfg, arch, batch, chunks, count, phase)
        _pipeline(out, cfg, arch, batch, chunks, count, phase)
    _gradients(out, cfg, arch, chunks, counts, _buckets(cfg, arch, chunks, stage, dp_ranks))
    return out


def _layers(
    out: Collectives,
    cfg: RunConfig,
    arch: Architecture,
    sizes: RankSizes,
    chunks: list[Chunk],
    micro_batches: int,
    phase: str,
) -> None:
    """Add those of tensor and context ranks in language layers, embedding and head.

    A layer enters two column-parallel matrices and leaves two row-parallel ones, forward and again
    when it is recomputed. Backward it does so in reverse, and sequence parallelism gathers the
    input of the column-parallel matrices once more.
    """
    parallel, learns = cfg.parallel, phase == "passes"
    layers = sum(len(chunk.layers) for chunk in chunks)
    in_full = sum(layers_in_full(cfg.model, len(chunk.layers)) for chunk in chunks)
    embeds, ends = any(c.pre_process for c in chunks), any(c.post_process for c in chunks)
    whole = dtype_bytes(cfg.model) * sizes.rows * arch.hidden
    forward = layers + learns * in_full  # forward passes of a layer

    def tensor(operation: str, calls: int, each: float) -> None:
        out.add(phase, operation, "tensor", micro_batches * calls, each)

    if parallel.sequence:
        trains = cfg.model.trains_language  # the backward pass of a frozen layer needs no input
        embeds_learn = embeds and (trains or cfg.model.lora.merger)
        gathers = 2 * forward + ends + learns * ((2 + 2 * trains) * layers + embeds_learn)
        tensor("all_gather", gathers, whole)
        tensor("reduce_scatter", 2 * forward + learns * (2 * layers + ends), whole)
        tensor("all_reduce", embeds, whole)
    elif parallel.tensor > 1:
        tensor("all_reduce", 2 * forward + embeds + learns * (2 * layers + ends), whole)
    if cfg.model.lora.rank and phase != "reference":
        _adapters(out, cfg, arch, sizes, chunks, micro_batches, phase)
    if parallel.tensor > 1 and ends:  # the head's sums of each chunk of rows: one number, and three
        rows = max(1, GPU_CHUNK_BYTES * parallel.tensor // (FLOAT32 * padded_vocab(arch, parallel)))
        pieces = -(-sizes.targets // rows)
        tensor("all_reduce", 2 * pieces, 2 * FLOAT32 * sizes.targets / pieces)
    if parallel.context > 1:
        each = (
            dtype_bytes(cfg.model)
            * sizes.rows
            * parallel.context
            * 2
            * arch.kv_heads
            * arch.head_dim
        )
        gathers = forward + learns * layers * (cfg.model.recompute == "selective")
        each //= parallel.tensor
        out.add(phase, "all_gather", "context", micro_batches * gathers, each)
        out.add(phase, "reduce_scatter", "context", micro_batches * layers * learns, each)


def _adapters(
    out: Collectives,
    cfg: RunConfig,
    arch: Architecture,
    sizes: RankSizes,
    chunks: list[Chunk],
    micro_batches: int,
    phase: str,
) -> None:
    """Add those of adapters: x A' of a column-parallel layer is gathered under sequence
    parallelism, and its gradient is scattered; else its gradient is summed."""
    learns, number = phase == "passes", dtype_bytes(cfg.model)
    for chunk in chunks:
        in_full = learns * layers_in_full(cfg.model, len(chunk.layers)) / len(chunk.layers)
        for width in adapted_widths(arch, cfg.model, chunk):
            each = number * sizes.rows * width
            if cfg.parallel.sequence:
                forward = 1 + in_full
                out.add(phase, "all_gather", "tensor", round(micro_batches * forward), each)
                out.add(phase, "reduce_scatter", "tensor", micro_batches * learns, each)
            elif cfg.parallel.tensor > 1:
                out.add(phase, "all_reduce", "tensor", micro_batches * learns, each)


def _vision(
    out: Collectives,
    cfg: RunConfig,
    arch: Architecture,
    batch: PackedBatch,
    chunks: list[Chunk],
    micro_batches: int,
    phase: str,
) -> None:
    """Add the gather of vision tokens, each rank's padded to the most of a rank, and the sum of
    their gradients over context ranks.

    With DeepStack a token has several embeddings. Under sequence parallelism a tensor rank has the
    gradients of its own rows' features, which are summed.
    """
    parallel, model = cfg.parallel, cfg.model
    ranks = parallel.tensor * parallel.context
    if ranks == 1 or not chunks[0].pre_process or batch.group.grid is None:
        return
    steps, height, width = batch.group.grid
    tokens = height * width // arch.vision.merge**2
    bounds = shard_steps([tokens] * (steps * batch.groups), ranks)
    most = tokens * max(last - first for first, last in bounds)
    each = dtype_bytes(model) * arch.vision_width
    out.add(phase, "all_gather", "vision", micro_batches, each * ranks * most)
    if phase != "passes" or (model.freeze_vision and model.freeze_merger):
        return
    every = tokens * steps * batch.groups
    if parallel.context > 1:
        out.add(phase, "all_reduce", "context", micro_batches, each * every)
    if parallel.sequence and arch.vision.deepstack_layers:
        features = dtype_bytes(model) * (arch.vision_width - arch.hidden)
        out.add(phase, "all_reduce", "tensor", micro_batches, features * every)


def _pipeline(
    out: Collectives,
    cfg: RunConfig,
    arch: Architecture,
    batch: PackedBatch,
    chunks: list[Chunk],
    micro_batches: int,
    phase: str,
) -> None:
    """Add the messages of every chunk: its input and output, and their gradients."""
    parallel, learns = cfg.parallel, phase == "passes"
    split = parallel.context * (parallel.tensor if parallel.sequence else 1)
    each = dtype_bytes(cfg.model) * (batch.rows // split) * arch.hidden
    before = sum(not chunk.pre_process for chunk in chunks)
    after = sum(not chunk.post_process for chunk in chunks)
    out.add(phase, "recv", "pipeline", micro_batches * (before + learns * after), each)
    out.add(phase, "send", "pipeline", micro_batches * (after + learns * before), each)


def _gradients(
    out: Collectives,
    cfg: RunConfig,
    arch: Architecture,
    chunks: list[Chunk],
    counts: ParameterCounts,
    buckets: int,
) -> None:
    """Add those after the last backward pass, and the gather of new weights.

    Data ranks sum all gradients. Tensor ranks sum those of the tower, of which each encodes a part,
    or of factors of adapters that are partial; those of the norms of heads; and under sequence
    parallelism those of the other norms. A tied head on another stage than the embedding has a sum
    of its own.
    """
    model, parallel = cfg.model, cfg.parallel
    number, trained = dtype_bytes(model), counts.trained(model)
    kind = "reduce_scatter" if parallel.distributed_optimizer else "all_reduce"
    out.add("passes", kind, "batch", buckets, FLOAT32 * trained / max(1, buckets))
    if parallel.distributed_optimizer:
        out.add("step", "all_gather", "batch", buckets, number * trained / max(1, buckets))
    tower = counts.vision * (not model.freeze_vision) + counts.merger * (not model.freeze_merger)
    if model.lora.rank:
        tower = sum(partial_adapters(arch, model, parallel, chunk) for chunk in chunks)
    if parallel.tensor > 1:
        out.add("passes", "all_reduce", "tensor", int(tower > 0), FLOAT32 * tower)
    layers = sum(len(chunk.layers) for chunk in chunks)
    norms = 2 * layers * arch.head_dim * arch.qk_norm  # of query and key heads
    if parallel.sequence:
        norms += sum(2 * len(chunk.layers) + chunk.post_process for chunk in chunks) * arch.hidden
    if parallel.tensor > 1 and model.trains_language:
        out.add("passes", "all_reduce", "tensor", int(norms > 0), FLOAT32 * norms)
    ends = any(c.pre_process or c.post_process for c in chunks)
    if (
        arch.tied_head
        and model.trains_language
        and len(all_chunks(arch, model, parallel)) > 1
        and ends
    ):
        rows = padded_vocab(arch, parallel) // parallel.tensor
        out.add("passes", "all_reduce", "other", 1, FLOAT32 * rows * arch.hidden)


def _buckets(
    cfg: RunConfig, arch: Architecture, chunks: list[Chunk], stage: int, dp_ranks: int
) -> int:
    """Return the number of messages that the gradients of a stage's chunks are divided into.

    Only the first stage divides them, to overlap them with the backward pass. A bucket is full with
    the parameter that reaches its size; the last parameters of the model come first. With the
    distributed optimizer a tied head on another stage than the embedding is in a bucket of its own,
    as is the embedding.
    """
    full = max(BUCKET, BUCKET_OF_RANK * dp_ranks)
    apart = arch.tied_head and cfg.parallel.pipeline > 1 and cfg.parallel.distributed_optimizer
    count = 0
    for chunk in chunks:
        held = 0
        for name, size in reversed(trained_sizes(arch, cfg.model, cfg.parallel, chunk)):
            alone = apart and name in (EMBEDDING, HEAD)
            count += held == 0 or alone
            held += size
            if alone or (held >= full and cfg.parallel.overlap and stage == 0):
                held = 0
    return count
