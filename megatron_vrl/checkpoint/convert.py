"""Convert checkpoints between Hugging Face and Megatron, and compare them, tensor by tensor.

No model is built and no process group is needed. Memory holds the tensors of one row of the weight
map at a time. Both directions check names, shapes and disk space before they write. The target is
written as TARGET.partial and renamed when it is complete.
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

from megatron_vrl.checkpoint.adapters_note import AdaptersNote, read_note
from megatron_vrl.checkpoint.checksums import check_sums_alone, write_sums
from megatron_vrl.checkpoint.hf_reader import HFCheckpoint, HFCheckpointWriter, copy_side_files
from megatron_vrl.checkpoint.layout import HF, STATE, WEIGHTS, hf_dir_of, is_megatron
from megatron_vrl.checkpoint.torch_dist import TorchDistReader, TorchDistWriter
from megatron_vrl.config import Lora
from megatron_vrl.errors import CheckpointError
from megatron_vrl.models.adapters import adapter_rows, factor_name
from megatron_vrl.models.architecture import Architecture, read_architecture
from megatron_vrl.models.chunk import whole_model
from megatron_vrl.models.families import family_of
from megatron_vrl.models.family import Shape
from megatron_vrl.models.weight_layouts import Row
from megatron_vrl.models.weight_map import chunk_rows, hf_shapes, megatron_shape
from megatron_vrl.storage.files import full_disk_named
from megatron_vrl.storage.no_checkpoint import advice

Writer = TypeVar("Writer", TorchDistWriter, HFCheckpointWriter)


class Source(Protocol):
    """Checkpoint of either kind, read by rows of the weight map."""

    def hf(self, row: Row) -> list[Tensor]:
        """Return the row's tensors in Hugging Face's layout."""
        ...

    def megatron(self, row: Row) -> Tensor:
        """Return the row's unsharded tensor in Megatron's layout."""
        ...


class _HuggingFace:
    def __init__(self, directory: Path, arch: Architecture) -> None:
        self._files = HFCheckpoint(directory, arch)
        self.type_note = self._files.type_note

    def hf(self, row: Row) -> list[Tensor]:
        return [self._files.tensor(name) for name in row.hf_names]

    def megatron(self, row: Row) -> Tensor:
        return row.layout.join(self.hf(row))


class _Megatron:
    def __init__(self, directory: Path, arch: Architecture) -> None:
        self._files = TorchDistReader(directory / WEIGHTS)
        shapes = hf_shapes(arch)
        known = set()
        for row in chunk_rows(arch, whole_model(arch)):
            stored, wanted = self._files.shape(row.megatron), megatron_shape(row, shapes)
            if row.layout.rows is not None and stored[0] >= wanted[0]:
                stored = (wanted[0], *stored[1:])  # zeros for the tensor-parallel ranks
            _same_shape(directory / WEIGHTS, row.megatron, stored, wanted)
            known.add(row.megatron)
        extra = {n for n in self._files.names() - known if not n.startswith("optimizer.")}
        if extra:
            raise CheckpointError(
                f"{directory / 'weights'} holds {min(extra)}, which the model of config.json does "
                "not have: config.json is of another model."
            )

    def hf(self, row: Row) -> list[Tensor]:
        return row.layout.part(self.megatron(row))

    def megatron(self, row: Row) -> Tensor:
        return self._files.tensor(row.megatron)[: row.layout.rows]


class _Adapters:
    """Adapters and their base, which are merged tensor by tensor."""

    def __init__(self, directory: Path, note: AdaptersNote, arch: Architecture) -> None:
        self.lora = Lora(**note.lora)
        self._files = TorchDistReader(directory / WEIGHTS)
        base = Path(note.base)
        if not base.is_dir():
            raise CheckpointError(
                f"{directory} holds adapters of {base}, which does not exist: put the base there."
            )
        self._base = _opened(base, arch)
        rows = adapter_rows(arch, self.lora, whole_model(arch))
        self._factors = {row.hf_names[0]: row.megatron for row in rows}
        self._weights = family_of(arch).weights

    def peft(self) -> dict[str, Tensor]:
        """Return every factor by its name in a PEFT adapter."""
        return {name: self._files.tensor(stored) for name, stored in self._factors.items()}

    def hf(self, row: Row) -> list[Tensor]:
        return [
            self._merged(name, tensor)
            for name, tensor in zip(row.hf_names, self._base.hf(row), strict=True)
        ]

    def megatron(self, row: Row) -> Tensor:
        return row.layout.join(self.hf(row))

    def _merged(self, name: str, weight: Tensor) -> Tensor:
        names = [factor_name(self._weights, name, factor) for factor in "AB"]
        if names[0] not in self._factors:
            return weight
        a, b = (self._files.tensor(self._factors[each]).float() for each in names)
        return torch.addmm(weight.float(), b, a, alpha=self.lora.scale).to(weight.dtype)


def convert_to_megatron(source: Path, target: Path, progress: bool | None = None) -> Architecture:
    """Convert a Hugging Face checkpoint into a Megatron one. Raises CheckpointError."""
    arch = _architecture(source, wants_megatron=False)
    tensors = _HuggingFace(source, arch)
    with _new_directory(target, source) as partial:
        copy_side_files(source, partial / HF)
        with _abandoned_on_error(TorchDistWriter(partial / WEIGHTS)) as writer:
            for row in _rows(arch, progress):
                writer.add(row.megatron, tensors.megatron(row))
            sums = writer.close()
        (partial / STATE).write_text("{}")
        write_sums(partial, {f"{WEIGHTS}/{name}": digest for name, digest in sums.items()})
    return arch


def convert_to_hf(source: Path, target: Path, progress: bool | None = None) -> Architecture:
    """Convert a Megatron checkpoint into a Hugging Face one. Raises CheckpointError.

    Adapters are merged into their base.
    """
    arch = _architecture(source, wants_megatron=True)
    tensors = _opened(source, arch)
    with _new_directory(target, source) as partial:
        copy_side_files(hf_dir_of(source), partial)
        with _abandoned_on_error(HFCheckpointWriter(partial)) as writer:
            for row in _rows(arch, progress):
                for name, tensor in zip(row.hf_names, tensors.hf(row), strict=True):
                    writer.add(name, tensor)
            writer.close()
    return arch


def convert_to_peft(source: Path, target: Path) -> Architecture:
    """Convert a Megatron checkpoint of adapters into a PEFT adapter. Raises CheckpointError."""
    from megatron_vrl.checkpoint.peft_files import write_peft  # imports the trainer

    arch, note = _architecture(source, wants_megatron=True), read_note(source)
    if note is None:
        raise CheckpointError(f"{source} holds whole weights: did you mean megatron-to-hf?")
    adapters = _Adapters(source, note, arch)
    with full_disk_named(target):
        if target.exists():
            raise CheckpointError(f"{target} exists already: choose another directory.")
        write_peft(target, adapters.lora, note.base, adapters.peft())
    return arch


def compare(first: Path, second: Path, progress: bool | None = None) -> int:
    """Compare two checkpoints bit for bit and return their number of tensors.

    A NaN equals itself, and -0 differs from 0. Raises CheckpointError naming the first tensor that
    differs, or a file of a Megatron checkpoint that differs from CHECKSUMS.
    """
    arch, _ = (read_architecture(hf_dir_of(path)) for path in (first, second))
    sources = [_opened(path, arch) for path in (first, second)]
    count = 0
    for row in _rows(arch, progress):
        pairs = zip(*(source.hf(row) for source in sources), strict=True)
        for name, (a, b) in zip(row.hf_names, pairs, strict=True):
            count += 1
            if not _equal(a, b):
                raise CheckpointError(f"{first} and {second} differ, first in {name}.")
    for path in filter(is_megatron, (first, second)):
        check_sums_alone(path)
    return count


def stored_tensors(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, unsharded tensor) of a checkpoint of either kind."""
    arch = read_architecture(hf_dir_of(checkpoint))
    tensors = _opened(checkpoint, arch)
    if isinstance(tensors, _HuggingFace) and (note := tensors.type_note()):
        print(f"warning: {note}", file=sys.stderr)
    for row in _rows(arch, progress=False):
        yield from zip(row.hf_names, tensors.hf(row), strict=True)


