"""Read and write Megatron's checkpoint format torch_dist, tensor by tensor and without a model.

`megatron.core.dist_checkpointing.load` reads these files in any layout. `*.distcp` files hold
tensors as `torch.save` writes them, one after another. `.metadata` holds the position of each and
the part of a tensor that it is. Tensors are named by their layer in the whole model (see
`checkpoint/checkpoint.py`).
"""

import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.serialization import get_crc32_options, set_crc32_options

from megatron_vrl.checkpoint.checksums import HashingFile, Sums
from megatron_vrl.checkpoint.safe_pickle import check_pickles
from megatron_vrl.errors import CheckpointError

FILE_BYTES = 4 * 2**30
CHUNK_BYTES = 256 * 2**20  # of a tensor; readers always read whole chunks
_FORMAT = {"sharded_backend": "torch_dist", "common_backend": "torch"}


@contextmanager
def _without_crc32() -> Iterator[None]:
    """Turn off torch's CRC32 in this block. CHECKSUMS replace it, and it took most of the time."""
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(before)


class TorchDistWriter:
    """Writer of a new torch_dist folder: `add` tensors, then `close`."""

    def __init__(self, weights: Path) -> None:
        self.weights = weights
        weights.mkdir(parents=True)
        self._metadata = Metadata(state_dict_metadata={})
        self._results: list[WriteResult] = []
        self._sums: Sums = {}
        self._file: HashingFile | None = None
        self._name = ""

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a tensor. Raises OSError if the disk is full."""
        row_bytes = max(1, tensor.nbytes // len(tensor))
        chunks: list[ChunkStorageMetadata] = []
        first = 0
        for part in tensor.split(max(1, CHUNK_BYTES // row_bytes)):
            offsets = torch.Size([first, *[0] * (tensor.dim() - 1)])
            chunks.append(ChunkStorageMetadata(offsets=offsets, sizes=part.shape))
            self._write(MetadataIndex(name, offsets, len(chunks) - 1), part)
            first += len(part)
        self._metadata.state_dict_metadata[name] = TensorStorageMetadata(
            TensorProperties(dtype=tensor.dtype), tensor.shape, chunks
        )

    def _write(self, index: MetadataIndex, part: Tensor) -> None:
        if self._file is None or self._file.tell() + part.nbytes > FILE_BYTES:
            self._begin_file()
        assert self._file is not None
        offset = self._file.tell()
        if part.untyped_storage().nbytes() != part.nbytes or not part.is_contiguous():
            part = part.clone(memory_format=torch.contiguous_format)  # a whole storage is saved
        try:
            with _without_crc32():
                torch.save(part, cast(IO[bytes], self._file))
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # the cause of torch's own error
                raise error.__context__ from None
            raise
        length = self._file.tell() - offset
        stored = _StorageInfo(self._name, offset, length)
        self._results.append(WriteResult(index=index, size_in_bytes=length, storage_data=stored))

    def _begin_file(self) -> None:
        self._end_file()
        self._name = f"__0_{len(self._sums)}.distcp"
        self._file = HashingFile(open(self.weights / self._name, "wb"))  # noqa: SIM115

    def _end_file(self) -> None:
        if self._file is not None:
            self._sums[self._name] = self._file.close()
            self._file = None

    def abandon(self) -> None:
        """Close the open file after an error."""
        with suppress(OSError):  # the disk is still full
            self._end_file()

    def close(self) -> Sums:
        """Write the metadata files, and return the hashes of the files with tensors."""
        self._end_file()
        torch.save({}, self.weights / "common.pt")
        FileSystemWriter(self.weights).finish(self._metadata, [self._results])
        versions = {"sharded_backend_version": 1, "common_backend_version": 1}
        (self.weights / "metadata.json").write_text(json.dumps(_FORMAT | versions))
        return self._sums


class _Window(io.RawIOBase):
    """Part of a file as a file object, from which `torch.load` reads without a copy."""

    def __init__(self, path: Path, first: int, length: int) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        self._first, self._length, self._position = first, length, 0

    def readinto(self, buffer: Any) -> int:
        room = memoryview(buffer).cast("B")[: max(0, self._length - self._position)]
        read = os.preadv(self._file.fileno(), [room], self._first + self._position)
        self._position += read
        return read

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()


class TorchDistReader:
    """Reader of a torch_dist folder of any layout. It returns unsharded tensors.

    Every method raises CheckpointError naming the file and the tensor.
    """

    def __init__(self, weights: Path) -> None:
        self.weights = weights
        metadata = check_pickles(weights)
        self._stored: dict[MetadataIndex, Any] = metadata.storage_data
        self._kinds = {
            name: kind
            for name, kind in metadata.state_dict_metadata.items()
            if isinstance(kind, TensorStorageMetadata)
        }
        files = sorted({stored.relative_path for stored in metadata.storage_data.values()})
        for file in files:
            if not (weights / file).is_file():
                raise CheckpointError(f"{weights} lacks its file {file}: restore it.")

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._kinds:
            raise CheckpointError(f"{self.weights}/.metadata lacks the tensor {name}: restore it.")
        return tuple(self._kinds[name].size)

    def names(self) -> set[str]:
        return set(self._kinds)

    def tensor(self, name: str) -> Tensor:
        shape, kind = self.shape(name), self._kinds[name]
        with self._damage_named(name):
            if len(kind.chunks) == 1:
                return self._chunk(name, kind.chunks[0])
            whole = torch.empty(shape, dtype=kind.properties.dtype)
            for chunk in kind.chunks:
                spans = zip(chunk.offsets, chunk.sizes, strict=True)
                part = whole[tuple(slice(first, first + size) for first, size in spans)]
                part.copy_(self._chunk(name, chunk))
        return whole

    def _chunk(self, name: str, chunk: ChunkStorageMetadata) -> Tensor:
        stored = self._stored[MetadataIndex(name, chunk.offsets)]
        with _Window(self.weights / stored.relative_path, stored.offset, stored.length) as file:
            tensor: Tensor = torch.load(cast(IO[bytes], file), weights_only=True)
        if tensor.shape != chunk.sizes:
            raise ValueError(f"a part of shape {list(tensor.shape)} for {list(chunk.sizes)}")
        return tensor

    @contextmanager
    def _damage_named(self, name: str) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, ValueError, EOFError, UnpicklingError) as error:
            reason = str(error).strip().splitlines()[-1] if str(error) else type(error).__name__
            raise CheckpointError(
                f"{self.weights}: the tensor {name} cannot be read ({reason}): restore it."
            ) from None
