"""Optimizer updates of a step: rebalance groups over data ranks, pack them, and update.

With one update per step the old log-probs are those of the update's own forward pass. With several
they are computed once before the first. The reference pass is also made once, and only if
algorithm.kl is not 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from megatron_vrl.algorithms import token_loss
from megatron_vrl.batching.balance import partition
from megatron_vrl.batching.pack import Group, MicroBatch
from megatron_vrl.context import RunContext
from megatron_vrl.models.qwen2_5_vl.flops import group_flops
from megatron_vrl.policy.micro_batches import plan_batches, rebalance
from megatron_vrl.policy.policy import Update
from megatron_vrl.trainer.experience import RolloutBatch, sampled_distribution, to_train


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateResult:
    """Updates of a step, with the work of this data-parallel rank."""

    groups: list[Group]  # that this data rank trained on
    batches: list[MicroBatch]  # of one pass over them
    updates: list[Update]  # the same on every rank; empty if no group was kept
    passes: int  # forward passes without gradient over `batches`


def update_policy(ctx: RunContext, rollout_batch: RolloutBatch, step: int) -> UpdateResult:
    """Train on a step's rollouts, after `step` finished steps. Every rank calls it."""
    cfg = ctx.cfg
    cost = lambda group: group_flops(ctx.arch, group).flops  # noqa: E731
    given = [to_train(e, cfg.algorithm.mask_truncated) for e in rollout_batch.kept]
    groups = rebalance([group for group in given if group.answers], ctx.mesh, cost)
    mini_batches = [
        batches
        for members in partition([cost(group) for group in groups], cfg.grpo.mini_batches)
        if (batches := _planned(ctx, [groups[i] for i in members], rollout_batch.dummy_group))
    ]
    several = len(mini_batches) * cfg.grpo.epochs > 1
    refers = cfg.algorithm.kl > 0 and cfg.algorithm.kl_in == "loss"
    of = sampled_distribution(ctx)
    old = [ctx.policy.logprobs(b, of) if several else None for b in mini_batches]
    reference = [ctx.policy.reference_logprobs(b, of) if refers else None for b in mini_batches]
    updates = [
        ctx.policy.update(
            batches, partial(token_loss, cfg=cfg.algorithm), of, step, old=before, reference=kept
        )
        for _ in range(cfg.grpo.epochs)
        for batches, before, kept in zip(mini_batches, old, reference, strict=True)
    ]
    return UpdateResult(
        groups=groups,
        batches=[batch for batches in mini_batches for batch in batches],
        updates=updates,
        passes=several + refers,
    )


def _planned(ctx: RunContext, groups: Sequence[Group], dummy_group: Group) -> list[MicroBatch]:
    cfg = ctx.cfg
    return plan_batches(
        groups,
        dummy_group,
        cfg.batch,
        ctx.mesh,
        cfg.algorithm.normalisation,
        cost=lambda group: group_flops(ctx.arch, group).flops,
        max_response_tokens=cfg.rollout.max_response_tokens,
    )
