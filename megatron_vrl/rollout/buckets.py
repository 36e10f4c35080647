"""Named tensors in flat buckets of shared memory, a few large copies per update.

A writer owns one anonymous file in memory (`memfd_create`) and uses it for every bucket of every
update: its pages are made once, which costs as much as several copies. It has no name in
/dev/shm: the kernel frees it with its last mapping, so no crash can leave one behind, and a
container's small /dev/shm is no limit. Whoever runs as the same user on this machine can map it
through /proc while the writer lives. A reader keeps its mapping of the writer it read last.

A reader must be done with a bucket before the writer fills the next one.
Left out: CUDA IPC handles. Weights that live on a GPU pass through host memory once.
"""

import os
import re
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from megatron_vrl.errors import RolloutError

NamedTensors = Iterable[tuple[str, torch.Tensor]]

MEMORY = re.compile(r"/proc/[0-9]+/fd/[0-9]+")  # nothing else is ever mapped
ALIGNMENT_BYTES = 64  # a tensor may start at a multiple of its element size only


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """What a receiver needs to map one bucket; plain values, so it travels over any RPC."""

    path: str  # /proc/PID/fd/N of the writer
    memory: str  # names the writer's memory: a new writer may come to have the same path
    num_bytes: int  # of the bucket
    memory_bytes: int  # of the file
    dtype: str  # of every tensor, as torch names it: "bfloat16"
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]


class BucketWriter:
    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._file = os.memfd_create("megatron_vrl_weights")
        self._path = f"/proc/{os.getpid()}/fd/{self._file}"
        self._name = uuid.uuid4().hex
        self._memory = torch.empty(0, dtype=torch.uint8)

    def write(self, named_tensors: NamedTensors) -> Bucket:
        """Fill the memory with these tensors, cast to the writer's dtype. They are taken one at a
        time."""
        names: list[str] = []
        shapes: list[tuple[int, ...]] = []
        end = 0
        for name, tensor in named_tensors:
            start, end = end, end + _padded_bytes(tensor.shape, self._dtype)
            self._grow(end)
            _view(self._memory, start, tensor.shape, self._dtype).copy_(tensor.detach())
            names.append(name)
            shapes.append(tuple(tensor.shape))
        return Bucket(
            path=self._path,
            memory=self._name,
            num_bytes=end,
            memory_bytes=len(self._memory),
            dtype=str(self._dtype).removeprefix("torch."),
            names=tuple(names),
            shapes=tuple(shapes),
        )

    def hold(self, bucket: Bucket, contents: bytes) -> Bucket:
        """The same bucket in this writer's memory; `contents` are its bytes."""
        self._grow(len(contents))
        self._memory[: len(contents)] = torch.frombuffer(bytearray(contents), dtype=torch.uint8)
        return replace(bucket, path=self._path, memory=self._name, memory_bytes=len(self._memory))

    def contents(self, bucket: Bucket) -> memoryview:
        """The bytes of the bucket that was written last, to be sent to another machine."""
        return self._memory.numpy().data[: bucket.num_bytes]

    def close(self) -> None:
        """Readers that have mapped the memory keep it."""
        os.close(self._file)

    def _grow(self, num_bytes: int) -> None:
        if num_bytes > len(self._memory):
            size = max(num_bytes, 2 * len(self._memory))
            os.ftruncate(self._file, size)
            self._memory = _mapped(self._path, size)


class BucketReader:
    """Reads buckets as views of the writer's memory."""

    def __init__(self) -> None:
        self._mapping: tuple[str, int] = ("", 0)
        self._memory = torch.empty(0, dtype=torch.uint8)

    def read(self, bucket: Bucket) -> Iterator[tuple[str, torch.Tensor]]:
        if not MEMORY.fullmatch(bucket.path):
            raise RolloutError(f"{bucket.path} is not the memory of a process; send a bucket.")
        if self._mapping != (bucket.memory, bucket.memory_bytes):
            self._memory = _mapped(bucket.path, bucket.memory_bytes)
            self._mapping = bucket.memory, bucket.memory_bytes
        yield from views(self._memory, bucket)


def views(memory: torch.Tensor, bucket: Bucket) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a bucket whose bytes lie in `memory`."""
    dtype, start = torch_dtype(bucket.dtype), 0
    for name, shape in zip(bucket.names, bucket.shapes, strict=True):
        yield name, _view(memory, start, shape, dtype)
        start += _padded_bytes(shape, dtype)


def torch_dtype(name: str) -> torch.dtype:
    """The torch type of that name: "float32" -> torch.float32."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def _mapped(path: str, num_bytes: int) -> torch.Tensor:
    return torch.from_file(path, shared=True, size=num_bytes, dtype=torch.uint8)


def _view(
    memory: torch.Tensor, start: int, shape: Iterable[int], dtype: torch.dtype
) -> torch.Tensor:
    size = torch.Size(shape)
    return memory[start : start + size.numel() * dtype.itemsize].view(dtype).view(size)


def _padded_bytes(shape: Iterable[int], dtype: torch.dtype) -> int:
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
