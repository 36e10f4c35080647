"""Device mesh: the ranks of a run and their process groups along each parallel axis.

This module alone uses Megatron's `parallel_state`. Rank order is Megatron's: tensor varies fastest,
then context, then data, then pipeline. Process groups use gloo on the CPU and NCCL on GPUs. `shard`
and `gather_shards` split items over axes and join them again.

Example: 8 processes with tensor 2 and pipeline 2 have data size 2; ranks 0 and 1 are one tensor
group, ranks 0 and 2 one data group, ranks 0 and 4 one pipeline group.
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
TILE_ROWS = 16  # rows of a tensor-core tile; FP8 kernels require a multiple of it
FP8_BLOCK = 128  # rows and channels of a block of FP8 with blockwise scaling


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One axis of the mesh: this process's rank on it, its size and its process group."""

    rank: int
    size: int
    group: dist.ProcessGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """All axes of the mesh, with this process's rank and device."""

    rank: int
    world: int
    device: torch.device
    tensor: Axis
    context: Axis
    pipeline: Axis
    data: Axis
    vision: Axis  # tensor x context: ranks that partition a micro-batch's vision work
    batch: Axis  # context x data: ranks that hold the same parameters
    model: Axis  # tensor x context x pipeline: ranks that train on the same samples
    interleaved: bool  # whether a pipeline rank holds several chunks of layers
    row_tile: int  # a tensor rank's rows of a packed sequence are padded to a multiple of it
    alone: dist.ProcessGroup  # group of this rank only, for modules that are not sharded


def check_layout(cfg: Parallel, world: int) -> None:
    """Raise ConfigError if `world` processes do not divide into the layout."""
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


def row_tile(cfg: Parallel, fp8: str) -> int:
    """Return the multiple that a tensor rank's rows are padded to on GPUs. fp8: `model.fp8`.

    Under sequence parallelism each rank quantises its own rows, and Transformer Engine gathers only
    whole blocks of 128 of them with blockwise scaling (2.11: `assert_dim_for_all_gather` of
    pytorch/module/base.py, `is_quantizable` of pytorch/tensor/float8_blockwise_tensor.py).
    """
    return FP8_BLOCK if fp8 == "blockwise" and cfg.sequence else TILE_ROWS


def init_mesh(cfg: Parallel, seed: int, fp8: str = "none") -> Mesh:
    """Join the default process group and return the mesh. Every rank must call it, once per
    process.

    Without torchrun's environment variables the world has one process. fp8: `model.fp8`.
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
        model=_model_axis(cfg, parallel_state.get_data_parallel_world_size()),
        interleaved=cfg.virtual > 1,
        row_tile=row_tile(cfg, fp8) if device.type == "cuda" else 1,
        alone=dist.new_group([dist.get_rank()], use_local_synchronization=True),
    )


def close_mesh() -> None:
    """Destroy the mesh, so that the process can build another one (for tests).

    Under torchrun the default group stays for the next mesh, because its store works only once. All
    other groups are destroyed one by one, which Megatron omits: each gloo group holds four threads.
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
    """Return this process's device, after megatron.core has been prepared for it.

    AdamW is installed on every device, and the CPU's patches if there is no GPU.
    """
    from megatron_vrl.parallel import adamw

    adamw.install()
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return device
    from megatron_vrl.parallel import cpu

    cpu.install()
    return torch.device("cpu")


def _axis(group: dist.ProcessGroup) -> Axis:
    """Return the axis of `group`."""
    return Axis(rank=group.rank(), size=group.size(), group=group)


def _model_axis(cfg: Parallel, data: int) -> Axis:
    """Return the axis of all ranks with this rank's data-parallel rank. Every rank must call it.

    `data` is the number of data-parallel ranks.
    """
    members: list[list[int]] = [[] for _ in range(data)]
    for rank in range(dist.get_world_size()):
        members[rank // (cfg.tensor * cfg.context) % data].append(rank)
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
    """Send `outgoing[r]` to rank r of the axis; return the objects sent to this rank, in sender
    order.

    Every rank of the axis must call it. Objects must be picklable, and peers are trusted. An array
    is copied once, into the send buffer. A received array is a view of the receive buffer, which
    lives as long as any of its arrays.
    """
    if axis.size == 1:
        return list(outgoing[0])
    messages = [_serialize(objects) for objects in outgoing]
    lengths = gather_objects(axis, [[len(part) for part in parts] for parts in messages])
    device = torch.device("cpu")
    if dist.get_backend(axis.group) == "nccl":
        device = torch.device("cuda", torch.cuda.current_device())
    sizes_out = [sum(map(_aligned_size, sizes)) for sizes in lengths[axis.rank]]
    sizes_in = [sum(map(_aligned_size, sizes[axis.rank])) for sizes in lengths]
    send_buffer = torch.empty(sum(sizes_out), dtype=torch.uint8)
    _write_parts(send_buffer.numpy().data, [part for parts in messages for part in parts])
    receive_buffer = torch.empty(sum(sizes_in), dtype=torch.uint8, device=device)
    dist.all_to_all_single(
        receive_buffer, send_buffer.to(device), sizes_in, sizes_out, group=axis.group
    )
    memory = receive_buffer.cpu().numpy().data
    received: list[Any] = []
    for sender, begin in zip(lengths, _offsets(sizes_in), strict=True):
        sizes = sender[axis.rank]
        starts = _offsets([_aligned_size(size) for size in sizes])
        parts = [memory[begin + s :][:size] for s, size in zip(starts, sizes, strict=True)]
        if parts:
            received += pickle.loads(parts[0], buffers=parts[1:])
    return received


def _serialize(objects: Sequence[Any]) -> list[memoryview]:
    """Return the pickle of `objects`, then the memory of their arrays; [] if there are no
    objects."""
    buffers: list[pickle.PickleBuffer] = []
    if not objects:
        return []
    head = pickle.dumps(list(objects), protocol=5, buffer_callback=buffers.append)
    return [memoryview(head), *(buffer.raw() for buffer in buffers)]


def _write_parts(memory: memoryview, parts: Sequence[memoryview]) -> None:
    """Write `parts` into `memory`, each at an aligned offset."""
    starts = _offsets([_aligned_size(len(part)) for part in parts])
    for start, part in zip(starts, parts, strict=True):
        memory[start : start + len(part)] = part


def _offsets(sizes: Sequence[int]) -> list[int]:
    """Return the start of each part when parts of `sizes` follow each other."""
    return [0, *accumulate(sizes)][: len(sizes)]


def _aligned_size(size: int) -> int:
    """Return `size` rounded up to a multiple of 64 bytes, which aligns arrays of any dtype."""
    return -(-size // 64) * 64


def world_axis(mesh: Mesh) -> Axis:
    """Return the axis of all ranks."""
    return Axis(rank=mesh.rank, size=mesh.world, group=dist.group.WORLD)  # type: ignore[arg-type]


@contextmanager
def raise_on_all_ranks(mesh: Mesh) -> Iterator[None]:
    """Context manager: if any rank raises a UserError in the block, every rank raises the first
    one.

    Every rank must enter the block, and no rank may communicate inside it. Without this, the other
    ranks would wait for a rank that has ended.
    """
    error: UserError | None = None
    try:
        yield
    except UserError as caught:
        error = caught
    errors = gather_objects(world_axis(mesh), error)
    first = next((e for e in errors if e is not None), None)
    if first is not None:
        raise first
