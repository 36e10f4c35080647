"""Ranks that a rehearsal tells apart.

The micro-batches of all data ranks are alike, and tensor ranks hold shards of one size. Two ranks
of a stage and of a context rank therefore run the same operations on the same shapes, except in the
vision tower, whose temporal steps are divided over tensor and context ranks, and in the head, where
the last tensor ranks hold the padding of the vocabulary.
"""

from megatron_vrl.config import RunConfig
from megatron_vrl.models.architecture import Architecture, padded_vocab
from megatron_vrl.models.vision_inputs import shard_steps
from megatron_vrl.planner.workload import PackedBatch


def distinct_ranks(
    cfg: RunConfig, arch: Architecture, batch: PackedBatch, world: int
) -> dict[int, list[int]]:
    """Return the first rank of each class of equal ranks, with all ranks of the class."""
    parallel = cfg.parallel
    tensor, context = parallel.tensor, parallel.context
    steps, height, width = batch.group.grid or (0, 0, 0)
    bounds = shard_steps([height * width] * (batch.groups * steps), tensor * context)
    padded = padded_vocab(arch, parallel)
    classes: dict[tuple[int, ...], list[int]] = {}
    for rank in range(world):
        stage = rank // (world // parallel.pipeline)
        along_tensor, along_context = rank % tensor, rank // tensor % context
        first, last = bounds[rank % (tensor * context)]
        end = padded * (along_tensor + 1) // tensor
        key = (
            stage,
            along_context,
            last - first if stage == 0 else 0,
            max(0, end - arch.vocab) if stage == parallel.pipeline - 1 else 0,
        )
        classes.setdefault(key, []).append(rank)
    return {ranks[0]: ranks for ranks in classes.values()}
