"""What FP8 did to a step's numbers, as metrics: `fp8/<operand>/...` of input, weight and gradient.

- `amax_max`: the largest value;
- `overflow`, `underflow`: share of values cut at the format's end, and of those that became 0;
- `nonfinite`: how many were no numbers.

Our own rounding (`fp8.py`) counts its values. Transformer Engine counts none; with delayed scaling
it keeps maxima, of which its scales are made, and there are `amax_max` and `nonfinite`, of tensors;
its other two scalings keep nothing and there is no metric. Over all ranks; a value that recompute
makes twice counts twice, and a weight as often as ranks hold it.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vrl.models.fp8_emulation import (
    E4M3,
    E5M2,
    RoundedColumnParallelLinear,
    RoundedRowParallelLinear,
    joined,
)

OPERANDS = ("input", "weight", "gradient")
# Transformer Engine's buffers, and which of their columns is what: a linear layer's one product
# has input, weight and output forward, and the output's gradient first backward.
BUFFERS = (("scaling_fwd", E4M3, {"input": 0, "weight": 1}), ("scaling_bwd", E5M2, {"gradient": 0}))


def fp8_metrics(chunks: Sequence[torch.nn.Module], device: torch.device) -> dict[str, float]:
    """Since `forget`, the same on every rank; every rank calls it. {} where nothing is counted."""
    rows = torch.zeros(len(OPERANDS), 5, dtype=torch.float64, device=device)
    counted = False  # by our rounding, value by value
    for module in (module for chunk in chunks for module in chunk.modules()):
        if isinstance(module, RoundedColumnParallelLinear | RoundedRowParallelLinear):
            found, counted = module.rounding.taken(), True
        else:
            found = _engine_maxima(module)
        for operand, seen in found.items():
            place = OPERANDS.index(operand)
            rows[place] = joined(rows[place], seen.to(rows))
    told = torch.cat([rows[:, :4].flatten(), torch.tensor([counted]).to(rows)])
    largest = rows[:, 4].contiguous()
    dist.all_reduce(told)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    sums = told[:-1].view(len(OPERANDS), 4).tolist()
    return dict(_named(sums, largest.tolist(), by_value=bool(told[-1])))


def forget(chunks: Sequence[torch.nn.Module]) -> None:
    """What was counted so far, such as in passes without gradient."""
    for module in (module for chunk in chunks for module in chunk.modules()):
        if isinstance(module, RoundedColumnParallelLinear | RoundedRowParallelLinear):
            module.rounding.taken()


def _named(
    sums: Sequence[Sequence[float]], largest: Sequence[float], by_value: bool
) -> Iterator[tuple[str, float]]:
    for operand, (values, over, under, nonfinite), amax in zip(
        OPERANDS, sums, largest, strict=True
    ):
        if not values:
            continue
        yield f"fp8/{operand}/amax_max", amax
        yield f"fp8/{operand}/nonfinite", nonfinite
        if by_value:
            yield f"fp8/{operand}/overflow", over / values
            yield f"fp8/{operand}/underflow", under / values


def _engine_maxima(module: torch.nn.Module) -> dict[str, Tensor]:
    """Operand -> [5] of a layer of Transformer Engine; {} of any other."""
    return maxima(module.fp8_meta) if isinstance(module, _engine_layers()) else {}


@functools.cache
def _engine_layers() -> Any:
    """Their class; (), which nothing is an instance of, without Transformer Engine."""
    if find_spec("transformer_engine") is None:
        return ()
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

    return TransformerEngineBaseModule


def maxima(meta: Mapping[str, Any]) -> dict[str, Tensor]:
    """Operand -> [5] of a layer's `fp8_meta` (Transformer Engine 2.11); {} unless its scaling is
    delayed.

    The history's largest; where that has been handed on already, which empties a history of one,
    the value that the scale was made of: the format's largest over the scale.
    """
    if "recipe" not in meta or not meta["recipe"].delayed():
        return {}
    found: dict[str, Tensor] = {}
    for name, kind, columns in BUFFERS:
        if name not in meta:  # no backward pass was made yet
            continue
        history, scale = meta[name].amax_history, meta[name].scale
        for operand, column in columns.items():
            largest = history[:, column].amax().double()
            before = torch.finfo(kind).max / scale[column].double()
            amax = torch.where(largest == 0, before, largest)
            finite, zero = amax.isfinite(), torch.zeros_like(amax)
            known = torch.where(finite, amax, zero)
            found[operand] = torch.stack([zero + 1, zero, zero, (~finite).double(), known])
    return found
