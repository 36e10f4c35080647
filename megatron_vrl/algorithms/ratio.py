"""The probability ratio, and the clipped policy loss of PPO (arXiv 1707.06347, equation 7).

Used with any advantage. On policy the ratio is 1 and the gradient that of REINFORCE. Left out: the
second bound for negative advantages ("dual clip", arXiv 1912.09729).
"""

import torch
from torch import Tensor

from megatron_vrl.algorithms.tokens import Tokens
from megatron_vrl.config import Algorithm

# exp stays finite in float32. At +-20 every bound that follows is passed by far.
LOG_RATIO_LIMIT = 20.0


def exp(log_ratio: Tensor) -> Tensor:
    """The ratio, finite in float32 for any log ratio."""
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def policy_loss(tokens: Tokens, cfg: Algorithm) -> tuple[Tensor, dict[str, Tensor]]:
    """max(-A r, -A clip(r)) of each token, r = probability / old probability."""
    return clipped(exp(tokens.logprob - tokens.old_logprob), tokens.advantage, cfg)


def clipped(ratio: Tensor, advantage: Tensor, cfg: Algorithm) -> tuple[Tensor, dict[str, Tensor]]:
    """The worse of the loss with the ratio as it is and clipped; all [N]."""
    plain = -advantage * ratio
    bounded = -advantage * ratio.clamp(1.0 - cfg.clip, 1.0 + cfg.clip_high)
    clip_fraction = (bounded > plain).to(plain.dtype)
    return torch.maximum(plain, bounded), {"clip_fraction": clip_fraction}
