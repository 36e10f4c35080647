"""Experience of a step: collect rollouts, score them, and drop zero-variance groups.

In a zero-variance group all advantages are 0. algorithm.dynamic_sampling_rounds collects more
prompts in their place, as in DAPO (arXiv 2503.14476). DAPO samples whole batches and keeps a
surplus; here only the missing number is sampled. A group with a reward that is not a number is
never trained on. It is dropped, named in a message and counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from megatron_vrl import config
from megatron_vrl.algorithms import (
    advantages,
    advantages_with_annotation,
    has_signal,
    kl_penalty,
)
from megatron_vrl.batching.pack import Answer, Group
from megatron_vrl.context import RunContext
from megatron_vrl.models.logprob_head import Distribution
from megatron_vrl.parallel.mesh import (
    gather_objects,
    gather_shards,
    raise_on_all_ranks,
    world_axis,
)
from megatron_vrl.rewards.weights import KL
from megatron_vrl.trainer.answer_sums import answer_sums
from megatron_vrl.trainer.rollout_queue import RolloutQueue
from megatron_vrl.trainer.temporal_reward import with_shuffled_boundaries, with_shuffled_group
from megatron_vrl.types import (
    AnnotatedAnswer,
    Experience,
    Prompt,
    RewardComponent,
    Rollout,
    Sample,
    ScoredGroup,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutBatch:
    """Rollouts of a step. The lists are this replica's; the rest is the same on every rank."""

    groups: list[ScoredGroup]  # every scored group
    experiences: list[Experience]  # of those whose rewards are numbers
    kept: list[Experience]  # those to train on
    dummy_group: Group  # for micro-batches of a rank that has fewer than others
    invalid: tuple[str, ...]  # ids of samples with a reward that is not a number
    rounds: int
    failures: dict[str, list[str]]  # user's reward function -> errors of its failed calls


def collect_rollouts(ctx: RunContext, rollout_queue: RolloutQueue) -> RolloutBatch:
    """Collect and score prompts until rollout.prompts_per_step groups are kept.

    It stops after algorithm.dynamic_sampling_rounds more rounds. Every rank calls it.
    """
    cfg = ctx.cfg
    groups: list[ScoredGroup] = []
    missing, rounds, kept = cfg.rollout.prompts_per_step, 0, list[Experience]()
    while missing > 0 and rounds <= cfg.algorithm.dynamic_sampling_rounds:
        new = _answered(ctx, rollout_queue, missing)
        with ctx.clock("score"):
            dummy = (groups or new)[0]
            groups += _with_kl(ctx, _with_temporal(ctx, new, dummy), dummy)
            experiences, invalid = _with_advantages(ctx, groups)
        drops = cfg.algorithm.drop_zero_variance_groups
        kept = [e for e in experiences if not drops or has_signal(e.advantages)]
        everywhere = sum(gather_objects(ctx.mesh.data, len(kept)))
        missing = cfg.rollout.prompts_per_step - everywhere
        rounds += 1
    dummy_group = training_group(
        Experience(scored=groups[0], advantages=np.zeros(len(groups[0].rollouts)))
    )
    return RolloutBatch(
        groups=groups,
        experiences=experiences,
        kept=kept,
        dummy_group=dummy_group,
        invalid=invalid,
        rounds=rounds,
        failures=_failures(ctx),
    )


def _failures(ctx: RunContext) -> dict[str, list[str]]:
    """Return the failed calls of reward functions on all ranks."""
    joined: dict[str, list[str]] = {}
    for of_rank in gather_objects(world_axis(ctx.mesh), ctx.reward_manager.take_failures()):
        for name, failed in of_rank.items():
            joined.setdefault(name, []).extend(failed)
    return joined


def training_group(experience: Experience, mask_truncated: bool = False) -> Group:
    """Return the group that an update trains on.

    `mask_truncated` drops the answers that were cut at the length limit. Their rewards still count
    in the advantages of the others. The annotation comes last, if it is in the group.
    """
    scored = experience.scored
    answers = [
        Answer(
            id=f"{scored.sample.id}#{index}",
            token_ids=rollout.token_ids,
            advantage=float(experience.advantages[index]),
            engine_logprobs=rollout.logprobs,
        )
        for index, rollout in enumerate(scored.rollouts)
        if not (mask_truncated and rollout.finish == "length")
    ]
    if scored.annotation is not None:
        token_ids = scored.annotation.token_ids
        answers.append(
            Answer(
                id=f"{scored.sample.id}#annotation",
                token_ids=token_ids,
                advantage=experience.annotation_advantage,
                engine_logprobs=np.full(len(token_ids), np.nan, dtype=np.float32),
            )
        )
    return Group(prompt=scored.prompt, answers=tuple(answers))


def sampling_distribution(ctx: RunContext) -> Distribution:
    """Return the distribution that the engine samples from. The trainer's log-probs use it, too."""
    return Distribution(
        temperature=ctx.cfg.rollout.temperature, banned=ctx.rollout_manager.banned_token_ids
    )


