"""FrameFile: an append-only file of lines in zstandard frames.

`zstdcat FILE` prints all lines. Each append writes one frame, which has one of these states:

  WRITING  part of the frame is on disk; if the process is killed now, the frame is torn
  WHOLE    readable; its checksum is verified on every read
  TORN     the last frame after a kill; readers skip it, `keep_frames` cuts it off before appending
  DAMAGED  a byte was changed later; readers raise DataError with the frame's offset

Example: three appends of 100 compressed bytes each, killed during the third: `frames` yields two
frames, bytes 0 to 100 and 100 to 200, and logs the number of bytes after 200.
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
def _explain_damage(path: Path, begin: int) -> Iterator[None]:
    """Turn a zstandard error into a DataError that names file and offset."""
    try:
        yield
    except zstandard.ZstdError as error:
        raise DataError(
            f"{path} is damaged at byte {begin} ({error}): copy it again, or remove it."
        ) from None


class Frame(NamedTuple):
    """One frame and its byte range."""

    begin: int  # byte offset in the file
    end: int
    content: bytes  # decompressed; whole lines


class FrameFile:
    """Appends frames, unbuffered: when `append` returns, the operating system has the frame."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by `close`)
        self._compressor = zstandard.ZstdCompressor(level=LEVEL, write_checksum=True)

    def append(self, lines: Sequence[bytes]) -> None:
        """Append the lines as one frame. Raises UserError if the disk is full."""
        frame = self._compressor.compress(b"".join(line + b"\n" for line in lines))
        left = memoryview(frame)
        with full_disk_named(self._path):
            while left:
                left = left[self._file.write(left) :]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def frames(
    path: Path, log: Callable[[str], None] = lambda sentence: None, begin: int = 0
) -> Iterator[Frame]:
    """Yield the whole frames from offset `begin` on, oldest first.

    `log` gets a sentence about a torn frame at the end. Raises DataError for a damaged frame.
    """
    with open(path, "rb") as file:
        file.seek(begin)
        ahead = file.read(CHUNK_BYTES)
        while ahead:
            frame, pieces, end = zstandard.ZstdDecompressor().decompressobj(), [], begin
            while ahead and not frame.eof:
                end += len(ahead)
                with _explain_damage(path, begin):
                    pieces.append(frame.decompress(ahead))
                ahead = frame.unused_data or file.read(CHUNK_BYTES)
            if not frame.eof:
                log(f"{path} ends in a torn frame: its last {end - begin} bytes are left out.")
                return
            end -= len(frame.unused_data)
            yield Frame(begin, end, b"".join(pieces))
            begin = end


def read_frame(path: Path, begin: int) -> bytes:
    """Return the content of the frame at offset `begin`."""
    for frame in frames(path, begin=begin):
        return frame.content
    raise DataError(f"{path} has changed while it was in use: start again.")


def keep_frames(path: Path, keeps: Callable[[bytes], bool]) -> None:
    """Truncate the file before the first frame that is torn or whose content `keeps` rejects."""
    end = 0
    for frame in frames(path):
        if not keeps(frame.content):
            break
        end = frame.end
    os.truncate(path, end)
