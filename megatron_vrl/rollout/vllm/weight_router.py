"""Where each tensor of a hand-over goes in a vLLM model, learnt by watching vLLM's own loader.

vLLM looks for a tensor's place by its name, at every call anew: it lists all parameters of the
model and tries its patterns on each name. The first hand-over goes that way; the copies that it
makes of each tensor are remembered, and the next ones repeat them.

A tensor is remembered only if the loader did nothing with it but copy parts of it into parameters.
One that it read or computed with goes through vLLM every time, and with it what follows in its
bucket.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_vrl.rollout.buckets import NamedTensors

Form = tuple[torch.Size, tuple[int, ...]]  # shape and strides


@dataclass(frozen=True, slots=True)
class _Copy:
    """Of a view of the tensor, which begins `offset` elements after it, into a parameter's."""

    form: Form
    offset: int
    into: torch.Tensor


@dataclass(slots=True)
class _Place:
    form: Form  # of the tensor when it was watched
    copies: list[_Copy] = field(default_factory=list)
    parameters: set[str] = field(default_factory=set)
    copies_only: bool = True


class WeightRouter:
    """Of the tensors of one model."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model: Any = model
        self._parameters = _parameters(model)
        self._known: dict[str, _Place] = {}

    def still_hold(self) -> bool:
        """Whether the model's parameters lie where they lay."""
        return self._parameters == _parameters(self._model)

    @torch.no_grad()
    def load_weights(self, tensors: NamedTensors) -> set[str]:
        """Into the model -> names of the parameters that these tensors filled, wholly or partly."""
        filled: set[str] = set()
        rest = iter(tensors)
        for name, tensor in rest:
            place = self._known.get(name)
            if place is None or place.form != _form(tensor):
                return filled | self._learn(chain([(name, tensor)], rest))
            if not place.copies_only:
                return filled | self._model.load_weights(chain([(name, tensor)], rest))
            for copy in place.copies:
                offset = tensor.storage_offset() + copy.offset
                copy.into.copy_(tensor.as_strided(*copy.form, offset))
            filled |= place.parameters
            del tensor  # its memory can serve the next one
        return filled

    def _learn(self, tensors: NamedTensors) -> set[str]:
        watched = _Watch(self._parameters)
        with watched:
            filled: set[str] = self._model.load_weights(watched.each(tensors))
        self._known |= watched.places
        return filled


class _Watch(TorchDispatchMode):
    """Notes what a loader does with each tensor until it asks for the next one."""

    def __init__(self, parameters: dict[int, str]) -> None:
        super().__init__()
        self.places: dict[str, _Place] = {}
        self._parameters = parameters
        self._tensor: torch.Tensor | None = None

    def each(self, tensors: NamedTensors) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors:
            self._tensor, self._place = tensor, _Place(_form(tensor))
            self.places[name] = self._place
            yield name, tensor
            self._tensor = None  # whatever makes the next one is not watched

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if self._tensor is None or not any(map(self._is_of_tensor, args)):
            return result
        if self._is_of_tensor(result):  # a view
            return result
        if function is torch.ops.aten.copy_.default and _memory(args[0]) in self._parameters:
            into, view = args[:2]
            offset = view.storage_offset() - self._tensor.storage_offset()
            self._place.copies.append(_Copy(_form(view), offset, into))
            self._place.parameters.add(self._parameters[_memory(into)])
        else:
            self._place.copies_only = False
        return result

    def _is_of_tensor(self, value: Any) -> bool:
        return (
            self._tensor is not None
            and isinstance(value, torch.Tensor)
            and _memory(value) == _memory(self._tensor)
        )


def _parameters(model: torch.nn.Module) -> dict[int, str]:
    return {_memory(parameter): name for name, parameter in model.named_parameters()}


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _form(tensor: torch.Tensor) -> Form:
    return tensor.shape, tensor.stride()
