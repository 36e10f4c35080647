"""Lines in zstandard frames: round trip, other readers, torn, damaged and truncated files."""

import os
from pathlib import Path

import pytest
import zstandard

from megatron_vrl.errors import DataError
from megatron_vrl.storage import compressed
from megatron_vrl.storage.compressed import FrameFile, frames, keep_frames, read_frame

STEPS = [[b"1", b"one"], [b"2"], [b"3", os.urandom(3000).hex().encode()]]


@pytest.fixture(params=[64, 1 << 20], ids=["small chunks", "large chunks"])
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    monkeypatch.setattr(compressed, "CHUNK_BYTES", request.param)
    path = tmp_path / "folder" / "rows.jsonl.zst"
    file = FrameFile(path)
    for lines in STEPS:
        file.append(lines)
    file.close()
    return path


def lines_of(path: Path) -> list[list[bytes]]:
    return [frame.content.splitlines() for frame in frames(path)]


def test_frames_are_read_as_they_were_written(path: Path) -> None:
    assert lines_of(path) == STEPS
    for frame in frames(path):
        assert read_frame(path, frame.begin) == frame.content
    assert frame.end == path.stat().st_size


def test_zstandard_readers_see_one_stream_of_lines(path: Path) -> None:
    with path.open("rb") as file:
        reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
        assert reader.read().splitlines() == [line for lines in STEPS for line in lines]


def test_an_incomplete_frame_is_skipped(path: Path) -> None:
    whole, ends = path.read_bytes(), [frame.end for frame in frames(path)]
    for size in [*range(ends[1] + 40), len(whole) - 1]:
        path.write_bytes(whole[:size])
        messages: list[str] = []
        num_whole = sum(end <= size for end in ends)
        assert [f.content.splitlines() for f in frames(path, messages.append)] == STEPS[:num_whole]
        torn = size - max([0, *(end for end in ends if end <= size)])
        assert messages == [f"{path} ends in a torn frame: its last {torn} bytes are left out."] * (
            torn > 0
        )


def test_a_truncated_file_can_be_appended_to(path: Path) -> None:
    with path.open("ab") as file:
        file.write(path.read_bytes()[:9])
    keep_frames(path, lambda content: content[:1] < b"3")
    assert lines_of(path) == STEPS[:2]
    frame_file = FrameFile(path)
    frame_file.append([b"again"])
    frame_file.close()
    assert lines_of(path) == [*STEPS[:2], [b"again"]]


def test_a_changed_byte_is_reported(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    _, _, last = frames(path)
    whole[last.begin + 40] ^= 1
    path.write_bytes(whole)
    with pytest.raises(DataError, match=f"damaged at byte {last.begin}"):
        list(frames(path))
    with pytest.raises(DataError, match=f"damaged at byte {last.begin}"):
        read_frame(path, last.begin)
