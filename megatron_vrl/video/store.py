"""A bounded store of encoded videos: memory, and optionally a directory shared by processes.

Keys are (digest of the file's bytes, digest of the sampling rule, window), so a renamed file is
found and a changed one is not. Both sides drop what was used longest ago. On disk an entry is one
`.npz` with checksums, written beside its name and renamed, so a reader sees a whole entry or none,
and two processes that write the same key leave one good file. A damaged entry counts as absent.

Left out: a lock across processes. The directory is measured after every 1/64 of its limit this
process has written and then cut to 7/8 of it, so up to 8 writers stay within the limit.
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
from megatron_vrl.types import EncodedVideo

MIB = 1 << 20
STALE_S = 3600  # an unfinished file this old was left by a process that died


class VideoStore:
    """`get` and `put` may be called from any thread."""

    def __init__(self, memory_mib: int, directory: str = "", disk_mib: int = 0):
        self._memory = _Memory(memory_mib * MIB)
        self._disk = _Disk(Path(directory), disk_mib * MIB) if directory else None

    def get(self, key: str) -> EncodedVideo | None:
        video = self._memory.get(key)
        if video is None and self._disk:
            video = self._disk.get(key)
            if video:
                self._memory.put(key, video)
        return video

    def put(self, key: str, video: EncodedVideo) -> None:
        self._memory.put(key, video)
        if self._disk:
            self._disk.put(key, video)

    @property
    def memory_bytes(self) -> int:
        return self._memory.used


class _Memory:
    def __init__(self, limit: int):
        self.used = 0
        self._limit = limit
        self._videos: OrderedDict[str, EncodedVideo] = OrderedDict()  # longest unused first
        self._lock = threading.Lock()

    def get(self, key: str) -> EncodedVideo | None:
        with self._lock:
            if key in self._videos:
                self._videos.move_to_end(key)
            return self._videos.get(key)

    def put(self, key: str, video: EncodedVideo) -> None:
        with self._lock:
            if key in self._videos or video.frames.nbytes > self._limit:
                return
            self._videos[key] = video
            self.used += video.frames.nbytes
            while self.used > self._limit:
                _, dropped = self._videos.popitem(last=False)
                self.used -= dropped.frames.nbytes


class _Disk:
    def __init__(self, directory: Path, limit: int):
        self._directory = directory
        self._limit = limit
        self._until_measured = 0  # bytes that may be written before the directory is measured
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._refused(error) from None

    def get(self, key: str) -> EncodedVideo | None:
        path = self._directory / f"{key}.npz"
        try:
            with np.load(path, allow_pickle=False) as arrays:
                values = {f.name: _value(arrays[f.name]) for f in fields(EncodedVideo)}
            values["grid_thw"] = tuple(values["grid_thw"].tolist())
            os.utime(path)  # used now
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None  # absent, evicted meanwhile, or damaged: decoded again and written anew
        return EncodedVideo(**values)

    def put(self, key: str, video: EncodedVideo) -> None:
        try:
            self._write(key, video)
            self._until_measured -= video.frames.nbytes
            if self._until_measured < 0:
                evict(self._directory, self._limit * 7 // 8)
                self._until_measured = self._limit // 64
        except OSError as error:
            raise self._refused(error) from None

    def _write(self, key: str, video: EncodedVideo) -> None:
        descriptor, unfinished = tempfile.mkstemp(dir=self._directory, suffix=".tmp")
        try:
            with os.fdopen(descriptor, "wb") as file:
                np.savez(file, **{f.name: getattr(video, f.name) for f in fields(video)})
            os.replace(unfinished, self._directory / f"{key}.npz")
        except BaseException:
            os.unlink(unfinished)
            raise

    def _refused(self, error: OSError) -> ConfigError:
        return ConfigError(
            f"video.store_dir={self._directory} cannot be written ({error.strerror}); name another "
            "directory, or leave it empty to store in memory only."
        )


def evict(directory: Path, limit: int) -> None:
    """Bring a directory of finished files down to `limit` bytes; used longest ago goes first."""
    entries = []
    for entry in os.scandir(directory):
        try:
            status = entry.stat()
        except FileNotFoundError:
            continue  # another process was faster
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
    """An array, or the plain value it was before it was saved."""
    return array if array.ndim else array.item()
