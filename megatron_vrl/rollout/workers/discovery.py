"""Where workers and trainers find each other: a directory with one file for each worker.

A worker writes its address when it serves and removes it when it leaves; a file that a killed
worker left names an address where nobody answers, which is what the trainer tries.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_vrl.errors import ConfigError

TOKEN_VARIABLE = "MEGATRON_VRL_ROLLOUT_TOKEN"  # environment: the secret that a worker may ask for


@contextmanager
def announced(directory: str, address: str) -> Iterator[None]:
    """The address can be found while the block runs; `directory` "": it cannot."""
    if not directory:
        yield
        return
    entry = Path(directory) / address.replace(":", "_")
    unfinished = entry.with_name(f"{os.getpid()}.tmp")
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(address)
        unfinished.replace(entry)
    except OSError as error:
        raise ConfigError(
            f"rollout.discovery_dir={directory} cannot be written ({error.strerror}); name a "
            "directory that workers and trainer share."
        ) from None
    try:
        yield
    finally:
        entry.unlink(missing_ok=True)


def found(directory: str) -> list[str]:
    """Addresses that were announced and not taken back."""
    if not directory or not Path(directory).is_dir():
        return []
    entries = sorted(p for p in Path(directory).iterdir() if p.suffix != ".tmp")
    addresses = []
    for entry in entries:
        with suppress(FileNotFoundError):  # taken back meanwhile
            addresses.append(entry.read_text())
    return addresses
