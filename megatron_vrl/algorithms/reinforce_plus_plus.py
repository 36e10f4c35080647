"""REINFORCE++ and its variant with a baseline (arXiv 2501.03262).

Advantage: the reward minus the mean over the step, divided by the standard deviation over the step.
The variant for several answers per prompt subtracts the group's mean instead; the mean over the
step is then 0. Both use PPO's clipped ratio. KL: k1 in the reward; the variant has k2 in the loss.

Differences from the authors' code (OpenRLHF): mean and deviation are taken over answers instead of
tokens, so long answers do not count more. The KL in the reward is the sum over the answer instead
of the sum from each token on. Equal rewards in the whole step give exactly 0, and in the variant
equal rewards in a group do too. The caller must gather the groups of the whole step.
"""

from collections.abc import Sequence

import numpy as np

from megatron_vrl.algorithms.groups import Rewards, centred
from megatron_vrl.algorithms.ratio import policy_loss

__all__ = ["advantages", "advantages_with_baseline", "policy_loss"]

EPSILON = 1e-6


def advantages(groups: Sequence[Rewards]) -> list[Rewards]:
    """Return advantages [n] of each group from the rewards [n] of every group of the step."""
    if not groups:
        return []
    rewards = np.concatenate(groups)
    if rewards.min() == rewards.max():  # rounding can move the mean of equal rewards
        return [np.zeros_like(group) for group in groups]
    mean, deviation = rewards.mean(), rewards.std()
    return [(group - mean) / (deviation + EPSILON) for group in groups]


def advantages_with_baseline(groups: Sequence[Rewards]) -> list[Rewards]:
    """Return advantages [n] of each group, with the group's mean as baseline; 0 for a group of
    one."""
    if not groups:
        return []
    distances = [centred(group) for group in groups]
    deviation = np.concatenate(distances).std()
    return [distance / (deviation + EPSILON) for distance in distances]
