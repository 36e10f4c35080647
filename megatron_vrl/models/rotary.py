"""Rotary position embedding of packed rows by tables that all layers of a micro-batch share.

Megatron's own code computes cosines and sines of the angles again in each call, and reads the
sequences' lengths from the device. Here a table is made once, and a layer rotates the query and key
heads in the output of `linear_qkv`, in place. Where Transformer Engine is installed on a GPU, its
fused kernel rotates, and the tables are angles, since the kernel computes cosines itself.

Shape letters: L rows, K key-value heads, R query heads of a key head, D channels of a head.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.common.embeddings.rope_utils import fused_apply_rotary_pos_emb
from torch import Tensor

FusedRotation = Callable[[Tensor, Tensor], Tensor]  # (t [L, K, R + 1, D], angles) -> like t


def fused_rotation() -> FusedRotation | None:
    """Return Transformer Engine's rotation, for a GPU with Transformer Engine, else None."""
    return fused_apply_rotary_pos_emb if torch.cuda.is_available() else None


def rotary_tables(angles: Tensor, dtype: torch.dtype) -> Tensor:
    """Return tables [2, L, 1, 1, D] of float32 angles [L, 1, 1, D] for `rotate`.

    They are the cosine, and the sine with a minus sign in the first half of the channels; for the
    fused kernel the angles of the rotation and of its inverse, in float32.
    """
    if fused_rotation() is not None:
        return torch.stack([angles, -angles])
    first, second = angles.sin().chunk(2, dim=-1)
    return torch.stack([angles.cos(), torch.cat([-first, second], dim=-1)]).to(dtype)


class TablesOfAngles(torch.nn.Module):
    """Megatron's rotary embedding module with tables instead of angles as its result."""

    def __init__(self, angles: torch.nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.angles, self.dtype = angles, dtype

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return tables [2, L, 1, 1, D] for the arguments of the wrapped module."""
        return rotary_tables(self.angles(*args, **kwargs), self.dtype)


def rotate(mixed: Tensor, tables: Tensor, key_heads: int) -> Tensor:
    """Rotate queries and keys of mixed [L, 1, K * (R + 2) * D] in place, and return it."""
    rotated: Tensor = _Rotate.apply(mixed, tables, key_heads)
    return rotated


class _Rotate(torch.autograd.Function):
    """Rotation in place. Its backward pass rotates the gradient by the negative angles.

    The result is a detached tensor on the memory of `mixed`. `ctx.mark_dirty` cannot be used: the
    linear layers of Transformer Engine 2.20.2 return a view made in their autograd function, and
    torch refuses to change such a tensor in place. Both tensors share one version counter, so
    torch still finds a backward pass that needs `mixed` as it was.
    """

    @staticmethod
    def forward(ctx: Any, mixed: Tensor, tables: Tensor, key_heads: int) -> Tensor:
        ctx.save_for_backward(tables)
        ctx.heads = (len(mixed), key_heads, -1, tables.shape[-1])
        mixed = mixed.detach()
        heads = mixed.view(ctx.heads)[:, :, :-1]
        _rotate(heads, tables, into=heads)
        return mixed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (tables,) = ctx.saved_tensors
        total = torch.empty_like(grads[0], memory_format=torch.contiguous_format)
        given, heads = grads[0].view(ctx.heads), total.view(ctx.heads)
        heads[:, :, -1].copy_(given[:, :, -1])
        _rotate(given[:, :, :-1], tables, into=heads[:, :, :-1], inverse=True)
        return total, None, None


def _rotate(heads: Tensor, tables: Tensor, *, into: Tensor, inverse: bool = False) -> None:
    """Write the rotation of heads [L, K, R + 1, D] into `into`, which may be `heads`."""
    if (fused := fused_rotation()) is not None:
        into.copy_(fused(heads, tables[int(inverse)]))
        return
    cosine, sine = tables
    swapped = heads.roll(heads.shape[-1] // 2, -1)
    torch.mul(heads, cosine, out=into)
    if inverse:  # one rounding less than autograd's gradient
        into.addcmul_(swapped, sine, value=-1)
    else:
        into.add_(swapped.mul_(sine))
