"""CISPO: clipped importance-sampling policy optimisation (MiniMax-M1, arXiv 2506.13585).

The loss is REINFORCE weighted by the token's clipped ratio (equations 4 and 5). The ratio is a
constant for the gradient: clipping bounds a token's weight and never removes its gradient, unlike
PPO's clip. Advantage: GRPO's. Loss: token mean over the step.

The paper has no lower bound (`clip: 1`) and does not state its upper bound. The preset limits the
weight to 5, as TRL does for ScaleRL (arXiv 2510.13786). The value of this loss is -A r log-prob,
where other losses have -A r; only gradients are comparable. Not implemented: ScaleRL's deviation
over the whole batch and its mean over prompts. The paper also uses DAPO's dynamic sampling and
length penalty; the preset does not set `dynamic_sampling_rounds` and `overlong_buffer`.
"""

from torch import Tensor

from megatron_vrl.algorithms.grpo import advantages
from megatron_vrl.algorithms.ratio import exp
from megatron_vrl.algorithms.tokens import Tokens
from megatron_vrl.config import Algorithm

__all__ = ["advantages", "policy_loss"]


def policy_loss(tokens: Tokens, cfg: Algorithm) -> tuple[Tensor, dict[str, Tensor]]:
    """Return -A sg[clip(r)] log-prob [N], and the fraction of tokens outside the bounds."""
    ratio = exp(tokens.logprob.detach() - tokens.old_logprob)
    weight = ratio.clamp(1.0 - cfg.clip, 1.0 + cfg.clip_high)
    loss = -tokens.advantage * weight * tokens.logprob
    return loss, {"actor/clip_fraction": (weight != ratio).to(loss.dtype)}
