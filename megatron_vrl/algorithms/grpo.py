"""Group relative policy optimisation (GRPO, arXiv 2402.03300), as Temporal-R1 released it.

Advantage: the reward's distance from its group's mean in units of the group's standard deviation,
the same for every token of an answer. Loss: the clipped ratio of PPO, plus a KL term towards the
frozen first model (k3 estimator), minus an entropy bonus.

Losses stay per token. Who calls sums them with token weights, so that how the tokens are cut into
micro-batches and ranks cannot change the loss (or does, where the released rule is asked for).
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_vrl.config import Algorithm

EPSILON = 1e-6
KL_LIMIT = 10.0
# exp stays finite in float32. At +-20 both terms that follow are far beyond their own limits.
LOG_RATIO_LIMIT = 20.0


def advantages(rewards: NDArray[np.float64], sample_id: str) -> NDArray[np.float64]:
    """Rewards [N] of one group -> advantages [N]; `sample_id` names the group in the error.

    Unbiased standard deviation. Equal rewards give exactly 0. A group of one keeps its reward:
    the released rule takes mean 0 and deviation 1 there.
    """
    if not np.isfinite(rewards).all():
        raise ValueError(f"A reward of sample {sample_id!r} is not finite: {rewards.tolist()}.")
    if len(rewards) == 1:
        return rewards / (1.0 + EPSILON)
    if rewards.min() == rewards.max():  # the mean of equal rewards may be off by a rounding
        return np.zeros_like(rewards)
    return (rewards - rewards.mean()) / (rewards.std(ddof=1) + EPSILON)


def teaches(advantages: NDArray[np.float64]) -> bool:
    """Whether the group has a policy gradient; a uniform one has none."""
    return bool(np.any(advantages != 0.0))


def token_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    ref_logprobs: Tensor | None,
    entropy: Tensor | None,
    cfg: Algorithm,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of each answer token, and what to log of it; every tensor is [N] over tokens.

    `old_logprobs` are those of the policy that sampled (`logprobs.detach()` on policy),
    `ref_logprobs` may be None only where cfg.kl is 0, `entropy` only where cfg.entropy is 0.
    """
    log_ratio = (logprobs - old_logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - cfg.clip, 1.0 + cfg.clip)
    loss = torch.maximum(plain, clipped)
    metrics = {
        "policy_loss": loss.detach(),
        "clip_fraction": (clipped > plain).to(loss.dtype),
        "approx_kl": (old_logprobs - logprobs).detach(),  # k1, of the step since sampling
    }
    if cfg.kl > 0:
        assert ref_logprobs is not None, "cfg.kl > 0 needs the reference's log-probs"
        kl = k3(logprobs, ref_logprobs)
        loss = loss + cfg.kl * kl
        metrics["ref_kl"] = kl.detach()
    if cfg.entropy > 0:
        assert entropy is not None, "cfg.entropy > 0 needs the entropy"
        loss = loss - cfg.entropy * entropy
    if entropy is not None:
        metrics["entropy"] = entropy.detach()
    return loss, metrics


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """KL(policy || reference) of each token, estimated without bias and never below 0."""
    log_ratio = (ref_logprobs - logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return (torch.expm1(log_ratio) - log_ratio).clamp(max=KL_LIMIT)
