"""Discovery of rollout workers by a shared directory with one file per worker.

A worker writes its address when it starts to serve and removes the file when it stops. A killed
worker leaves its file behind; the trainer tries the address and ignores it when nothing answers.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_vrl.errors import ConfigError

TOKEN_VARIABLE = "MEGATRON_VRL_ROLLOUT_TOKEN"  # environment: secret of workers and trainer


@contextmanager
def announce(directory: str, address: str) -> Iterator[None]:
    """Announce the address while the block runs. directory "": do nothing.

    Raises ConfigError if the directory cannot be written.
    """
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
            f"rollout.discovery_dir={directory} cannot be written ({error.strerror}): name a "
            "directory that workers and trainer share."
        ) from None
    try:
        yield
    finally:
        entry.unlink(missing_ok=True)


def announced_addresses(directory: str) -> list[str]:
    """Return the announced addresses, sorted by file name. directory "": none."""
    if not directory or not Path(directory).is_dir():
        return []
    entries = sorted(p for p in Path(directory).iterdir() if p.suffix != ".tmp")
    addresses = []
    for entry in entries:
        with suppress(FileNotFoundError):  # the worker stopped meanwhile
            addresses.append(entry.read_text())
    return addresses
