"""Probability ratio and clipped policy loss of PPO (arXiv 1707.06347, equation 7).

On policy the ratio is 1 and the gradient is that of REINFORCE. Not implemented: the second bound
for negative advantages ("dual clip", arXiv 1912.09729).
"""

import torch
from torch import Tensor

from megatron_vrl.algorithms.tokens import Tokens
from megatron_vrl.config import Algorithm

# exp(20) is finite in float32 and far outside every clip bound.
LOG_RATIO_LIMIT = 20.0


def exp(log_ratio: Tensor) -> Tensor:
    """Return exp(log_ratio), limited so that it is finite in float32."""
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def policy_loss(tokens: Tokens, cfg: Algorithm) -> tuple[Tensor, dict[str, Tensor]]:
    """Return max(-A r, -A clip(r)) of each token, r = probability / old probability, and
    metrics."""
    return clipped_loss(exp(tokens.logprob - tokens.old_logprob), tokens.advantage, cfg)


def clipped_loss(
    ratio: Tensor, advantage: Tensor, cfg: Algorithm
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the larger of the losses with the plain and the clipped ratio [N], and
    `clip_fraction`."""
    plain = -advantage * ratio
    bounded = -advantage * ratio.clamp(1.0 - cfg.clip, 1.0 + cfg.clip_high)
    clip_fraction = (bounded > plain).to(plain.dtype)
    return torch.maximum(plain, bounded), {"actor/clip_fraction": clip_fraction}
