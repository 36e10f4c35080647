"""GRPO: group relative policy optimisation (arXiv 2402.03300), as released by Temporal-R1.

Advantage (section 4.1.2): the reward minus the group's mean, divided by the group's standard
deviation; all tokens of an answer share it. Loss (equation 3): PPO's clipped ratio, plus a KL term
to the frozen initial model (k3 estimator, equation 4).

Differences from the paper, as released: an entropy bonus, and a KL coefficient of 0.01 instead of
0.04. The paper averages tokens within answers, then answers (`normalisation: sequence_mean`).
"""

import numpy as np

from megatron_vrl.algorithms.groups import Rewards, centred, per_group
from megatron_vrl.algorithms.ratio import policy_loss

__all__ = ["advantages", "policy_loss"]

EPSILON = 1e-6


def group_advantages(rewards: Rewards) -> Rewards:
    """Return advantages [n] of one group's rewards [n].

    The standard deviation is unbiased. Equal rewards give exactly 0. A group of one keeps its
    reward: the released code uses mean 0 and deviation 1 there. Example: rewards 0, 1, 1 give about
    -1.15, 0.58, 0.58.
    """
    deviation = rewards.std(ddof=1) if len(rewards) > 1 else np.float64(1.0)
    return centred(rewards) / (deviation + EPSILON)


advantages = per_group(group_advantages)
