"""Optimizer updates of a step: balance groups over data-parallel ranks, pack them, and update.

With one update per step, the old log-probs are those of the update's own forward pass. With several
updates, they are computed once, before the first update. The log-probs of the reference model are
also computed once, and only if the loss has a KL term (algorithm.kl > 0, algorithm.kl_in: loss).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from megatron_vrl.algorithms import token_loss
from megatron_vrl.batching.balance import partition
from megatron_vrl.batching.pack import Group, MicroBatch
from megatron_vrl.context import RunContext
from megatron_vrl.models.flops import group_flops
from megatron_vrl.policy.micro_batches import plan_batches, rebalance
from megatron_vrl.policy.policy import Update
from megatron_vrl.trainer.experience import RolloutBatch, sampling_distribution, training_group


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateResult:
    """Optimizer updates of a step, and the groups and micro-batches of this data-parallel rank."""

    groups: list[Group]  # groups that this data-parallel rank trained on
    batches: list[MicroBatch]  # micro-batches of one pass over `groups`
    updates: list[Update]  # equal on every rank; empty if no group was kept
    passes: int  # forward passes without gradient over `batches`


def update_policy(ctx: RunContext, rollout_batch: RolloutBatch, step: int) -> UpdateResult:
    """Train on the rollouts of a step. Every rank calls the function.

    `step` is the number of finished steps.
    """
    cfg = ctx.cfg
    cost = lambda group: group_flops(ctx.arch, group).flops  # noqa: E731
    trainable = [training_group(e, cfg.algorithm.mask_truncated) for e in rollout_batch.kept]
    groups = rebalance([group for group in trainable if group.answers], ctx.mesh, cost)
    mini_batches = [
        batches
        for members in partition([cost(group) for group in groups], cfg.grpo.mini_batches)
        if (
            batches := _plan_micro_batches(
                ctx, [groups[i] for i in members], rollout_batch.dummy_group
            )
        )
    ]
    has_old = len(mini_batches) * cfg.grpo.epochs > 1
    has_reference = cfg.algorithm.kl > 0 and cfg.algorithm.kl_in == "loss"
    distribution = sampling_distribution(ctx)
    with ctx.policy.vision_outputs.kept(has_old + has_reference + cfg.grpo.epochs):
        old_logprobs = [
            ctx.policy.logprobs(b, distribution) if has_old else None for b in mini_batches
        ]
        references = [
            ctx.policy.reference_logprobs(b, distribution) if has_reference else None
            for b in mini_batches
        ]
        updates = [
            ctx.policy.update(
                batches,
                partial(token_loss, cfg=cfg.algorithm),
                distribution,
                step,
                old=old,
                reference=reference,
            )
            for _ in range(cfg.grpo.epochs)
            for batches, old, reference in zip(mini_batches, old_logprobs, references, strict=True)
        ]
    return UpdateResult(
        groups=groups,
        batches=[batch for batches in mini_batches for batch in batches],
        updates=updates,
        passes=has_old + has_reference,
    )


def _plan_micro_batches(
    ctx: RunContext, groups: Sequence[Group], dummy_group: Group
) -> list[MicroBatch]:
    """Return the micro-batches of one optimizer update, balanced by FLOPs."""
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
