"""Log-probs and entropies of target tokens without materialising [N, V] logits.

Rows are processed in chunks of at most `CHUNK_BYTES` of float32 logits, `GPU_CHUNK_BYTES` on a GPU.
The forward pass computes log-sum-exp, target logit and entropy of each chunk; the backward pass
computes the chunk's logits again for the gradients (the recompute of cut cross-entropy, arXiv
2411.09009). Both passes reuse two buffers. On a GPU each elementwise part is one compiled kernel,
and there is one buffer. With a vocabulary split over tensor-parallel ranks, each
rank computes the logits of its own part.

Example: a vocabulary of 151,936 tokens on one rank gives chunks of 220 rows (883 on a GPU).

Shape letters: N rows, n rows of a chunk, C channels, V tokens of this rank's part of the
vocabulary.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vrl.models.compiled import on_gpu
from megatron_vrl.parallel.arrays import upload

BANNED_LOGIT = -1e30  # exp gives 0; unlike -inf it can be multiplied by 0
CHUNK_BYTES = 128 * 2**20  # of float32 logits; smaller chunks read the weight more often
GPU_CHUNK_BYTES = 512 * 2**20  # each chunk also reads and writes the weight's float32 gradient


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """Distribution that answers are sampled from: temperature and banned tokens."""

    temperature: float = 1.0
    banned: tuple[int, ...] = ()  # token ids with probability 0


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    group: dist.ProcessGroup,
    distribution: Distribution,
    vocab: int | None = None,
    chunk_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return log-prob [N] and entropy [N] in nats, float32, of `target` [N] under `hidden` [N, C].

    `weight` [V, C] is this rank's part of the output layer; `target` indexes the whole vocabulary,
    of which rows from `vocab` on have no token. `chunk_bytes` None: `CHUNK_BYTES` of the device.
    The gradient of `hidden` is a partial sum: the caller sums it over `group`, as Megatron's
    mappings do.
    """
    size = chunk_bytes or (GPU_CHUNK_BYTES if hidden.is_cuda else CHUNK_BYTES)
    chunk = max(1, size // (4 * len(weight)))
    first = group.rank() * len(weight)
    banned = _banned_rows(distribution.banned, vocab, first, len(weight), weight.device)
    return _TokenLogprobs.apply(
        hidden, weight, target, group, banned, distribution.temperature, chunk
    )


@functools.lru_cache(maxsize=8)
def _banned_rows(
    banned: tuple[int, ...], vocab: int | None, first: int, rows: int, device: torch.device
) -> Tensor:
    """Return the rows of this rank's part of the vocabulary that no answer may hold."""
    end = first + rows
    padding = range(end if vocab is None else min(vocab, end), end)
    own = [token - first for token in {*banned, *padding} if first <= token < end]
    return upload(np.array(sorted(own), dtype=np.int64), device)


class _TokenLogprobs(torch.autograd.Function):
    """Autograd function of `token_logprobs`; its backward pass computes the logits again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        group: dist.ProcessGroup,
        banned: Tensor,
        temperature: float,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        first = group.rank() * weight.shape[0]
        local = target - first
        mine = (local >= 0) & (local < weight.shape[0])
        local = torch.where(mine, local, 0)
        statistics = torch.empty(3, len(target), device=hidden.device)  # lse, target logit, mean
        logits = _LogitChunks(hidden, weight, banned, temperature, chunk)
        for rows, values, scratch in logits:
            chosen = values.gather(1, local[rows, None]).squeeze(1) * mine[rows]
            statistics[:, rows] = _statistics(values, scratch, chosen, group)
        lse, chosen, mean = statistics
        ctx.save_for_backward(hidden, weight, local, mine, banned, lse, mean)
        ctx.temperature, ctx.chunk = temperature, chunk
        return chosen - lse, lse - mean

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, of_weight = _gradients(ctx, *grads)  # the buffers of logits are free again
        if of_weight is not None:
            of_weight = of_weight.to(of_hidden.dtype)
        return of_hidden, of_weight, None, None, None, None, None


def _gradients(
    ctx: Any, grad_logprob: Tensor, grad_entropy: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of `hidden` in its dtype and of `weight` in float32.

    The latter is None if `weight` is frozen.
    """
    hidden, weight, local, mine, banned, lse, mean = ctx.saved_tensors
    grad_hidden = torch.empty_like(hidden)
    grad_weight = None
    if ctx.needs_input_grad[1]:
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
    logits = _LogitChunks(hidden, weight, banned, ctx.temperature, ctx.chunk)
    for rows, values, scratch in logits:
        slope = slope_of_softmax(
            values, scratch, lse[rows], mean[rows], grad_logprob[rows], grad_entropy[rows]
        )
        picked = mine[rows] * grad_logprob[rows]
        slope.scatter_add_(1, local[rows, None], picked[:, None])
        if ctx.temperature != 1.0:
            slope /= ctx.temperature
        grad_hidden[rows] = _chunk_gradient(grad_weight, slope, weight, hidden[rows])
    return grad_hidden, grad_weight


@dataclass(frozen=True, slots=True)
class _LogitChunks:
    """Iterator over (slice of rows, their float32 logits [n, V], scratch buffer [n, V]).

    On a GPU the scratch buffer is None, since compiled code needs none.
    """

    hidden: Tensor
    weight: Tensor
    banned: Tensor
    temperature: float
    chunk: int

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        shape = (min(self.chunk, len(self.hidden)), len(self.weight))
        values = torch.empty(shape, device=self.weight.device)
        scratch = None if values.is_cuda else torch.empty_like(values)
        for start in range(0, len(self.hidden), self.chunk):
            part = self.hidden[start : start + self.chunk]
            into = values[: len(part)]
            _product(part, self.weight.t(), into)
            if self.temperature != 1.0:
                into /= self.temperature
            into.index_fill_(1, self.banned, BANNED_LOGIT)
            room = None if scratch is None else scratch[: len(part)]
            yield slice(start, start + len(part)), into, room


def _product(left: Tensor, right: Tensor, into: Tensor) -> None:
    """Write left @ right into `into`, in float32 for any dtype of the operands."""
    if left.dtype == torch.float32:
        torch.mm(left, right, out=into)
    elif left.is_cuda:  # 16-bit operands, float32 accumulation and result
        torch.mm(left, right, out_dtype=torch.float32, out=into)
    else:
        into.copy_(left @ right)


def _chunk_gradient(total: Tensor | None, slope: Tensor, weight: Tensor, hidden: Tensor) -> Tensor:
    """Return slope [n, V] @ weight [V, C], and add slope.T @ hidden [n, C] to total [V, C].

    The copy of `slope` in the dtype of `weight` is freed before the next chunk makes its own.
    """
    narrow = slope.to(weight.dtype)
    product = narrow @ weight
    if total is not None:
        _add_product(total, slope, narrow, hidden)
    return product


def _add_product(total: Tensor, slope: Tensor, narrow: Tensor, hidden: Tensor) -> None:
    """Add slope [n, V].T @ hidden [n, C] to total [V, C] in float32.

    `narrow` is `slope` in the dtype of `hidden`; a GPU multiplies 16-bit operands.
    """
    if hidden.is_cuda and hidden.dtype != torch.float32:
        torch.addmm(total, narrow.t(), hidden, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(slope.t(), hidden.float())


def _statistics(
    logits: Tensor, scratch: Tensor | None, chosen: Tensor, group: dist.ProcessGroup
) -> Tensor:
    """Return [3, n] over all ranks: log-sum-exp, target logit, mean logit under the softmax."""
    peak = logits.amax(dim=1)
    if group.size() > 1:
        dist.all_reduce(peak, dist.ReduceOp.MAX, group=group)
    total, weighted = exponential_sums(logits, scratch, peak)
    sums = torch.stack([total, chosen, weighted])
    if group.size() > 1:
        dist.all_reduce(sums, group=group)
    total, chosen, weighted = sums
    return torch.stack([peak + torch.log(total), chosen, weighted / total])


@on_gpu
def exponential_sums(logits: Tensor, scratch: Tensor | None, peak: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums [n] of e ** (logit - peak), and of its products with the logits [n, V].

    `scratch` [n, V] takes the exponentials; None where compiled code keeps them in registers.
    """
    weights = torch.sub(logits, peak[:, None], out=scratch).exp_()
    return weights.sum(1), torch.linalg.vecdot(weights, logits)


@on_gpu
def slope_of_softmax(
    logits: Tensor,
    scratch: Tensor | None,
    lse: Tensor,
    mean: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor,
) -> Tensor:
    """Return the gradient of logits [n, V] in their place, without the term of the target.

    d logprob = onehot - p; d entropy = -p * (logit - mean), for p = e ** (logit - lse).
    """
    softmax = torch.sub(logits, lse[:, None], out=scratch).exp_()
    slope = logits.sub_(mean[:, None]).mul_(grad_entropy[:, None])
    return slope.add_(grad_logprob[:, None]).mul_(softmax).neg_()
