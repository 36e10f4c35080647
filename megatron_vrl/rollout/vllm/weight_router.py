"""Cached locations of HF tensors in a vLLM model, recorded from vLLM's own loader.

vLLM finds a tensor's location by its name at every load: it lists all parameters of the model and
tries its patterns on every name. `WeightRouter` runs the loader once for each tensor, records the
copies that the loader makes (a TorchDispatchMode sees them), and repeats only those copies at later
syncs. docs/results/rollouts.md has the gain.

Fall-back: a tensor goes through vLLM's loader, and with it the rest of its bucket, if

- the router has not seen the tensor, or has seen it with another shape or other strides. The loader
  is then recorded again;
- the loader did more with it than copy parts of it into parameters (read or computed something).

A router is valid while the model's parameters stay at their addresses (`is_valid`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_vrl.rollout.buckets import NamedTensors

Layout = tuple[torch.Size, tuple[int, ...]]  # shape and strides


@dataclass(frozen=True, slots=True)
class _Copy:
    """Copy of a view of the source tensor into a view of a parameter."""

    layout: Layout  # of the source view
    offset: int  # of the source view behind the start of the tensor, elements
    into: torch.Tensor


@dataclass(slots=True)
class _Route:
    """All copies that the loader made of one tensor."""

    layout: Layout  # of the tensor when the loader was recorded
    copies: list[_Copy] = field(default_factory=list)
    parameters: set[str] = field(default_factory=set)  # names of the parameters written
    copies_only: bool = True  # False: the loader also read or computed with the tensor


class WeightRouter:
    """Loader of one model's weights that repeats recorded copies."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model: Any = model
        self._parameters = _parameter_addresses(model)
        self._routes: dict[str, _Route] = {}

    def is_valid(self) -> bool:
        """Return True while every parameter is where it was when the router was made."""
        return self._parameters == _parameter_addresses(self._model)

    @torch.no_grad()
    def load_weights(self, tensors: NamedTensors) -> set[str]:
        """Load the tensors and return the names of the parameters that were written."""
        written: set[str] = set()
        rest = iter(tensors)
        for name, tensor in rest:
            route = self._routes.get(name)
            if route is None or route.layout != _layout(tensor):
                return written | self._record(chain([(name, tensor)], rest))
            if not route.copies_only:
                return written | self._model.load_weights(chain([(name, tensor)], rest))
            for copy in route.copies:
                offset = tensor.storage_offset() + copy.offset
                copy.into.copy_(tensor.as_strided(*copy.layout, offset))
            written |= route.parameters
            del tensor  # the iterator may reuse its memory for the next tensor
        return written

    def _record(self, tensors: NamedTensors) -> set[str]:
        recorder = _Recorder(self._parameters)
        with recorder:
            written: set[str] = self._model.load_weights(recorder.each(tensors))
        self._routes |= recorder.routes
        return written


class _Recorder(TorchDispatchMode):
    """Records what a loader does with each tensor until it takes the next one."""

    def __init__(self, parameters: dict[int, str]) -> None:
        super().__init__()
        self.routes: dict[str, _Route] = {}
        self._parameters = parameters
        self._tensor: torch.Tensor | None = None

    def each(self, tensors: NamedTensors) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors:
            self._tensor, self._route = tensor, _Route(_layout(tensor))
            self.routes[name] = self._route
            yield name, tensor
            self._tensor = None  # operations that produce the next tensor are not recorded

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if self._tensor is None or not any(map(self._shares_memory, args)):
            return result
        if self._shares_memory(result):  # a view
            return result
        if function is torch.ops.aten.copy_.default and _address(args[0]) in self._parameters:
            into, view = args[:2]
            offset = view.storage_offset() - self._tensor.storage_offset()
            self._route.copies.append(_Copy(_layout(view), offset, into))
            self._route.parameters.add(self._parameters[_address(into)])
        else:
            self._route.copies_only = False
        return result

    def _shares_memory(self, value: Any) -> bool:
        return (
            self._tensor is not None
            and isinstance(value, torch.Tensor)
            and _address(value) == _address(self._tensor)
        )


def _parameter_addresses(model: torch.nn.Module) -> dict[int, str]:
    return {_address(parameter): name for name, parameter in model.named_parameters()}


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _layout(tensor: torch.Tensor) -> Layout:
    return tensor.shape, tensor.stride()
