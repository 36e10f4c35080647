"""Weights in and out: a Hugging Face checkpoint into this rank's shards, and back as a stream.

Reading touches only the tensors of this pipeline stage, one at a time. The stream gathers over
tensor and pipeline ranks, so every rank yields the whole model, one chunk's tensors at a time.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_vrl.errors import CheckpointError
from megatron_vrl.model.qwen25vl import Qwen25VL
from megatron_vrl.model.weight_map import chunk_rows, published_name
from megatron_vrl.observe.files import full_disk_named
from megatron_vrl.parallel.mesh import Mesh, gather_objects

SHARD_BYTES = 4 * 2**30


class PublishedCheckpoint:
    """The tensors of a Hugging Face directory by published name, read on demand."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        files = sorted(self.directory.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{directory} holds no .safetensors file: give a checkpoint.")
        self._file_of: dict[str, tuple[Path, str]] = {}
        for file in files:
            try:
                with safe_open(file, "pt") as shard:
                    self._file_of |= {published_name(n): (file, n) for n in shard.keys()}  # noqa: SIM118
            except SafetensorError as error:
                raise CheckpointError(f"{file} is damaged ({error}): restore it.") from None
        self._check_complete()

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def tensor(self, name: str) -> Tensor:
        if name not in self._file_of:
            raise CheckpointError(f"{self.directory} lacks the tensor {name}: a shard is missing.")
        file, stored = self._file_of[name]
        with safe_open(file, "pt") as shard:
            return shard.get_tensor(stored)

    def _check_complete(self) -> None:
        index = self.directory / "model.safetensors.index.json"
        if not index.exists():
            return
        for shard in sorted(set(json.loads(index.read_text())["weight_map"].values())):
            if not (self.directory / shard).exists():
                raise CheckpointError(f"{self.directory} lacks its shard {shard}: restore it.")


def load_published(chunks: Sequence[Qwen25VL], directory: str | Path) -> None:
    """Copy a Hugging Face checkpoint into this rank's shards. Every rank calls it."""
    source = PublishedCheckpoint(directory)
    for model in chunks:
        _load_chunk(model, source)


@torch.no_grad()
def _load_chunk(model: Qwen25VL, source: PublishedCheckpoint) -> None:
    mesh = model.mesh
    params = dict(model.named_parameters())
    for row in chunk_rows(model.arch, model.chunk):
        tensors = [source.tensor(name) for name in row.published]
        param = params.pop(row.megatron)
        try:
            whole = row.layout.join(tensors)
            shard = row.layout.shard(whole, mesh.tensor.rank, mesh.tensor.size)
        except RuntimeError:  # torch's word for shapes that do not go together
            shard = None
        if shard is None or shard.shape != param.shape:
            raise CheckpointError(
                f"{source.directory}: {', '.join(row.published)} of shape "
                f"{', '.join(str(list(t.shape)) for t in tensors)} do not make the model's "
                f"{list(param.shape)}: config.json is of another model."
            )
        param.copy_(shard)
    assert not params, f"parameters without a row in the table: {sorted(params)}"


@torch.no_grad()
def published_tensors(
    chunks: Sequence[Qwen25VL], value: Callable[[Tensor], Tensor] = torch.Tensor.detach
) -> Iterator[tuple[str, Tensor]]:
    """The whole model as (published name, tensor), the same on every rank, in a fixed order.

    Every rank must call it and exhaust it. One chunk's tensors are in memory at a time. `value`
    is taken of each parameter: itself, or for example its gradient.
    """
    mesh = chunks[0].mesh
    for own in chunks:
        for stage in range(mesh.pipeline.size):
            tensors = _unsharded(own, value) if stage == mesh.pipeline.rank else []
            yield from _broadcast_stage(mesh, stage, tensors)


def _unsharded(model: Qwen25VL, value: Callable[[Tensor], Tensor]) -> list[tuple[str, Tensor]]:
    tensor = model.mesh.tensor
    params = {name: value(param) for name, param in model.named_parameters()}
    tensors: list[tuple[str, Tensor]] = []
    for row in chunk_rows(model.arch, model.chunk):
        if not row.exported:
            continue
        shards = [params[row.megatron]]
        if row.layout.axis is not None and tensor.size > 1:
            shards = [torch.empty_like(shards[0]) for _ in range(tensor.size)]
            dist.all_gather(shards, params[row.megatron], group=tensor.group)
        parts = row.layout.part(row.layout.unshard(shards))
        tensors += zip(row.published, parts, strict=True)
    return tensors


def _broadcast_stage(
    mesh: Mesh, stage: int, tensors: list[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """One stage's tensors to all stages, as one flat buffer."""
    if mesh.pipeline.size == 1:
        yield from tensors
        return
    plans = gather_objects(mesh.pipeline, [(n, t.shape, t.dtype) for n, t in tensors])
    plan = plans[stage]
    dtype = plan[0][2]
    sizes = [shape.numel() for _, shape, _ in plan]
    if stage == mesh.pipeline.rank:
        flat = torch.cat([tensor.reshape(-1) for _, tensor in tensors])
    else:
        flat = torch.empty(sum(sizes), dtype=dtype, device=mesh.device)
    dist.broadcast(flat, dist.get_global_rank(mesh.pipeline.group, stage), mesh.pipeline.group)
    for (name, shape, _), part in zip(plan, flat.split(sizes), strict=True):
        yield name, part.view(shape)


def save_published(chunks: Sequence[Qwen25VL], template: str | Path, directory: str | Path) -> None:
    """Write a Hugging Face checkpoint that stock transformers and vLLM load.

    `template` is a directory whose config, tokenizer and processor files are copied. Every rank
    calls it; rank 0 writes, into a temporary directory that takes the name when it is complete.
    """
    directory = Path(directory)
    partial = directory.with_name(directory.name + ".partial")
    writer = chunks[0].mesh.rank == 0
    if writer:
        shutil.rmtree(partial, ignore_errors=True)
        with full_disk_named(partial):
            copy_side_files(template, partial)
    shard: dict[str, Tensor] = {}
    shards: list[dict[str, int]] = []
    for name, tensor in published_tensors(chunks):
        if not writer:
            continue
        if shard and _num_bytes(shard) + tensor.nbytes > SHARD_BYTES:
            shards.append(_write_shard(partial, len(shards), shard))
            shard = {}
        shard[name] = tensor.contiguous().cpu()
    if writer:
        shards.append(_write_shard(partial, len(shards), shard))
        _name_shards(partial, shards)
        shutil.rmtree(directory, ignore_errors=True)
        partial.rename(directory)


def copy_side_files(template: str | Path, directory: Path) -> None:
    """Copy config, tokenizer and processor files: everything of a checkpoint but its weights."""
    directory.mkdir(parents=True, exist_ok=True)
    for file in Path(template).iterdir():
        if file.is_file() and "safetensors" not in file.name:
            shutil.copy2(file, directory / file.name)


def _num_bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _write_shard(directory: Path, number: int, tensors: dict[str, Tensor]) -> dict[str, int]:
    try:
        save_file(tensors, directory / f"shard-{number}.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:
        raise CheckpointError(
            f"{directory} cannot be written ({error}): make room and start the same command again."
        ) from None
    return {name: tensor.nbytes for name, tensor in tensors.items()}


def _name_shards(directory: Path, shards: list[dict[str, int]]) -> None:
    """Give shards their published names, with an index when there are several."""
    if len(shards) == 1:
        (directory / "shard-0.safetensors").rename(directory / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"shard-{number}.safetensors").rename(directory / file)
        weight_map |= dict.fromkeys(names, file)
    total = sum(size for names in shards for size in names.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
