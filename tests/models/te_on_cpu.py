"""Transformer Engine's layers on a machine without a GPU: its Python code with kernels of ours.

`kernels_of_the_cpu` replaces the three kernels that a layer in bfloat16 or float32 calls (matrix
product, RMSNorm and its gradient), cuBLAS's workspace, and the answers to Transformer Engine's
questions for a GPU. Transformer Engine's modules and autograd functions stay as they are, and so do
Megatron's wrappers of them. FP8 is left out.

`NormColumnParallelLinear` is for machines without Transformer Engine: Megatron's linear layer with
the parameters and the names of the fused module.
"""

import collections
import sys
from typing import Any
from unittest.mock import patch

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_vrl.models.layers import _RMSNorm

Counts = collections.Counter[str]


class NormColumnParallelLinear(ColumnParallelLinear):
    """Norm and linear layer in one module, with Transformer Engine's parameter names."""

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, **others: Any
    ) -> None:
        super().__init__(input_size, output_size, config=config, **others)
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size))
        self.layer_norm_weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return output and bias of the linear layer for the norm of `input_`."""
        normed = _RMSNorm.apply(input_, self.layer_norm_weight, self.config.layernorm_epsilon)
        return super().forward(normed, *args, **kwargs)


def kernels_of_the_cpu(monkeypatch: Any, counts: Counts) -> None:
    """Replace the kernels until the test's end; each call adds to `counts`."""
    import transformer_engine.pytorch.cpp_extensions as extensions
    import transformer_engine_torch
    from transformer_engine.pytorch.cpp_extensions import gemm
    from transformer_engine.pytorch.ops.basic import rmsnorm

    for name, kernel in KERNELS.items():
        for owner in (transformer_engine_torch, extensions, rmsnorm):
            if hasattr(owner, name):
                monkeypatch.setattr(owner, name, _counted(name, kernel, counts))
    no_bytes = torch.empty(0, dtype=torch.uint8)
    monkeypatch.setattr(gemm, "get_cublas_workspace", lambda *_: no_bytes)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", _asked_by_transformer_engine)
    is_cuda = property(lambda tensor: _asked_by_transformer_engine())
    monkeypatch.setattr(torch.Tensor, "is_cuda", is_cuda, raising=False)


def _asked_by_transformer_engine() -> bool:
    frame: Any = sys._getframe(1)
    while frame.f_globals["__name__"] == __name__:
        frame = frame.f_back
    return str(frame.f_globals["__name__"]).startswith("transformer_engine")


def _counted(name: str, kernel: Any, counts: Counts) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        counts[name] += 1
        return kernel(*args, **kwargs)

    return call


@torch.no_grad()
def generic_gemm(
    a: Tensor, turn_a: bool, b: Tensor, turn_b: bool, out: Tensor | None, *others: Any, **_: Any
) -> tuple[Any, ...]:
    """Return op(b) @ op(a) with the bias added, or in a backward pass the gradient of the bias.

    `out` is written, or added to with `accumulate`, if given.
    """
    _, _, bias, _, _, _, backward, _, _, accumulate, _ = others
    rows, matrix = b.reshape(-1, b.shape[-1]), a.reshape(-1, a.shape[-1])
    product = (rows.t() if turn_b else rows) @ (matrix.t() if turn_a else matrix)
    of_bias = rows.sum(0) if backward and bias is not None else None
    if bias is not None and not backward:
        product = product + bias
    if out is not None:
        product = out.add_(product) if accumulate else out.copy_(product)
    return product, of_bias, None, None


def rmsnorm_fwd(
    x: Tensor, weight: Tensor, eps: float, out: None, quantizer: None, *_: Any
) -> tuple[Tensor, None, Tensor]:
    """Return the norm of x [n, C] and the factor of each row [n]."""
    assert out is None and quantizer is None
    with patch.object(torch.autograd.function.FunctionCtx, "save_for_backward") as saved:
        normed = _RMSNorm.forward(torch.autograd.function.FunctionCtx(), x, weight, eps)
    return normed, None, saved.call_args.args[2].view(-1)


def rmsnorm_bwd(
    grad: Tensor, x: Tensor, scale: Tensor, weight: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x [n, C] and weight [C] for the factors of `rmsnorm_fwd`."""

    class Saved:
        saved_tensors = (x, weight, scale.view(-1, 1))

    of_x, of_weight, _none = _RMSNorm.backward(Saved, grad)
    return of_x, of_weight


KERNELS = {
    "generic_gemm": generic_gemm,
    "rmsnorm_fwd": rmsnorm_fwd,
    "rmsnorm_bwd": rmsnorm_bwd,
}
