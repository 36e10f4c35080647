"""Decoupled clip and dynamic sampling (DAPO, arXiv 2503.14476).

Advantage and loss are GRPO's; the rest are keys: an upper clip bound of its own (equation 10), new
prompts for groups without a gradient (11), a mean over tokens (12), no KL term, answers that were
cut off left out of the loss (section 3.4), and the length penalty of rewards/overlong.py (13).

The deviation is unbiased here, of which the paper says nothing. Its penalty reaches over the last
fifth of the longest answer; since that is a count of tokens, `overlong_buffer` stays with the user.
The paper refills without a limit; ten rounds are common in scripts built on its recipe.
"""

from megatron_vrl.algorithms.grpo import advantages
from megatron_vrl.algorithms.ratio import policy_loss

__all__ = ["advantages", "policy_loss"]
