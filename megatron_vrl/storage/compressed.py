"""A file of lines that grows by a zstandard frame at a time: `zstdcat FILE` prints them all.

A process that is killed in the midst of a frame leaves it torn at the file's end, where it is never
read and cut off before the file grows again. Frames carry a checksum: what was changed since is
named and not read. Nothing here knows what the lines mean.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import zstandard

from megatron_vrl.errors import DataError
from megatron_vrl.storage.files import full_disk_named

LEVEL = 3
CHUNK_BYTES = 1 << 20


@contextmanager
def _damage_named(path: Path, begin: int) -> Iterator[None]:
    try:
        yield
    except zstandard.ZstdError as error:
        raise DataError(
            f"{path} is damaged at byte {begin} ({error}): copy it again, or remove it."
        ) from None


class Frame(NamedTuple):
    begin: int  # in the file, bytes
    end: int
    content: bytes  # whole lines


class FrameFile:
    """Appends frames. Unbuffered: a frame has left the process when `append` returns."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by `close`)
        self._compressor = zstandard.ZstdCompressor(level=LEVEL, write_checksum=True)

    def append(self, lines: Sequence[bytes]) -> None:
        frame = self._compressor.compress(b"".join(line + b"\n" for line in lines))
        left = memoryview(frame)
        with full_disk_named(self._path):
            while left:
                left = left[self._file.write(left) :]

    def close(self) -> None:
        self._file.close()


def frames(
    path: Path, say: Callable[[str], None] = lambda sentence: None, begin: int = 0
) -> Iterator[Frame]:
    """Whole frames, oldest first; `say` hears of a torn one. Raises DataError for a damaged one."""
    with open(path, "rb") as file:
        file.seek(begin)
        ahead = file.read(CHUNK_BYTES)
        while ahead:
            frame, pieces, end = zstandard.ZstdDecompressor().decompressobj(), [], begin
            while ahead and not frame.eof:
                end += len(ahead)
                with _damage_named(path, begin):
                    pieces.append(frame.decompress(ahead))
                ahead = frame.unused_data or file.read(CHUNK_BYTES)
            if not frame.eof:
                say(f"{path} ends in a torn frame: its last {end - begin} bytes are left out.")
                return
            end -= len(frame.unused_data)
            yield Frame(begin, end, b"".join(pieces))
            begin = end


def read_frame(path: Path, begin: int) -> bytes:
    """The content of the frame that begins there."""
    for frame in frames(path, begin=begin):
        return frame.content
    raise DataError(f"{path} has changed while it was in use: start again.")


def keep_frames(path: Path, keeps: Callable[[bytes], bool]) -> None:
    """Cut the file before its first frame whose content is not to be kept, or that is torn."""
    end = 0
    for frame in frames(path):
        if not keeps(frame.content):
            break
        end = frame.end
    os.truncate(path, end)
