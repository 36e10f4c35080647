"""RL algorithms: advantages from rewards, and policy losses per token.

A new algorithm is one file, which names its paper, one row in ALGORITHMS, and its preset in
`config/algorithm_presets.py`. docs/algorithms.md compares the rows.

A loss stays per token here. The trainer sums token losses with token weights, so the split into
micro-batches and ranks does not change the loss (`normalisation: temporal_r1` is the exception).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from megatron_vrl import config
from megatron_vrl.algorithms import (
    cispo,
    combine,
    dapo,
    dr_grpo,
    ground_truth,
    grpo,
    gspo,
    reinforce_plus_plus,
    rloo,
)
from megatron_vrl.algorithms.groups import has_signal
from megatron_vrl.algorithms.kl import kl_penalty
from megatron_vrl.algorithms.rollout_correction import rollout_is_weight
from megatron_vrl.algorithms.tokens import Tokens, local_sequence_sum
from megatron_vrl.types import RewardComponent, total_reward

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "Tokens",
    "advantages",
    "advantages_with_annotation",
    "has_signal",
    "kl_penalty",
    "local_sequence_sum",
    "rollout_is_weight",
    "token_loss",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """One algorithm: its advantage rule and its policy loss."""

    advantages: Callable[[Sequence[NDArray[np.float64]]], list[NDArray[np.float64]]]
    """Function from rewards [n] of every group of the step, over all ranks, to advantages of the
    same shapes."""
    policy_loss: Callable[[Tokens, config.Algorithm], tuple[Tensor, dict[str, Tensor]]]
    """Function (tokens, config) -> loss [N] without KL and entropy terms, and metrics {name:
    [N]}."""


ALGORITHMS: dict[str, Algorithm] = {
    "grpo": Algorithm(advantages=grpo.advantages, policy_loss=grpo.policy_loss),
    "dr_grpo": Algorithm(advantages=dr_grpo.advantages, policy_loss=dr_grpo.policy_loss),
    "dapo": Algorithm(advantages=dapo.advantages, policy_loss=dapo.policy_loss),
    "gspo": Algorithm(advantages=gspo.advantages, policy_loss=gspo.policy_loss),
    "cispo": Algorithm(advantages=cispo.advantages, policy_loss=cispo.policy_loss),
    "rloo": Algorithm(advantages=rloo.advantages, policy_loss=rloo.policy_loss),
    "reinforce_plus_plus": Algorithm(
        advantages=reinforce_plus_plus.advantages, policy_loss=reinforce_plus_plus.policy_loss
    ),
    "reinforce_plus_plus_baseline": Algorithm(
        advantages=reinforce_plus_plus.advantages_with_baseline,
        policy_loss=reinforce_plus_plus.policy_loss,
    ),
}


def advantages(
    groups: Sequence[Mapping[str, RewardComponent]], cfg: config.Algorithm
) -> list[NDArray[np.float64]]:
    """Return advantages [n] of each group from the reward components of every group of the step.

    `groups` must cover all ranks. Raise ValueError for a non-finite reward; callers remove such
    groups first.
    """
    combine.check_finite(groups)
    rule = ALGORITHMS[cfg.name].advantages
    if cfg.combine == "normalise_then_sum":
        return combine.normalise_then_sum(groups, rule)
    return combine.sum_then_normalise(groups, rule)


def advantages_with_annotation(
    groups: Sequence[Mapping[str, RewardComponent]], cfg: config.Algorithm
) -> list[ground_truth.WithTruth]:
    """Return the advantages of each group [n + 1], whose last answer is the annotation.

    See `advantages`; `cfg.ground_truth_answer` names the rule, and the annotation's advantage is
    multiplied by `cfg.ground_truth_weight`.
    """
    combine.check_finite(groups)
    join = ground_truth.RULES[cfg.ground_truth_answer]
    totals = [total_reward(components) for components in groups]
    return [
        replace(one, truth=cfg.ground_truth_weight * one.truth)
        for one in join(totals, ALGORITHMS[cfg.name].advantages)
    ]


def token_loss(tokens: Tokens, cfg: config.Algorithm) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of each token [N], and metrics {name: [N]} without gradient.

    The loss is policy loss x rollout-correction weight + `kl` x KL - `entropy` x entropy. A metric
    is reduced over tokens by its mean, or by its maximum if its name ends in "_max".
    """
    loss, metrics = ALGORITHMS[cfg.name].policy_loss(tokens, cfg)
    if cfg.rollout_is != "none":
        weight, cut = rollout_is_weight(tokens, cfg)
        loss = loss * weight
        metrics |= {"rollout/is_weight": weight, "rollout/is_cut_fraction": cut}
    logprob = tokens.logprob.detach()
    gap = (tokens.old_logprob - tokens.engine_logprob).abs()  # same weights, two implementations
    metrics |= {"actor/policy_loss": loss.detach(), "actor/entropy": tokens.entropy.detach()}
    metrics |= {
        "actor/ppo_kl": tokens.old_logprob - logprob
    }  # k1 estimate of the change since sampling
    metrics |= {"rollout/logprob_gap": gap, "rollout/logprob_gap_max": gap}
    if cfg.kl > 0 and cfg.kl_in == "loss":
        assert tokens.reference is not None, "a KL term needs reference log-probs"
        kl = kl_penalty(tokens.logprob, tokens.reference, cfg)
        loss = loss + cfg.kl * kl
        metrics["actor/kl"] = kl.detach()
    if cfg.entropy > 0:
        loss = loss - cfg.entropy * tokens.entropy
    return loss, metrics
