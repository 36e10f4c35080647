"""Check the pickles of a checkpoint against an allow-list before torch loads them.

torch reads `.metadata` with a plain `pickle.load`, which calls any function that the file names.
Our checkpoints pickle a dozen record classes, and any other name is an error. `common.pt`, tensors
and byte objects are torch zip files. Their pickles are read by the same unpickler, with None in the
place of tensors.
"""

import io
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from megatron_vrl.errors import CheckpointError

_DCP = "torch.distributed.checkpoint."
ALLOWED = frozenset(
    {
        *(f"{_DCP}metadata.{name}" for name in ("Metadata", "MetadataIndex", "StorageMeta")),
        *(f"{_DCP}metadata.{name}" for name in ("TensorProperties", "_MEM_FORMAT_ENCODING")),
        *(f"{_DCP}metadata.{kind}StorageMetadata" for kind in ("Tensor", "Bytes", "Chunk")),
        *(f"{_DCP}planner.{name}" for name in ("SavePlan", "WriteItem", "WriteItemType")),
        f"{_DCP}planner.TensorWriteData",
        f"{_DCP}filesystem._StorageInfo",
        f"{_DCP}filesystem._StoragePrefix",
        "torch.Size",
        "torch.serialization._get_layout",
        "collections.OrderedDict",
        "pathlib.PosixPath",
        "pathlib._local.PosixPath",  # its name in Python 3.13
        *(f"torch.{name}" for name in ("float32", "bfloat16", "float16", "float64")),
        *(f"torch.{name}" for name in ("int64", "int32", "uint8", "bool")),
    }
)
# Functions that rebuild tensors, and storage classes. All are read as None.
TENSOR_PARTS = frozenset(
    {
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_parameter",
        *(f"torch.{kind}Storage" for kind in ("Float", "BFloat16", "Half", "Double", "Long")),
        *(f"torch.{kind}Storage" for kind in ("Int", "Byte", "Bool")),
    }
)


def _none(*_: Any) -> None:
    return None


class _Restricted(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, origin: str, tensors: bool) -> None:
        super().__init__(file)
        self._origin, self._tensors = origin, tensors

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if self._tensors and full in TENSOR_PARTS:
            return _none
        if full not in ALLOWED:
            raise CheckpointError(
                f"{self._origin} names {full}, which no checkpoint of this program holds; loading "
                "it could run code, so it was not read: use a checkpoint from a source you trust."
            )
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> None:
        return None  # a storage


def read_metadata(weights: Path) -> Metadata:
    """Return the `.metadata` of a torch_dist folder.

    Raises CheckpointError if the file is missing, damaged or names a class that is not allowed.
    """
    file = weights / ".metadata"
    try:
        metadata = _read(file.read_bytes(), str(file))
    except OSError as error:
        raise CheckpointError(f"Cannot read {file}: {error.strerror}. Restore it.") from None
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"{file} is not a checkpoint's metadata: restore it.")
    return metadata


def check_pickles(weights: Path) -> Metadata:
    """Check every pickle of a torch_dist folder and return its metadata.

    Pickles of tensors are left out: torch reads them under its own allow-list (`weights_only`).
    Raises CheckpointError naming the file and the class.
    """
    metadata = read_metadata(weights)
    for file in sorted(weights.rglob("*.pt")):
        _read_zip(file.read_bytes(), str(file))
    for name, content in _byte_objects(weights, metadata):
        _read_zip(content, name)
    return metadata


def _byte_objects(weights: Path, metadata: Metadata) -> Iterator[tuple[str, bytes]]:
    """Yield (name for messages, content) of each pickled object among the tensors."""
    for index, stored in (metadata.storage_data or {}).items():
        kind = metadata.state_dict_metadata.get(index.fqn)
        if not isinstance(kind, BytesStorageMetadata):
            continue
        path = weights / stored.relative_path
        try:
            with open(path, "rb") as file:
                file.seek(stored.offset)
                yield f"{path} ({index.fqn})", file.read(stored.length)
        except OSError as error:
            raise CheckpointError(f"Cannot read {path}: {error.strerror}. Restore it.") from None


def _read_zip(content: bytes, origin: str) -> None:
    """Check the pickles of a torch zip file.

    Raises CheckpointError if it is no zip: torch would read it as a bare pickle.
    """
    try:
        archive = zipfile.ZipFile(io.BytesIO(content))
        pickles = [name for name in archive.namelist() if name.endswith(".pkl")]
        contents = [archive.read(name) for name in pickles]
    except (zipfile.BadZipFile, ValueError, EOFError) as error:
        raise CheckpointError(f"{origin} is damaged ({error}): restore it.") from None
    for inner in contents:
        _read(inner, origin, tensors=True)


def _read(content: bytes, origin: str, tensors: bool = False) -> Any:
    try:
        return _Restricted(io.BytesIO(content), origin, tensors).load()
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        raise CheckpointError(f"{origin} is damaged ({error}): restore it.") from None
