"""A step's experience: prompts rolled out, answers scored, groups that teach nothing left out.

A group teaches nothing if all its advantages are 0. `algorithm.dynamic_sampling_rounds` asks for
more prompts in their place (the dynamic sampling of DAPO, arXiv 2503.14476); as many as are
missing, where DAPO samples whole batches and keeps a surplus. A group with a reward that is no
number is never trained on: it is left out, named and counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from megatron_vrl.algorithms import Part, advantages, has_signal, kl_penalty, overlong_penalty
from megatron_vrl.batching.pack import Answer, Group
from megatron_vrl.context import RunContext
from megatron_vrl.models.logprob_head import Distribution
from megatron_vrl.parallel.mesh import gather_objects, raise_on_all_ranks, world_axis
from megatron_vrl.policy.micro_batches import plan_batches
from megatron_vrl.rewards import weights_of
from megatron_vrl.trainer.rollout_queue import RolloutQueue
from megatron_vrl.types import Experience, ScoredGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutBatch:
    """What a step learns from; lists are this replica's, the rest is the same on every rank."""

    groups: list[ScoredGroup]  # every scored group
    experiences: list[Experience]  # of those whose rewards are numbers
    kept: list[Experience]  # those to train on
    dummy_group: Group  # a group of this replica that keeps a rank without work busy
    invalid: tuple[str, ...]  # samples with a reward that is no number
    rounds: int
    failures: dict[str, list[str]]  # reward function of the user's -> what its failed calls did


