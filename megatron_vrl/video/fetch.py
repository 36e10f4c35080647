"""Local copies of videos in an object store: any URL that fsspec opens, in a bounded directory.

A copy is named by its URL and by the version that the store reports, written beside its name and
renamed, so processes and runs may share the directory. What was used longest ago goes first: room
is made before a copy is begun, and again when it is whole, for others may have come meanwhile.
Beyond the limit there are only copies that are being written, one a process. Nothing here lists a
bucket. Left out: credentials, which fsspec takes from the environment.
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
    return "://" in path


class LocalCopies:
    def __init__(self, directory: str, limit_mib: int):
        self._directory = Path(directory)
        self._limit = limit_mib * MIB

    def path(self, url: str) -> str:
        """Of a copy of what the URL holds now. Raises VideoError, which does not name the URL."""
        try:
            system, inside = fsspec.url_to_fs(url)
            name = hashlib.blake2b(f"{url} {system.ukey(inside)}".encode(), digest_size=16)
            copy = self._directory / (name.hexdigest() + Path(inside).suffix)
            if copy.exists():
                os.utime(copy)  # used now
            else:
                self._fetch(system, inside, copy)
        except FileNotFoundError:
            raise VideoError("is not there; check the path.", "missing") from None
        except (OSError, ValueError, ImportError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise VideoError(f"cannot be fetched ({reason}); check it.", "missing") from None
        return str(copy)

    def _fetch(self, system: fsspec.AbstractFileSystem, inside: str, copy: Path) -> None:
        size = system.size(inside)
        if size > self._limit:
            raise ValueError(f"{size / MIB:.1f} MiB and video.fetch_mib is {self._limit // MIB}")
        self._directory.mkdir(parents=True, exist_ok=True)
        evict(self._directory, self._limit - size)
        self._write(system, inside, copy)
        evict(self._directory, self._limit)

    def _write(self, system: fsspec.AbstractFileSystem, inside: str, copy: Path) -> None:
        descriptor, unfinished = tempfile.mkstemp(dir=self._directory, suffix=".tmp")
        try:
            with os.fdopen(descriptor, "wb") as target, system.open(inside, "rb") as source:
                shutil.copyfileobj(source, target, MIB)
            os.replace(unfinished, copy)
        except BaseException:
            os.unlink(unfinished)
            raise
