"""Log-probabilities of given tokens without ever holding [N, V] logits.

Hidden rows are read in chunks of `CHUNK_BYTES` of logits: those of one chunk exist at a time, in
the forward pass to get log-sum-exp, target logit and entropy, and once more in the backward pass to
get the gradients (the recompute of cut cross-entropy, arXiv 2411.09009). Both passes work in place
in two buffers. The vocabulary may be split over the tensor-parallel ranks; then each rank sees only
its part of the logits.

Shape letters: N rows, n of them in a chunk, C channels, V words of this rank's part.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BANNED_LOGIT = -1e30  # its exp is 0, and unlike -inf it may be multiplied by 0
CHUNK_BYTES = 128 * 2**20  # of float32 logits; smaller ones read and write the weight more often


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
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Tensor, Tensor]:
    """hidden [N, C], weight [V, C], target [N] (whole vocabulary) -> log-prob [N], entropy [N].

    Both in float32; entropy in nats. The gradient of `hidden` is this rank's part only: the
    caller sums it over `group`, as Megatron's mappings do.
    """
    chunk = max(1, chunk_bytes // (4 * len(weight)))
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
        logits = _Logits(hidden, weight, banned, of.temperature, chunk)
        for rows, values, spare in logits:
            chosen = values.gather(1, local[rows, None]).squeeze(1) * mine[rows]
            statistics[:, rows] = _statistics(values, spare, chosen, group)
        lse, chosen, mean = statistics
        ctx.save_for_backward(hidden, weight, local, mine, banned, lse, mean)
        ctx.temperature, ctx.chunk = of.temperature, chunk
        return chosen - lse, lse - mean

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_logprob, grad_entropy = grads
        hidden, weight, local, mine, banned, lse, mean = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        logits = _Logits(hidden, weight, banned, ctx.temperature, ctx.chunk)
        for rows, values, spare in logits:
            share = torch.sub(values, lse[rows, None], out=spare).exp_()  # softmax
            # d logprob = onehot - p;  d entropy = -p * (logit - mean)
            slope = values.sub_(mean[rows, None]).mul_(grad_entropy[rows, None])
            slope.add_(grad_logprob[rows, None]).mul_(share).neg_()
            picked = mine[rows] * grad_logprob[rows]
            slope.scatter_add_(1, local[rows, None], picked[:, None])
            if ctx.temperature != 1.0:
                slope /= ctx.temperature
            grad_hidden[rows] = slope.to(weight.dtype) @ weight
            _add_product(grad_weight, slope, hidden[rows])
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None


@dataclass(frozen=True, slots=True)
class _Logits:
    """Iterates over (rows, their logits [n, V] in float32, a buffer of that shape)."""

    hidden: Tensor
    weight: Tensor
    banned: Tensor
    temperature: float
    chunk: int

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        shape = (min(self.chunk, len(self.hidden)), len(self.weight))
        values, spare = (torch.empty(shape, device=self.weight.device) for _ in range(2))
        for start in range(0, len(self.hidden), self.chunk):
            part = self.hidden[start : start + self.chunk]
            into = values[: len(part)]
            _product(part, self.weight.t(), into)
            if self.temperature != 1.0:
                into /= self.temperature
            into.index_fill_(1, self.banned, BANNED_LOGIT)
            yield slice(start, start + len(part)), into, spare[: len(part)]


def _product(left: Tensor, right: Tensor, into: Tensor) -> None:
    """into = left @ right, in float32 whatever they are in."""
    if left.dtype == torch.float32:
        torch.mm(left, right, out=into)
    elif left.is_cuda:  # operands of 16 bits, sums and result of 32
        torch.mm(left, right, out_dtype=torch.float32, out=into)
    else:
        into.copy_(left @ right)


def _add_product(total: Tensor, slope: Tensor, hidden: Tensor) -> None:
    """total [V, C] += slope [n, V].T @ hidden [n, C], in float32."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        left = slope.to(hidden.dtype).t()
        torch.addmm(total, left, hidden, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(slope.t(), hidden.float())


def _statistics(logits: Tensor, spare: Tensor, chosen: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[3, n]: log-sum-exp, logit of the target, mean logit under the softmax; over all ranks."""
    peak = logits.amax(dim=1)
    if group.size() > 1:
        dist.all_reduce(peak, dist.ReduceOp.MAX, group=group)
    weights = torch.sub(logits, peak[:, None], out=spare).exp_()
    weighted = torch.linalg.vecdot(weights, logits)
    sums = torch.stack([weights.sum(1), chosen, weighted])
    if group.size() > 1:
        dist.all_reduce(sums, group=group)
    total, chosen, weighted = sums
    return torch.stack([peak + torch.log(total), chosen, weighted / total])
