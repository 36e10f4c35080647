"""LoRA (arXiv 2106.09685): a frozen linear layer and a trained product of two thin matrices.

An adapted layer returns x W' + scale * (x A') B', where ' is the transpose. `Adapter` holds A and B
of one linear layer of Megatron. The layer's product and the adapter's are added before the layer
communicates, so a row-parallel layer reduces both at once. Tensor parallelism, for L rows and all
matrices of the layer together (R = their number x rank):

    layer              A                  B                   collectives of the adapter
    column-parallel    on every rank      split by output     sum of the gradient of x A' [L, R]
    with sequence      on every rank      split by output     gather of x A', scatter of its grad.
    row-parallel       split by input     on every rank       none

A gradient that covers one rank's rows or channels only (A of a column-parallel layer with sequence
parallelism, B of a row-parallel layer) carries the mark `partial_over_tensor`. The policy sums it
over the tensor ranks after the backward pass.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_vrl.config import Lora
from megatron_vrl.models.adapters import AdaptedLinear, adapted_linears, joined_rows
from megatron_vrl.models.architecture import Architecture
from megatron_vrl.models.chunk import Chunk
from megatron_vrl.models.weight_map import hf_shapes
from megatron_vrl.parallel.mesh import Axis


class Adapter(torch.nn.Module):
    """Factors of the adapters of one linear layer; parameters "A.q_proj", "B.q_proj" and so on."""

    def __init__(
        self,
        arch: Architecture,
        cfg: Lora,
        linear: AdaptedLinear,
        weight: Tensor,
        tensor: Axis,
        sequence: bool,
    ) -> None:
        """weight: the layer's, on this rank."""
        super().__init__()
        self.enabled = True
        self.scale, self.kind = cfg.scale, linear.kind
        self._gathers = sequence and linear.kind == "column"
        self._sums = not sequence and linear.kind == "column" and tensor.size > 1
        self._join = joined_rows(arch, linear, tensor.size)
        self._keys = linear.keys
        shapes = hf_shapes(arch)
        ranks = tensor.size if linear.kind == "column" else 1
        self._outputs = [shapes[name][0] // ranks for name in linear.row.hf_names]
        self.A, self.B = torch.nn.ParameterDict(), torch.nn.ParameterDict()
        for key, rows, used in zip(self._keys, self._outputs, linear.targeted, strict=True):
            if used:
                self.A[key] = _factor(weight, cfg.rank, weight.shape[1])
                self.B[key] = _factor(weight, rows, cfg.rank)
        split = {"column": "B", "row": "A", "whole": ""}[linear.kind]
        partial = {"column": "A" if sequence else "", "row": "B", "whole": ""}[linear.kind]
        for name, param in self.named_parameters():
            marks: Any = param
            marks.tensor_model_parallel = name[0] == split
            marks.partial_over_tensor = tensor.size > 1 and name[0] == partial

    def added(self, x: Tensor, output: Tensor) -> Tensor:
        """Return `output` plus the adapter's product of `x`, the local input of the layer."""
        inner = F.linear(x, self._a())
        if self._gathers:
            inner = gather_from_sequence_parallel_region(inner, tensor_parallel_output_grad=True)
        elif self._sums:
            inner = copy_to_tensor_model_parallel_region(inner)
        flat = output.flatten(0, -2)
        total = torch.addmm(flat, inner.flatten(0, -2), self._b().t(), alpha=self.scale)
        return total.view_as(output)

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """Return `weight` plus the adapter's product, computed in float32, in weight's dtype."""
        a, b = self._a().float(), self._b().float()
        return torch.addmm(weight.float(), b, a, alpha=self.scale).to(weight.dtype)

    def _a(self) -> Tensor:
        """Return all A's, one below the other [R, input]."""
        parts = list(self.A.values())
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _b(self) -> Tensor:
        """Return the B's as blocks of one matrix [output, R], in the order of Megatron's rows."""
        if len(self._keys) == 1:
            return next(iter(self.B.values()))
        some = next(iter(self.B.values()))
        columns = some.shape[1] * len(self.B)
        blocks, first = [], 0
        for key, rows in zip(self._keys, self._outputs, strict=True):
            if key not in self.B:
                blocks.append(some.new_zeros(rows, columns))
                continue
            part = self.B[key]
            blocks.append(F.pad(part, (first, columns - first - part.shape[1])))
            first += part.shape[1]
        return self._join(blocks)


def _factor(weight: Tensor, rows: int, columns: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(rows, columns, dtype=weight.dtype, device=weight.device))


class _Adaptable:
    """Mixin of Megatron's parallel linear layers: adds the product of `lora` before the layer
    communicates."""

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = super()._forward_impl(input, weight, *args, **kwargs)  # type: ignore[misc]
        adapter = _adapter_of(self)
        return output if adapter is None else adapter.added(input, output)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Return the layer's sharded state dict, with the axis of the factors that are split."""
        state: dict[str, Any] = super().sharded_state_dict(  # type: ignore[misc]
            prefix, sharded_offsets, metadata
        )
        adapter: Adapter | None = getattr(self, "lora", None)
        if adapter is None:
            return state
        factor, axis = {"column": ("B.", 0), "row": ("A.", 1)}[adapter.kind]
        factors = adapter.state_dict(prefix="", keep_vars=True)
        return state | make_sharded_tensors_for_checkpoint(
            factors,
            f"{prefix}lora.",
            {name: axis for name in factors if name.startswith(factor)},
            sharded_offsets,
            tp_group=self.tp_group,  # type: ignore[attr-defined]
            dp_cp_group=metadata["dp_cp_group"],
        )


class AdaptableColumnParallelLinear(_Adaptable, ColumnParallelLinear):
    """ColumnParallelLinear that may hold an adapter."""


class AdaptableRowParallelLinear(_Adaptable, RowParallelLinear):
    """RowParallelLinear that may hold an adapter."""


def add_adapters(
    model: torch.nn.Module,
    arch: Architecture,
    cfg: Lora,
    chunk: Chunk,
    tensor: Axis,
    sequence: bool,
) -> None:
    """Give the targeted linear layers of a chunk their adapters, and freeze all other parameters.

    The factors are 0; `begin_adapters` draws them.
    """
    model.requires_grad_(False)
    for linear in adapted_linears(arch, cfg, chunk):
        module: Any = model.get_submodule(linear.module)
        module.lora = Adapter(arch, cfg, linear, module.weight, tensor, sequence)
        if linear.kind == "whole":  # of torch, which communicates nothing
            module.register_forward_hook(_add_after)


def _add_after(module: torch.nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
    adapter = _adapter_of(module)
    return output if adapter is None else adapter.added(args[0], output)


def _adapter_of(module: Any) -> Adapter | None:
    """Return the adapter of a linear layer; None if it has none, or in `without_adapters`."""
    adapter: Adapter | None = getattr(module, "lora", None)
    return adapter if adapter is not None and adapter.enabled else None


def adapters(chunks: Iterable[torch.nn.Module]) -> Iterator[Adapter]:
    """Yield the adapters of a model's chunks."""
    for chunk in chunks:
        yield from (module for module in chunk.modules() if isinstance(module, Adapter))


@contextmanager
def without_adapters(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Context manager in which the chunks compute the frozen base, without their adapters."""
    held = list(adapters(chunks))
    for adapter in held:
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter in held:
            adapter.enabled = True


class MergedWeights:
    """Function from a parameter to the weight that an engine or an export gets: the sum of base
    and adapter, or the parameter itself."""

    def __init__(self, chunks: Iterable[torch.nn.Module]) -> None:
        adapted = [m for chunk in chunks for m in chunk.modules() if hasattr(m, "lora")]
        self._adapters: dict[int, Any] = {id(module.weight): module.lora for module in adapted}

    def __call__(self, param: Tensor) -> Tensor:
        """Return the merged weight of a parameter. The parameter is not changed."""
        adapter = self._adapters.get(id(param))
        return param.detach() if adapter is None else adapter.merged(param.detach())


def new_factor(name: str, shape: Sequence[int], seed: int) -> Tensor:
    """Return a whole factor of a new adapter, as PEFT draws it: A Kaiming-uniform, B zero.

    The values depend on the name in the PEFT adapter, the shape and the seed, so every layout
    starts with equal adapters.
    """
    factor = torch.zeros(*shape)
    if ".lora_A." in name:
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        torch.nn.init.kaiming_uniform_(factor, a=math.sqrt(5), generator=generator)
    return factor
