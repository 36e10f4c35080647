"""Clipped importance-sampling policy optimisation (CISPO, MiniMax-M1, arXiv 2506.13585).

REINFORCE, each token weighted with its clipped ratio (equations 4 and 5): the ratio is a constant
for the gradient, so that clipping bounds a token's weight and never removes its gradient, as PPO's
does. Advantage: GRPO's. Token mean over the step.

The paper has no lower bound (`clip: 1`) and does not say its upper one; a weight of at most 5 is
what TRL gives for ScaleRL (arXiv 2510.13786). The value of this loss is -A r log-prob and not -A r
as in the others; only gradients compare. Left out: ScaleRL's deviation over the whole batch and its
mean over prompts. The paper also refills (`dynamic_sampling_rounds`) and punishes length
(`overlong_buffer`) as DAPO does; both stay with the user.
"""

from torch import Tensor

from megatron_vrl.algorithms.grpo import advantages
from megatron_vrl.algorithms.ratio import exp
from megatron_vrl.algorithms.tokens import Tokens
from megatron_vrl.config import Algorithm

__all__ = ["advantages", "policy_loss"]


def policy_loss(tokens: Tokens, cfg: Algorithm) -> tuple[Tensor, dict[str, Tensor]]:
    """-A sg[clip(r)] log-prob of each token; clip_fraction counts every token out of bounds."""
    ratio = exp(tokens.logprob.detach() - tokens.old_logprob)
    weight = ratio.clamp(1.0 - cfg.clip, 1.0 + cfg.clip_high)
    loss = -tokens.advantage * weight * tokens.logprob
    return loss, {"clip_fraction": (weight != ratio).to(loss.dtype)}
