"""No pickle of a checkpoint runs code: each is first read under an allow-list.

torch reads `.metadata` with a plain `pickle.load`, which calls whatever the file names. What our
checkpoints hold in pickles is a dozen record classes; any other name is refused. The rest
(`common.pt`, tensors, byte objects) are torch zip files, whose pickle is read the same way, with
stand-ins for tensors.
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
# Read as None: what makes a tensor out of a storage, and the storages' names.
TENSOR_PARTS = frozenset(
    {
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_parameter",
        *(f"torch.{kind}Storage" for kind in ("Float", "BFloat16", "Half", "Double", "Long")),
        *(f"torch.{kind}Storage" for kind in ("Int", "Byte", "Bool")),
    }
)


def _nothing(*_: Any) -> None:
    return None


class _Restricted(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, place: str, tensors: bool) -> None:
        super().__init__(file)
        self._place, self._tensors = place, tensors

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if self._tensors and full in TENSOR_PARTS:
            return _nothing
        if full not in ALLOWED:
            raise CheckpointError(
                f"{self._place} names {full}, which no checkpoint of this program holds; loading "
                "it could run code, so it was not read: use a checkpoint from a source you trust."
            )
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> None:
        return None  # a storage


def read_metadata(weights: Path) -> Metadata:
    """`.metadata` of a torch_dist folder. Raises CheckpointError if it is absent or refused."""
    file = weights / ".metadata"
    try:
        metadata = _read(file.read_bytes(), str(file))
    except OSError as error:
        raise CheckpointError(f"Cannot read {file}: {error.strerror}. Restore it.") from None
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"{file} is not a checkpoint's metadata: restore it.")
    return metadata


def check_pickles(weights: Path) -> Metadata:
    """Read every pickle of a torch_dist folder but those of tensors, which torch itself reads under
    an allow-list (`weights_only`). Raises CheckpointError naming file and class."""
    metadata = read_metadata(weights)
    for file in sorted(weights.rglob("*.pt")):
        _read_zip(file.read_bytes(), str(file))
    for name, content in _byte_objects(weights, metadata):
        _read_zip(content, name)
    return metadata


def _byte_objects(weights: Path, metadata: Metadata) -> Iterator[tuple[str, bytes]]:
    for index, place in (metadata.storage_data or {}).items():
        kind = metadata.state_dict_metadata.get(index.fqn)
        if not isinstance(kind, BytesStorageMetadata):
            continue
        path = weights / place.relative_path
        try:
            with open(path, "rb") as file:
                file.seek(place.offset)
                yield f"{path} ({index.fqn})", file.read(place.length)
        except OSError as error:
            raise CheckpointError(f"Cannot read {path}: {error.strerror}. Restore it.") from None


def _read_zip(content: bytes, place: str) -> None:
    """torch falls back to a bare pickle where a file is no zip, so such a file is refused."""
    try:
        archive = zipfile.ZipFile(io.BytesIO(content))
        pickles = [name for name in archive.namelist() if name.endswith(".pkl")]
        contents = [archive.read(name) for name in pickles]
    except (zipfile.BadZipFile, ValueError, EOFError) as error:
        raise CheckpointError(f"{place} is damaged ({error}): restore it.") from None
    for inner in contents:
        _read(inner, place, tensors=True)


def _read(content: bytes, place: str, tensors: bool = False) -> Any:
    try:
        return _Restricted(io.BytesIO(content), place, tensors).load()
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        raise CheckpointError(f"{place} is damaged ({error}): restore it.") from None
