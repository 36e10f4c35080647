"""GSPO: group sequence policy optimisation (arXiv 2507.18071), in its per-token form.

The ratio is one number per answer: s = exp(mean over its tokens of log-prob minus old log-prob),
clipped as a whole (equations 5 to 7). GSPO-token (equations 13 and 14) makes the loss a token loss:
the ratio of token t is sg[s] pi_t / sg[pi_t]. Its value is s. With one advantage per answer, the
mean of its gradients over the answer is the gradient of s. Advantage: GRPO's.

The preset's bounds are the paper's, for 4 updates per batch of rollouts. The paper has no KL term.
"""

import torch
from torch import Tensor

from megatron_vrl.algorithms.grpo import advantages
from megatron_vrl.algorithms.ratio import clipped_loss, exp
from megatron_vrl.algorithms.tokens import Tokens
from megatron_vrl.config import Algorithm

__all__ = ["advantages", "policy_loss"]


def policy_loss(tokens: Tokens, cfg: Algorithm) -> tuple[Tensor, dict[str, Tensor]]:
    """Return max(-A s, -A clip(s)) [N] with the ratio s of each token's answer, and metrics."""
    length = tokens.sequence_sum(torch.ones_like(tokens.logprob))
    log_ratio = (tokens.logprob - tokens.old_logprob).detach()
    sequence_ratio = exp(tokens.sequence_sum(log_ratio) / length)
    one = exp(tokens.logprob - tokens.logprob.detach())  # value 1, gradient of the log-prob
    return clipped_loss(sequence_ratio * one, tokens.advantage, cfg)
