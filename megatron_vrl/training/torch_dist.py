"""Megatron's checkpoint format, torch_dist, one tensor at a time and without a model.

What `megatron.core.dist_checkpointing.load` reads: tensors as `torch.save` writes them, one behind
the other in `*.distcp` files, and in `.metadata` where each lies and which part of which tensor it
is. Written by one process, read in any layout. Names are those of the whole model's layers, see
`training/checkpoint.py`.
"""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from megatron_vrl.errors import CheckpointError
from megatron_vrl.training.checksums import HashingFile, Sums
from megatron_vrl.training.pickles import check_pickles

FILE_BYTES = 4 * 2**30
CHUNK_BYTES = 256 * 2**20  # of a tensor; a reader that wants a part reads whole chunks
_FORMAT = {"sharded_backend": "torch_dist", "common_backend": "torch"}


class TorchDistWriter:
    """Writes tensors to WEIGHTS, a new directory; complete once `close`d."""

    def __init__(self, weights: Path) -> None:
        self.weights = weights
        weights.mkdir(parents=True)
        self._metadata = Metadata(state_dict_metadata={})
        self._results: list[WriteResult] = []
        self._sums: Sums = {}
        self._file: HashingFile | None = None
        self._name = ""

    def add(self, name: str, tensor: Tensor) -> None:
        """Raises OSError if the disk is full."""
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
            torch.save(part, cast(IO[bytes], self._file))
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # torch hides it behind its own clean-up
                raise error.__context__ from None
            raise
        length = self._file.tell() - offset
        place = _StorageInfo(self._name, offset, length)
        self._results.append(WriteResult(index=index, size_in_bytes=length, storage_data=place))

    def _begin_file(self) -> None:
        self._end_file()
        self._name = f"__0_{len(self._sums)}.distcp"
        self._file = HashingFile(open(self.weights / self._name, "wb"))  # noqa: SIM115

    def _end_file(self) -> None:
        if self._file is not None:
            self._sums[self._name] = self._file.close()
            self._file = None

    def abandon(self) -> None:
        """Let go of the file after an error."""
        with suppress(OSError):  # of a full disk, once more
            self._end_file()

    def close(self) -> Sums:
        """Write what makes it a checkpoint; SHA-256 of the files with tensors."""
        self._end_file()
        torch.save({}, self.weights / "common.pt")
        FileSystemWriter(self.weights).finish(self._metadata, [self._results])
        versions = {"sharded_backend_version": 1, "common_backend_version": 1}
        (self.weights / "metadata.json").write_text(json.dumps(_FORMAT | versions))
        return self._sums


class _KnownMetadata(FileSystemReader):
    """Does not read `.metadata` again for each tensor."""

    def __init__(self, weights: Path, metadata: Metadata) -> None:
        super().__init__(weights)
        self._known = metadata

    def read_metadata(self) -> Metadata:
        return self._known


class TorchDistReader:
    """The tensors of WEIGHTS as whole ones, whatever layout they were written in.

    Raises CheckpointError naming the file and the tensor.
    """

    def __init__(self, weights: Path) -> None:
        self.weights = weights
        metadata = check_pickles(weights)
        self._reader = _KnownMetadata(weights, metadata)
        self._kinds = {
            name: kind
            for name, kind in metadata.state_dict_metadata.items()
            if isinstance(kind, TensorStorageMetadata)
        }
        files = sorted({place.relative_path for place in metadata.storage_data.values()})
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
        tensor = torch.empty(self.shape(name), dtype=self._kinds[name].properties.dtype)
        with self._damage_named(name), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it should be
            dcp.load({name: tensor}, storage_reader=self._reader, no_dist=True)
        return tensor

    @contextmanager
    def _damage_named(self, name: str) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, ValueError, EOFError, dcp.CheckpointException) as error:
            reason = str(error).strip().splitlines()[-1] if str(error) else type(error).__name__
            raise CheckpointError(
                f"{self.weights}: the tensor {name} cannot be read ({reason}): restore it."
            ) from None
