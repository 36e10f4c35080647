"""Sharded state dicts of a policy: the tensors that a rank writes, and those that it reads.

On disk there are tensors of the whole model: weights under their names (by the layer in the whole
model) and optimizer state as `optimizer.state.NAME.WEIGHT`, where NAME is `exp_avg`, `exp_avg_sq`
or, in bfloat16, `param` (the main weight). Megatron's format `fully_reshardable` has the same
tensors. It gathers them on one rank to write them; here every rank writes the elements it holds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megatron_vrl.checkpoint.shards import BLOCK_BYTES, Region, regions_of, shard_ranges, sharded
from megatron_vrl.models.adapters import is_adapter
from megatron_vrl.parallel.mesh import Mesh, gather_objects, world_axis
from megatron_vrl.policy.optimizer_state import parameter_states, step_count
from megatron_vrl.policy.policy import Policy

_LAYERS = {"non_homogeneous_layers": True}  # a name for each layer, instead of one stack of them
Model = dict[str, dict[str, ShardedTensor | ShardedTensorFactory]]


def model_state(policy: Policy, *, base: bool = False) -> Model:
    """Return the model's sharded state dict, {"chunkI": {parameter: ShardedTensor}}.

    With `model.lora` it holds the adapters, or their frozen base if `base` is True. Megatron's
    `_extra_state` is left out: only FP8 layers fill it, and it is stored as pickles.
    """
    state: Model = {}
    for number, chunk in enumerate(policy.chunks):
        entries = chunk.sharded_state_dict(metadata=dict(_LAYERS))  # Megatron adds keys to it
        kept = {name: entry for name, entry in entries.items() if "_extra_state" not in name}
        if policy.lora.rank:
            kept = {name: entry for name, entry in kept.items() if is_adapter(name) != base}
        state[f"chunk{number}"] = kept
    return state


def state_to_load(policy: Policy) -> dict[str, Any]:
    """Return the tensors of model and optimizer, which are read into their place."""
    model = model_state(policy)
    regions = {id(entry.data): regions_of(entry) for entry in nested_values(model)}
    shards = [
        shard
        for held in _optimizer_tensors(policy)
        for shard in sharded(regions[id(held.parameter)], held.flat, held.start, held.prefix)
    ]
    return {**model, "shards": shards}


def state_to_save(policy: Policy) -> dict[str, Any]:
    """Return the tensors that this rank writes, and the step count. Every rank calls it.

    Nothing is copied: every tensor is a view of the model's or the optimizer's memory.
    """
    entries = list(nested_values(model_state(policy)))
    regions = {id(entry.data): regions_of(entry) for entry in entries}
    held = [
        _Held(entry.data, entry.data.detach().view(-1), start=0, prefix="", replicated=True)
        for entry in entries
    ]
    held += _optimizer_tensors(policy)
    shares: dict[Any, list[tuple[_Held, list[Region]]]] = {}
    for each in held:
        of = regions[id(each.parameter)]
        if copies := _copies(of, each.replicated, policy.mesh):
            shares.setdefault((copies, each.flat.dtype), []).append((each, of))
    state: dict[str, Any] = {"shards": []}
    for (copies, _), alike in shares.items():
        ranges = shard_ranges([len(each.flat) for each, _ in alike], copies.rank, copies.ranks)
        for (each, of), (low, high) in zip(alike, ranges, strict=True):
            part, start = each.flat[low:high], each.start + low
            state["shards"] += sharded(of, part, start, each.prefix, BLOCK_BYTES)
    if policy.optimizer is not None:
        steps = gather_objects(world_axis(policy.mesh), step_count(policy.optimizer))
        state["optimizer"] = {"step": max(steps)}  # rank 0 writes it, and may train nothing
    return state


@dataclass(frozen=True, slots=True)
class _Held:
    """Elements of a weight or of an optimizer state that this rank holds."""

    parameter: torch.nn.Parameter
    flat: Tensor  # [elements]
    start: int  # first of them in the flat parameter
    prefix: str  # of the stored tensor's name
    replicated: bool  # whether all data ranks hold them


def _optimizer_tensors(policy: Policy) -> list[_Held]:
    """Return the optimizer state that this rank holds; [] without an optimizer."""
    states = [] if policy.optimizer is None else parameter_states(policy.optimizer)
    return [
        _Held(state.parameter, flat, state.start, f"optimizer.state.{name}.", state.replicated)
        for state in states
        for name, flat in state.tensors.items()
    ]


@dataclass(frozen=True, slots=True)
class _Copies:
    """Ranks that hold the same elements, and this rank among them."""

    tensor: bool  # all tensor ranks do
    data: bool  # all data ranks do
    rank: int
    ranks: int


def _copies(regions: Sequence[Region], replicated: bool, mesh: Mesh) -> _Copies | None:
    """Return the ranks that hold the same elements of a parameter's weight or optimizer state.

    A parameter that is not split is on every tensor rank. `replicated`: the elements are on every
    data rank. None if another pipeline stage writes them (a tied embedding).
    """
    pipeline, tensor = regions[0].replica
    whole = sum(prod(region.shape) for region in regions) == prod(regions[0].global_shape)
    if pipeline or (tensor and not whole):
        return None
    rank, ranks = (mesh.batch.rank, mesh.batch.size) if replicated else (0, 1)
    if whole:
        rank, ranks = rank * mesh.tensor.size + mesh.tensor.rank, ranks * mesh.tensor.size
    return _Copies(whole, replicated, rank, ranks)
