"""DAPO: decoupled clip and dynamic sampling policy optimisation (arXiv 2503.14476).

Advantage and loss are GRPO's. The rest is configuration: a separate upper clip bound (equation 10),
dynamic sampling in place of zero-variance groups (11), token mean (12), no KL term, masked
truncated answers (section 3.4), and the length penalty of rewards/overlong.py (13).

The paper does not say which standard deviation it uses; here it is the unbiased one. The paper's
penalty covers the last fifth of the longest answer. `overlong_buffer` is a number of tokens, so the
preset leaves it to the user. The paper samples without a limit; the preset allows ten rounds in
all, as common scripts do.
"""

from megatron_vrl.algorithms.grpo import advantages
from megatron_vrl.algorithms.ratio import policy_loss

__all__ = ["advantages", "policy_loss"]
