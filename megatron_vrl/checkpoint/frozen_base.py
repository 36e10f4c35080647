"""Digest of the frozen base, and the check that a checkpoint of adapters fits a policy."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_vrl.checkpoint.adapters_note import ADAPTERS, AdaptersNote, read_note
from megatron_vrl.config import Lora
from megatron_vrl.errors import CheckpointError
from megatron_vrl.models.vision_language_model import VisionLanguageModel
from megatron_vrl.models.weight_map import chunk_rows, parameters_by_row
from megatron_vrl.parallel.mesh import gather_objects
from megatron_vrl.policy.policy import Policy

SETTINGS = ("rank", "alpha", "use_rslora", "targets", "merger")


def note_of(policy: Policy) -> AdaptersNote:
    """Return the note of a policy with adapters."""
    return AdaptersNote(
        lora=_settings(policy.lora), base=policy.base, base_digest=policy.base_digest
    )


def _settings(cfg: Lora) -> dict[str, Any]:
    """Return the settings on which the tensors depend, with the targets by name."""
    dumped = cfg.model_dump(mode="json", include=set(SETTINGS))
    return dumped | {"targets": sorted(cfg.target_names)}


def write_note(checkpoint: Path, policy: Policy) -> None:
    """Write adapters.json into the directory of a checkpoint."""
    (checkpoint / ADAPTERS).write_text(json.dumps(asdict(note_of(policy)), indent=1))


def check_fits_policy(checkpoint: Path, policy: Policy) -> None:
    """Raise CheckpointError if a checkpoint does not fit the policy.

    Adapters must have the policy's settings and base. A policy with adapters refuses whole weights.
    """
    note = read_note(checkpoint)
    if note is None:
        if policy.lora.rank:
            raise CheckpointError(
                f"{checkpoint} holds whole weights and model.lora.rank={policy.lora.rank} asks for "
                "adapters: set another run.out_dir, or model.lora.rank=0."
            )
        return
    if not policy.lora.rank:
        raise CheckpointError(
            f"{checkpoint} holds adapters only: set model.lora as in its {ADAPTERS}, or make whole "
            "weights of it (mvrl convert megatron-to-hf)."
        )
    mine = note_of(policy)
    for key, value in mine.lora.items():
        if note.lora.get(key) != value:
            raise CheckpointError(
                f"{checkpoint} holds adapters with {key}={json.dumps(note.lora.get(key))}, and "
                f"model.lora.{key} is {json.dumps(value)}: set model.lora.{key} as it was."
            )
    if note.base_digest != mine.base_digest:
        raise CheckpointError(
            f"{checkpoint} holds adapters of the weights {note.base}, and those of "
            f"model.checkpoint={mine.base} differ: set the model.checkpoint of the run."
        )


@torch.no_grad()
def base_digest(chunks: Sequence[VisionLanguageModel]) -> str:
    """Return a digest of a model's weights without its adapters. Every rank calls it.

    It is the SHA-256 of the sum of the bit patterns of every parameter. It depends on no layout and
    no file format, and reads no file. It does not see values that change places in one parameter.
    """
    mesh = chunks[0].mesh
    names, sums = [], []
    for model in chunks:
        params = parameters_by_row(model)
        for row in (row for row in chunk_rows(model.arch, model.chunk) if row.exported):
            param = params[row.megatron].detach()
            bits = param.view({4: torch.int32, 2: torch.int16}[param.element_size()])
            counts = row.layout.axis is not None or mesh.tensor.rank == 0
            names.append("+".join(row.hf_names))
            sums.append(bits.sum(dtype=torch.int64) * counts)
    total = torch.stack(sums)
    if mesh.tensor.size > 1:
        dist.all_reduce(total, group=mesh.tensor.group)
    stages = gather_objects(mesh.pipeline, dict(zip(names, total.tolist(), strict=True)))
    whole = {name: value for stage in stages for name, value in stage.items()}
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()
