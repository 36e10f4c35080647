"""This rank's groups -> micro-batches that fit those of all other ranks.

Every data-parallel rank must run the same number of micro-batches, and every token must weigh as
if the whole step were one batch. Both need a word from the other ranks; nothing else here does.
`rebalance` comes before, if at all: it hands groups to other data ranks until all have nearly the
same work. Left out: splitting a group, whose prompt two ranks would then compute.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_vrl.batching.balance import assign_ranks, into_micro_batches
from megatron_vrl.batching.pack import Group, MicroBatch, pack, repeat_prompts, shard_context
from megatron_vrl.config import Batch
from megatron_vrl.parallel.mesh import Mesh, exchange_objects, gather_objects

TILE_ROWS = 16  # of a matrix product on tensor cores; FP8 takes nothing else
Cost = Callable[[Group], float]
Normalisation = Literal[
    "global_tokens", "sequence_mean", "sequence_sum", "constant_length", "temporal_r1"
]


def tokens(group: Group) -> float:
    """The cost of a group where attention and the vision tower cost nothing more."""
    return float(group.num_tokens)


def rebalance(groups: Sequence[Group], mesh: Mesh, cost: Cost) -> list[Group]:
    """The groups of this data rank after all data ranks have shared theirs out by `cost`.

    Every rank calls it with the groups of its replica, the same on all ranks of the replica. Only
    groups that change rank are sent, with their frames. A rank may end with none.
    """
    everywhere = gather_objects(mesh.data, [cost(group) for group in groups])
    costs = [c for of_rank in everywhere for c in of_rank]
    homes = [rank for rank, of_rank in enumerate(everywhere) for _ in of_rank]
    places = assign_ranks(costs, homes, mesh.data.size)
    first = homes.index(mesh.data.rank) if groups else 0
    outgoing: list[list[tuple[int, Group]]] = [[] for _ in range(mesh.data.size)]
    for number, group in enumerate(groups, start=first):  # counted over all ranks
        outgoing[places[number]].append((number, group))
    kept, outgoing[mesh.data.rank] = outgoing[mesh.data.rank], []
    if places != homes:
        kept += exchange_objects(mesh.data, outgoing)
    return [group for _, group in sorted(kept, key=lambda pair: pair[0])]


def plan_batches(
    groups: Sequence[Group],
    dummy_group: Group,
    cfg: Batch,
    mesh: Mesh,
    normalisation: Normalisation = "global_tokens",
    *,
    cost: Cost = tokens,
    max_response_tokens: int = 1,
) -> list[MicroBatch]:
    """Every rank calls it, with the groups of its data rank; [] if no rank has any.

    A rank with fewer micro-batches than another cuts its own finer, and what then is missing is
    filled with an answer of `dummy_group` whose tokens weigh 0. `cost` balances the micro-batches.
    See `_token_weights` for `normalisation`; `max_response_tokens` is read by `constant_length`.
    """
    laid_out = repeat_prompts(groups) if cfg.layout == "plain" else list(groups)
    sizes, costs = [g.num_tokens for g in laid_out], [cost(g) for g in laid_out]
    bins = into_micro_batches(sizes, costs, cfg.tokens)
    own = (len(bins), sum(g.num_targets for g in groups), sum(len(g.answers) for g in groups))
    counts, targets, answers = zip(*gather_objects(mesh.data, own), strict=True)
    most = max(counts)
    if most == 0:
        return []
    if mesh.interleaved:  # its micro-batches are handed on in rounds of the pipeline's size
        most = -(-most // mesh.pipeline.size) * mesh.pipeline.size
    if len(bins) < most:
        bins = into_micro_batches(sizes, costs, cfg.tokens, at_least=most)
    idle = replace(dummy_group, answers=dummy_group.answers[:1])
    members = [[laid_out[i] for i in bin_] for bin_ in bins] + [[idle]] * (most - len(bins))
    batches = _packed(members, mesh)
    step = _Step(sum(targets), sum(answers), len(bins) * mesh.data.size, max_response_tokens)
    weights = [_token_weights(batch, normalisation, step) for batch in batches[: len(bins)]]
    weights += [np.zeros(len(batch.target), np.float32) for batch in batches[len(bins) :]]
    weighed = (replace(b, weight=weight) for b, weight in zip(batches, weights, strict=True))
    return [shard_context(batch, mesh.context.rank, mesh.context.size) for batch in weighed]


@dataclass(frozen=True, slots=True)
class _Step:
    """What a token's weight is divided by; counted over all data ranks."""

    tokens: int  # that have a loss
    answers: int
    micro_batches: int  # as if every rank had as many of its own as this one
    max_response_tokens: int


def _token_weights(
    batch: MicroBatch, normalisation: Normalisation, step: _Step
) -> NDArray[np.float32]:
    """[N] of a whole micro-batch.

    `global_tokens`: every token of the step the same (DAPO, arXiv 2503.14476). `sequence_mean`:
    every answer the same, its tokens equally (GRPO, arXiv 2402.03300). `sequence_sum`: an answer
    weighs its length. `constant_length`: that over the longest response there may be (Dr. GRPO,
    arXiv 2503.20783). `seed`: mean inside each micro-batch, then over micro-batches, then over
    data ranks, as Temporal-R1 released it; the only one that depends on how answers are packed.
    """
    length = np.bincount(batch.sequence)[batch.sequence]  # [N] of the token's answer
    divisors: dict[Normalisation, Any] = {
        "global_tokens": step.tokens,
        "sequence_mean": step.answers * length,
        "sequence_sum": step.answers,
        "constant_length": step.answers * step.max_response_tokens,
        "temporal_r1": step.micro_batches * len(batch.target),
    }
    return (np.ones(len(batch.target)) / divisors[normalisation]).astype(np.float32)


def _packed(bins: Sequence[Sequence[Group]], mesh: Mesh) -> list[MicroBatch]:
    """One micro-batch of each bin, padded to what the layout and the hardware divide."""
    zigzag = 2 * mesh.context.size if mesh.context.size > 1 else 1
    tile = TILE_ROWS if mesh.device.type == "cuda" else 1
    multiple = mesh.tensor.size * zigzag * tile
    # The interleaved schedule sends tensors of one shape: all are as long as the longest.
    longest = max(sum(group.num_tokens for group in groups) for groups in bins)
    at_least = longest if mesh.interleaved else 0
    return [pack(groups, multiple=multiple, at_least=at_least) for groups in bins]
