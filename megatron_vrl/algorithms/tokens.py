"""What every loss is computed from: the tokens of a micro-batch that have a loss."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """The loss tokens of a micro-batch; every tensor is [N] float32."""

    logprob: Tensor  # of the policy being trained, with gradient
    old_logprob: Tensor  # of the policy when the batch of rollouts began: logprob.detach() if now
    engine_logprob: Tensor  # of the rollout engine when it sampled
    advantage: Tensor
    entropy: Tensor
    reference: Tensor | None  # log-prob under the reference; None only without a KL term
    sequence_sum: Callable[[Tensor], Tensor]  # [N] -> [N], see local_sequence_sum


def local_sequence_sum(
    sequence_index: Tensor,
    num_sequences: int | None = None,
    across: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Callable[[Tensor], Tensor]:
    """A function [N] -> [N]: the sum of a quantity over all tokens of each token's answer.

    `sequence_index` [N] int64 names each token's answer. The sums have no gradient and are taken
    in float64, so that the order of tokens does not show. Where ranks share the answers,
    `num_sequences` is the same on all and `across` adds up their sums [num_sequences] float64.
    """
    if num_sequences is None:
        num_sequences = int(sequence_index.max()) + 1 if len(sequence_index) else 0

    def sequence_sum(values: Tensor) -> Tensor:
        sums = torch.zeros(num_sequences, dtype=torch.float64, device=values.device)
        sums.index_add_(0, sequence_index, values.detach().double())
        return across(sums)[sequence_index].to(values.dtype)

    return sequence_sum
