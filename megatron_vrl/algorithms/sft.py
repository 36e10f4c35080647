"""Supervised warm-up: imitate the target token by token (cross entropy, as everywhere).

Per token like the losses of `ALGORITHMS`, so one training step serves both phases.
"""

from torch import Tensor


def token_loss(logprobs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs [N] of the target's tokens -> loss [N], and what to log of it."""
    loss = -logprobs
    return loss, {"cross_entropy": loss.detach()}
