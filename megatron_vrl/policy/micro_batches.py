"""Pack a rank's groups into micro-batches, the same number on every data-parallel rank.

Every token gets the weight it would have if the whole step were one batch. `plan_batches` needs one
all-gather over the data-parallel ranks for the number of micro-batches and the weights; the rest is
local. Before, `rebalance` can move groups between data-parallel ranks until their work is nearly
equal. A group is never split, since two ranks would then compute its prompt.
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

Cost = Callable[[Group], float]
Normalisation = Literal[
    "global_tokens", "sequence_mean", "sequence_sum", "constant_length", "temporal_r1"
]


def tokens(group: Group) -> float:
    """Return the number of tokens of a group as its cost."""
    return float(group.num_tokens)


def rebalance(groups: Sequence[Group], mesh: Mesh, cost: Cost) -> list[Group]:
    """Partition the groups of all data-parallel ranks by `cost`, and return this rank's.

    Every rank calls this function with the groups of its replica. All ranks of a replica pass equal
    groups. Only groups that change rank are sent, with their video frames. The result may be empty.
    """
    everywhere = gather_objects(mesh.data, [cost(group) for group in groups])
    costs = [c for of_rank in everywhere for c in of_rank]
    homes = [rank for rank, of_rank in enumerate(everywhere) for _ in of_rank]
    targets = assign_ranks(costs, homes, mesh.data.size)
    first = homes.index(mesh.data.rank) if groups else 0
    outgoing: list[list[tuple[int, Group]]] = [[] for _ in range(mesh.data.size)]
    for number, group in enumerate(groups, start=first):  # the number of a group over all ranks
        outgoing[targets[number]].append((number, group))
    kept, outgoing[mesh.data.rank] = outgoing[mesh.data.rank], []
    if targets != homes:
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
    """Return the micro-batches of this rank's groups; [] if no rank has groups.

    Every rank calls this function, with the groups of its data-parallel rank. A rank with fewer
    micro-batches than another first splits its own into smaller ones, and then adds dummy
    micro-batches: an answer of `dummy_group` whose tokens have weight 0. Micro-batches are balanced
    by `cost`. See `_token_weights` for `normalisation`; only `constant_length` uses
    `max_response_tokens`.
    """
    laid_out = repeat_prompts(groups) if cfg.layout == "plain" else list(groups)
    sizes, costs = [g.num_tokens for g in laid_out], [cost(g) for g in laid_out]
    bins = into_micro_batches(sizes, costs, cfg.tokens)
    own = (len(bins), sum(g.num_targets for g in groups), sum(len(g.answers) for g in groups))
    counts, targets, answers = zip(*gather_objects(mesh.data, own), strict=True)
    most = max(counts)
    if most == 0:
        return []
    if mesh.interleaved:  # the interleaved schedule needs a multiple of the pipeline's size
        most = -(-most // mesh.pipeline.size) * mesh.pipeline.size
    if len(bins) < most:
        bins = into_micro_batches(sizes, costs, cfg.tokens, at_least=most)
    dummy = replace(dummy_group, answers=dummy_group.answers[:1])
    members = [[laid_out[i] for i in bin_] for bin_ in bins] + [[dummy]] * (most - len(bins))
    batches = _packed(members, mesh)
    step = _Step(sum(targets), sum(answers), len(bins) * mesh.data.size, max_response_tokens)
    weights = [_token_weights(batch, normalisation, step) for batch in batches[: len(bins)]]
    weights += [np.zeros(len(batch.target), np.float32) for batch in batches[len(bins) :]]
    weighed = (replace(b, weight=weight) for b, weight in zip(batches, weights, strict=True))
    return [shard_context(batch, mesh.context.rank, mesh.context.size) for batch in weighed]


@dataclass(frozen=True, slots=True)
class _Step:
    """Counts over all data-parallel ranks, from which the divisors of token weights are made."""

    tokens: int  # tokens that have a loss
    answers: int
    micro_batches: int  # own micro-batches of this rank, without dummies, times data ranks
    max_response_tokens: int


def _token_weights(
    batch: MicroBatch, normalisation: Normalisation, step: _Step
) -> NDArray[np.float32]:
    """Return the weight [N] of each token of a micro-batch before context ranks split it.

    `global_tokens`: mean over all tokens of the step (DAPO, arXiv 2503.14476). `sequence_mean`:
    mean over answers of the mean over their tokens (GRPO, arXiv 2402.03300). `sequence_sum`: mean
    over answers of the sum over their tokens. `constant_length`: `sequence_sum` divided by the
    maximum response length (Dr. GRPO, arXiv 2503.20783). `temporal_r1`: mean inside each
    micro-batch, then over micro-batches, then over data ranks, as in Temporal-R1's released code;
    `temporal_r1` alone depends on how answers are packed.
    """
    length = np.bincount(batch.sequence)[batch.sequence]  # [N] tokens in its answer
    divisors: dict[Normalisation, Any] = {
        "global_tokens": step.tokens,
        "sequence_mean": step.answers * length,
        "sequence_sum": step.answers,
        "constant_length": step.answers * step.max_response_tokens,
        "temporal_r1": step.micro_batches * len(batch.target),
    }
    weights: NDArray[np.float64] = np.ones(len(batch.target)) / divisors[normalisation]
    return weights.astype(np.float32)


def _packed(bins: Sequence[Sequence[Group]], mesh: Mesh) -> list[MicroBatch]:
    """Pack each bin into a micro-batch, padded to a multiple for the layout and the hardware."""
    zigzag = 2 * mesh.context.size if mesh.context.size > 1 else 1
    multiple = mesh.tensor.size * zigzag * mesh.row_tile
    # The interleaved schedule sends tensors of one shape: pad all to the longest.
    longest = max(sum(group.num_tokens for group in groups) for groups in bins)
    at_least = longest if mesh.interleaved else 0
    return [pack(groups, multiple=multiple, at_least=at_least) for groups in bins]
