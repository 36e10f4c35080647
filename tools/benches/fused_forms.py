"""Stand-ins for the fused kernels of a GPU, so that `bench.py ops` counts its forms on a CPU.

A stand-in computes on the CPU what the kernel computes, unseen by the counter, and is counted as
one operation that reads its arguments and writes its results. Replaced are torch's RMSNorm kernel,
Megatron's fused SwiGLU, Transformer Engine's rotation and torch's variable-length FlashAttention,
each forward and backward. The code around them is that of a GPU: tables of angles, and the plan
of variable-length calls. Left out: weight gradients added inside their products (apex), and
Transformer Engine's layers, whose calls tests/models/test_norm_in_linear.py counts."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from megatron_vrl.models import cascade_calls, cascade_plans, layers, rotary, swiglu
from megatron_vrl.models import inputs as pass_inputs
from megatron_vrl.models.cascade_calls import VarlenCall
from megatron_vrl.observe.op_counter import OpCounter


class FusedForms:
    """Stand-ins that count in `counter`."""

    def __init__(self) -> None:
        self.counter: OpCounter | None = None

    def one(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function` as one operation `name`."""

        def call(*arguments: Any) -> Any:
            with _disable_current_modes(), torch._C.DisableTorchFunction():
                results = function(*arguments)
            if self.counter is not None:
                tensors = [x for x in tree_leaves([arguments, results]) if isinstance(x, Tensor)]
                self.counter.operations[name] += 1
                self.counter.bytes_moved += sum(x.numel() * x.element_size() for x in tensors)
            return results

        return call

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Replace the kernels in this block. The policy and its plans must be made inside it."""
        rotation = self.one("rotary_embedding", rotated)

        def varlen(batch: Any, device: torch.device, key_heads: int) -> Any:
            return cascade_plans.varlen_cascade(batch, device)

        with (
            self._function(layers._RMSNorm, "rms_norm"),
            self._function(swiglu._SwiGLU, "swiglu"),
            patch.object(rotary, "fused_rotation", lambda: rotation),
            patch.object(pass_inputs, "cascade_plan", varlen),
            patch.object(cascade_calls, "flash_forward", self.one("flash", forward)),
            patch.object(cascade_calls, "flash_backward", self.one("flash_backward", backward)),
        ):
            yield

    @contextmanager
    def _function(self, function: Any, name: str) -> Iterator[None]:
        """Count forward and backward of an autograd function as one operation each."""
        with (
            patch.object(function, "forward", staticmethod(self.one(name, function.forward))),
            patch.object(
                function,
                "backward",
                staticmethod(self.one(f"{name}_backward", function.backward)),
            ),
        ):
            yield


def rotated(heads: Tensor, angles: Tensor) -> Tensor:
    """Return the rotation of heads [L, K, R + 1, D] by angles [L, 1, 1, D]."""
    first, second = heads.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (heads * angles.cos() + turned * angles.sin()).to(heads.dtype)


def forward(query: Tensor, key: Tensor, value: Tensor, call: VarlenCall) -> tuple[Tensor, Tensor]:
    """Return output [n, H, D] and log-sum-exp [H, n], as `cascade_calls.flash_forward`."""
    out = torch.empty_like(query)
    lse = query.new_empty(query.shape[1::-1], dtype=torch.float32)
    for rows, keys in _sequences(call):
        entry = (x.transpose(0, 1)[None] for x in (query[rows], key[keys], value[keys]))
        part, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *entry, 0.0, call.causal
        )
        out[rows], lse[:, rows] = part[0].transpose(0, 1), sums[0]
    return out, lse


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    call: VarlenCall,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, as `cascade_calls.flash_backward`."""
    results = [torch.zeros_like(x) for x in (query, key, value)]
    for rows, keys in _sequences(call):
        entry = (x.transpose(0, 1)[None] for x in (grad[rows], query[rows], key[keys], value[keys]))
        parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *entry, out[rows].transpose(0, 1)[None], lse[None, :, rows], 0.0, call.causal
        )
        for result, part, place in zip(results, parts, (rows, keys, keys), strict=True):
            result[place] = part[0].transpose(0, 1)
    return results[0], results[1], results[2]


def _sequences(call: VarlenCall) -> Iterator[tuple[slice, slice]]:
    """Yield the queries and keys of each sequence that has queries."""
    queries, keys = call.cu_seqlens_q.tolist(), call.cu_seqlens_k.tolist()
    for i in range(len(queries) - 1):
        if queries[i + 1] > queries[i]:
            yield slice(*queries[i : i + 2]), slice(*keys[i : i + 2])
