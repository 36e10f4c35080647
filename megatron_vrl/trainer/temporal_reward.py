"""The component `temporal` of a step's groups (`rewards.temporal`).

The rules are in `rewards/temporal_sensitivity.py`, the shuffled prompts in
`data/shuffled_frames.py`. Answers to shuffled frames earn rewards and are never trained on.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from megatron_vrl.batching.pack import MicroBatch
from megatron_vrl.context import RunContext
from megatron_vrl.data.shuffled_frames import boundaries_shuffled
from megatron_vrl.policy.policy import LogProbs
from megatron_vrl.rewards.temporal_sensitivity import (
    BONUS,
    TEMPORAL,
    shuffled_boundaries_bonus,
    shuffled_group_bonus,
)
from megatron_vrl.trainer.answer_sums import answer_sums
from megatron_vrl.trainer.rollout_queue import AnsweredPrompt
from megatron_vrl.types import RewardComponent, ScoredGroup


def with_shuffled_group(
    ctx: RunContext, answered: Sequence[AnsweredPrompt], groups: Sequence[ScoredGroup]
) -> list[ScoredGroup]:
    """Return the groups of `answered` with the component of T-GRPO, where a sample has a video."""
    shuffled = ctx.reward_manager.groups(
        [one.sample for one in answered],
        [one.prompt for one in answered],
        [one.shuffled for one in answered],
    )
    return [
        _with(group, shuffled_group_bonus(group.sample.task, group.components, other.components))
        if group.sample.clips
        else group
        for group, other in zip(groups, shuffled, strict=True)
    ]


def with_shuffled_boundaries(
    ctx: RunContext,
    groups: Sequence[ScoredGroup],
    dummy_group: ScoredGroup,
    logprobs: Callable[[Sequence[MicroBatch]], LogProbs],
) -> list[ScoredGroup]:
    """Return the groups with the component of TaRO, where a task scores `temporal_iou`.

    `logprobs` makes the pass over the shuffled frames. Every rank calls it, with the groups of a
    round.
    """
    scored = [group for group in groups if "temporal_iou" in group.components]
    seed = ctx.cfg.run.seed
    shuffled = [
        replace(g, prompt=boundaries_shuffled(g.prompt, g.sample, (seed, g.rollouts[0].seed)))
        for g in scored
    ]
    # The answers' log-probs with the frames in order are the engine's.
    sums = answer_sums(ctx, shuffled, dummy_group, logprobs, lambda engine, other: engine - other)
    found = {
        id(group): _with(group, _boundaries_bonus(group, of_group))
        for group, of_group in zip(scored, sums, strict=True)
    }
    return [found.get(id(group), group) for group in groups]


def _boundaries_bonus(group: ScoredGroup, sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the component [n] from the answers' summed drops of log-prob."""
    lengths = np.array([len(rollout.token_ids) for rollout in group.rollouts])
    return shuffled_boundaries_bonus(sums / lengths, group.components["temporal_iou"].values)


def _with(group: ScoredGroup, values: NDArray[np.float64]) -> ScoredGroup:
    """Return the group with the component `temporal`."""
    component = RewardComponent(values=values, weight=BONUS)
    return replace(group, components={**group.components, TEMPORAL: component})
