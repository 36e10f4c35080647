"""GRPO done right (Dr. GRPO, arXiv 2503.20783, section 3.2 and figure 1).

GRPO without its two divisions: the advantage is the distance from the group's mean, not in units of
its deviation, which favours questions that are too easy or too hard; and token losses are divided
by a constant, not by the answer's length, which favours long wrong answers. The loss is PPO's. The
constant is the longest answer allowed, as in the paper's code.
"""

from megatron_vrl.algorithms.groups import centred, per_group
from megatron_vrl.algorithms.ratio import policy_loss

__all__ = ["advantages", "policy_loss"]

advantages = per_group(centred)
