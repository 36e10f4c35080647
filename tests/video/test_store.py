"""Frame store: bit-equal round trip, size limits, concurrent processes."""

import multiprocessing
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from megatron_vrl.config import Video
from megatron_vrl.errors import ConfigError
from megatron_vrl.models.qwen2_5_vl.pixels import PIXELS
from megatron_vrl.types import EncodedVideo, Visual
from megatron_vrl.video import VideoReader
from megatron_vrl.video.store import MIB, VideoStore
from tests.tiny import image
from tests.video.conftest import MakeClip, videos_of


def a_video(seed: int, frames: int = 4, side: int = 140) -> EncodedVideo:
    rng = np.random.default_rng(seed)
    return EncodedVideo(
        path=f"clip{seed}.mp4",
        digest=f"{seed:032x}",
        codec="h264",
        duration_s=1 / 3,
        frame_indices=np.arange(frames, dtype=np.int64),
        timestamps_s=rng.random(frames),
        sampled_fps=2.1,
        seconds_per_grid=2 / 2.1,
        grid_thw=(frames // 2, side // 14, side // 14),
        frame_budget=side * side,
        frames=rng.integers(0, 256, (frames, side, side, 3), dtype=np.uint8),
    )


def assert_same(one: Visual | None, other: Visual) -> None:
    assert one is not None and type(one) is type(other)
    for field in fields(other):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        assert type(mine) is type(theirs)
        np.testing.assert_array_equal(mine, theirs)


def disk_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


def test_disk_round_trip_is_bit_equal(tmp_path: Path) -> None:
    VideoStore(1, str(tmp_path), 64).put("key", a_video(0))
    assert_same(VideoStore(1, str(tmp_path), 64).get("key"), a_video(0))
    VideoStore(1, str(tmp_path), 64).put("picture", image((4, 6), 1))
    assert_same(VideoStore(1, str(tmp_path), 64).get("picture"), image((4, 6), 1))
    assert VideoStore(1, str(tmp_path), 64).get("other") is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key.npz", "picture.npz"]


def test_memory_evicts_the_least_recently_used() -> None:
    store = VideoStore(1)
    size = a_video(0).frames.nbytes
    room = MIB // size
    for seed in range(room):
        store.put(str(seed), a_video(seed))
    assert store.get("0") is not None
    store.put("new", a_video(99))
    assert store.memory_bytes <= MIB
    assert store.get("1") is None
    assert_same(store.get("0"), a_video(0))
    assert_same(store.get("new"), a_video(99))


def test_memory_does_not_store_a_video_over_its_limit() -> None:
    store = VideoStore(1)
    store.put("small", a_video(0))
    store.put("large", a_video(1, frames=40))
    assert store.get("large") is None
    assert store.get("small") is not None


def test_disk_limit_holds(tmp_path: Path) -> None:
    store = VideoStore(1, str(tmp_path), 2)
    for seed in range(30):
        store.put(str(seed), a_video(seed))
        assert disk_bytes(tmp_path) <= 2 * MIB
    assert (tmp_path / "29.npz").exists()
    assert not (tmp_path / "0.npz").exists()


def test_damaged_entry_is_decoded_again(tmp_path: Path) -> None:
    VideoStore(1, str(tmp_path), 64).put("key", a_video(0))
    entry = tmp_path / "key.npz"
    content = bytearray(entry.read_bytes())
    content[len(content) // 2] ^= 1
    entry.write_bytes(content)
    store = VideoStore(1, str(tmp_path), 64)
    assert store.get("key") is None
    store.put("key", a_video(0))
    assert_same(VideoStore(1, str(tmp_path), 64).get("key"), a_video(0))


def _write_often(directory: str) -> None:
    for turn in range(40):
        store = VideoStore(1, directory, 2)
        store.put("shared", a_video(7))
        store.put(str(turn), a_video(turn))
        found = store.get("shared")
        assert found is not None


def test_processes_share_a_directory(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_often, args=(str(tmp_path),)) for _ in range(2)]
    for writer in writers:
        writer.start()
    seen = 0
    while any(writer.is_alive() for writer in writers):
        if found := VideoStore(1, str(tmp_path), 2).get("shared"):
            assert_same(found, a_video(7))
            seen += 1
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert seen
    assert not list(tmp_path.glob("*.tmp"))


def test_unwritable_directory_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        VideoStore(1, str(tmp_path / "file" / "store"), 2)


def test_reader_decodes_a_file_once(make_clip: MakeClip, tmp_path: Path) -> None:
    path = make_clip("clip.mp4")
    copy = tmp_path / "copy.mp4"
    copy.write_bytes(Path(path).read_bytes())
    cfg = Video(decoder="pyav", store_dir=str(tmp_path / "store"))
    reader = VideoReader(cfg, PIXELS)
    first, second = videos_of(reader.encode([path, str(copy)]))
    assert reader.counts == {"decoded": 1, "failed": 0, "store": 0, "retried": 0}
    assert_same(second, replace(first, path=str(copy)))

    later = VideoReader(
        cfg.model_copy(update={"decoder": "dali"}), PIXELS
    )  # the same bytes, so shared
    assert_same(videos_of(later.encode([path]))[0], first)
    assert later.counts == {"decoded": 0, "failed": 0, "store": 1, "retried": 0}

    other_rule = VideoReader(cfg.model_copy(update={"fps": 3.0}), PIXELS)
    assert len(videos_of(other_rule.encode([path]))[0].frames) > len(first.frames)

    copy.write_bytes(Path(make_clip("other.mp4", num_frames=20)).read_bytes())
    assert videos_of(reader.encode([str(copy)]))[0].digest != first.digest
