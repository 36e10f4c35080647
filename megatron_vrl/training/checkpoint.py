"""Megatron distributed checkpoints of a run: weights, optimizer, and where the run stood.

`ROOT/step-000120/` holds `weights/` (torch_dist, resharded on load), `published/` (config,
tokenizer and processor files, so that an engine can start from it) and `state.json`, written
last: a directory without it is not a checkpoint. It is written beside its place and takes its
name when it is whole; `ROOT/latest` names the newest and is replaced atomically, and only then
are older ones removed, so the only good copy is never at risk.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from megatron_vrl.errors import CheckpointError
from megatron_vrl.model.weights import copy_side_files, load_published
from megatron_vrl.observe.files import full_disk_named
from megatron_vrl.parallel.mesh import agreed
from megatron_vrl.training.policy import Policy

STATE = "state.json"
# Megatron 0.16's default sharding of optimizer state no longer works; this one reshards freely.
_OPTIMIZER = {"distrib_optim_sharding_type": "fully_reshardable"}
_LAYERS = {"non_homogeneous_layers": True}  # a name for each layer, instead of one stack of them


def save_checkpoint(
    directory: str | Path, policy: Policy, state: dict[str, Any], template: str | Path
) -> None:
    """Write one checkpoint; every rank calls it. `state` must be JSON.

    Raises UserError on every rank if the disk is full.
    """
    directory = Path(directory)
    partial = directory.with_name(directory.name + ".partial")
    with agreed(policy.mesh), full_disk_named(directory):
        if policy.mesh.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            (partial / "weights").mkdir(parents=True)
            copy_side_files(template, partial / "published")
    try:
        dist_checkpointing.save(_sharded(policy), str(partial / "weights"))
    except CheckpointException:  # raised on every rank; its writers do not say why
        free_mib = shutil.disk_usage(partial).free >> 20
        if policy.mesh.rank == 0:
            shutil.rmtree(partial)
        raise CheckpointError(
            f"The checkpoint {directory} cannot be written; its disk has {free_mib} MiB left. "
            "Make room and start the same command again."
        ) from None
    with agreed(policy.mesh), full_disk_named(directory):
        if policy.mesh.rank == 0:
            _write(partial / STATE, json.dumps(state, indent=1))
            shutil.rmtree(directory, ignore_errors=True)
            partial.rename(directory)


def save_latest(
    root: str | Path,
    name: str,
    policy: Policy,
    state: dict[str, Any],
    template: str | Path,
    keep: int,
    pinned: str = "",
) -> None:
    """Write ROOT/name, point ROOT/latest at it, keep `pinned` and the `keep` newest alone."""
    root = Path(root)
    save_checkpoint(root / name, policy, state, template)
    with agreed(policy.mesh), full_disk_named(root):
        if policy.mesh.rank == 0:
            _write(root / "latest", name)
            kept = {pinned, *(directory.name for directory in _complete(root)[-keep:])}
            for old in root.iterdir():
                if old.is_dir() and old.name not in kept:
                    shutil.rmtree(old)


def latest(root: str | Path) -> Path | None:
    """The newest complete checkpoint under ROOT, or None."""
    root = Path(root)
    marker = root / "latest"
    if marker.exists() and (root / marker.read_text().strip() / STATE).exists():
        return root / marker.read_text().strip()
    found = _complete(root)
    return found[-1] if found else None


def published_files(checkpoint: str | Path) -> Path:
    """Directory with the config, tokenizer and processor files of either kind of checkpoint."""
    inner = Path(checkpoint) / "published"
    return inner if inner.is_dir() else Path(checkpoint)


def load_weights(checkpoint: str | Path, policy: Policy) -> None:
    """Weights alone, from a Hugging Face or a Megatron checkpoint. Every rank calls it."""
    checkpoint = Path(checkpoint)
    if (checkpoint / "weights").is_dir():
        _load(checkpoint, _sharded_model(policy), policy)
    elif checkpoint.is_dir():
        load_published(policy.chunks, checkpoint)
    else:
        raise CheckpointError(f"There is no checkpoint {checkpoint}: set model.checkpoint.")
    if policy.optimizer is not None:
        policy.optimizer.reload_model_params()


def load_checkpoint(checkpoint: str | Path, policy: Policy) -> None:
    """Weights and optimizer; `policy.start_phase` must have been called. Every rank calls it."""
    _load(Path(checkpoint), _sharded(policy, is_loading=True), policy)


def read_state(checkpoint: str | Path) -> dict[str, Any]:
    try:
        return json.loads((Path(checkpoint) / STATE).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{checkpoint}/{STATE} cannot be read ({error}): remove it."
        ) from None


def _sharded(policy: Policy, is_loading: bool = False) -> dict[str, Any]:
    state = _sharded_model(policy)
    if policy.optimizer is not None:
        state["optimizer"] = policy.optimizer.sharded_state_dict(
            dict(state), is_loading=is_loading, metadata=_OPTIMIZER
        )
    return state


def _sharded_model(policy: Policy) -> dict[str, Any]:
    """Chunks under local names; on disk a tensor is named by its layer in the whole model."""
    return {
        f"chunk{number}": chunk.sharded_state_dict(metadata=_LAYERS)
        for number, chunk in enumerate(policy.chunks)
    }


def _load(checkpoint: Path, sharded: dict[str, Any], policy: Policy) -> None:
    try:
        loaded = dist_checkpointing.load(sharded, str(checkpoint / "weights"))
    except (CheckpointingException, OSError, RuntimeError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{checkpoint} cannot be loaded ({reason}): use another checkpoint."
        ) from error
    for number, chunk in enumerate(policy.chunks):
        chunk.load_state_dict(loaded[f"chunk{number}"])
    if "optimizer" in sharded:
        assert policy.optimizer is not None
        policy.optimizer.load_state_dict(loaded["optimizer"])


def _complete(root: Path) -> list[Path]:
    """Complete checkpoints under ROOT, oldest first."""
    return sorted(
        (s.parent for s in root.glob(f"*/{STATE}")), key=lambda d: (d / STATE).stat().st_mtime
    )


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)
