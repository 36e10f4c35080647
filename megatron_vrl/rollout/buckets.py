"""Named tensors in flat buckets of memory that other processes can read, a few large copies per
update.

A writer owns one piece of memory and uses it for every bucket of every update: its pages are made
once, which costs as much as several copies. On a CPU it is an anonymous file (`memfd_create`). It
has no name in /dev/shm: the kernel frees it with its last mapping, so no crash can leave one
behind, and a container's small /dev/shm is no limit. Whoever runs as the same user on this machine
can map it through /proc while the writer lives. On a GPU it is memory of that GPU, opened by a
CUDA IPC handle. A reader keeps what it opened for each writer; in the writer's own process it
reads the memory itself.

A reader must be done with a bucket before the writer fills the next one.
"""

import os
import re
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from weakref import WeakValueDictionary

import torch

from megatron_vrl.errors import RolloutError

NamedTensors = Iterable[tuple[str, torch.Tensor]]

MEMORY = re.compile(r"/proc/[0-9]+/fd/[0-9]+")  # nothing else is ever mapped
ALIGNMENT_BYTES = 64  # a tensor may start at a multiple of its element size only


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaHandle:
    """What `UntypedStorage._share_cuda_` gives, to open another process's memory on a GPU."""

    gpu: str  # UUID: indices differ between processes
    memory: bytes
    num_bytes: int
    offset_bytes: int
    counter: bytes
    counter_offset: int
    event: bytes
    event_sync: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """What a receiver needs to open one bucket; plain values, so it travels over any RPC."""

    path: str = ""  # /proc/PID/fd/N of the writer; "": it lies on a GPU
    handle: CudaHandle | None = None
    memory: str  # names the writer's memory: a new writer may come to have the same path
    num_bytes: int  # of the bucket
    memory_bytes: int  # of the memory
    dtype: str  # of every tensor, as torch names it: "bfloat16"
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]


class BucketWriter:
    def __init__(self, dtype: torch.dtype, device: torch.device | None = None) -> None:
        """`device`: a GPU, or None for memory of the machine."""
        self._dtype, self._device = dtype, device
        self._file = -1 if device else os.memfd_create("megatron_vrl_weights")
        self._path = "" if device else f"/proc/{os.getpid()}/fd/{self._file}"
        self._name = ""
        self._handle: CudaHandle | None = None
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
        if self._device is not None:
            torch.cuda.synchronize(self._device)
        return self._here(
            Bucket(
                memory="",
                num_bytes=end,
                memory_bytes=0,
                dtype=str(self._dtype).removeprefix("torch."),
                names=tuple(names),
                shapes=tuple(shapes),
            )
        )

    def hold(self, bucket: Bucket) -> tuple[Bucket, torch.Tensor]:
        """Room for a bucket of another writer: where it will be, and its bytes, to be filled."""
        self._grow(bucket.num_bytes)
        return self._here(bucket), self.flat(bucket)

    def flat(self, bucket: Bucket) -> torch.Tensor:
        """The bytes of the bucket that is held, uint8 [num_bytes]."""
        return self._memory[: bucket.num_bytes]

    def contents(self, bucket: Bucket) -> memoryview:
        """The same in this machine's memory, to be sent or filled where it lies there."""
        return self.flat(bucket).cpu().numpy().data

    def close(self) -> None:
        """Readers that have mapped the memory keep it."""
        if self._device is None:
            os.close(self._file)

    def _here(self, bucket: Bucket) -> Bucket:
        return replace(
            bucket,
            path=self._path,
            handle=self._handle,
            memory=self._name,
            memory_bytes=len(self._memory),
        )

    def _grow(self, num_bytes: int) -> None:
        """What was in the memory stays."""
        if num_bytes <= len(self._memory):
            return
        size = max(num_bytes, 2 * len(self._memory))
        if self._device is None:
            os.ftruncate(self._file, size)
            self._memory = _mapped(self._path, size)
        else:
            larger = torch.empty(size, dtype=torch.uint8, device=self._device)
            larger[: len(self._memory)] = self._memory
            self._memory, self._handle = larger, _cuda_handle(larger)
        self._name = uuid.uuid4().hex
        _own[self._name] = self._memory


