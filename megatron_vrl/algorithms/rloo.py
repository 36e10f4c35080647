"""REINFORCE with a leave-one-out baseline (RLOO, arXiv 2402.14740).

Advantage: the reward minus the mean reward of the group's other answers, which does not depend on
the answer and so adds no bias. An answer is one action: its loss is the sum over its tokens, and
the KL term (k1, summed over the answer) is part of its reward. A group of one keeps its reward.

The paper has no ratio. Here the loss is PPO's, as in common frameworks: on policy the gradient is
that of REINFORCE, and with several updates per batch the ratio is clipped.
"""

from megatron_vrl.algorithms.groups import Rewards, centred, per_group
from megatron_vrl.algorithms.ratio import policy_loss

__all__ = ["advantages", "policy_loss"]


def of_group(rewards: Rewards) -> Rewards:
    """Rewards [n] of one group -> advantages [n]: r - (sum - r) / (n - 1) is the centred reward
    times n / (n - 1)."""
    n = len(rewards)
    return centred(rewards) * (n / max(n - 1, 1))


advantages = per_group(of_group)
