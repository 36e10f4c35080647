"""Decoding processes: a hang or crash ends one process; prefetched videos are bit-equal."""

import gc
import os
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from megatron_vrl.config import Video
from megatron_vrl.errors import VideoError
from megatron_vrl.models.qwen2_5_vl.pixels import PIXELS
from megatron_vrl.types import EncodedVideo, VideoClip
from megatron_vrl.video import VideoReader
from megatron_vrl.video.workers import Workers
from tests.video.conftest import MakeClip, errors_of, videos_of

SMALL: dict[str, Any] = {"decoder": "pyav", "min_pixels": 28 * 28, "num_frames": 4}
LONG_S = 60.0
ROOT = Path(__file__).parents[2]


def add(made: int, number: int) -> int:
    return made + number


def process_of(made: int) -> int:
    return os.getpid()


def hang(made: int) -> None:
    time.sleep(1000)


def crash(made: int) -> None:
    os.kill(os.getpid(), 11)


def refuse(made: int) -> None:
    raise VideoError("is bad.", "empty")


def mistake(made: int) -> None:
    raise KeyError("ours")


@pytest.fixture(scope="module")
def workers() -> Workers:
    return Workers(1, partial(int, 40))


def test_a_task_that_hangs_is_killed_and_the_next_one_runs(workers: Workers) -> None:
    before = workers.submit(LONG_S, process_of).result()
    with pytest.raises(VideoError, match=r"was not decoded within 0\.2 s") as error:
        workers.submit(0.2, hang).result()
    assert error.value.kind == "hung"
    assert workers.submit(LONG_S, add, 2).result() == 42
    with pytest.raises(ProcessLookupError):
        os.kill(before, 0)


def test_a_task_that_crashes_is_a_video_error(workers: Workers) -> None:
    with pytest.raises(VideoError, match=r"exit code -11") as error:
        workers.submit(LONG_S, crash).result()
    assert error.value.kind == "crashed"
    assert workers.submit(LONG_S, add, 2).result() == 42


def test_errors_are_raised_by_the_future(workers: Workers) -> None:
    with pytest.raises(VideoError, match=r"is bad\.") as error:
        workers.submit(LONG_S, refuse).result()
    assert error.value.kind == "empty"
    with pytest.raises(RuntimeError, match="KeyError: 'ours'"):
        workers.submit(LONG_S, mistake).result()


def test_processes_end_with_their_pool() -> None:
    workers = Workers(1, partial(int, 40))
    process = workers.submit(LONG_S, process_of).result()
    del workers
    gc.collect()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail(f"process {process} outlived its owner")


def repeat(source: str, target: str, times: int) -> None:
    """Write the same frames repeatedly in one group of pictures, so that seeking is impossible."""
    with av.open(source) as shown, av.open(target, "w") as container:
        stream = container.add_stream_from_template(shown.streams.video[0])
        packets = [packet for packet in shown.demux(video=0) if packet.size]
        duration = packets[0].duration
        assert duration is not None
        for count in range(times * len(packets)):
            packet = av.Packet(bytes(packets[count % len(packets)]))
            packet.pts = packet.dts = count * duration
            packet.duration, packet.time_base = duration, packets[0].time_base
            packet.is_keyframe, packet.stream = count == 0, stream
            container.mux(packet)


def test_a_video_over_its_timeout_is_a_video_error(make_clip: MakeClip, tmp_path: Path) -> None:
    slow = str(tmp_path / "slow.mp4")
    repeat(make_clip("part.mp4", num_frames=40, codec="mpeg4", size=(480, 640)), slow, times=400)
    quick = make_clip("quick.mp4", num_frames=8)
    reader = VideoReader(Video(**SMALL, timeout_s=1.0, workers=1), PIXELS)
    error, video = reader.encode([slow, quick])
    assert isinstance(video, EncodedVideo) and isinstance(error, VideoError)
    assert error.kind == "hung" and str(error).startswith(f"{slow} was not decoded within 1 s")
    assert reader.counts["retried"] >= 1
    began = time.monotonic()
    assert errors_of(reader.encode([slow]))[0].kind == "hung"  # it is not tried again
    assert time.monotonic() - began < 0.5


@pytest.mark.parametrize("decoder", ["dali", "pyav"])
def test_prefetched_videos_are_bit_equal(make_clip: MakeClip, decoder: str) -> None:
    paths = [make_clip(f"{i}.mp4", num_frames=8 + i) for i in range(6)]
    cfg = Video(**SMALL | {"decoder": decoder}, prefetch=4, store_mib=1)
    plain = videos_of(VideoReader(cfg, PIXELS).encode(paths))
    reader = VideoReader(cfg, PIXELS)
    reader.prefetch([VideoClip(path) for path in paths])
    ahead = videos_of(reader.encode(paths[::-1])[::-1])
    for one, other in zip(plain, ahead, strict=True):
        np.testing.assert_array_equal(one.frames, other.frames)
    assert reader.counts["decoded"] == 6
    reader.prefetch([VideoClip("/nowhere.mp4")])
    assert errors_of(reader.encode(["/nowhere.mp4"]))[0].kind == "missing"
    reader.prefetch([])


@pytest.mark.slow
def test_memory_is_flat_over_a_thousand_videos(make_clip: MakeClip, tmp_path: Path) -> None:
    """One file under 1,000 names with a different window each, so that all are decoded."""
    source = make_clip("source.mp4", num_frames=16, size=(56, 56))
    clip = []
    for number in range(1000):
        name = tmp_path / f"{number}.mp4"
        os.link(source, name)
        clip.append(VideoClip(str(name), (0.0, 0.5 + number / 1e3)))
    reader = VideoReader(Video(**SMALL, store_mib=1), PIXELS)
    held = []
    for start in range(0, 1000, 100):
        assert all(isinstance(v, EncodedVideo) for v in reader.encode(clip[start:][:100]))
        held.append(resident_bytes())
    assert reader.counts["decoded"] == 1000
    assert held[-1] - held[4] < 8 << 20


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


READ_ONE = """
import sys
from megatron_vrl.config import Video
from megatron_vrl.models.qwen2_5_vl.pixels import PIXELS
from megatron_vrl.video import VideoReader
from tests.video.conftest import MakeClip
if __name__ == "__main__":
    reader = VideoReader(Video(decoder="pyav", workers=2), PIXELS)
    print(type(reader.encode([sys.argv[1]])[0]).__name__)
"""


@pytest.mark.parametrize(
    "length",
    [pytest.param(75, marks=pytest.mark.slow), 76, pytest.param(200, marks=pytest.mark.slow)],
)
def test_a_long_tmpdir(make_clip: MakeClip, tmp_path: Path, length: int) -> None:
    """A Unix socket address has at most 107 bytes. TMPDIR is tested under and over MAX_TMPDIR."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    long = folder / ("x" * (length - len(str(folder)) - 1))
    long.mkdir()
    program = tmp_path / "one.py"
    program.write_text(READ_ONE)
    environment = os.environ | {"TMPDIR": str(long), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(program), make_clip("clip.mp4", num_frames=4)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "EncodedVideo", done.stderr
    assert not any(long.iterdir())
    shutil.rmtree(folder)
