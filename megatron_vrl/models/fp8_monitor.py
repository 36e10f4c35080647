"""FP8 metrics of a training step: `fp8/<operand>/...` for operand input, weight and gradient.

- `amax_max`: the largest absolute value;
- `overflow`, `underflow`: fraction of values clipped at the format's maximum, and rounded to 0;
- `nonfinite`: number of non-finite values.

Emulated FP8 (`models/fp8_emulation.py`) counts every value. Transformer Engine counts none: with
delayed scaling it stores maxima, which give `amax_max` and the `nonfinite` number of tensors; its
other recipes store nothing and give no metric. Metrics cover all ranks. Values that recompute
produces twice count twice, and a weight counts on every rank that holds it.
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
    EmulatedFp8ColumnParallelLinear,
    EmulatedFp8RowParallelLinear,
    merge_statistics,
)

OPERANDS = ("input", "weight", "gradient")
# Columns of Transformer Engine's buffers: `scaling_fwd` has input, weight and output of a linear
# layer, `scaling_bwd` starts with the output's gradient.
BUFFERS = (("scaling_fwd", E4M3, {"input": 0, "weight": 1}), ("scaling_bwd", E5M2, {"gradient": 0}))


def fp8_metrics(chunks: Sequence[torch.nn.Module], device: torch.device) -> dict[str, float]:
    """Return the metrics since `reset_fp8_metrics`, equal on all ranks; {} if nothing is counted.

    Every rank must call it.
    """
    rows = torch.zeros(len(OPERANDS), 5, dtype=torch.float64, device=device)
    counted = False  # whether emulated FP8 counted single values
    for module in (module for chunk in chunks for module in chunk.modules()):
        if isinstance(module, EmulatedFp8ColumnParallelLinear | EmulatedFp8RowParallelLinear):
            statistics, counted = module.quantizer.pop_statistics(), True
        else:
            statistics = _transformer_engine_amax(module)
        for operand, seen in statistics.items():
            index = OPERANDS.index(operand)
            rows[index] = merge_statistics(rows[index], seen.to(rows))
    sums_and_flag = torch.cat([rows[:, :4].flatten(), torch.tensor([counted]).to(rows)])
    largest = rows[:, 4].contiguous()
    dist.all_reduce(sums_and_flag)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    sums = sums_and_flag[:-1].view(len(OPERANDS), 4).tolist()
    return dict(_named(sums, largest.tolist(), by_value=bool(sums_and_flag[-1])))


def reset_fp8_metrics(chunks: Sequence[torch.nn.Module]) -> None:
    """Discard the statistics so far, for example those of forward passes without gradient."""
    for module in (module for chunk in chunks for module in chunk.modules()):
        if isinstance(module, EmulatedFp8ColumnParallelLinear | EmulatedFp8RowParallelLinear):
            module.quantizer.pop_statistics()


def _named(
    sums: Sequence[Sequence[float]], largest: Sequence[float], by_value: bool
) -> Iterator[tuple[str, float]]:
    """Yield (metric name, value) of each operand; `by_value` is False for Transformer Engine's
    maxima."""
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


def _transformer_engine_amax(module: torch.nn.Module) -> dict[str, Tensor]:
    """Return statistics [5] by operand of a Transformer Engine module; {} of any other module."""
    return (
        delayed_scaling_amax(module.fp8_meta)
        if isinstance(module, _transformer_engine_base())
        else {}
    )


@functools.cache
def _transformer_engine_base() -> Any:
    """Return Transformer Engine's base class; (), which nothing is an instance of, if it is not
    installed."""
    if find_spec("transformer_engine") is None:
        return ()
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

    return TransformerEngineBaseModule


def delayed_scaling_amax(meta: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return statistics [5] by operand from a layer's `fp8_meta` (Transformer Engine 2.11).

    Return {} unless the layer uses delayed scaling. The maximum is the largest of the amax history.
    If the history was already reset, which empties a history of one, the maximum is recovered from
    the scale: the format's maximum / scale.
    """
    if "recipe" not in meta or not meta["recipe"].delayed():
        return {}
    statistics: dict[str, Tensor] = {}
    for name, kind, columns in BUFFERS:
        if name not in meta:  # no backward pass has run yet
            continue
        history, scale = meta[name].amax_history, meta[name].scale
        for operand, column in columns.items():
            largest = history[:, column].amax().double()
            before = torch.finfo(kind).max / scale[column].double()
            amax = torch.where(largest == 0, before, largest)
            finite, zero = amax.isfinite(), torch.zeros_like(amax)
            known = torch.where(finite, amax, zero)
            statistics[operand] = torch.stack([zero + 1, zero, zero, (~finite).double(), known])
    return statistics
