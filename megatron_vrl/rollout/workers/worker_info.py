"""Identity of a rollout worker: its model, its machine and its GPUs."""

import hashlib
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from megatron_vrl.config import RunConfig
from megatron_vrl.rollout.request import max_model_len


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """Model that a worker serves. A trainer accepts only workers whose model equals its own."""

    architecture: str  # digest of the checkpoint's config.json
    dtype: str
    max_model_len: int  # tokens of prompt and response together
    banned_tokens: str  # digest of the banned token ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """Response of a worker to a health check."""

    instance: str  # random id, new at every start of the worker
    machine: str  # result of `machine()` in the worker
    gpus: tuple[str, ...]  # UUIDs of the GPUs visible to the worker
    served_model: ServedModel
    version: int | None  # weight version; None before the first sync and during a sync


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A worker that takes part in a weight sync."""

    address: str  # host:port
    instance: str
    machine: str
    gpus: tuple[str, ...]


def machine() -> str:
    """Return an id. Two processes with equal ids can map each other's memory through /proc."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.stat('/proc/self/ns/pid').st_ino} {os.getuid()} {socket.gethostname()}"


def served_model(
    cfg: RunConfig, hf_dir: str | Path, banned_token_ids: tuple[int, ...]
) -> ServedModel:
    """Return the model that a worker with this config serves. `hf_dir` holds the config.json."""
    hf_config = (Path(hf_dir) / "config.json").read_bytes()
    return ServedModel(
        architecture=hashlib.sha256(hf_config).hexdigest(),
        dtype=cfg.model.dtype,
        max_model_len=max_model_len(cfg),
        banned_tokens=hashlib.sha256(str(banned_token_ids).encode()).hexdigest(),
    )
