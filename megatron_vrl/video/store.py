"""Frame store: LRU cache of encoded videos and images in memory, and optionally on disk.

The key is (digest of the file's bytes, digest of the sampling rule, window); of an image, (digest
of the file's bytes, digest of the pixel rule). So a renamed file is found, and a changed file is
not.

The states of an entry on disk, one `.npz` file with checksums:

  ABSENT  -> WRITING   written to a .tmp file; readers do not see it
  WRITING -> PRESENT   renamed; if two processes write one key, one complete file remains
  PRESENT -> ABSENT    evicted: the entry used longest ago goes first (its mtime is its last use)
  DAMAGED -> PRESENT   a file that fails its checksum counts as absent: decoded and written again
  WRITING -> ABSENT    a .tmp file older than an hour was left by a killed process and is deleted

Processes use no lock. Each process measures the directory after its first write and then whenever
it has written a further 1/64 of the limit, and evicts down to 7/8 of the limit. So up to 8
processes stay within the limit. Example: with a limit of 64 GiB, 8 processes evict down to 56 GiB
and add at most 1 GiB each before they measure again.
"""

import os
import tempfile
import threading
import time
import zipfile
from collections import OrderedDict
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vrl.errors import ConfigError
from megatron_vrl.types import EncodedImage, EncodedVideo, Visual

MIB = 1 << 20
STALE_S = 3600  # a .tmp file older than this was left by a killed process


class VideoStore:
    """Memory cache in front of a disk cache. `get` and `put` are thread-safe."""

    def __init__(self, memory_mib: int, directory: str = "", disk_mib: int = 0):
        self._memory = _Memory(memory_mib * MIB)
        self._disk = _Disk(Path(directory), disk_mib * MIB) if directory else None

    def get(self, key: str) -> Visual | None:
        """Return the video of a key; None if neither cache has it."""
        video = self._memory.get(key)
        if video is None and self._disk:
            video = self._disk.get(key)
            if video:
                self._memory.put(key, video)
        return video

    def put(self, key: str, video: Visual) -> None:
        """Store the video in both caches."""
        self._memory.put(key, video)
        if self._disk:
            self._disk.put(key, video)

    @property
    def memory_bytes(self) -> int:
        """Return the bytes of frames in memory."""
        return self._memory.used


class _Memory:
    """LRU cache in memory of at most `limit` bytes of frames."""

    def __init__(self, limit: int):
        self.used = 0
        self._limit = limit
        self._videos: OrderedDict[str, Visual] = OrderedDict()  # least recently used first
        self._lock = threading.Lock()

    def get(self, key: str) -> Visual | None:
        """Return the video and mark it as used."""
        with self._lock:
            if key in self._videos:
                self._videos.move_to_end(key)
            return self._videos.get(key)

    def put(self, key: str, video: Visual) -> None:
        """Store the video and evict the least recently used ones.

        A video over the limit is not stored.
        """
        with self._lock:
            if key in self._videos or video.frames.nbytes > self._limit:
                return
            self._videos[key] = video
            self.used += video.frames.nbytes
            while self.used > self._limit:
                _, dropped = self._videos.popitem(last=False)
                self.used -= dropped.frames.nbytes


class _Disk:
    """LRU cache in a directory of about `limit` bytes, shared by processes."""

    def __init__(self, directory: Path, limit: int):
        self._directory = directory
        self._limit = limit
        self._bytes_until_scan = 0  # bytes to write before the directory is measured
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._write_error(error) from None

    def get(self, key: str) -> Visual | None:
        """Return the video and mark it as used; None if the file is absent or damaged."""
        path = self._directory / f"{key}.npz"
        try:
            with np.load(path, allow_pickle=False) as arrays:
                kind = EncodedVideo if "codec" in arrays else EncodedImage
                values = {f.name: _value(arrays[f.name]) for f in fields(kind)}
            values["grid_thw"] = tuple(values["grid_thw"].tolist())
            os.utime(path)  # used now
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None  # absent, evicted meanwhile, or damaged: the caller decodes and stores it
        return kind(**values)

    def put(self, key: str, video: Visual) -> None:
        """Store the video. Raises ConfigError if the directory cannot be written."""
        try:
            self._write(key, video)
            self._bytes_until_scan -= video.frames.nbytes
            if self._bytes_until_scan < 0:
                evict(self._directory, self._limit * 7 // 8)
                self._bytes_until_scan = self._limit // 64
        except OSError as error:
            raise self._write_error(error) from None

    def _write(self, key: str, video: Visual) -> None:
        """Write the entry to a temporary file and rename it."""
        descriptor, unfinished = tempfile.mkstemp(dir=self._directory, suffix=".tmp")
        try:
            with os.fdopen(descriptor, "wb") as file:
                np.savez(file, **{f.name: getattr(video, f.name) for f in fields(video)})
            os.replace(unfinished, self._directory / f"{key}.npz")
        except BaseException:
            os.unlink(unfinished)
            raise

    def _write_error(self, error: OSError) -> ConfigError:
        """Return the error for a directory that cannot be written."""
        return ConfigError(
            f"video.store_dir={self._directory} cannot be written ({error.strerror}); give another "
            "directory, or leave it empty to store in memory only."
        )


def evict(directory: Path, limit: int) -> None:
    """Delete the least recently used files until the directory has at most `limit` bytes.

    Temporary files are not counted. Those older than STALE_S are deleted.
    """
    entries = []
    for entry in os.scandir(directory):
        try:
            status = entry.stat()
        except FileNotFoundError:
            continue  # deleted by another process
        if not entry.name.endswith(".tmp"):
            entries.append((status.st_mtime_ns, status.st_size, entry.path))
        elif time.time() - status.st_mtime > STALE_S:
            Path(entry.path).unlink(missing_ok=True)
    excess = sum(size for _, size, _ in entries) - limit
    for _, size, path in sorted(entries):
        if excess <= 0:
            break
        Path(path).unlink(missing_ok=True)
        excess -= size


def _value(array: np.ndarray) -> Any:
    """Return the array, or the scalar that was saved as a 0-d array."""
    return array if array.ndim else array.item()
