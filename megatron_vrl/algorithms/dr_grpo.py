"""Dr. GRPO: GRPO done right (arXiv 2503.20783, section 3.2 and figure 1).

Dr. GRPO removes two divisions of GRPO. The advantage is the distance from the group's mean, without
division by the standard deviation, which favours questions that are too easy or too hard. Token
losses are divided by a constant, not by the answer's length, which favours long wrong answers. The
constant is the longest answer allowed, as in the paper's code. The loss is PPO's.
"""

from megatron_vrl.algorithms.groups import centred, per_group
from megatron_vrl.algorithms.ratio import policy_loss

__all__ = ["advantages", "policy_loss"]

advantages = per_group(centred)