def _opened(path: Path, arch: Architecture) -> Source:
    if not is_megatron(path):
        return _HuggingFace(path, arch)
    note = read_note(path)
    return _Megatron(path, arch) if note is None else _Adapters(path, note, arch)


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
    """Return the rows of the whole model. `progress` None: show a bar if stderr is a terminal."""
    off = None if progress is None else not progress
    return iter(tqdm(chunk_rows(arch, whole_model(arch)), "tensors", disable=off))


def _same_shape(folder: Path, name: str, stored: Shape, wanted: Shape) -> None:
    if stored != wanted:
        raise CheckpointError(
            f"{folder}: {name} has the shape {list(stored)}, and config.json asks for "
            f"{list(wanted)}: config.json is of another model."
        )


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))


@contextmanager
def _abandoned_on_error(writer: Writer) -> Iterator[Writer]:
    """Abandon the writer if the block raises."""
    try:
        yield writer
    except BaseException:
        writer.abandon()
        raise


@contextmanager
def _new_directory(target: Path, source: Path) -> Iterator[Path]:
    """Yield TARGET.partial, which is renamed to `target` at the end or removed on an error."""
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
    """Raises CheckpointError if the disk of `target` is too small for the files of `source`."""
    files = [*source.glob("*.safetensors"), *source.glob("weights/*")]
    wanted = sum(file.stat().st_size for file in files)
    free = shutil.disk_usage(target.parent).free
    if free < wanted:
        raise CheckpointError(
            f"{target} needs about {wanted >> 20} MiB, and its disk has {free >> 20} MiB left: "
            "make room."
        )