def collect_rollouts(ctx: RunContext, rollout_queue: RolloutQueue) -> RolloutBatch:
    """Every rank calls it."""
    cfg = ctx.cfg
    groups: list[ScoredGroup] = []
    rewards: list[dict[str, Part]] = []
    missing, rounds, kept = cfg.rollout.prompts_per_step, 0, list[Experience]()
    while missing > 0 and rounds <= cfg.algorithm.dynamic_sampling_rounds:
        new = _answered(ctx, rollout_queue, missing)
        groups += new
        with ctx.clock("score"):
            rewards += _rewards(ctx, new, dummy_group=groups[0])
            experiences, invalid = _with_advantages(ctx, groups, rewards)
        drops = cfg.algorithm.drop_zero_variance_groups
        kept = [e for e in experiences if not drops or has_signal(e.advantages)]
        everywhere = sum(gather_objects(ctx.mesh.data, len(kept)))
        missing = cfg.rollout.prompts_per_step - everywhere
        rounds += 1
    dummy_group = to_train(
        Experience(scored=groups[0], advantages=np.zeros(len(groups[0].rewards)))
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
    """Of all ranks."""
    joined: dict[str, list[str]] = {}
    for of_rank in gather_objects(world_axis(ctx.mesh), ctx.reward_manager.take_failures()):
        for name, failed in of_rank.items():
            joined.setdefault(name, []).extend(failed)
    return joined


def to_train(experience: Experience, mask_truncated: bool = False) -> Group:
    """The group as it is packed. The advantages are those of all its answers."""
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
    return Group(prompt=scored.prompt, answers=tuple(answers))


def sampled_distribution(ctx: RunContext) -> Distribution:
    """Which the engine samples from, and so the trainer's log-probs are of."""
    return Distribution(
        temperature=ctx.cfg.rollout.temperature, banned=ctx.rollout_manager.banned_token_ids
    )


def _answered(ctx: RunContext, rollout_queue: RolloutQueue, num: int) -> list[ScoredGroup]:
    """Scored groups of this rank's share of `num` samples and of its replica's other ranks."""
    answered = rollout_queue.take(num)
    samples = [sample for sample, _, _ in answered]
    prompts = [prompt for _, prompt, _ in answered]
    with ctx.clock("score"):
        with raise_on_all_ranks(ctx.mesh):
            scored = ctx.reward_manager.groups(
                samples, prompts, [answers for _, _, answers in answered]
            )
        return ctx.gather_replica(scored)


def _rewards(
    ctx: RunContext, groups: Sequence[ScoredGroup], dummy_group: ScoredGroup
) -> list[dict[str, Part]]:
    """What each group's advantages are made of. Every rank calls it, with the groups of a round."""
    rewards = [_reward_parts(ctx, group) for group in groups]
    cfg = ctx.cfg.algorithm
    if cfg.kl > 0 and cfg.kl_in == "reward":
        for of_group, kl in zip(rewards, _kl_of_groups(ctx, groups, dummy_group), strict=True):
            of_group["kl"] = Part(values=-kl, weight=cfg.kl)
    return rewards


def _with_advantages(
    ctx: RunContext, groups: Sequence[ScoredGroup], rewards: Sequence[dict[str, Part]]
) -> tuple[list[Experience], tuple[str, ...]]:
    """Experiences of this replica's valid groups, and the ids of all ranks' invalid ones.

    Advantages may depend on the whole step, so the data ranks tell each other their rewards.
    """
    valid = [all(np.isfinite(part.values).all() for part in r.values()) for r in rewards]
    wrong = [g.sample.id for g, is_valid in zip(groups, valid, strict=True) if not is_valid]
    own = [r for r, is_valid in zip(rewards, valid, strict=True) if is_valid]
    everywhere = gather_objects(ctx.mesh.data, (own, wrong))
    before = sum(len(of_rank) for of_rank, _ in everywhere[: ctx.mesh.data.rank])
    of_all = [r for of_rank, _ in everywhere for r in of_rank]
    of_step = advantages(of_all, ctx.cfg.algorithm) if of_all else []
    mine = iter(of_step[before : before + len(own)])
    experiences = [
        Experience(scored=group, advantages=next(mine))
        for group, is_valid in zip(groups, valid, strict=True)
        if is_valid
    ]
    return experiences, tuple(sorted({name for _, names in everywhere for name in names}))


def _reward_parts(ctx: RunContext, group: ScoredGroup) -> dict[str, Part]:
    cfg = ctx.cfg
    weights = weights_of(cfg.rewards)[group.sample.task]
    rewards = {
        name: Part(values=values, weight=weights.get(name, 0.0))
        for name, values in group.parts.items()
    }
    if cfg.algorithm.overlong_buffer:
        lengths = np.array([len(rollout.token_ids) for rollout in group.rollouts])
        limit, buffer = cfg.rollout.max_response_tokens, cfg.algorithm.overlong_buffer
        rewards["overlong"] = Part(
            values=overlong_penalty(lengths, limit, buffer), weight=cfg.algorithm.overlong_penalty
        )
    return rewards


def _kl_of_groups(
    ctx: RunContext, groups: Sequence[ScoredGroup], dummy_group: ScoredGroup
) -> list[NDArray[np.float64]]:
    """KL to the reference [n] of each group's answers, summed over tokens.

    The policy's log-probs are the engine's, which holds the same weights: no pass of ours.
    """
    to_score = [
        _numbered(group, first) for first, group in zip(_starts(groups), groups, strict=True)
    ]
    batches = plan_batches(to_score, _numbered(dummy_group, 0), ctx.cfg.batch, ctx.mesh)
    sums = np.zeros(sum(len(group.rollouts) for group in groups))
    references = ctx.policy.reference_logprobs(batches, sampled_distribution(ctx))
    for batch, reference in zip(batches, references, strict=True):
        if reference is not None and ctx.mesh.tensor.rank == 0:  # tensor ranks hold the same
            engine = reference.new_tensor(batch.engine_logprob)
            penalty = kl_penalty(engine, reference, ctx.cfg.algorithm).double().cpu().numpy()
            numbers = np.array([int(name) for name in batch.answer_id])[batch.sequence]
            counted = batch.weight > 0  # not those of a filler
            np.add.at(sums, numbers[counted], penalty[counted])
    total = sum(gather_objects(ctx.mesh.model, sums))  # context ranks hold parts of an answer
    return np.split(total, _starts(groups)[1:]) if groups else []


def _starts(groups: Sequence[ScoredGroup]) -> list[int]:
    """Number of each group's first answer."""
    counts = np.array([len(group.rollouts) for group in groups], dtype=np.int64)
    return [int(start) for start in np.cumsum(counts) - counts]


def _numbered(group: ScoredGroup, first: int) -> Group:
    """To be scored only: its answers are called by their numbers."""
    whole = to_train(Experience(scored=group, advantages=np.zeros(len(group.rollouts))))
    answers = [replace(a, id=str(first + i)) for i, a in enumerate(whole.answers)]
    return replace(whole, answers=tuple(answers))
