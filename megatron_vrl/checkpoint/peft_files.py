"""PEFT adapters on disk: `adapter_config.json` and `adapter_model.safetensors`.

PEFT on transformers and vLLM load the files that `save_peft` writes. `begin_adapters` reads such a
folder, or draws new adapters.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from megatron_vrl.checkpoint.hf_export import WeightExport
from megatron_vrl.config import Lora
from megatron_vrl.errors import CheckpointError
from megatron_vrl.models.adapters import (
    PEFT_PREFIX,
    adapter_rows,
    adapter_shapes,
    target_modules,
)
from megatron_vrl.models.architecture import Architecture
from megatron_vrl.models.chunk import whole_model
from megatron_vrl.models.families import family_of
from megatron_vrl.models.family import released_name
from megatron_vrl.models.lora import new_factor
from megatron_vrl.models.weight_map import parameters_by_row
from megatron_vrl.parallel.mesh import raise_on_all_ranks
from megatron_vrl.policy.policy import Policy
from megatron_vrl.storage.files import full_disk_named

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
# Fields that change what an adapter computes -> values with which it is plain LoRA.
PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "modules_to_save": (None, []),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, []),
    "target_parameters": (None, []),
    "init_lora_weights": (True, False, "gaussian"),  # others change the base
}


def peft_config(cfg: Lora, base: str) -> dict[str, Any]:
    """Return the content of adapter_config.json. base: checkpoint of the frozen weights."""
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": cfg.rank,
        "lora_alpha": int(cfg.alpha) if cfg.alpha.is_integer() else cfg.alpha,
        "use_rslora": cfg.use_rslora,
        "target_modules": target_modules(cfg),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "task_type": None,
    }


def adapter_export(
    policy: Policy, value: Callable[[Tensor], Tensor] = torch.Tensor.detach
) -> WeightExport:
    """Return the export of the factors under their names in a PEFT adapter.

    Every rank calls it. `value` maps a factor to the tensor to export.
    """
    return WeightExport(
        policy.chunks,
        value=value,
        rows_of=lambda arch, chunk: adapter_rows(arch, policy.lora, chunk),
    )


def save_peft(policy: Policy, directory: Path) -> None:
    """Write the policy's adapters as a PEFT folder. Every rank calls it; rank 0 writes."""
    tensors: dict[str, Tensor] = {}
    writes = policy.mesh.rank == 0
    for name, tensor in adapter_export(policy).tensors():
        if writes:
            tensors[name] = tensor.cpu().clone()
    with raise_on_all_ranks(policy.mesh), full_disk_named(directory):
        if writes:
            write_peft(directory, policy.lora, policy.base, tensors)


def write_peft(directory: Path, cfg: Lora, base: str, tensors: Mapping[str, Tensor]) -> None:
    """Write a PEFT folder, which replaces an older one. Raises OSError if the disk is full."""
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / CONFIG).write_text(json.dumps(peft_config(cfg, base), indent=2) + "\n")
    (partial / TENSORS).write_bytes(save(dict(tensors), metadata={"format": "pt"}))
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)


def begin_adapters(policy: Policy) -> None:
    """Give the policy the adapters that training starts from. Every rank calls it.

    They are those of `model.lora.adapter`, or new ones. Raises CheckpointError on every rank.
    """
    cfg, mesh = policy.lora, policy.mesh
    with raise_on_all_ranks(mesh):
        factor: Callable[[str, tuple[int, ...]], Tensor]
        if cfg.adapter:
            stored = PeftFolder(Path(cfg.adapter), policy.arch, cfg)
            factor = lambda name, shape: stored.tensor(name)  # noqa: E731
        else:
            factor = lambda name, shape: new_factor(name, shape, policy.seed)  # noqa: E731
        for model in policy.chunks:
            params = parameters_by_row(model)
            shapes = adapter_shapes(model.arch, cfg, model.chunk)
            for row in adapter_rows(model.arch, cfg, model.chunk):
                (name,) = row.hf_names
                whole = factor(name, shapes[name])
                shard = row.layout.shard(whole, mesh.tensor.rank, mesh.tensor.size)
                with torch.no_grad():
                    params[row.megatron].copy_(shard)


class PeftFolder:
    """Tensors of a PEFT folder by the name that `adapter_rows` gives them.

    The constructor raises CheckpointError if the folder is not that of plain LoRA with the settings
    of `model.lora`.
    """

    def __init__(self, directory: Path, arch: Architecture, cfg: Lora) -> None:
        self._directory = directory
        self._weights = family_of(arch).weights
        _check_settings(directory, _read_config(directory), cfg)
        shapes = adapter_shapes(arch, cfg, whole_model(arch))
        stored = self._stored()
        wanted = {self._canonical(name): shape for name, shape in shapes.items()}
        self._check_names(stored.keys(), wanted.keys())
        self._names = {name: stored[self._canonical(name)] for name in shapes}
        with safe_open(directory / TENSORS, "pt") as file:
            for name, shape in shapes.items():
                found = file.get_slice(self._names[name]).get_shape()
                if tuple(found) != shape:
                    raise CheckpointError(
                        f"{directory}: {self._names[name]} has the shape {found}, and the model "
                        f"asks for {list(shape)}: the adapter is of another model."
                    )

    def tensor(self, name: str) -> Tensor:
        with safe_open(self._directory / TENSORS, "pt") as file:
            found: Tensor = file.get_tensor(self._names[name])
        return found

    def _stored(self) -> dict[str, str]:
        """Return the canonical name of each tensor -> its name in the file."""
        try:
            with safe_open(self._directory / TENSORS, "pt") as file:
                return {self._canonical(name): name for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{self._directory / TENSORS} cannot be read ({error}): save the adapter with "
                "PEFT's save_pretrained, or set another model.lora.adapter."
            ) from None

    def _canonical(self, name: str) -> str:
        """Return a name that is the same for all versions of transformers."""
        return released_name(self._weights, name.removeprefix(PEFT_PREFIX))

    def _check_names(self, stored: Iterable[str], wanted: Iterable[str]) -> None:
        stored, wanted = set(stored), set(wanted)
        for names, verb in ((wanted - stored, "lacks"), (stored - wanted, "holds")):
            if names:
                raise CheckpointError(
                    f"{self._directory} {verb} {min(names)}, unlike the layers of model.lora: set "
                    "model.lora.targets and model.lora.merger as the adapter was trained."
                )


def _read_config(directory: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((directory / CONFIG).read_text())
        return found
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{directory / CONFIG} cannot be read ({error}): set model.lora.adapter to a folder "
            "that PEFT saved."
        ) from None


def _check_settings(directory: Path, found: Mapping[str, Any], cfg: Lora) -> None:
    """Raises CheckpointError naming the first field that is not plain LoRA's or `model.lora`'s."""
    for field, values in PLAIN.items():
        if field in found and found[field] not in values:
            raise CheckpointError(
                f"{directory} has {field}={json.dumps(found[field])}, and only plain LoRA is "
                f"supported ({field}={json.dumps(values[0])}): merge the adapter into its base."
            )
    settings = {
        "r": ("rank", cfg.rank),
        "lora_alpha": ("alpha", cfg.alpha),
        "use_rslora": ("use_rslora", cfg.use_rslora),
    }
    for field, (key, value) in settings.items():
        if found.get(field, False) != value:
            raise CheckpointError(
                f"{directory} has {field}={json.dumps(found.get(field))}, and model.lora.{key} is "
                f"{json.dumps(value)}: set model.lora.{key} as the adapter was trained."
            )
