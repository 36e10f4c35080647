"""LocalCopies: local copies of videos from object stores, in a directory of bounded size.

Any URL that fsspec opens is supported. The file name of a copy is a digest of its URL and of the
version that the store reports, so a changed object gets a new copy.

The states of a copy:

  MISSING -> WRITING (.tmp)   least recently used copies are evicted first, to make room
  WRITING -> PRESENT          renamed; then evicted down to the limit again, since other processes
                              may have written meanwhile
  PRESENT -> MISSING          evicted; the copy used longest ago goes first

Processes and runs may share the directory. It exceeds the limit by at most one unfinished copy per
process. Example: with a limit of 100 MiB and 90 MiB of copies, a video of 20 MiB evicts copies down
to 80 MiB first.

No bucket is listed. fsspec takes credentials from the environment.
"""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import fsspec

from megatron_vrl.errors import VideoError
from megatron_vrl.video.store import MIB, evict


def is_url(path: str) -> bool:
    """Return whether the path is a URL."""
    return "://" in path


class LocalCopies:
    """Copies in `directory`, at most `limit_mib` MiB."""

    def __init__(self, directory: str, limit_mib: int):
        self._directory = Path(directory)
        self._limit = limit_mib * MIB

    def path(self, url: str) -> str:
        """Return the path of a local copy of the current object.

        Raises VideoError without the URL.
        """
        try:
            system, inside = fsspec.url_to_fs(url)
            name = hashlib.blake2b(f"{url} {system.ukey(inside)}".encode(), digest_size=16)
            copy = self._directory / (name.hexdigest() + Path(inside).suffix)
            if copy.exists():
                os.utime(copy)  # used now
            else:
                self._fetch(system, inside, copy)
        except FileNotFoundError:
            raise VideoError("does not exist; check the path.", "missing") from None
        except (OSError, ValueError, ImportError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise VideoError(f"cannot be fetched ({reason}); check it.", "missing") from None
        return str(copy)

    def _fetch(self, system: fsspec.AbstractFileSystem, inside: str, copy: Path) -> None:
        """Make room, copy the object, and evict down to the limit.

        Raises ValueError if it is too large.
        """
        size = system.size(inside)
        if size > self._limit:
            raise ValueError(f"{size / MIB:.1f} MiB, over video.fetch_mib={self._limit // MIB}")
        self._directory.mkdir(parents=True, exist_ok=True)
        evict(self._directory, self._limit - size)
        self._write(system, inside, copy)
        evict(self._directory, self._limit)

    def _write(self, system: fsspec.AbstractFileSystem, inside: str, copy: Path) -> None:
        """Copy the object to a temporary file and rename it."""
        descriptor, unfinished = tempfile.mkstemp(dir=self._directory, suffix=".tmp")
        try:
            with os.fdopen(descriptor, "wb") as target, system.open(inside, "rb") as source:
                shutil.copyfileobj(source, target, MIB)
            os.replace(unfinished, copy)
        except BaseException:
            os.unlink(unfinished)
            raise
