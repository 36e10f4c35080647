"""SwiGLU activation (arXiv 2002.05202) that keeps only its input for the backward pass.

Megatron keeps gate and up, the SiLU of the gate, a copy of up (its unfused MLP adds 0 to it)
and the product: 5 F values a row for F channels. Here they are 3 F: gate and up, and the product,
which the second matrix keeps as its input. On a GPU the kernels are Megatron's `fused_bias_swiglu`,
which torch.compile makes; elsewhere torch's operations in the order of autograd, to the bit.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions import fused_bias_swiglu
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class SwiGLU(torch.nn.Module):
    """Activation module of Megatron's MLP; `use_te_activation_func` of its config selects it."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()

    def forward(self, gate_up: Tensor) -> Tensor:
        """Return SiLU(gate) * up [..., F] of gate_up [..., 2 F]."""
        return swiglu(gate_up)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return {}: Megatron's MLP asks each of its modules, and this one has no parameters."""
        return {}


def swiglu(gate_up: Tensor) -> Tensor:
    """Return SiLU(gate) * up [..., F] of gate_up [..., 2 F]."""
    product: Tensor = _SwiGLU.apply(gate_up)
    return product


class _SwiGLU(torch.autograd.Function):
    """Autograd function of `swiglu` that keeps only its input."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        if gate_up.is_cuda:
            fused: Tensor = fused_bias_swiglu.swiglu(gate_up)
            return fused
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_up,), (grad,) = ctx.saved_tensors, grads
        if gate_up.is_cuda:
            fused: Tensor = fused_bias_swiglu.swiglu_back(grad, gate_up)
            return fused
        gate, up = gate_up.chunk(2, dim=-1)
        total = torch.empty_like(gate_up)
        of_gate, of_up = total.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=of_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=of_gate)
        return total
