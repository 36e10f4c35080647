"""Weight files of a Hugging Face (HF) checkpoint directory, and the tensors in their headers.

model.safetensors.index.json decides which file each tensor is read from. Copies of a tensor in
other shards are ignored. Without an index, the weights are model.safetensors. Other .safetensors
files are leftovers of an earlier save and are not opened. (transformers prefers model.safetensors
to the index. The two rules differ only if a directory has both.)

This module reads headers, never tensors.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from megatron_vrl.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Entry of a safetensors header."""

    file: Path
    name: str  # name in the file
    dtype: str  # safetensors name, for example "BF16"
    shape: tuple[int, ...]


def read_headers(directory: Path) -> list[StoredTensor]:
    """Return one entry per tensor of a HF checkpoint.

    Raises CheckpointError if a file is missing or damaged, if index and shards disagree, if the
    directory contains an adapter, or if it is ambiguous which files are the weights.
    """
    check_no_adapter(directory)
    if (directory / INDEX).exists():
        return _indexed(directory)
    return _header(_single_file(directory))


def check_no_adapter(directory: Path) -> None:
    """Raise CheckpointError if the directory contains a LoRA adapter."""
    adapter = next((name for name in ADAPTERS if (directory / name).exists()), None)
    if adapter is not None:
        raise CheckpointError(
            f"{directory} holds an adapter ({adapter}), which would not be applied: merge it into "
            "its base model first (merge_and_unload of peft) and give the merged folder."
        )


def is_weight_file(name: str) -> bool:
    """Return whether a file of a HF checkpoint holds weights or is an index of weight files."""
    return name.removesuffix(".index.json").endswith(WEIGHT_SUFFIXES)


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """Open a safetensors file. Raises CheckpointError if it is damaged."""
    try:
        with safe_open(file, "pt") as shard:
            yield shard
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged ({error}){_restore(file)}.") from None


def _restore(file: Path) -> str:
    """Return the advice for a damaged file."""
    try:
        with file.open("rb") as content:
            pointer = content.read(40).startswith(b"version https://git-lfs")
    except OSError:
        pointer = False
    return ", a Git LFS pointer: run git lfs pull" if pointer else ": restore it"


def _header(file: Path) -> list[StoredTensor]:
    """Return the entries of one file."""
    with opened(file) as shard:
        slices = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118
        return [
            StoredTensor(file, name, entry.get_dtype(), tuple(entry.get_shape()))
            for name, entry in slices.items()
        ]


def _indexed(directory: Path) -> list[StoredTensor]:
    """Return the entries of all shards that the index names.

    Raises CheckpointError if they disagree.
    """
    index = directory / INDEX
    assigned = _weight_map(index)
    stored: list[StoredTensor] = []
    for shard in sorted(set(assigned.values())):
        entries = _header(directory / shard)
        held = {entry.name for entry in entries}
        named = {name for name, file in assigned.items() if file == shard}
        if lost := sorted(named - held):
            raise CheckpointError(
                f"{directory / shard} lacks the tensor {lost[0]}, which {INDEX} expects there: "
                "the files are of different saves, restore them."
            )
        if unknown := sorted(held - assigned.keys()):
            raise CheckpointError(
                f"{directory / shard} holds {unknown[0]}, which {INDEX} does not name: "
                "the files are of different saves, restore them."
            )
        stored += [entry for entry in entries if entry.name in named]
    return stored


def _weight_map(index: Path) -> dict[str, str]:
    """Return tensor name -> shard from the index. Raises CheckpointError if a shard is missing."""
    try:
        assigned = json.loads(index.read_text())["weight_map"]
        if not assigned or not all(isinstance(file, str) for file in assigned.values()):
            raise ValueError("its weight_map names no file for each tensor")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is damaged ({error}): restore it.") from None
    for shard in sorted(set(assigned.values())):
        if Path(shard).name != shard:
            raise CheckpointError(f"{index} names {shard}, which is no file beside it: restore it.")
        if not (index.parent / shard).exists():
            raise CheckpointError(f"{index.parent} lacks its shard {shard}: restore it.")
    return dict(assigned)


def _single_file(directory: Path) -> Path:
    """Return model.safetensors. Raises CheckpointError if other files may be the weights."""
    files = sorted(file.name for file in directory.glob("*.safetensors"))
    if not files:
        raise CheckpointError(_without_safetensors(directory))
    shards = sorted(file.name for file in directory.glob("model-*-of-*.safetensors"))
    if SINGLE not in files or shards:
        others = shards or files
        count = f" and {len(others) - 1} more" if len(others) > 1 else ""
        also = f"beside {SINGLE}" if SINGLE in files else f"but no {SINGLE}"
        raise CheckpointError(
            f"{directory} holds {others[0]}{count} {also}, and no {INDEX} says which of the files "
            "are the weights: restore the index or remove the files of another save."
        )
    return directory / SINGLE


def _without_safetensors(directory: Path) -> str:
    """Return the error message for a directory without .safetensors files."""
    others = sorted(f.name for f in directory.iterdir() if f.name.endswith(WEIGHT_SUFFIXES))
    if not others:
        return f"{directory} holds no .safetensors file: give a checkpoint."
    return (
        f"{directory} holds no .safetensors file, but {others[0]}, which is not read: convert it "
        "with transformers (from_pretrained, then save_pretrained writes safetensors)."
    )
