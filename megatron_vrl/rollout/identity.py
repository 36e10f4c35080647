"""Which worker is this, what does it serve, and can memory be shared with it."""

import hashlib
import os
import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What a worker serves; a trainer takes only workers that equal its own."""

    architecture: str  # digest of the checkpoint's config.json
    dtype: str
    max_model_len: int
    banned_tokens: str  # digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    instance: str  # another after every start
    machine: str  # equal where memory can be shared
    gpus: tuple[str, ...]  # UUIDs of those it can see
    identity: Identity
    version: int | None  # of the weights; None: none yet, or an update is under way


@dataclass(frozen=True, slots=True)
class Member:
    """A worker that takes part in a hand-over of weights."""

    address: str
    instance: str
    machine: str
    gpus: tuple[str, ...]


def machine() -> str:
    """Equal for two processes that can map each other's memory through /proc."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.stat('/proc/self/ns/pid').st_ino} {os.getuid()} {socket.gethostname()}"


def identity_of(
    hf_dir: str | Path, dtype: str, max_model_len: int, banned_tokens: tuple[int, ...]
) -> Identity:
    config = (Path(hf_dir) / "config.json").read_bytes()
    return Identity(
        architecture=hashlib.sha256(config).hexdigest(),
        dtype=dtype,
        max_model_len=max_model_len,
        banned_tokens=hashlib.sha256(str(banned_tokens).encode()).hexdigest(),
    )
