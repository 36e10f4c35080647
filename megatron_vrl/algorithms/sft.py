"""Supervised fine-tuning loss of the warm-up: cross entropy of each target token.

The loss is per token, as the losses of `ALGORITHMS` are, so one training step serves both phases.
"""

from torch import Tensor

from megatron_vrl.algorithms.tokens import Tokens


def token_loss(tokens: Tokens) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss [N] of the target tokens, and metrics {name: [N]}."""
    loss = -tokens.logprob
    return loss, {"cross_entropy": loss.detach()}
