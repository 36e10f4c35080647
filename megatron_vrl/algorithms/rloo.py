"""RLOO: REINFORCE with a leave-one-out baseline (arXiv 2402.14740).

Advantage: the reward minus the mean reward of the group's other answers. This baseline does not
depend on the answer, so it adds no bias. An answer is one action: its loss is the sum over its
tokens, and the KL term (k1, summed over the answer) is part of its reward. A group of one keeps its
reward.

The paper has no ratio. This loss is PPO's, as in common frameworks: on policy its gradient is that
of REINFORCE, and with several updates per batch the ratio is clipped.
"""

from megatron_vrl.algorithms.groups import Rewards, centred, per_group
from megatron_vrl.algorithms.ratio import policy_loss

__all__ = ["advantages", "policy_loss"]


def group_advantages(rewards: Rewards) -> Rewards:
    """Return advantages [n] of one group's rewards [n]: r - (sum - r) / (n - 1).

    This equals the centred reward times n / (n - 1).
    """
    n = len(rewards)
    return centred(rewards) * (n / max(n - 1, 1))


advantages = per_group(group_advantages)
