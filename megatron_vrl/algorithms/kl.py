"""Estimators of KL(policy || reference) from tokens that the policy sampled.

Source: Schulman, "Approximating KL divergence" (2020). With d = log policy - log reference:

- k1 = d: unbiased, of either sign; its gradient is 0 on average;
- k2 = d^2 / 2: biased, low variance; its gradient is that of KL(policy || reference);
- k3 = exp(-d) + d - 1: unbiased and never negative; its gradient is that of KL(reference ||
  policy).

k3 is limited to 10 per token, as in Temporal-R1's released code.
"""

import torch
from torch import Tensor

from megatron_vrl.algorithms.ratio import LOG_RATIO_LIMIT
from megatron_vrl.config import Algorithm

K3_LIMIT = 10.0


def kl_penalty(policy_logprob: Tensor, reference: Tensor, cfg: Algorithm) -> Tensor:
    """Return the KL estimate of each token [N], before multiplication by `cfg.kl`.

    `cfg.kl_estimator` selects the estimator. The loss and the KL in the reward both use this
    function.
    """
    if cfg.kl_estimator == "k1":
        return policy_logprob - reference
    if cfg.kl_estimator == "k2":
        return 0.5 * (policy_logprob - reference).square()
    return k3(policy_logprob, reference)


def k3(policy_logprob: Tensor, reference: Tensor) -> Tensor:
    """Return the k3 estimate [N]: never negative, and exactly 0 for equal policies."""
    log_ratio = (reference - policy_logprob).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return (torch.expm1(log_ratio) - log_ratio).clamp(max=K3_LIMIT)
