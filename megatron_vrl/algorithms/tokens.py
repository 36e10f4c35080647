"""Input of every policy loss: the loss tokens of a micro-batch."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Loss tokens of a micro-batch; every tensor is [N] float32."""

    logprob: Tensor  # log-prob under the policy being trained, with gradient
    old_logprob: Tensor  # under the policy before the step's first update
    engine_logprob: Tensor  # under the rollout engine, at sampling
    advantage: Tensor
    entropy: Tensor
    reference: Tensor | None  # under the reference model; None without a KL term
    sequence_sum: Callable[[Tensor], Tensor]  # [N] -> [N], see local_sequence_sum


def local_sequence_sum(
    sequence_index: Tensor,
    num_sequences: int | None = None,
    across: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Callable[[Tensor], Tensor]:
    """Return a function [N] -> [N] that gives each token the sum of a quantity over its answer.

    `sequence_index` [N] int64 holds each token's answer. Sums have no gradient and are computed in
    float64, so that the order of tokens does not matter. If ranks share answers, `num_sequences`
    must be equal on all ranks, and `across` adds up their sums [num_sequences] float64.
    """
    if num_sequences is None:
        num_sequences = int(sequence_index.max()) + 1 if len(sequence_index) else 0

    def sequence_sum(values: Tensor) -> Tensor:
        sums = torch.zeros(num_sequences, dtype=torch.float64, device=values.device)
        sums.index_add_(0, sequence_index, values.detach().double())
        return across(sums)[sequence_index].to(values.dtype)

    return sequence_sum
