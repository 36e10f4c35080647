"""Hugging Face checkpoints on disk: tensors read on demand, shards written as a stream.

Neither direction holds more than one tensor. A shard's header is written last, into room kept at
the front of the file, so nothing need be known beforehand about the tensors that come (the
format lets a header end in spaces: https://huggingface.co/docs/safetensors).
"""

import json
import shutil
import struct
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_vrl.errors import CheckpointError
from megatron_vrl.model.weight_map import published_name

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 4 * 2**30
HEADER_BYTES = 64 * 2**10 - 8  # of each shard; with its length, pages: tensors begin on one
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class PublishedCheckpoint:
    """The tensors of a Hugging Face directory by published name, read on demand.

    Raises CheckpointError naming the file and the tensor.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._check_complete()
        files = sorted(self.directory.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{directory} holds no .safetensors file: give a checkpoint.")
        self._file_of: dict[str, tuple[Path, str]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            try:
                with safe_open(file, "pt") as shard:
                    for stored in shard.keys():  # noqa: SIM118
                        name = published_name(stored)
                        self._file_of[name] = (file, stored)
                        self.shapes[name] = tuple(shard.get_slice(stored).get_shape())
            except SafetensorError as error:
                raise CheckpointError(f"{file} is damaged ({error}): restore it.") from None

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def file_of(self, name: str) -> Path:
        if name not in self._file_of:
            raise CheckpointError(f"{self.directory} lacks the tensor {name}: a shard is missing.")
        return self._file_of[name][0]

    def tensor(self, name: str) -> Tensor:
        """The file is opened for each tensor, so that what was read can leave memory."""
        file, (_, stored) = self.file_of(name), self._file_of[name]
        with safe_open(file, "pt") as shard:
            return shard.get_tensor(stored)

    def _check_complete(self) -> None:
        index = self.directory / INDEX
        if not index.exists():
            return
        try:
            shards = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{index} is damaged ({error}): restore it.") from None
        for shard in sorted(shards):
            if not (self.directory / shard).exists():
                raise CheckpointError(f"{self.directory} lacks its shard {shard}: restore it.")


class PublishedWriter:
    """Writes `add`ed tensors to DIRECTORY as shards that stock readers load, once `close`d."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._shards: list[dict[str, int]] = []  # bytes of each tensor
        self._file: IO[bytes] | None = None
        self._header: dict[str, Any] = {}
        self._header_bytes = 0
        self._end = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Raises OSError if the disk is full."""
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
        """Let go of the file after an error."""
        if self._file is not None:
            with suppress(OSError):  # of a full disk, once more
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
        """Published names, with an index when there are several."""
        count = len(self._shards)
        if count == 1:
            self._path(0).rename(self.directory / "model.safetensors")
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
    """Copy config, tokenizer and processor files: everything of a checkpoint but its weights."""
    directory.mkdir(parents=True, exist_ok=True)
    for file in Path(template).iterdir():
        if file.is_file() and "safetensors" not in file.name:
            shutil.copy2(file, directory / file.name)
