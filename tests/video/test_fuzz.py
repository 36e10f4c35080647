"""Damaged files: any bytes are either decoded or raise VideoError."""

import random
from collections import Counter
from pathlib import Path
from typing import Any

import av
import pytest

from megatron_vrl.config import Video
from megatron_vrl.errors import VideoError
from megatron_vrl.models.qwen2_5_vl.pixels import PIXELS
from megatron_vrl.types import EncodedVideo, VideoClip
from megatron_vrl.video.encode import Encoder
from tests.video.conftest import MakeClip, write_clip
from tests.video.oddities import ODDITIES

RULE: dict[str, Any] = {
    "min_pixels": 28 * 28,
    "max_pixels": 28 * 28,
    "num_frames": 2,
    "decoder": "pyav",
}
TINY = {  # name -> codec, of a few KB each
    "a.mp4": "libx264",
    "b.mp4": "libx265",
    "c.mkv": "libx264",
    "d.webm": "libvpx-vp9",
    "e.webm": "libvpx",
    "f.avi": "mjpeg",
    "g.avi": "mpeg4",
    "h.ts": "libx264",
    "i.flv": "libx264",
    "j.mpg": "mpeg2video",
    "k.mov": "mjpeg",
    "l.ts": "mpeg2video",
}
ODD = {"two_streams.mkv": "libvpx", "cover_first.mp4": "libx264", "late.mp4": "libx264"}


@pytest.fixture(scope="module")
def contents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    for name, codec in TINY.items():
        full: dict[str, Any] = {"pixels": "yuvj420p"} if codec == "mjpeg" else {}
        fps: dict[str, Any] = {"fps": 25} if codec == "mpeg2video" else {}
        write_clip(
            str(folder / name), num_frames=5, size=(32, 32), gop=3, codec=codec, **full, **fps
        )
    for name, codec in ODD.items():
        ODDITIES[name.partition(".")[0]](str(folder / name), codec)
    with av.open(str(folder / "a.mp4")) as source, av.open(str(folder / "m.mkv"), "w") as target:
        target.metadata["title"] = "a title that is written in some alphabet"
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def mutant(content: bytes, rng: random.Random) -> bytes:
    """Change a few bytes, mostly in headers; sometimes truncate or duplicate."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 2, 8, 40))):
        place = rng.choice((rng.randrange(3000), -1 - rng.randrange(4000), rng.randrange(1 << 30)))
        changed[place % len(changed)] = rng.choice((0, 255, rng.randrange(256)))
    kind = rng.random()
    if kind < 0.05:
        return bytes(changed[: rng.randrange(1, len(changed))])
    return bytes(changed) * (2 if kind > 0.97 else 1)


def results(contents: dict[str, bytes], count: int, seed: int, folder: Path) -> Counter[str]:
    """Count the results of `count` mutants. Raises any exception that is not a VideoError."""
    encoder, rng = Encoder(Video(**RULE), PIXELS), random.Random(seed)
    found: Counter[str] = Counter()
    for number in range(count):
        name = sorted(contents)[number % len(contents)]
        path = folder / name
        path.write_bytes(mutant(contents[name], rng))
        try:
            (video,) = encoder.encode([VideoClip(str(path))], ["digest"])
        except Exception as error:
            raise AssertionError(f"mutant {number} of {name}, seed {seed}") from error
        assert isinstance(video, EncodedVideo | VideoError)
        if isinstance(video, VideoError):
            assert "\n" not in str(video) and len(str(video)) < 400
        found[video.kind if isinstance(video, VideoError) else "read"] += 1
    return found


def test_mutated_files_raise_only_video_errors(contents: dict[str, bytes], tmp_path: Path) -> None:
    found = results(contents, 600, 0, tmp_path)
    assert found["read"] > 60 and found["unreadable"] > 10 and found["damaged"] > 10, found


@pytest.mark.slow
@pytest.mark.timeout(600)  # about 12 s of one free core
def test_three_thousand_mutants(contents: dict[str, bytes], tmp_path: Path) -> None:
    found = results(contents, 3_000, 1, tmp_path)
    assert found["read"] > 300, found


@pytest.mark.parametrize("suffix", ["avi", "mp4", "mkv"])
def test_a_title_that_is_not_utf8_is_read(tmp_path: Path, make_clip: MakeClip, suffix: str) -> None:
    source, path = make_clip("whole.mp4", num_frames=8, codec="mpeg4"), tmp_path / f"a.{suffix}"
    with av.open(source) as shown, av.open(str(path), "w") as target:
        target.metadata["title"] = "CAFEXX"
        stream = target.add_stream_from_template(shown.streams.video[0])
        for packet in shown.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    titled = path.read_bytes()
    assert b"CAFEXX" in titled
    path.write_bytes(titled.replace(b"CAFEXX", b"CAF\xc9\xe9\xff"))
    (video,) = Encoder(Video(**RULE), PIXELS).encode([VideoClip(str(path))], ["digest"])
    assert isinstance(video, EncodedVideo), video


def test_an_unknown_codec_is_unreadable(tmp_path: Path, make_clip: MakeClip) -> None:
    path = tmp_path / "unknown.mp4"
    path.write_bytes(Path(make_clip("a.mp4", num_frames=4)).read_bytes().replace(b"avc1", b"zzz1"))
    (error,) = Encoder(Video(**RULE), PIXELS).encode([VideoClip(str(path))], ["digest"])
    assert isinstance(error, VideoError) and error.kind == "unreadable"
    assert str(error).startswith("has a codec that FFmpeg does not know")
