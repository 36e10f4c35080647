"""DAPO: decoupled clip and dynamic sampling policy optimisation (arXiv 2503.14476).

Advantage and loss are GRPO's. The rest is configuration: a separate upper clip bound (equation 10),
dynamic sampling in place of zero-variance groups (11), token mean (12), no KL term, masked
truncated answers (section 3.4), and the length penalty of this file (13).

The paper does not say which standard deviation it uses; here it is the unbiased one. The paper's
penalty covers the last fifth of the longest answer. `overlong_buffer` is a number of tokens, so the
preset leaves it to the user. The paper samples without a limit; the preset allows ten rounds in
all, as common scripts do.
"""

import numpy as np
from numpy.typing import NDArray

from megatron_vrl.algorithms.grpo import advantages
from megatron_vrl.algorithms.ratio import policy_loss

__all__ = ["advantages", "overlong_penalty", "policy_loss"]


def overlong_penalty(lengths: NDArray[np.int64], limit: int, buffer: int) -> NDArray[np.float64]:
    """Return the length penalty [n] of answers with `lengths` tokens.

    The penalty is 0 up to `buffer` tokens before `limit` and falls linearly to -1 at `limit`. It is
    0 everywhere if `buffer` is 0. Example: limit 512, buffer 128: 384 tokens give 0, 448 give -0.5.
    """
    if buffer == 0:
        return np.zeros(len(lengths))
    return np.clip((limit - buffer - lengths) / buffer, -1.0, 0.0)