class BucketReader:
    """Reads buckets as views of the writer's memory."""

    def __init__(self) -> None:
        self._open: dict[str, torch.Tensor] = {}  # by name
        self._used: set[str] = set()

    def read(self, bucket: Bucket) -> Iterator[tuple[str, torch.Tensor]]:
        """Raises RolloutError for what is no memory of a process."""
        memory = _own.get(bucket.memory)
        if memory is None:
            if bucket.memory not in self._open:
                self._open[bucket.memory] = _open(bucket)
            memory = self._open[bucket.memory]
            self._used.add(bucket.memory)
        yield from views(memory, bucket)

    def end_update(self) -> None:
        """Close what this update did not read: its writer is gone, or has larger memory."""
        self._open = {name: self._open[name] for name in self._used}
        self._used = set()


def views(memory: torch.Tensor, bucket: Bucket) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a bucket whose bytes lie in `memory`."""
    dtype, start = torch_dtype(bucket.dtype), 0
    for name, shape in zip(bucket.names, bucket.shapes, strict=True):
        yield name, _view(memory, start, shape, dtype)
        start += _padded_bytes(shape, dtype)


def torch_dtype(name: str) -> torch.dtype:
    """The torch type of that name: "float32" -> torch.float32."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def visible_gpus() -> tuple[str, ...]:
    """UUIDs of the GPUs that this process can use, in its own order."""
    count = torch.cuda.device_count()
    return tuple(str(torch.cuda.get_device_properties(index).uuid) for index in range(count))


_own: WeakValueDictionary[str, torch.Tensor] = WeakValueDictionary()  # memory of this process


def _open(bucket: Bucket) -> torch.Tensor:
    if bucket.handle is not None:
        return _cuda_memory(bucket.handle)
    if not MEMORY.fullmatch(bucket.path):
        raise RolloutError(f"{bucket.path} is not the memory of a process; send a bucket.")
    return _mapped(bucket.path, bucket.memory_bytes)


def _mapped(path: str, num_bytes: int) -> torch.Tensor:
    return torch.from_file(path, shared=True, size=num_bytes, dtype=torch.uint8)


def _cuda_handle(memory: torch.Tensor) -> CudaHandle:
    index, handle, size, offset, counter, counter_offset, event, sync = (
        memory.untyped_storage()._share_cuda_()
    )
    return CudaHandle(
        gpu=visible_gpus()[index],
        memory=handle,
        num_bytes=size,
        offset_bytes=offset,
        counter=counter,
        counter_offset=counter_offset,
        event=event,
        event_sync=sync,
    )


def _cuda_memory(handle: CudaHandle) -> torch.Tensor:
    if handle.gpu not in visible_gpus():
        raise RolloutError(
            f"The weights lie on GPU {handle.gpu}, which this process cannot see: show it in "
            "CUDA_VISIBLE_DEVICES, or set rollout.transport=broadcast."
        )
    index = visible_gpus().index(handle.gpu)
    torch.cuda.init()
    storage = torch.UntypedStorage._new_shared_cuda(
        index,
        handle.memory,
        handle.num_bytes,
        handle.offset_bytes,
        handle.counter,
        handle.counter_offset,
        handle.event,
        handle.event_sync,
    )
    return torch.empty(0, dtype=torch.uint8, device=f"cuda:{index}").set_(storage)


def _view(
    memory: torch.Tensor, start: int, shape: Iterable[int], dtype: torch.dtype
) -> torch.Tensor:
    size = torch.Size(shape)
    return memory[start : start + size.numel() * dtype.itemsize].view(dtype).view(size)


def _padded_bytes(shape: Iterable[int], dtype: torch.dtype) -> int:
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
