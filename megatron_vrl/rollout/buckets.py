"""Named tensors packed into flat buckets of shared memory, a few large copies per update.

A bucket is one anonymous file in memory (`memfd_create`) and a table of what lies where. It has
no name in /dev/shm: the kernel frees it with its last mapping, so no crash can leave one behind,
and a container's small /dev/shm is no limit. Whoever runs as the same user on this machine can
map it through /proc while the writer holds it open.
Left out: CUDA IPC handles. Weights that live on a GPU pass through host memory once.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

NamedTensors = Iterable[tuple[str, torch.Tensor]]

DEFAULT_BUCKET_BYTES = 256 << 20
ALIGNMENT_BYTES = 64  # a tensor may start at a multiple of its element size only


@dataclass(frozen=True, slots=True)
class Bucket:
    """What a receiver needs to map one bucket; plain values, so it travels over any RPC."""

    path: str  # /proc/PID/fd/N of the writer
    num_bytes: int
    dtype: str  # of every tensor, as torch names it: "bfloat16"
    names: list[str]
    shapes: list[list[int]]


def write_buckets(
    named_tensors: NamedTensors, dtype: torch.dtype, max_bytes: int = DEFAULT_BUCKET_BYTES
) -> Iterator[Bucket]:
    """Yield the tensors, cast to `dtype`, in buckets of at most `max_bytes`.

    A larger tensor travels alone. A bucket can be mapped until the next one is asked for; the
    writer then lets go of it, so it holds one bucket and the receiver at most the one before.
    """
    pending: list[tuple[str, torch.Tensor]] = []
    pending_bytes = 0
    for name, tensor in named_tensors:
        num_bytes = _padded_bytes(tensor.shape, dtype)
        if pending and pending_bytes + num_bytes > max_bytes:
            yield from _written(pending, pending_bytes, dtype)
            pending, pending_bytes = [], 0
        pending.append((name, tensor.detach()))
        pending_bytes += num_bytes
    if pending:
        yield from _written(pending, pending_bytes, dtype)


def read_bucket(bucket: Bucket) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a bucket as views of the mapping; they keep it alive."""
    memory = _mapped(bucket.path, bucket.num_bytes)
    dtype = torch_dtype(bucket.dtype)
    yield from zip(bucket.names, _views(memory, bucket.shapes, dtype), strict=True)


def torch_dtype(name: str) -> torch.dtype:
    """The torch type of that name: "float32" -> torch.float32."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def _written(
    named_tensors: list[tuple[str, torch.Tensor]], num_bytes: int, dtype: torch.dtype
) -> Iterator[Bucket]:
    shapes = [list(tensor.shape) for _, tensor in named_tensors]
    file = os.memfd_create("megatron_vrl_weights")
    try:
        os.ftruncate(file, num_bytes)
        path = f"/proc/{os.getpid()}/fd/{file}"
        views = _views(_mapped(path, num_bytes), shapes, dtype)
        for (_, tensor), view in zip(named_tensors, views, strict=True):
            view.copy_(tensor)
        names = [name for name, _ in named_tensors]
        yield Bucket(path, num_bytes, str(dtype).removeprefix("torch."), names, shapes)
    finally:
        os.close(file)


def _mapped(path: str, num_bytes: int) -> torch.Tensor:
    return torch.from_file(path, shared=True, size=num_bytes, dtype=torch.uint8)


def _views(
    memory: torch.Tensor, shapes: Iterable[list[int]], dtype: torch.dtype
) -> Iterator[torch.Tensor]:
    start = 0
    for shape in shapes:
        end = start + torch.Size(shape).numel() * dtype.itemsize
        yield memory[start:end].view(dtype).view(shape)
        start += _padded_bytes(shape, dtype)


def _padded_bytes(shape: Iterable[int], dtype: torch.dtype) -> int:
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
