"""Hugging Face checkpoints on disk: read tensors on demand, write shards as a stream.

Memory holds at most one tensor in either direction. The writer reserves space for a shard's header
at the front of the file and writes the header last, so it need not know the tensors in advance.
The format allows a header to end in spaces (https://huggingface.co/docs/safetensors).
"""

import json
import re
import shutil
import struct
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from megatron_vrl.errors import CheckpointError
from megatron_vrl.models.architecture import Architecture, config_dtype
from megatron_vrl.models.families import family_of
from megatron_vrl.models.family import WeightMap, released_name
from megatron_vrl.models.weight_map import hf_shapes
from megatron_vrl.storage.hf_files import (
    INDEX,
    SINGLE,
    StoredTensor,
    is_weight_file,
    opened,
    read_headers,
)

SHARD_BYTES = 4 * 2**30
HEADER_BYTES = 64 * 2**10 - 8  # of each shard; with its length, pages: tensors begin on one
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
TYPE_NAMES = {stored: str(dtype).removeprefix("torch.") for dtype, stored in DTYPES.items()}
CHAT_TEMPLATES = "additional_chat_templates"  # a directory, of transformers 5
COMPARED_ROWS = 8192  # of a head and the embedding at a time
# Buffers that every reader computes. transformers ignores them, too.
HARMLESS = re.compile(r"rotary(_pos)?_emb\.inv_freq$")
# Tensors of quantisers: compressed-tensors, DeepSeek's FP8, ModelOpt, bitsandbytes, GPTQ, AWQ.
QUANTISED = re.compile(
    r"(_scale|_scale_inv|_scale_2|_zero_point|_packed|\bSCB|\bqweight|\bqzeros|\bscales|\bg_idx"
    r"|\babsmax|\bquant_map|\bquant_state\.\w+|\bweight_format)$"
)


class HFCheckpoint:
    """Tensors of a Hugging Face folder by name, read on demand.

    The constructor compares the headers with the model of config.json. It raises CheckpointError,
    naming file and tensor, for a tensor that is missing, unknown, of another shape, or not float32,
    bfloat16 or float16. Two kinds of unknown tensors are ignored: the buffers of HARMLESS, and a
    head that is bit-equal to the embedding it is tied to.
    """

    def __init__(self, directory: str | Path, arch: Architecture) -> None:
        self.directory = Path(directory)
        self._weights = family_of(arch).weights
        self._stored = _by_released_name(read_headers(self.directory), self._weights)
        shapes = hf_shapes(arch)
        extra = sorted(self._stored.keys() - shapes.keys())
        _check_not_quantised(self.directory, extra)
        for name, shape in shapes.items():
            _check_tensor(self._entry(name), name, shape)
        for name in extra:
            self._check_extra(name)
        self._shapes = shapes

    def file_of(self, name: str) -> Path:
        return self._entry(name).file

    def tensor(self, name: str) -> Tensor:
        """Return a tensor. The file is opened each time, so that read pages can leave memory."""
        stored = self._entry(name)
        with opened(stored.file) as shard:
            found: Tensor = shard.get_tensor(stored.name)
        return found

    def type_note(self) -> str:
        """Return a sentence if tensors are stored in another type than config.json names."""
        wanted = config_dtype(self.directory)
        types = {name: TYPE_NAMES[self._entry(name).dtype] for name in self._shapes}
        others = [name for name, dtype in types.items() if wanted and dtype != wanted]
        if not others:
            return ""
        return (
            f"{self.directory}: {len(others)} of {len(types)} tensors, the first {others[0]}, are "
            f"stored as {types[others[0]]} and config.json says {wanted}; they are cast on loading."
        )

    def _entry(self, name: str) -> StoredTensor:
        if name not in self._stored:
            raise CheckpointError(f"{self.directory} lacks the tensor {name}: a shard is missing.")
        return self._stored[name]

    def _check_extra(self, name: str) -> None:
        if HARMLESS.search(name):
            return
        reason = "which the model of config.json does not have: config.json is of another model"
        if name == self._weights.head:
            if self._head_is_tied():
                return
            reason = (
                f"which differs from {self._weights.embedding}, and config.json ties the two: set "
                "tie_word_embeddings to false in config.json or remove the head"
            )
        raise CheckpointError(f"{self.file_of(name)} holds {name}, {reason}.")

    def _head_is_tied(self) -> bool:
        """Return whether the head is bit-equal to the embedding; reads some rows at a time."""
        head, embedding = self._entry(self._weights.head), self._entry(self._weights.embedding)
        if (head.dtype, head.shape) != (embedding.dtype, embedding.shape):
            return False
        with opened(head.file) as first, opened(embedding.file) as second:
            pair = first.get_slice(head.name), second.get_slice(embedding.name)
            return all(
                torch.equal(*(part[row : row + COMPARED_ROWS].view(torch.uint8) for part in pair))
                for row in range(0, head.shape[0], COMPARED_ROWS)
            )


