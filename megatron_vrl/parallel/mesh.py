"""Device mesh: the part of the model and of the batch that this process owns.

No other module uses Megatron's `parallel_state`. Ranks are ordered as in Megatron: tensor fastest,
then context, data and pipeline. Process groups are gloo on the CPU and NCCL on GPUs. `shard` and
`gather_shards` split items over axes and join them again.
"""

import os
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_vrl.config import Parallel
from megatron_vrl.errors import ConfigError, UserError

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One axis of the grid: this process's place on it and the group along it."""

    rank: int
    size: int
    group: dist.ProcessGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    rank: int
    world: int
    device: torch.device
    tensor: Axis
    context: Axis
    pipeline: Axis
    data: Axis
    vision: Axis  # tensor x context: the ranks that share a micro-batch's vision work
    batch: Axis  # context x data: the ranks that hold the same parameters
    model: Axis  # tensor x context x pipeline: the ranks that work on the same samples
    interleaved: bool  # several chunks of layers on each pipeline rank
    alone: dist.ProcessGroup  # this rank only; modules that are not split along `tensor`


def check_layout(cfg: Parallel, world: int) -> None:
    """Raises ConfigError if the ranks do not divide into the layout."""
    per_replica = cfg.tensor * cfg.context * cfg.pipeline
    if world % per_replica:
        context = f" x parallel.context={cfg.context}" if cfg.context > 1 else ""
        raise ConfigError(
            f"parallel.tensor={cfg.tensor}{context} x parallel.pipeline={cfg.pipeline} needs a "
            f"multiple of {per_replica} processes, not {world}: change --nproc-per-node or the "
            "layout."
        )
    if cfg.virtual > 1 and cfg.pipeline == 1:
        raise ConfigError("parallel.virtual > 1 needs parallel.pipeline > 1: set one of them.")
    if cfg.sequence and cfg.tensor == 1:
        raise ConfigError("parallel.sequence=true needs parallel.tensor > 1: set one of them.")


