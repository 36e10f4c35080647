"""REINFORCE++ and its variant with a baseline (arXiv 2501.03262).

Advantage: the reward minus the mean over the whole step, in units of the deviation over the whole
step. The variant, for several answers per prompt, first subtracts the group's mean; then the mean
over the step is 0 already. Both use PPO's clipped ratio: on policy the gradient is that of
REINFORCE. KL: k1 in the reward; in the variant k2 in the loss.

What differs: mean and deviation are taken over answers, in the authors' code (OpenRLHF) over
tokens, so that there long answers count more; and the KL in the reward is the sum over the answer,
there the sum from each token on. Equal rewards in the whole step give exactly 0, and in the variant
equal rewards in a group. A whole step must be at hand: the caller gathers it.
"""

from collections.abc import Sequence

import numpy as np

from megatron_vrl.algorithms.groups import Rewards, centred
from megatron_vrl.algorithms.ratio import policy_loss

__all__ = ["advantages", "advantages_with_baseline", "policy_loss"]

EPSILON = 1e-6


def advantages(groups: Sequence[Rewards]) -> list[Rewards]:
    """Rewards [n] of every group of the step -> advantages [n]."""
    if not groups:
        return []
    rewards = np.concatenate(groups)
    if rewards.min() == rewards.max():  # the mean of equal rewards may be off by a rounding
        return [np.zeros_like(group) for group in groups]
    mean, deviation = rewards.mean(), rewards.std()
    return [(group - mean) / (deviation + EPSILON) for group in groups]


def advantages_with_baseline(groups: Sequence[Rewards]) -> list[Rewards]:
    """Rewards [n] of every group of the step -> advantages [n]. A group of one has baseline 0."""
    if not groups:
        return []
    distances = [centred(group) for group in groups]
    deviation = np.concatenate(distances).std()
    return [distance / (deviation + EPSILON) for distance in distances]
