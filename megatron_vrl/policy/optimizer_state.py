"""Tensors of the optimizer state that this rank holds, whichever optimizer class Megatron chose.

Megatron's distributed optimizer holds a range of the flat elements of a parameter. Its other
optimizers hold all elements, equal on all data ranks. A state is named as AdamW names it; `param`
is the float32 main weight of a bfloat16 parameter. A float32 parameter is its own main weight.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterState:
    """Optimizer state of one parameter on this rank."""

    parameter: torch.nn.Parameter
    start: int  # first element of the flat parameter that this rank holds
    tensors: dict[str, Tensor]  # name -> [elements], views of the optimizer's own tensors
    replicated: bool  # whether all data ranks hold these elements


def parameter_states(optimizer: MegatronOptimizer) -> Iterator[ParameterState]:
    """Yield the state of each trained parameter of which this rank holds elements."""
    for part in optimizer.chained_optimizers:
        if part.optimizer is None:  # all parameters of this rank are frozen
            continue
        if isinstance(part, DistributedOptimizer):
            for parameter in part.model_param_gbuf_map:
                held = part._get_model_param_range_map(parameter)["param"]
                group, index = part.model_param_group_index_map[parameter]
                main = part.optimizer.param_groups[group]["params"][index]
                yield _state(part, parameter, main, held.start, replicated=False)
        else:
            for parameter, main in _main_weights(part):
                yield _state(part, parameter, main, 0, replicated=True)


def _main_weights(part: MegatronOptimizer) -> Iterator[tuple[torch.nn.Parameter, Tensor]]:
    """Yield each parameter with its main weight, for an optimizer that is not distributed."""
    if isinstance(part, Float16OptimizerWithFloat16Params):
        for halves, mains in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True):
            yield from zip(halves, mains, strict=True)
        for group in part.fp32_from_fp32_groups:
            yield from zip(group, group, strict=True)
    else:
        for param in part.get_parameters():
            yield param, param


def _state(
    part: Any, parameter: torch.nn.Parameter, main: Tensor, start: int, replicated: bool
) -> ParameterState:
    tensors = {name: part.optimizer.state[main][name].view(-1) for name in MOMENTS}
    if parameter.dtype != torch.float32:
        tensors["param"] = main.detach().view(-1)
    return ParameterState(parameter=parameter, start=start, tensors=tensors, replicated=replicated)


def step_count(optimizer: MegatronOptimizer) -> int:
    """Return the number of updates that this rank's optimizer has made; 0 if all is frozen."""
    return max((group.get("step", 0) for group in _groups(optimizer)), default=0)


def set_step_count(optimizer: MegatronOptimizer, step: int) -> None:
    """Set the number of updates, on which AdamW's bias corrections depend."""
    for group in _groups(optimizer):
        group["step"] = step


def _groups(optimizer: MegatronOptimizer) -> Iterator[dict[str, Any]]:
    """Yield the param groups of AdamW."""
    for part in optimizer.chained_optimizers:
        if part.optimizer is not None:
            yield from part.optimizer.param_groups
