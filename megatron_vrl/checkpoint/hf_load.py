"""Load a Hugging Face checkpoint into this rank's shards, and save the policy as one.

Loading reads only the tensors of this pipeline stage, one at a time. Saving streams the whole model
through every rank in buckets (`hf_export.py`).
"""

import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_vrl.checkpoint.hf_export import WeightExport
from megatron_vrl.checkpoint.hf_reader import HFCheckpoint, HFCheckpointWriter, copy_side_files
from megatron_vrl.errors import UserError
from megatron_vrl.models.adapters import is_adapter
from megatron_vrl.models.vision_language_model import VisionLanguageModel
from megatron_vrl.models.weight_map import chunk_rows, parameters_by_row
from megatron_vrl.parallel.mesh import raise_on_all_ranks
from megatron_vrl.storage.files import full_disk_named


def load_hf_weights(chunks: Sequence[VisionLanguageModel], directory: str | Path) -> None:
    """Load a Hugging Face checkpoint into this rank's shards. Every rank calls it.

    Raises CheckpointError on every rank, naming file and tensor.
    """
    mesh, arch = chunks[0].mesh, chunks[0].arch
    with raise_on_all_ranks(mesh):
        source = HFCheckpoint(directory, arch)
        if mesh.rank == 0 and (note := source.type_note()):
            print(f"warning: {note}", file=sys.stderr)
        for model in chunks:
            _load_chunk(model, source)


@torch.no_grad()
def _load_chunk(model: VisionLanguageModel, source: HFCheckpoint) -> None:
    mesh = model.mesh
    params = parameters_by_row(model)
    for row in chunk_rows(model.arch, model.chunk):
        whole = row.layout.join([source.tensor(name) for name in row.hf_names])
        param = params.pop(row.megatron)
        shard = row.layout.shard(whole, mesh.tensor.rank, mesh.tensor.size)
        assert shard.shape == param.shape, row.megatron  # `source` has compared with config.json
        param.copy_(shard)
    left = [name for name in params if not is_adapter(name)]
    assert not left, f"parameters without a row in the table: {sorted(left)}"


def hf_tensors(
    chunks: Sequence[VisionLanguageModel], value: Callable[[Tensor], Tensor] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, tensor) of the whole model, the same on every rank, in fixed order.

    Every rank must call it and exhaust it. `value` maps a parameter to the tensor to yield, for
    example its gradient; None: the weight, merged with its adapter if it has one.
    """
    return WeightExport(chunks, value=value).tensors()


def save_hf(
    chunks: Sequence[VisionLanguageModel],
    template: str | Path,
    directory: str | Path,
    files: Mapping[str, str] | None = None,
) -> None:
    """Write a Hugging Face checkpoint that stock transformers and vLLM load.

    `template`: folder whose config, tokenizer and processor files are copied. `files`: name -> text
    of more files. Every rank calls it. Rank 0 writes DIRECTORY.partial and renames it at the end.
    """
    directory = Path(directory)
    partial = directory.with_name(directory.name + ".partial")
    writer = chunks[0].mesh.rank == 0
    with raise_on_all_ranks(chunks[0].mesh), full_disk_named(directory):
        if writer:
            shutil.rmtree(partial, ignore_errors=True)
            copy_side_files(template, partial)
            for name, text in (files or {}).items():
                (partial / name).write_text(text)
    shards = HFCheckpointWriter(partial) if writer else None
    failure: UserError | None = None
    for name, tensor in hf_tensors(chunks):  # exhaust it even if the disk is full
        if shards is not None and failure is None:
            try:
                with full_disk_named(directory):
                    shards.add(name, tensor.cpu())
            except UserError as error:
                failure = error
                shutil.rmtree(partial)
    with raise_on_all_ranks(chunks[0].mesh), full_disk_named(directory):
        if failure is not None:
            raise failure
        if shards is not None:
            shards.close()
            shutil.rmtree(directory, ignore_errors=True)
            partial.rename(directory)
