"""Sums over the tokens of every answer, of the engine's log-probs and those of another pass."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from megatron_vrl.batching.pack import Answer, Group, MicroBatch
from megatron_vrl.context import RunContext
from megatron_vrl.parallel.mesh import gather_objects
from megatron_vrl.policy.micro_batches import plan_batches
from megatron_vrl.policy.policy import LogProbs
from megatron_vrl.types import ScoredGroup


def answer_sums(
    ctx: RunContext,
    groups: Sequence[ScoredGroup],
    dummy_group: ScoredGroup,
    logprobs: Callable[[Sequence[MicroBatch]], LogProbs],
    of_token: Callable[[Tensor, Tensor], Tensor],
) -> list[NDArray[np.float64]]:
    """Return the sum of `of_token(engine, other)` over each answer's tokens, [n] for each group.

    `engine` are the log-probs of the engine, which holds the weights that the step begins with, and
    `other` those of `logprobs`. Every rank calls it, with the groups of a round.
    """
    to_score = [
        _numbered(group, first) for first, group in zip(_starts(groups), groups, strict=True)
    ]
    batches = plan_batches(to_score, _numbered(dummy_group, 0), ctx.cfg.batch, ctx.mesh)
    sums = np.zeros(sum(len(group.rollouts) for group in groups))
    for batch, other in zip(batches, logprobs(batches) if batches else [], strict=True):
        if other is not None and ctx.mesh.tensor.rank == 0:  # equal on tensor ranks
            engine = other.new_tensor(batch.engine_logprob)
            values = of_token(engine, other).double().cpu().numpy()
            answer_indices = np.array([int(name) for name in batch.answer_id])[batch.sequence]
            counted = batch.weight > 0  # tokens of dummy micro-batches have weight 0
            np.add.at(sums, answer_indices[counted], values[counted])
    total = sum(gather_objects(ctx.mesh.model, sums))  # context ranks hold parts of an answer
    return np.split(total, _starts(groups)[1:]) if groups else []


def _starts(groups: Sequence[ScoredGroup]) -> list[int]:
    """Return the number of each group's first answer, counted over all groups."""
    counts = np.array([len(group.rollouts) for group in groups], dtype=np.int64)
    return [int(start) for start in np.cumsum(counts) - counts]


def _numbered(group: ScoredGroup, first: int) -> Group:
    """Return the group for a forward pass, with answer numbers as answer ids."""
    answers = [
        Answer(
            id=str(first + index),
            token_ids=rollout.token_ids,
            advantage=0.0,
            engine_logprobs=rollout.logprobs,
        )
        for index, rollout in enumerate(group.rollouts)
    ]
    return Group(prompt=group.prompt, answers=tuple(answers))
