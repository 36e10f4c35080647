"""Group relative policy optimisation (GRPO, arXiv 2402.03300), as Temporal-R1 released it.

Advantage (section 4.1.2): the reward's distance from its group's mean in units of the group's
standard deviation, the same for every token of an answer. Loss (equation 3): the clipped ratio of
PPO, plus a KL term to the frozen first model (k3 estimator, equation 4).

As released and unlike the paper: an entropy bonus, and 0.01 instead of 0.04 for the KL term. The
paper takes the mean over answers of the mean over tokens (`normalisation: sequence_mean`).
"""

import numpy as np

from megatron_vrl.algorithms.groups import Rewards, centred, per_group
from megatron_vrl.algorithms.ratio import policy_loss

__all__ = ["advantages", "policy_loss"]

EPSILON = 1e-6


def of_group(rewards: Rewards) -> Rewards:
    """Rewards [n] of one group -> advantages [n].

    Unbiased standard deviation. Equal rewards give exactly 0. A group of one keeps its reward:
    the released rule takes mean 0 and deviation 1 there.
    """
    deviation = rewards.std(ddof=1) if len(rewards) > 1 else np.float64(1.0)
    return centred(rewards) / (deviation + EPSILON)


advantages = per_group(of_group)