def init_mesh(cfg: Parallel, seed: int) -> Mesh:
    """Join the process group and build the grid. Every rank calls it, once per process.

    Without torchrun's environment the process is alone (world 1).
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    check_layout(cfg, world)
    device = _init_device()
    if not dist.is_initialized():
        store = None if world > 1 else dist.HashStore()
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=int(os.environ.get("RANK", "0")) if store else -1,
            world_size=world if store else -1,
            timeout=timedelta(minutes=30),
        )
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(
        cfg.tensor,
        cfg.pipeline,
        virtual_pipeline_model_parallel_size=cfg.virtual if cfg.virtual > 1 else None,
        context_parallel_size=cfg.context,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return Mesh(
        rank=dist.get_rank(),
        world=world,
        device=device,
        tensor=_axis(parallel_state.get_tensor_model_parallel_group()),
        context=_axis(parallel_state.get_context_parallel_group()),
        pipeline=_axis(parallel_state.get_pipeline_model_parallel_group()),
        data=_axis(parallel_state.get_data_parallel_group()),
        vision=_axis(parallel_state.get_tensor_and_context_parallel_group()),
        batch=_axis(parallel_state.get_data_parallel_group(with_context_parallel=True)),
        model=_model_axis(parallel_state.get_data_parallel_rank()),
        interleaved=cfg.virtual > 1,
        alone=dist.new_group([dist.get_rank()], use_local_synchronization=True),
    )


def close_mesh() -> None:
    """Give up the grid, so that the process may build another one (for tests).

    Under torchrun the world's group stays and serves the next grid: its store works once. The
    others are closed one by one, which Megatron leaves out: a gloo group keeps four threads.
    """
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.get_world_size() == 1:
        dist.destroy_process_group()
        return
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def _init_device() -> torch.device:
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return device
    from megatron_vrl.parallel import cpu

    cpu.install()
    return torch.device("cpu")


def _axis(group: dist.ProcessGroup) -> Axis:
    return Axis(rank=group.rank(), size=group.size(), group=group)


def _model_axis(data_rank: int) -> Axis:
    """The ranks with the same place on the data axis. Every rank calls it."""
    placed: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(placed, data_rank)
    members = [
        [rank for rank, at in enumerate(placed) if at == place] for place in sorted({*placed})
    ]
    group, _ = dist.new_subgroups_by_enumeration(members)
    return _axis(group)


def gather_objects(axis: Axis, value: Any) -> list[Any]:
    """Return the values of all ranks along `axis`, in rank order. Every rank of it calls it."""
    if axis.size == 1:
        return [value]
    values: list[Any] = [None] * axis.size
    dist.all_gather_object(values, value, group=axis.group)
    return values


def shard(items: Sequence[Item], *axes: Axis) -> list[Item]:
    """Return this rank's shard of `items`: every k-th item, along one axis after the other.

    Example: with data size 2 and model size 2, `shard(range(8), mesh.data, mesh.model)` is [0, 4],
    [2, 6] on the two ranks of replica 0 and [1, 5], [3, 7] on those of replica 1.
    """
    for axis in axes:
        items = items[axis.rank :: axis.size]
    return list(items)


def gather_shards(items: Sequence[Item], axis: Axis) -> list[Item]:
    """Return the shards of all ranks along `axis` as one list, in the order before `shard`.

    Every rank of the axis calls it.
    """
    return interleave(gather_objects(axis, list(items)))


def interleave(shards: Sequence[Sequence[Item]]) -> list[Item]:
    """Return the items that `shard` split: [[a0, a2], [a1]] -> [a0, a1, a2]."""
    longest = max(map(len, shards), default=0)
    return [items[i] for i in range(longest) for items in shards if i < len(items)]


def exchange_objects(axis: Axis, outgoing: Sequence[Sequence[Any]]) -> list[Any]:
    """Send `outgoing[r]` to rank r of the axis; what all sent to this rank, in sender order.

    Every rank of the axis calls it, with anything that can be pickled. An array is copied once,
    into the message; the received one is a view of the message, which lives as long as any of its
    arrays. Peers are trusted, as in `gather_objects`.
    """
    if axis.size == 1:
        return list(outgoing[0])
    messages = [_message(objects) for objects in outgoing]
    lengths = gather_objects(axis, [[len(part) for part in parts] for parts in messages])
    device = torch.device("cpu")
    if dist.get_backend(axis.group) == "nccl":
        device = torch.device("cuda", torch.cuda.current_device())
    sizes_out = [sum(map(_aligned, sizes)) for sizes in lengths[axis.rank]]
    sizes_in = [sum(map(_aligned, sizes[axis.rank])) for sizes in lengths]
    outbox = torch.empty(sum(sizes_out), dtype=torch.uint8)
    _fill(outbox.numpy().data, [part for parts in messages for part in parts])
    inbox = torch.empty(sum(sizes_in), dtype=torch.uint8, device=device)
    dist.all_to_all_single(inbox, outbox.to(device), sizes_in, sizes_out, group=axis.group)
    memory = inbox.cpu().numpy().data
    received: list[Any] = []
    for sender, begin in zip(lengths, _starts(sizes_in), strict=True):
        sizes = sender[axis.rank]
        starts = _starts([_aligned(size) for size in sizes])
        parts = [memory[begin + s :][:size] for s, size in zip(starts, sizes, strict=True)]
        if parts:
            received += pickle.loads(parts[0], buffers=parts[1:])
    return received


def _message(objects: Sequence[Any]) -> list[memoryview]:
    """The objects' pickle, then the memory of their arrays; [] without objects."""
    buffers: list[pickle.PickleBuffer] = []
    if not objects:
        return []
    head = pickle.dumps(list(objects), protocol=5, buffer_callback=buffers.append)
    return [memoryview(head), *(buffer.raw() for buffer in buffers)]


def _fill(memory: memoryview, parts: Sequence[memoryview]) -> None:
    starts = _starts([_aligned(len(part)) for part in parts])
    for start, part in zip(starts, parts, strict=True):
        memory[start : start + len(part)] = part


def _starts(sizes: Sequence[int]) -> list[int]:
    return [0, *accumulate(sizes)][: len(sizes)]


def _aligned(size: int) -> int:
    """Arrays begin at multiples of 64 bytes, where any number type may lie."""
    return -(-size // 64) * 64


def world_axis(mesh: Mesh) -> Axis:
    return Axis(rank=mesh.rank, size=mesh.world, group=dist.group.WORLD)  # type: ignore[arg-type]


@contextmanager
def raise_on_all_ranks(mesh: Mesh) -> Iterator[None]:
    """All ranks leave the block together: if one raises a UserError, every rank raises it.

    Every rank enters it, and no rank may communicate inside. So no rank is left waiting for one
    that has gone.
    """
    error: UserError | None = None
    try:
        yield
    except UserError as caught:
        error = caught
    errors = gather_objects(world_axis(mesh), error)
    first = next((found for found in errors if found is not None), None)
    if first is not None:
        raise first
