"""Images and videos embedded in rows, written as files so that every later stage has a path.

The name of a file is a digest of its bytes, so a file is written once, whatever rows, ranks and
runs share it. The folder is `media_cache_dir` of the source. Nothing is evicted, since samples keep
the paths: a file that would make the folder larger than `media_cache_mib` is refused.
"""

import hashlib
import io
import os
import tempfile
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from PIL import Image

from megatron_vrl.config import Source
from megatron_vrl.data.formats.records import VIDEO_SUFFIXES
from megatron_vrl.errors import DataError
from megatron_vrl.storage.files import full_disk_named

DEFAULT_DIR = "~/.cache/megatron_vrl/media"
MIB = 1 << 20
_NOT_AN_IMAGE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # raised by PIL


def cache_dir(source: Source) -> str:
    """Return the folder for the embedded files of a source."""
    return os.path.expanduser(source.media_cache_dir or DEFAULT_DIR)


def write_image(content: bytes, source: Source, where: str) -> str:
    """Return the path of the image file. `where` names file, record and field in a DataError."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            ending = (image.format or "img").lower()
    except _NOT_AN_IMAGE:
        raise DataError(f"{where} holds {len(content)} bytes that are no image.") from None
    return _write(content, f".{ending}", source, where)


def write_video(content: bytes, name: str, source: Source, where: str) -> str:
    """Return the path of the video file. `name` is the embedded file's own name, "" if unknown."""
    if not content:
        raise DataError(f"{where} holds no bytes, expected a video.")
    ending = Path(name).suffix.lower()
    return _write(content, ending if ending in VIDEO_SUFFIXES else ".mp4", source, where)


class _Folder:
    """A cache folder with the size of its files, as far as this process knows it."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self.measure()

    def measure(self) -> None:
        """Add up the sizes of all files, also those of other processes."""
        self.size = 0
        for entry in os.scandir(self.path):
            with suppress(FileNotFoundError):  # another process has renamed its file
                self.size += entry.stat().st_size


@lru_cache(maxsize=32)
def _folder(path: str) -> _Folder:
    """Return the folder at a path, measured once."""
    return _Folder(path)


def _write(content: bytes, ending: str, source: Source, where: str) -> str:
    """Write the file unless it exists, and return its path."""
    try:
        folder = _folder(cache_dir(source))
        file = folder.path / (hashlib.blake2b(content, digest_size=16).hexdigest() + ending)
        if not file.exists():
            _check_size(folder, len(content), source, where)
            with full_disk_named(file):
                _replace(file, content)
            folder.size += len(content)
    except OSError as error:
        raise DataError(
            f"{where} cannot be written to {cache_dir(source)} ({error.strerror}): give another "
            "media_cache_dir."
        ) from None
    return str(file)


def _check_size(folder: _Folder, size: int, source: Source, where: str) -> None:
    """Raise DataError if the folder has no room for `size` bytes."""
    limit = source.media_cache_mib * MIB
    if folder.size + size > limit:
        folder.measure()
    if folder.size + size > limit:
        raise DataError(
            f"{where} has {size / MIB:.1f} MiB, and {folder.path} would exceed "
            f"media_cache_mib={source.media_cache_mib}: raise it, or remove files of other data."
        )


def _replace(file: Path, content: bytes) -> None:
    """Write a file beside its name and rename it."""
    descriptor, unfinished = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as opened:
            opened.write(content)
        os.replace(unfinished, file)
    except BaseException:
        os.unlink(unfinished)
        raise
