"""Weights for the gap between the engine that sampled and the trainer that learns.

Both hold the same weights and still give a token different probabilities, so training is off policy
unnoticed. The policy loss is weighted with w = old trainer probability / engine probability, a
constant for the gradient. clip: min(w, limit), truncated importance sampling (TIS; Yao et al.,
"Your efficient RL framework secretly brings you off-policy RL training", 2025). mask: w inside
[1 / limit, limit] and else 0, as IcePop does (Ring-1T, arXiv 2510.18855), whose two bounds are free
and not each other's inverse.

token: w of each token, biased but steady. sequence: w of the answer, the product over its tokens,
without bias before it is truncated.
"""

import math

from torch import Tensor

from megatron_vrl.algorithms.ratio import exp
from megatron_vrl.algorithms.tokens import Tokens
from megatron_vrl.config import Algorithm


def rollout_is_weight(tokens: Tokens, cfg: Algorithm) -> tuple[Tensor, Tensor]:
    """Weight of each token, [N], and where it was clipped or masked (1 or 0); no gradient."""
    log_weight = (tokens.old_logprob - tokens.engine_logprob).detach()
    if cfg.rollout_is == "sequence":
        log_weight = tokens.sequence_sum(log_weight)
    weight, bound = exp(log_weight), math.log(cfg.rollout_is_threshold)
    if cfg.rollout_is_mode == "clip":
        return weight.clamp(max=cfg.rollout_is_threshold), (log_weight > bound).to(weight.dtype)
    cut = (log_weight.abs() > bound).to(weight.dtype)
    return weight * (1.0 - cut), cut
