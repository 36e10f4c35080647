"""Emulated FP8 for the linear layers of the language model, on any device.

`model.layers: fp8_emulated` casts the operands of each matrix product to float8 and back, as
Transformer Engine's recipes do, and computes the product in the model's dtype. It serves tests and
small studies; it saves no time. Input and weight are rounded to E4M3, the output's gradient to E5M2
(blockwise: E4M3 for all). Biases, norms, attention, vision tower, embedding and head are not
rounded. Scales follow Transformer Engine 2.11 under Megatron 0.16.1:

- delayed: the maximum of the previous call (a history of one); the first scale is 1;
- current: the maximum of the tensor;
- blockwise: the maximum of each 128 values along K, and of each 128 x 128 block of a weight; scales
  are powers of 2.

Shape letters: T rows, K input channels (summed), N output channels.
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


class Quantizer:
    """FP8 rounding of one linear layer's operands, with statistics of its effect.

    It holds the last maximum of each operand (delayed scaling), and statistics since the last
    `pop_statistics`.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.gradient = E4M3 if recipe == "blockwise" else E5M2
        self.amax: dict[str, Tensor] = {}  # operand -> maximum of the previous call; delayed only
        self._statistics: dict[str, Tensor] = {}  # operand -> [5], see `quantization_statistics`

    def __call__(self, values: Tensor, operand: Operand) -> Tensor:
        """Return `values` [T, K], or a weight [N, K], rounded to FP8 and back. K is the summed
        axis."""
        kind = self.gradient if operand == "gradient" else E4M3
        scale = self._scale_of(values, operand, kind)
        rounded = _cast(values, scale, kind)
        statistics = quantization_statistics(values.detach(), rounded.detach(), scale, kind)
        before = self._statistics.get(operand)
        self._statistics[operand] = (
            statistics if before is None else merge_statistics(before, statistics)
        )
        return rounded

    def _scale_of(self, values: Tensor, operand: Operand, kind: torch.dtype) -> Tensor:
        """Return the scale of `values` by the recipe: a scalar, or [T, K] for blockwise."""
        if self.recipe == "blockwise":
            return _block_scale(values, kind, BLOCK if operand == "weight" else 1)
        largest = values.detach().abs().amax().float()
        if self.recipe == "current":
            return _scale(largest, kind)
        before = self.amax.get(operand)
        self.amax[operand] = largest
        return torch.ones_like(largest) if before is None else _scale(before, kind)

    def pop_statistics(self) -> dict[str, Tensor]:
        """Return statistics [5] by operand since the last call, and reset them."""
        statistics, self._statistics = self._statistics, {}
        return statistics


def quantization_statistics(
    values: Tensor, rounded: Tensor, scale: Tensor, kind: torch.dtype
) -> Tensor:
    """Return [5]: number of values; values clipped at the format's maximum; non-zero values rounded
    to 0; non-finite values; the largest finite absolute value."""
    size = values.float().abs()
    finite = size.isfinite()
    limit = torch.finfo(kind).max * (1 + 2**-20)  # tolerance for rounding of the scale itself
    counts = (
        size.new_tensor(size.numel()),
        ((size * scale > limit) & finite).sum(),
        ((rounded == 0) & (size > 0)).sum(),
        (~finite).sum(),
        torch.where(finite, size, 0.0).amax(),
    )
    return torch.stack([count.double() for count in counts])


def merge_statistics(one: Tensor, other: Tensor) -> Tensor:
    """Return the merged statistics [..., 5] of two: counts are added, the larger maximum is
    kept."""
    largest = torch.maximum(one[..., 4:], other[..., 4:])
    return torch.cat([one[..., :4] + other[..., :4], largest], dim=-1)


def _scale(largest: Tensor, kind: torch.dtype) -> Tensor:
    """Return the scale that maps `largest` to the format's maximum; 1 where `largest` is 0."""
    scale = torch.finfo(kind).max / largest
    return torch.where((largest > 0) & scale.isfinite(), scale, 1.0)


def _block_scale(values: Tensor, kind: torch.dtype, rows: int) -> Tensor:
    """Return scales [T, K] of blocks of `rows` x BLOCK values, rounded down to a power of 2."""
    height, width = values.shape
    padded = F.pad(values.float().abs(), (0, -width % BLOCK, 0, -height % rows))
    blocks = padded.unflatten(0, (-1, rows)).unflatten(2, (-1, BLOCK))
    scale = _scale(blocks.amax((1, 3)), kind)
    scale = torch.exp2(torch.floor(torch.log2(scale)))
    return scale.repeat_interleave(rows, 0).repeat_interleave(BLOCK, 1)[:height, :width]


def _cast(values: Tensor, scale: Tensor, kind: torch.dtype) -> Tensor:
    """Return `values` scaled, cast to `kind`, cast back and unscaled."""
    limit = torch.finfo(kind).max
    return ((values.float() * scale).clamp(-limit, limit).to(kind).float() / scale).to(values.dtype)


class _Product(torch.autograd.Function):
    """Product inputs [T, K] @ weight [N, K].T -> [T, N] with FP8 operands, forward and backward."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, quantizer: Quantizer) -> Tensor:
        quantized = quantizer(inputs, "input")
        # The weight's gradient sums over T, so its blocks run along T.
        for_backward = quantized
        if quantizer.recipe == "blockwise":
            for_backward = quantizer(inputs.t(), "input").t()
        rounded_weight = quantizer(weight, "weight")
        ctx.quantizer = quantizer
        ctx.save_for_backward(for_backward, rounded_weight)
        return quantized @ rounded_weight.t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient,) = gradients
        inputs, weight = ctx.saved_tensors
        quantizer: Quantizer = ctx.quantizer
        quantized = quantizer(gradient, "gradient")
        transposed = quantized.t()
        if quantizer.recipe == "blockwise":
            transposed = quantizer(gradient.t(), "gradient")
        return quantized @ weight, transposed @ inputs, None


def _linear(inputs: Tensor, weight: Tensor, bias: Tensor | None, quantizer: Quantizer) -> Tensor:
    """Return inputs [..., K] @ weight.T + bias with FP8 operands."""
    flat = _Product.apply(inputs.flatten(0, -2), weight, quantizer)
    output = flat.unflatten(0, inputs.shape[:-1])
    return output if bias is None else output + bias


class EmulatedFp8ColumnParallelLinear(ColumnParallelLinear):
    """Megatron's ColumnParallelLinear with FP8 operands; one tensor rank only, since scales are
    local."""

    def __init__(self, *args: Any, recipe: Recipe, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.quantizer = Quantizer(recipe)

    def _forward_impl(
        self, input: Tensor, weight: Tensor, bias: Tensor | None = None, **_: Any
    ) -> Tensor:
        return _linear(input, weight, bias, self.quantizer)


class EmulatedFp8RowParallelLinear(RowParallelLinear):
    """Megatron's RowParallelLinear with FP8 operands; one tensor rank only."""

    def __init__(self, *args: Any, recipe: Recipe, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.quantizer = Quantizer(recipe)

    def _forward_impl(
        self, input: Tensor, weight: Tensor, bias: Tensor | None = None, **_: Any
    ) -> Tensor:
        return _linear(input, weight, bias, self.quantizer)
