"""Weight buckets: named tensors in one flat piece of memory that other processes can map.

A `BucketWriter` owns one piece of memory and reuses it for every bucket of every weight sync, since
creating its pages costs as much as several copies. On a CPU the memory is an anonymous file
(`memfd_create`). It has no name in /dev/shm: the kernel frees it with its last mapping, a crash
leaves nothing behind, and the size of a container's /dev/shm does not matter. Processes of the same
user on the same machine can map it through /proc while the writer lives. On a GPU the memory is
opened by a CUDA IPC handle.

A `BucketReader` in another process maps the memory of each writer once. The writer's own process
uses `BucketWriter.tensors`.

A reader must have finished with a bucket before the writer fills the next one.

Example of two buckets in one memory, float32, tensors padded to 64 bytes:

    write([("a", [3, 5]), ("b", [8])])   a: bytes 0 to 60, b: bytes 64 to 96, num_bytes 128
    write([("c", [4])])                  c: bytes 0 to 16, num_bytes 64; a is overwritten
"""

import os
import re
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from megatron_vrl.errors import RolloutError

NamedTensors = Iterable[tuple[str, torch.Tensor]]

MEMFD_PATH = re.compile(r"/proc/[0-9]+/fd/[0-9]+")  # a reader maps no other path
ALIGNMENT_BYTES = 64  # a tensor must start at a multiple of its element size


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaHandle:
    """CUDA IPC handle of GPU memory: the values that `UntypedStorage._share_cuda_` returns."""

    gpu: str  # UUID; GPU indices differ between processes
    memory: bytes
    num_bytes: int
    offset_bytes: int
    counter: bytes
    counter_offset: int
    event: bytes
    event_sync: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightBucket:
    """Location and contents of one bucket. All values are plain, so any RPC can carry it."""

    path: str = ""  # /proc/PID/fd/N of the writer; "" for memory of a GPU
    handle: CudaHandle | None = None
    memory: str  # unique id of the memory; a later writer may have the same path
    num_bytes: int  # of the bucket, padding included
    memory_bytes: int  # of the whole memory
    dtype: str  # of every tensor, for example "bfloat16"
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]


class BucketWriter:
    """Owner of one piece of memory that holds one bucket at a time."""

    def __init__(self, dtype: torch.dtype, device: torch.device | None = None) -> None:
        """device: a GPU, or None for host memory."""
        self._dtype, self._device = dtype, device
        self._file = -1 if device else os.memfd_create("megatron_vrl_weights")
        self._path = "" if device else f"/proc/{os.getpid()}/fd/{self._file}"
        self._name = ""
        self._handle: CudaHandle | None = None
        self._memory = torch.empty(0, dtype=torch.uint8)

    def write(self, named_tensors: NamedTensors) -> WeightBucket:
        """Fill the memory with these tensors, cast to the writer's dtype.

        The tensors are taken from the iterable one at a time.
        """
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
        return self._located(
            WeightBucket(
                memory="",
                num_bytes=end,
                memory_bytes=0,
                dtype=str(self._dtype).removeprefix("torch."),
                names=tuple(names),
                shapes=tuple(shapes),
            )
        )

    def reserve(self, bucket: WeightBucket) -> WeightBucket:
        """Make room for a bucket of another writer and return it with this writer's location.

        `flat` and `contents` give the bytes to fill.
        """
        self._grow(bucket.num_bytes)
        return self._located(bucket)

    def tensors(self, bucket: WeightBucket) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors of the bucket in this memory, for use in the writer's process."""
        return views(self._memory, bucket)

    def flat(self, bucket: WeightBucket) -> torch.Tensor:
        """Return the bytes of the bucket in this memory, uint8 [num_bytes]."""
        return self._memory[: bucket.num_bytes]

    def contents(self, bucket: WeightBucket) -> memoryview:
        """Return the bytes of the bucket in host memory: shared memory, or a copy of a GPU's."""
        return self.flat(bucket).cpu().numpy().data

    def close(self) -> None:
        """Release the file. Readers keep the memory that they have mapped."""
        if self._device is None:
            os.close(self._file)

    def _located(self, bucket: WeightBucket) -> WeightBucket:
        """Return the bucket with the location of this writer's memory."""
        return replace(
            bucket,
            path=self._path,
            handle=self._handle,
            memory=self._name,
            memory_bytes=len(self._memory),
        )

    def _grow(self, num_bytes: int) -> None:
        """Enlarge the memory to at least `num_bytes` and keep its contents."""
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


class BucketReader:
    """Cache of the memory of other processes' writers, opened once for each."""

    def __init__(self) -> None:
        self._open: dict[str, torch.Tensor] = {}  # by WeightBucket.memory
        self._used: set[str] = set()  # in this weight sync

    def read(self, bucket: WeightBucket) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors of the bucket as views of the writer's memory.

        Raises RolloutError if the bucket's location is not the memory of a process.
        """
        if bucket.memory not in self._open:
            self._open[bucket.memory] = _open(bucket)
        self._used.add(bucket.memory)
        yield from views(self._open[bucket.memory], bucket)

    def end_update(self) -> None:
        """Close memory that this weight sync did not read; its writer is gone or has grown."""
        self._open = {name: self._open[name] for name in self._used}
        self._used = set()


def views(memory: torch.Tensor, bucket: WeightBucket) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a bucket whose bytes start at the beginning of `memory`."""
    dtype, start = torch_dtype(bucket.dtype), 0
    for name, shape in zip(bucket.names, bucket.shapes, strict=True):
        yield name, _view(memory, start, shape, dtype)
        start += _padded_bytes(shape, dtype)


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype of a name: "float32" -> torch.float32."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def visible_gpus() -> tuple[str, ...]:
    """Return the UUIDs of the GPUs visible to this process, by device index."""
    count = torch.cuda.device_count()
    return tuple(str(torch.cuda.get_device_properties(index).uuid) for index in range(count))


def _open(bucket: WeightBucket) -> torch.Tensor:
    if bucket.handle is not None:
        return _cuda_memory(bucket.handle)
    if not MEMFD_PATH.fullmatch(bucket.path):
        raise RolloutError(f"{bucket.path} is not the memory of a process: send a weight bucket.")
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
            f"The weights are on GPU {handle.gpu}, which this process cannot see: add it to "
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
