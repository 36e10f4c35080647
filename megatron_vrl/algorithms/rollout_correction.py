"""Rollout correction: importance weights for the mismatch between rollout engine and trainer.

Engine and trainer hold the same weights and still compute different probabilities, so training is
slightly off policy. The policy loss is multiplied by w = old trainer probability / engine
probability, a constant for the gradient.

- clip: min(w, threshold), truncated importance sampling (TIS; Yao et al., "Your efficient RL
  framework secretly brings you off-policy RL training", 2025);
- mask: w inside [1 / threshold, threshold], else 0, as IcePop (Ring-1T, arXiv 2510.18855), whose
  two bounds are independent of each other;
- token: w of each token, biased with low variance;
- sequence: w of the answer, the product over its tokens, unbiased before truncation.
"""

import math

from torch import Tensor

from megatron_vrl.algorithms.ratio import exp
from megatron_vrl.algorithms.tokens import Tokens
from megatron_vrl.config import Algorithm


def rollout_is_weight(tokens: Tokens, cfg: Algorithm) -> tuple[Tensor, Tensor]:
    """Return the weight of each token [N], and 1 or 0 [N] for clipped or masked tokens; no
    gradient."""
    log_weight = (tokens.old_logprob - tokens.engine_logprob).detach()
    if cfg.rollout_is == "sequence":
        log_weight = tokens.sequence_sum(log_weight)
    weight, bound = exp(log_weight), math.log(cfg.rollout_is_threshold)
    if cfg.rollout_is_mode == "clip":
        return weight.clamp(max=cfg.rollout_is_threshold), (log_weight > bound).to(weight.dtype)
    cut = (log_weight.abs() > bound).to(weight.dtype)
    return weight * (1.0 - cut), cut
