"""Supervised warm-up: imitate the target token by token (cross entropy, as everywhere).

Per token like the losses of `ALGORITHMS`, so one training step serves both phases.
"""

from torch import Tensor

from megatron_vrl.algorithms.tokens import Tokens


def token_loss(tokens: Tokens) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss [N] of the target's tokens, and what to log of it."""
    loss = -tokens.logprob
    return loss, {"cross_entropy": loss.detach()}