def _answered(ctx: RunContext, rollout_queue: RolloutQueue, num: int) -> list[ScoredGroup]:
    """Collect `num` prompts over all ranks and return the scored groups of this replica."""
    answered = rollout_queue.collect(num)
    samples = [one.sample for one in answered]
    prompts = [one.prompt for one in answered]
    with ctx.clock("score"):
        with raise_on_all_ranks(ctx.mesh):
            rollouts = [one.rollouts for one in answered]
            scored = ctx.reward_manager.groups(samples, prompts, rollouts)
            if ctx.cfg.rewards.temporal == "shuffled_group":
                scored = with_shuffled_group(ctx, answered, scored)
            if ctx.cfg.algorithm.ground_truth_answer != "none":
                scored = _with_annotations(ctx, samples, prompts, scored)
        return gather_shards(scored, ctx.mesh.model)


def _with_annotations(
    ctx: RunContext,
    samples: Sequence[Sample],
    prompts: Sequence[Prompt],
    groups: Sequence[ScoredGroup],
) -> list[ScoredGroup]:
    """Return the groups with the ideal answer of their sample and its rewards."""
    ideal = [
        Rollout(
            token_ids=ctx.encoder.target(sample),
            logprobs=np.empty(0, np.float32),
            text=ctx.encoder.target_text(sample),
            finish="stop",
            weight_version=0,
            newest_version=0,
            seed=0,
        )
        for sample in samples
    ]
    scored = ctx.reward_manager.groups(samples, prompts, [[rollout] for rollout in ideal])
    return [
        replace(
            group,
            annotation=AnnotatedAnswer(
                token_ids=rollout.token_ids,
                rewards={name: float(c.values[0]) for name, c in alone.components.items()},
            ),
        )
        for group, rollout, alone in zip(groups, ideal, scored, strict=True)
    ]


def _with_kl(
    ctx: RunContext, groups: Sequence[ScoredGroup], dummy_group: ScoredGroup
) -> list[ScoredGroup]:
    """Return the groups with the component `kl`, if the KL term belongs in the reward.

    Every rank calls it, with the groups of a round.
    """
    cfg = ctx.cfg.algorithm
    if not (cfg.kl > 0 and cfg.kl_in == "reward"):
        return list(groups)
    of = sampling_distribution(ctx)
    sums = answer_sums(
        ctx,
        groups,
        dummy_group,
        lambda batches: ctx.policy.reference_logprobs(batches, of),
        lambda engine, reference: kl_penalty(engine, reference, cfg),
    )
    added = [{KL: RewardComponent(values=-kl, weight=cfg.kl)} for kl in sums]
    return [
        replace(group, components={**group.components, **kl})
        for group, kl in zip(groups, added, strict=True)
    ]


def _with_temporal(
    ctx: RunContext, groups: Sequence[ScoredGroup], dummy_group: ScoredGroup
) -> list[ScoredGroup]:
    """Return the groups with TaRO's component `temporal`, if `rewards.temporal` asks for it.

    Every rank calls it, with the groups of a round.
    """
    if ctx.cfg.rewards.temporal != "shuffled_boundaries":
        return list(groups)
    of = sampling_distribution(ctx)
    return with_shuffled_boundaries(
        ctx, groups, dummy_group, lambda batches: ctx.policy.logprobs(batches, of)
    )


def _with_advantages(
    ctx: RunContext, groups: Sequence[ScoredGroup]
) -> tuple[list[Experience], tuple[str, ...]]:
    """Return the experiences of this replica's valid groups, and the ids of all invalid groups.

    Advantages may depend on the whole step, so the data-parallel ranks exchange their rewards.
    """
    everything = [_all_components(group) for group in groups]
    valid = [all(np.isfinite(c.values).all() for c in of.values()) for of in everything]
    wrong = [g.sample.id for g, is_valid in zip(groups, valid, strict=True) if not is_valid]
    own = [of for of, is_valid in zip(everything, valid, strict=True) if is_valid]
    everywhere = gather_objects(ctx.mesh.data, (own, wrong))
    before = sum(len(of_rank) for of_rank, _ in everywhere[: ctx.mesh.data.rank])
    of_all = [r for of_rank, _ in everywhere for r in of_rank]
    of_step = _advantages(of_all, ctx.cfg.algorithm) if of_all else []
    mine = iter(of_step[before : before + len(own)])
    experiences = []
    for group, is_valid in zip(groups, valid, strict=True):
        if is_valid:
            sampled, annotation = next(mine)
            experiences.append(
                Experience(scored=group, advantages=sampled, annotation_advantage=annotation)
            )
    return experiences, tuple(sorted({name for _, names in everywhere for name in names}))


def _all_components(group: ScoredGroup) -> dict[str, RewardComponent]:
    """Return the components of the group's answers [n], or [n + 1] with its annotation last."""
    if group.annotation is None:
        return dict(group.components)
    return {
        name: one._replace(values=np.append(one.values, group.annotation.rewards[name]))
        for name, one in group.components.items()
    }


def _advantages(
    groups: Sequence[dict[str, RewardComponent]], cfg: config.Algorithm
) -> list[tuple[NDArray[np.float64], float]]:
    """Return each group's advantages [n], and its annotation's (0 without one)."""
    if cfg.ground_truth_answer == "none":
        return [(values, 0.0) for values in advantages(groups, cfg)]
    return [(one.sampled, one.truth) for one in advantages_with_annotation(groups, cfg)]
