"""Functions on the rewards of a group that several algorithms use."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Rewards = NDArray[np.float64]  # [n] rewards of one group, the answers to one prompt
Advantages = Callable[[Sequence[Rewards]], list[Rewards]]  # input: every group of the step


def per_group(rule: Callable[[Rewards], Rewards]) -> Advantages:
    """Return the advantage function that applies `rule` to each group separately."""
    return lambda groups: [rule(rewards) for rewards in groups]


def centred(rewards: Rewards) -> Rewards:
    """Return rewards minus the group's mean; exactly 0 if all rewards are equal.

    A group of one keeps its reward: its baseline is 0, since it has no other answer to compare
    with.
    """
    if len(rewards) == 1:
        return rewards.copy()
    if rewards.min() == rewards.max():  # rounding can move the mean of equal rewards
        return np.zeros_like(rewards)
    distance: NDArray[np.float64] = rewards - rewards.mean()
    return distance


def has_signal(advantages: Rewards) -> bool:
    """Return whether any advantage is non-zero, that is, whether the group has a policy
    gradient."""
    return bool(np.any(advantages != 0.0))
