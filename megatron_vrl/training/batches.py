"""This rank's groups -> micro-batches that fit those of all other ranks.

Every data-parallel rank must run the same number of micro-batches, and every token must weigh as
if the whole step were one batch. Both need a word from the other ranks; nothing else here does.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from megatron_vrl.batching.pack import (
    Group,
    MicroBatch,
    as_plain,
    pack,
    share_context,
    split_by_tokens,
)
from megatron_vrl.config import Batch
from megatron_vrl.parallel.mesh import Mesh, gather_objects

TILE_ROWS = 16  # of a matrix product on tensor cores; FP8 takes nothing else


def plan_batches(
    groups: Sequence[Group],
    filler: Group,
    cfg: Batch,
    mesh: Mesh,
    normalisation: Literal["global_tokens", "seed"] = "global_tokens",
) -> list[MicroBatch]:
    """Every rank calls it, with the groups of its data rank; [] if no rank has any.

    `global_tokens`: a token weighs 1 / (tokens of the step). `seed`: mean inside each micro-batch,
    then over micro-batches, then over data ranks, as Temporal-R1 released it. `filler` keeps a
    rank busy that has fewer micro-batches than the others; its tokens weigh 0.
    """
    laid_out = as_plain(groups) if cfg.layout == "plain" else list(groups)
    bins = split_by_tokens(laid_out, cfg.tokens)
    targets = sum(group.num_targets for group in groups)
    everywhere = gather_objects(mesh.data, (len(bins), targets))
    most = max(count for count, _ in everywhere)
    if mesh.interleaved:  # its micro-batches are handed on in rounds of the pipeline's size
        most = -(-most // mesh.pipeline.size) * mesh.pipeline.size
    total = sum(count for _, count in everywhere)
    if most == 0:
        return []
    # The interleaved schedule sends tensors of one shape: all are as long as the longest.
    longest = max(sum(g.num_tokens for g in members) for members in [*bins, [filler]])
    at_least = longest if mesh.interleaved else 0
    batches = [_packed(members, mesh, at_least) for members in bins]
    if normalisation == "global_tokens":
        weights = [1.0 / total] * len(batches)
    else:
        weights = [1.0 / (len(b.target) * len(batches) * mesh.data.size) for b in batches]
    weighed = [_weigh(batch, weight) for batch, weight in zip(batches, weights, strict=True)]
    if len(weighed) < most:
        idle = _packed([replace(filler, answers=filler.answers[:1])], mesh, at_least)
        weighed += [_weigh(idle, 0.0)] * (most - len(weighed))
    return [share_context(batch, mesh.context.rank, mesh.context.size) for batch in weighed]


def _packed(groups: Sequence[Group], mesh: Mesh, at_least: int) -> MicroBatch:
    zigzag = 2 * mesh.context.size if mesh.context.size > 1 else 1
    tile = TILE_ROWS if mesh.device.type == "cuda" else 1
    return pack(groups, multiple=mesh.tensor.size * zigzag * tile, at_least=at_least)


def _weigh(batch: MicroBatch, weight: float) -> MicroBatch:
    return replace(batch, weight=np.full(len(batch.target), weight, dtype=np.float32))
