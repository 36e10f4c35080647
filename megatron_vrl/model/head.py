"""Log-probabilities of given tokens without ever holding [N, V] logits.

Hidden rows are read in chunks: logits of one chunk exist at a time, in the forward pass to get
log-sum-exp, target logit and entropy, and once more in the backward pass to get the gradients
(the recompute of cut cross-entropy, arXiv 2411.09009). The vocabulary may be split over the
tensor-parallel ranks; then each rank sees only its part of the logits.

Shape letters: N rows, C channels, V words of this rank's part.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BANNED_LOGIT = -1e30  # its exp is 0, and unlike -inf it may be multiplied by 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """Which distribution over words is meant: the one that answers are sampled from."""

    temperature: float = 1.0
    banned: tuple[int, ...] = ()  # token ids that are never sampled: their probability is 0


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    group: dist.ProcessGroup,
    of: Distribution,
    chunk: int = 1024,
) -> tuple[Tensor, Tensor]:
    """hidden [N, C], weight [V, C], target [N] (whole vocabulary) -> log-prob [N], entropy [N].

    Both in float32; entropy in nats. The gradient of `hidden` is this rank's part only: the
    caller sums it over `group`, as Megatron's mappings do.
    """
    return _TokenLogprobs.apply(hidden, weight, target, group, of, chunk)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        group: dist.ProcessGroup,
        of: Distribution,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        first = group.rank() * weight.shape[0]
        local = target - first
        mine = (local >= 0) & (local < weight.shape[0])
        local = torch.where(mine, local, 0)
        banned = torch.tensor(of.banned, dtype=torch.long, device=hidden.device) - first
        banned = banned[(banned >= 0) & (banned < weight.shape[0])]
        statistics = torch.empty(3, len(target), device=hidden.device)  # lse, target logit, mean
        for rows in _chunks(len(target), chunk):
            logits = _logits(hidden[rows], weight, banned, of.temperature)
            statistics[:, rows] = _statistics(logits, local[rows], mine[rows], group)
        lse, chosen, mean = statistics
        ctx.save_for_backward(hidden, weight, local, mine, banned, lse, mean)
        ctx.temperature, ctx.chunk = of.temperature, chunk
        return chosen - lse, lse - mean

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_logprob, grad_entropy = grads
        hidden, weight, local, mine, banned, lse, mean = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for rows in _chunks(len(local), ctx.chunk):
            logits = _logits(hidden[rows], weight, banned, ctx.temperature)
            share = torch.exp(logits - lse[rows, None])  # softmax
            # d logprob = onehot - p;  d entropy = -p * (logit - mean)
            slope = share * (
                -grad_logprob[rows, None] - grad_entropy[rows, None] * (logits - mean[rows, None])
            )
            picked = mine[rows] * grad_logprob[rows]
            slope.scatter_add_(1, local[rows, None], picked[:, None])
            slope /= ctx.temperature
            grad_hidden[rows] = (slope.to(weight.dtype) @ weight).to(hidden.dtype)
            grad_weight += slope.t() @ hidden[rows].float()
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None


def _chunks(rows: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, rows, size)]


def _logits(hidden: Tensor, weight: Tensor, banned: Tensor, temperature: float) -> Tensor:
    logits = (hidden @ weight.t()).float() / temperature
    return logits.index_fill_(1, banned, BANNED_LOGIT)


def _statistics(logits: Tensor, local: Tensor, mine: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[3, n]: log-sum-exp, logit of the target, mean logit under the softmax; over all ranks."""
    peak = logits.amax(dim=1)
    if group.size() > 1:
        dist.all_reduce(peak, dist.ReduceOp.MAX, group=group)
    weights = torch.exp(logits - peak[:, None])
    chosen = logits.gather(1, local[:, None]).squeeze(1) * mine
    sums = torch.stack([weights.sum(1), chosen, (weights * logits).sum(1)])
    if group.size() > 1:
        dist.all_reduce(sums, group=group)
    total, chosen, weighted = sums
    return torch.stack([peak + torch.log(total), chosen, weighted / total])