def _by_released_name(entries: list[StoredTensor], weights: WeightMap) -> dict[str, StoredTensor]:
    stored: dict[str, StoredTensor] = {}
    for entry in entries:
        name = released_name(weights, entry.name)
        if name in stored:
            raise CheckpointError(
                f"{entry.file} holds {entry.name}, which is the same tensor as "
                f"{stored[name].name}: remove one of them."
            )
        stored[name] = entry
    return stored


def _check_not_quantised(directory: Path, extra: list[str]) -> None:
    if (name := next(filter(QUANTISED.search, extra), None)) is not None:
        raise CheckpointError(
            f"{directory} holds {name}, so its weights are quantised, which is not read: give the "
            "checkpoint in bfloat16, float16 or float32."
        )


def _check_tensor(stored: StoredTensor, name: str, shape: tuple[int, ...]) -> None:
    if stored.dtype not in TYPE_NAMES:
        raise CheckpointError(
            f"{stored.file} stores {name} as {stored.dtype}, which is not read: give the "
            "checkpoint in bfloat16, float16 or float32."
        )
    if stored.shape != shape:
        raise CheckpointError(
            f"{stored.file}: {name} has the shape {list(stored.shape)}, and config.json asks for "
            f"{list(shape)}: config.json is of another model."
        )


class HFCheckpointWriter:
    """Writer of a Hugging Face checkpoint: `add` tensors, then `close`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._shards: list[dict[str, int]] = []  # bytes of each tensor
        self._file: IO[bytes] | None = None
        self._header: dict[str, Any] = {}
        self._header_bytes = 0
        self._end = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a tensor. Raises OSError if the disk is full."""
        entry = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape)}
        entry["data_offsets"] = [self._end, self._end + tensor.nbytes]
        if self._file is None or not self._fits(name, entry, tensor.nbytes):
            self._begin_shard()
            entry["data_offsets"] = [0, tensor.nbytes]
        assert self._file is not None
        self._header[name] = entry
        self._header_bytes += _json_bytes({name: entry})
        self._end += tensor.nbytes
        self._file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self._shards[-1][name] = tensor.nbytes

    def close(self) -> None:
        """Name the shards and write their index. Raises OSError if the disk is full."""
        self._end_shard()
        self._name_shards()

    def abandon(self) -> None:
        """Close the open file after an error."""
        if self._file is not None:
            with suppress(OSError):  # the disk is still full
                self._file.close()

    def _fits(self, name: str, entry: dict[str, Any], num_bytes: int) -> bool:
        room = HEADER_BYTES - self._header_bytes
        return self._end + num_bytes <= SHARD_BYTES and _json_bytes({name: entry}) < room

    def _begin_shard(self) -> None:
        self._end_shard()
        self._file = open(self._path(len(self._shards)), "wb")  # noqa: SIM115
        self._file.seek(8 + HEADER_BYTES)
        self._header, self._end = {"__metadata__": {"format": "pt"}}, 0
        self._header_bytes = _json_bytes(self._header)
        self._shards.append({})

    def _end_shard(self) -> None:
        if self._file is None:
            return
        header = json.dumps(self._header, separators=(",", ":")).encode().ljust(HEADER_BYTES)
        self._file.seek(0)
        self._file.write(struct.pack("<Q", len(header)) + header)
        self._file.close()
        self._file = None

    def _path(self, number: int) -> Path:
        return self.directory / f"shard-{number}.safetensors"

    def _name_shards(self) -> None:
        """Rename the shards as transformers does, and write an index if there are several."""
        count = len(self._shards)
        if count == 1:
            self._path(0).rename(self.directory / SINGLE)
            return
        weight_map: dict[str, str] = {}
        for number, sizes in enumerate(self._shards):
            file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._path(number).rename(self.directory / file)
            weight_map |= dict.fromkeys(sizes, file)
        total = sum(size for sizes in self._shards for size in sizes.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (self.directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _json_bytes(entries: dict[str, Any]) -> int:
    return len(json.dumps(entries))


def copy_side_files(template: str | Path, directory: Path) -> None:
    """Copy config, tokenizer and processor files: all files of a checkpoint but its weights.

    Directories other than `additional_chat_templates` are left out.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for file in Path(template).iterdir():
        if file.is_file() and not is_weight_file(file.name):
            shutil.copy2(file, directory / file.name)
    if (templates := Path(template) / CHAT_TEMPLATES).is_dir():
        shutil.copytree(templates, directory / CHAT_TEMPLATES, dirs_exist_ok=True)
