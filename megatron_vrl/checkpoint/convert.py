"""Conversion between Hugging Face and Megatron, and comparison, one tensor at a time.

No model is built and no process group is needed: memory holds one row of the mapping table, read
and joined, never a stage. Both directions check names, shapes and room on the disk before they
write, into a directory that takes its name when it is whole.
"""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_vrl.checkpoint.checksums import check_sums_alone, write_sums
from megatron_vrl.checkpoint.hf_reader import HFCheckpoint, HFCheckpointWriter, copy_side_files
from megatron_vrl.checkpoint.layout import STATE, hf_dir_of, is_megatron
from megatron_vrl.checkpoint.torch_dist import TorchDistReader, TorchDistWriter
from megatron_vrl.errors import CheckpointError
from megatron_vrl.models.architecture import Architecture, read_architecture
from megatron_vrl.models.pipeline_split import whole_model
from megatron_vrl.models.qwen2_5_vl.hf_shapes import Shape, hf_shapes, megatron_shape
from megatron_vrl.models.qwen2_5_vl.weight_map import Row, chunk_rows
from megatron_vrl.storage.files import full_disk_named
from megatron_vrl.storage.no_checkpoint import advice

Writer = TypeVar("Writer", TorchDistWriter, HFCheckpointWriter)


class Source(Protocol):
    """A checkpoint of either kind, by rows of the table."""

    def published(self, row: Row) -> list[Tensor]:
        """The row's tensors as Hugging Face has them."""
        ...

    def megatron(self, row: Row) -> Tensor:
        """The row's tensor as Megatron has it, whole."""
        ...


class _Published:
    def __init__(self, directory: Path, arch: Architecture) -> None:
        self._files = HFCheckpoint(directory, arch)
        self.type_note = self._files.type_note

    def published(self, row: Row) -> list[Tensor]:
        return [self._files.tensor(name) for name in row.hf_names]

    def megatron(self, row: Row) -> Tensor:
        return row.layout.join(self.published(row))


class _Megatron:
    def __init__(self, directory: Path, arch: Architecture) -> None:
        self._files = TorchDistReader(directory / "weights")
        shapes = hf_shapes(arch)
        known = set()
        for row in chunk_rows(arch, whole_model(arch)):
            stored, wanted = self._files.shape(row.megatron), megatron_shape(row, shapes)
            if row.layout.rows is not None and stored[0] >= wanted[0]:
                stored = (wanted[0], *stored[1:])  # zeros for the tensor-parallel ranks
            _same_shape(directory / "weights", row.megatron, stored, wanted)
            known.add(row.megatron)
        extra = {n for n in self._files.names() - known if not n.startswith("optimizer.")}
        if extra:
            raise CheckpointError(
                f"{directory / 'weights'} holds {min(extra)}, which the model of config.json does "
                "not have: config.json is of another model."
            )

    def published(self, row: Row) -> list[Tensor]:
        return row.layout.part(self.megatron(row))

    def megatron(self, row: Row) -> Tensor:
        return self._files.tensor(row.megatron)[: row.layout.rows]


def convert_to_megatron(source: Path, target: Path, progress: bool | None = None) -> Architecture:
    """Hugging Face -> what training loads in any layout. Raises CheckpointError."""
    arch = _architecture(source, wants_megatron=False)
    tensors = _Published(source, arch)
    with _new_directory(target, source) as partial:
        copy_side_files(source, partial / "published")
        with _let_go(TorchDistWriter(partial / "weights")) as writer:
            for row in _rows(arch, progress):
                writer.add(row.megatron, tensors.megatron(row))
            sums = writer.close()
        (partial / STATE).write_text("{}")
        write_sums(partial, {f"weights/{name}": digest for name, digest in sums.items()})
    return arch


