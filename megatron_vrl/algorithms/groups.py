"""What the advantages of several algorithms share."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Rewards = NDArray[np.float64]  # [n] of one group, whose answers share a prompt
Advantages = Callable[[Sequence[Rewards]], list[Rewards]]  # of every group of the step


def per_group(rule: Callable[[Rewards], Rewards]) -> Advantages:
    """`rule`, of one group, for all groups of the step."""
    return lambda groups: [rule(rewards) for rewards in groups]


def centred(rewards: Rewards) -> Rewards:
    """Distance from the group's mean; exactly 0 for equal rewards.

    A group of one keeps its reward: nothing is there to compare it with, so its baseline is 0.
    """
    if len(rewards) == 1:
        return rewards.copy()
    if rewards.min() == rewards.max():  # the mean of equal rewards may be off by a rounding
        return np.zeros_like(rewards)
    distance: NDArray[np.float64] = rewards - rewards.mean()
    return distance


def has_signal(advantages: Rewards) -> bool:
    """Whether a group has a policy gradient."""
    return bool(np.any(advantages != 0.0))
