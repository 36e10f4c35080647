"""How rewards become a loss. A new algorithm is one file (with its paper) and one row here, and its
name and published values in algorithm_values.py.

Losses stay per token. Who calls sums them with token weights, so that how the tokens are cut into
micro-batches and ranks cannot change the loss (or does, where the released rule is asked for).
docs/algorithms.md compares the rows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from megatron_vrl import config
from megatron_vrl.algorithms import (
    cispo,
    combine,
    dapo,
    dr_grpo,
    grpo,
    gspo,
    reinforce_plus_plus,
    rloo,
)
from megatron_vrl.algorithms.groups import has_signal
from megatron_vrl.algorithms.kl import kl_penalty
from megatron_vrl.algorithms.rollout_correction import rollout_is_weight
from megatron_vrl.algorithms.tokens import Tokens, local_sequence_sum
from megatron_vrl.types import RewardComponent

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "Tokens",
    "advantages",
    "has_signal",
    "kl_penalty",
    "local_sequence_sum",
    "rollout_is_weight",
    "token_loss",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    advantages: Callable[[Sequence[NDArray[np.float64]]], list[NDArray[np.float64]]]
    """Rewards [n] of every group of the whole step (all ranks) -> advantages, same shapes."""
    policy_loss: Callable[[Tokens, config.Algorithm], tuple[Tensor, dict[str, Tensor]]]
    """Loss [N] without KL and entropy terms, and metrics {name: [N]}."""


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
    """Reward components of every group of the step, over all ranks -> advantages [n] of each group.

    Raises ValueError for a reward that is not finite: callers leave those out before.
    """
    combine.check_finite(groups)
    rule = ALGORITHMS[cfg.name].advantages
    if cfg.combine == "normalise_then_sum":
        return combine.normalise_then_sum(groups, rule)
    return combine.sum_then_normalise(groups, rule)


def token_loss(tokens: Tokens, cfg: config.Algorithm) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of each token, [N], and what to log of it, {name: [N]} without gradient.

    Policy loss x importance weight + kl x KL - entropy x entropy. A metric's mean over tokens is
    meant, or its maximum if its name ends in "_max".
    """
    loss, metrics = ALGORITHMS[cfg.name].policy_loss(tokens, cfg)
    if cfg.rollout_is != "none":
        weight, cut = rollout_is_weight(tokens, cfg)
        loss = loss * weight
        metrics |= {"rollout_is_weight": weight, "rollout_is_cut": cut}
    logprob = tokens.logprob.detach()
    gap = (tokens.old_logprob - tokens.engine_logprob).abs()  # of one and the same policy
    metrics |= {"policy_loss": loss.detach(), "entropy": tokens.entropy.detach()}
    metrics |= {"approx_kl": tokens.old_logprob - logprob}  # k1, of the step since sampling
    metrics |= {"logprob_gap": gap, "logprob_gap_max": gap}
    if cfg.kl > 0 and cfg.kl_in == "loss":
        assert tokens.reference is not None, "a KL term needs the reference's log-probs"
        kl = kl_penalty(tokens.logprob, tokens.reference, cfg)
        loss = loss + cfg.kl * kl
        metrics["ref_kl"] = kl.detach()
    if cfg.entropy > 0:
        loss = loss - cfg.entropy * tokens.entropy
    return loss, metrics