def convert_to_hf(source: Path, target: Path, progress: bool | None = None) -> Architecture:
    """Megatron, as training or this tool wrote it -> Hugging Face. Raises CheckpointError."""
    arch = _architecture(source, wants_megatron=True)
    tensors = _Megatron(source, arch)
    with _new_directory(target, source) as partial:
        copy_side_files(hf_dir_of(source), partial)
        with _let_go(HFCheckpointWriter(partial)) as writer:
            for row in _rows(arch, progress):
                for name, tensor in zip(row.hf_names, tensors.published(row), strict=True):
                    writer.add(name, tensor)
            writer.close()
    return arch


def compare(first: Path, second: Path, progress: bool | None = None) -> int:
    """How many tensors the two hold. Raises CheckpointError naming the first that differs.

    Bit for bit: a NaN equals itself and -0 is not 0. A Megatron checkpoint must also agree with
    its CHECKSUMS.
    """
    arch, _ = (read_architecture(hf_dir_of(path)) for path in (first, second))
    sources = [_opened(path, arch) for path in (first, second)]
    count = 0
    for row in _rows(arch, progress):
        pairs = zip(*(source.published(row) for source in sources), strict=True)
        for name, (a, b) in zip(row.hf_names, pairs, strict=True):
            count += 1
            if not _equal(a, b):
                raise CheckpointError(f"{first} and {second} differ, first in {name}.")
    for path in filter(is_megatron, (first, second)):
        check_sums_alone(path)
    return count


def stored_tensors(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    """(published name, whole tensor) of a checkpoint of either kind, one row at a time."""
    arch = read_architecture(hf_dir_of(checkpoint))
    tensors = _opened(checkpoint, arch)
    if isinstance(tensors, _Published) and (note := tensors.type_note()):
        print(f"warning: {note}", file=sys.stderr)
    for row in _rows(arch, progress=False):
        yield from zip(row.hf_names, tensors.published(row), strict=True)


def _opened(path: Path, arch: Architecture) -> Source:
    return _Megatron(path, arch) if is_megatron(path) else _Published(path, arch)


def _architecture(source: Path, wants_megatron: bool) -> Architecture:
    if not source.is_dir():
        known = advice(source) or f"There is no checkpoint {source}: give a directory."
        raise CheckpointError(known)
    arch = read_architecture(hf_dir_of(source))
    if is_megatron(source) != wants_megatron:
        found, other = ("a Megatron", "megatron-to-hf"), ("no Megatron", "hf-to-megatron")
        kind, hint = found if is_megatron(source) else other
        raise CheckpointError(f"{source} is {kind} checkpoint: did you mean {hint}?")
    return arch


def _rows(arch: Architecture, progress: bool | None) -> Iterator[Row]:
    """`progress` None: a bar if stderr is a terminal."""
    off = None if progress is None else not progress
    return iter(tqdm(chunk_rows(arch, whole_model(arch)), "tensors", disable=off))


def _same_shape(place: Path, name: str, stored: Shape, wanted: Shape) -> None:
    if stored != wanted:
        raise CheckpointError(
            f"{place}: {name} has the shape {list(stored)}, and config.json asks for "
            f"{list(wanted)}: config.json is of another model."
        )


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(words), b.contiguous().view(words))


@contextmanager
def _let_go(writer: Writer) -> Iterator[Writer]:
    try:
        yield writer
    except BaseException:
        writer.abandon()
        raise


@contextmanager
def _new_directory(target: Path, source: Path) -> Iterator[Path]:
    """A directory that becomes `target` at the end, and vanishes if that is not reached."""
    if target.exists():
        raise CheckpointError(f"{target} exists already: remove it or choose another directory.")
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with full_disk_named(target):
            partial.mkdir(parents=True)
            _check_room(source, target)
            yield partial
            partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_room(source: Path, target: Path) -> None:
    files = [*source.glob("*.safetensors"), *source.glob("weights/*")]
    wanted = sum(file.stat().st_size for file in files)
    free = shutil.disk_usage(target.parent).free
    if free < wanted:
        raise CheckpointError(
            f"{target} needs about {wanted >> 20} MiB, and its disk has {free >> 20} MiB left: "
            "make room."
        )
