"""Group sequence policy optimisation (GSPO, arXiv 2507.18071), in its per-token form.

The ratio is the answer's: s = exp(mean over its tokens of log-prob minus old log-prob), clipped as
a whole (equations 5 to 7). Token losses need only detached sums over an answer in GSPO-token's form
(equations 13 and 14): the ratio of token t is sg[s] pi_t / sg[pi_t]. Its value is s, and with one
advantage per answer its gradient, meaned over the answer, is that of s. Advantage: GRPO's.

The bounds are the paper's, for 4 updates per batch of rollouts. It has no KL term.
"""

import torch
from torch import Tensor

from megatron_vrl.algorithms.grpo import advantages
from megatron_vrl.algorithms.ratio import clipped, exp
from megatron_vrl.algorithms.tokens import Tokens
from megatron_vrl.config import Algorithm

__all__ = ["advantages", "policy_loss"]


def policy_loss(tokens: Tokens, cfg: Algorithm) -> tuple[Tensor, dict[str, Tensor]]:
    """max(-A s, -A clip(s)) of each token, whose ratio s is its answer's."""
    length = tokens.sequence_sum(torch.ones_like(tokens.logprob))
    log_ratio = (tokens.logprob - tokens.old_logprob).detach()
    sequence_ratio = exp(tokens.sequence_sum(log_ratio) / length)
    one = exp(tokens.logprob - tokens.logprob.detach())  # its gradient is the log-prob's
    return clipped(sequence_ratio * one, tokens.advantage, cfg)
