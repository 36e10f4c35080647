"""KL(policy || reference) from the tokens that the policy sampled: three estimators.

After Schulman, "Approximating KL divergence" (2020). With d = log policy - log reference: k1 = d,
without bias, of any sign; k2 = d^2 / 2, biased, small variance; k3 = exp(-d) + d - 1, without bias
and never below 0. In a loss what counts is the gradient: that of k1 is 0 on average, that of k2 is
the gradient of the KL, that of k3 is the gradient of KL(reference || policy). k3 is limited to 10
per token, as Temporal-R1 released it.
"""

import torch
from torch import Tensor

from megatron_vrl.algorithms.ratio import LOG_RATIO_LIMIT
from megatron_vrl.config import Algorithm

K3_LIMIT = 10.0


def kl_penalty(policy_logprob: Tensor, reference: Tensor, cfg: Algorithm) -> Tensor:
    """Estimate of each token, [N], without the coefficient `cfg.kl`; for the loss or the reward."""
    if cfg.kl_estimator == "k1":
        return policy_logprob - reference
    if cfg.kl_estimator == "k2":
        return 0.5 * (policy_logprob - reference).square()
    return k3(policy_logprob, reference)


def k3(policy_logprob: Tensor, reference: Tensor) -> Tensor:
    """Never below 0, exactly 0 for equal policies."""
    log_ratio = (reference - policy_logprob).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return (torch.expm1(log_ratio) - log_ratio).clamp(max=K3_LIMIT)
