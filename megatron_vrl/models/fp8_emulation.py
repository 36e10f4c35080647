"""FP8 products of the language layers, computed anywhere: what Transformer Engine's recipes round,
with torch's float8 casts, and the product itself in the model's own precision.

For proofs and small studies (`model.layers: fp8_emulated`); a run that wants speed takes
Transformer Engine. Rounded are the three operands of each linear layer's products: input and weight
to E4M3, the output's gradient to E5M2 (blockwise: all to E4M3). Biases, norms, attention, vision
tower, embedding and head are not. Scales are as in Transformer Engine 2.11 under Megatron 0.16.1:

- delayed: the largest value of the call before (Megatron's history of one); the first scale is 1;
- current: the largest value of the tensor;
- blockwise: of each 128 values along the product's sum, of each 128 x 128 of a weight; powers of 2.

Shape letters: T rows, K summed channels, N output channels.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

Recipe = Literal["delayed", "current", "blockwise"]
Operand = Literal["input", "weight", "gradient"]
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BLOCK = 128


class Rounding:
    """What one linear layer rounds with, the largest values that it saw last, and what rounding did
    to its operands since the last `taken`."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.gradient = E4M3 if recipe == "blockwise" else E5M2
        self.amax: dict[str, Tensor] = {}  # operand -> scalar, of the call before; delayed only
        self._seen: dict[str, Tensor] = {}  # operand -> [5], see `seen_of`

    def __call__(self, values: Tensor, operand: Operand) -> Tensor:
        """values [T, K] or weight [N, K], summed over K in the product -> the same, rounded."""
        kind = self.gradient if operand == "gradient" else E4M3
        scale = self._scale_of(values, operand, kind)
        rounded = _cast(values, scale, kind)
        seen = seen_of(values.detach(), rounded.detach(), scale, kind)
        before = self._seen.get(operand)
        self._seen[operand] = seen if before is None else joined(before, seen)
        return rounded

    def _scale_of(self, values: Tensor, operand: Operand, kind: torch.dtype) -> Tensor:
        if self.recipe == "blockwise":
            return _block_scale(values, kind, BLOCK if operand == "weight" else 1)
        largest = values.detach().abs().amax().float()
        if self.recipe == "current":
            return _scale(largest, kind)
        before = self.amax.get(operand)
        self.amax[operand] = largest
        return torch.ones_like(largest) if before is None else _scale(before, kind)

    def taken(self) -> dict[str, Tensor]:
        """Operand -> [5] since the last call."""
        seen, self._seen = self._seen, {}
        return seen


def seen_of(values: Tensor, rounded: Tensor, scale: Tensor, kind: torch.dtype) -> Tensor:
    """[5]: values; those beyond the format's range under `scale`, which were cut; those that became
    0 and were not; those that are not finite; the largest finite one."""
    size = values.float().abs()
    finite = size.isfinite()
    limit = torch.finfo(kind).max * (1 + 2**-20)  # a scale's own rounding cuts nothing
    counts = (
        size.new_tensor(size.numel()),
        ((size * scale > limit) & finite).sum(),
        ((rounded == 0) & (size > 0)).sum(),
        (~finite).sum(),
        torch.where(finite, size, 0.0).amax(),
    )
    return torch.stack([count.double() for count in counts])


def joined(one: Tensor, other: Tensor) -> Tensor:
    """[..., 5] of both: counts added, the larger of the largest."""
    largest = torch.maximum(one[..., 4:], other[..., 4:])
    return torch.cat([one[..., :4] + other[..., :4], largest], dim=-1)


def _scale(largest: Tensor, kind: torch.dtype) -> Tensor:
    scale = torch.finfo(kind).max / largest
    return torch.where((largest > 0) & scale.isfinite(), scale, 1.0)


def _block_scale(values: Tensor, kind: torch.dtype, rows: int) -> Tensor:
    """[T, K]: of each value's block, `rows` x BLOCK, rounded down to a power of 2."""
    height, width = values.shape
    padded = F.pad(values.float().abs(), (0, -width % BLOCK, 0, -height % rows))
    blocks = padded.unflatten(0, (-1, rows)).unflatten(2, (-1, BLOCK))
    scale = _scale(blocks.amax((1, 3)), kind)
    scale = torch.exp2(torch.floor(torch.log2(scale)))
    return scale.repeat_interleave(rows, 0).repeat_interleave(BLOCK, 1)[:height, :width]


def _cast(values: Tensor, scale: Tensor, kind: torch.dtype) -> Tensor:
    limit = torch.finfo(kind).max
    return ((values.float() * scale).clamp(-limit, limit).to(kind).float() / scale).to(values.dtype)


class _Product(torch.autograd.Function):
    """inputs [T, K] @ weight[N, K].T -> [T, N], and the two products of the backward pass."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, rounding: Rounding) -> Tensor:
        seen = rounding(inputs, "input")
        # Summed over T in the weight's gradient: blocks lie along T there.
        turned = rounding(inputs.t(), "input").t() if rounding.recipe == "blockwise" else seen
        rounded_weight = rounding(weight, "weight")
        ctx.rounding = rounding
        ctx.save_for_backward(turned, rounded_weight)
        return seen @ rounded_weight.t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient,) = gradients
        turned, weight = ctx.saved_tensors
        rounding: Rounding = ctx.rounding
        seen = rounding(gradient, "gradient")
        across = rounding(gradient.t(), "gradient") if rounding.recipe == "blockwise" else seen.t()
        return seen @ weight, across @ turned, None


def _linear(inputs: Tensor, weight: Tensor, bias: Tensor | None, rounding: Rounding) -> Tensor:
    flat = _Product.apply(inputs.flatten(0, -2), weight, rounding)
    output = flat.unflatten(0, inputs.shape[:-1])
    return output if bias is None else output + bias


class RoundedColumnParallelLinear(ColumnParallelLinear):
    """On one tensor rank: the scales of several are not agreed on."""

    def __init__(self, *args: Any, recipe: Recipe, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rounding = Rounding(recipe)

    def _forward_impl(
        self, input: Tensor, weight: Tensor, bias: Tensor | None = None, **_: Any
    ) -> Tensor:
        return _linear(input, weight, bias, self.rounding)


class RoundedRowParallelLinear(RowParallelLinear):
    def __init__(self, *args: Any, recipe: Recipe, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rounding = Rounding(recipe)

    def _forward_impl(
        self, input: Tensor, weight: Tensor, bias: Tensor | None = None, **_: Any
    ) -> Tensor:
        return _linear(input, weight, bias, self.rounding)
