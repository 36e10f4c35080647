"""trim.split: the frames of the parts are the frames of the whole stream, byte for byte."""

import io
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from megatron_vrl.config import Video
from megatron_vrl.models.qwen2_5_vl.pixels import PIXELS
from megatron_vrl.video.dali import DaliDecoder
from megatron_vrl.video.nal import NalReader
from megatron_vrl.video.probe import DecodeJob, planned
from megatron_vrl.video.pyav import decode_frames
from megatron_vrl.video.routing import BLACKWELL, dali_reads
from megatron_vrl.video.trim import CONTAINERS, split
from tests.video.conftest import MakeClip

NUM_FRAMES = 60
Options = dict[str, Any]  # of `write_clip`
PPS = 8  # NAL unit type of H.264
SMALL = Video(min_pixels=28 * 28, max_pixels=56 * 56)


def x264(params: str, **options: Any) -> Options:
    return {"codec_options": {"x264-params": f"keyint=20:scenecut=0:{params}"}, **options}


def x265(params: str, **options: Any) -> Options:
    params = f"log-level=none:keyint=20:scenecut=0:{params}"
    return {"codec": "libx265", "codec_options": {"x265-params": params}, **options}


def vpx(codec: str) -> Options:
    options = {"auto-alt-ref": "1", "lag-in-frames": "16", "deadline": "good", "cpu-used": "5"}
    return {"codec": codec, "codec_options": options}


CLIPS: dict[str, Options] = {
    "b_pyramid.mp4": x264("bframes=5:b-pyramid=normal"),
    "open_gop.mp4": x264("bframes=5:b-pyramid=normal:open-gop=1"),
    "open_gop.ts": x264("bframes=4:open-gop=1:repeat-headers=1"),
    "open_gop.mkv": x264("bframes=4:open-gop=1"),
    "slices.flv": x264("bframes=2:slices=4"),
    "baseline.mp4": x264("bframes=0:ref=3"),
    "intra_refresh.mp4": x264("bframes=2:intra-refresh=1"),
    "ten_bits.mov": x264("bframes=3", pixels="yuv420p10le"),
    "variable.mkv": x264("bframes=3", times_ms=[i * 40 + i * i * 3 for i in range(NUM_FRAMES)]),
    "hevc_open_gop.mp4": x265("bframes=4:open-gop=1"),
    "hevc_closed_gop.mkv": x265("bframes=4:open-gop=0"),
    "hevc_layers.ts": x265("bframes=3:b-adapt=0:temporal-layers=2:open-gop=1:repeat-headers=1"),
    "vp9.webm": vpx("libvpx-vp9"),
    "vp9.mp4": vpx("libvpx-vp9"),
    "vp8.webm": {"codec": "libvpx"},
    "mjpeg.mkv": {"codec": "mjpeg", "pixels": "yuvj420p"},
}
MADE: Options = {"num_frames": NUM_FRAMES, "size": (64, 96), "gop": 20}


def jobs(path: str) -> Iterator[DecodeJob]:
    """Yield jobs with different wanted frames: ends, around a key frame, regular, random."""
    job = planned(path, None, SMALL, PIXELS)
    last = job.file.num_frames - 1
    rng = np.random.default_rng(last)
    choices = [[0], [last], [last // 3 - 1], [last // 3], [last // 3 + 1], [0, last], [1, 2, last]]
    choices += [list(range(0, last, 7)), list(range(last + 1))]
    choices += [rng.choice(last + 1, min(last, 5), replace=False).tolist() for _ in range(3)]
    for chosen in choices:
        yield with_frames(job, sorted(chosen))


def with_frames(job: DecodeJob, frames: list[int]) -> DecodeJob:
    return replace(job, plan=replace(job.plan, indices=np.array(frames)))


def decoded(file: str | io.BytesIO, stream: int = 0) -> list[av.VideoFrame]:
    """Return all frames from the first key frame on."""
    frames: list[av.VideoFrame] = []
    is_decodable = False
    with av.open(file, "r") as container:
        video = container.streams[stream]
        assert isinstance(video, av.VideoStream)
        for packet in container.demux(video):
            is_decodable |= packet.is_keyframe or not packet.size
            frames += packet.decode() if is_decodable else []
    return frames


def num_packets(path: str, stream: int) -> int:
    with av.open(path) as container:
        return sum(packet.size > 0 for packet in container.demux(container.streams[stream]))


def assert_parts_are_exact(path: str, every: int = 1) -> int:
    """Compare FFmpeg's frames of the parts and of the file. Return the smallest packet count."""
    fewest, file = 1 << 30, planned(path, None, SMALL, PIXELS).file
    shown = decoded(path, file.stream)
    assert len(shown) == file.num_frames
    for job in list(jobs(path))[::every]:
        parts, found = split(job), {}
        for part in parts:
            frames = decoded(io.BytesIO(part.encoded.tobytes()))
            times = [frame.pts for frame in frames if frame.pts is not None]
            assert len(times) == len(frames)
            assert times == sorted(times)  # NVDEC's frames are put into the order of pts
            for number, position in zip(part.frames, part.positions, strict=True):
                found[number] = frames[position].to_ndarray()
        assert [*found] == job.plan.indices.tolist()
        wrong = [
            n for n, frame in found.items() if not np.array_equal(frame, shown[n].to_ndarray())
        ]
        assert not wrong, (path, job.plan.indices.tolist(), wrong)
        fewest = min(fewest, sum(part.num_packets for part in parts))
    return fewest


@pytest.mark.parametrize("name", CLIPS)
def test_parts_have_the_frames_of_the_whole_stream(make_clip: MakeClip, name: str) -> None:
    path = make_clip(name, **MADE | CLIPS[name])
    assert assert_parts_are_exact(path) == 1  # of the first frame
    last = with_frames(planned(path, None, SMALL, PIXELS), [NUM_FRAMES - 1])
    (part,) = split(last)
    if name == "intra_refresh.mp4":  # no second access point: every reference frame is needed
        assert part.num_packets > NUM_FRAMES // 3
    else:
        assert part.num_packets <= NUM_FRAMES // 3


@pytest.mark.parametrize("name", CLIPS)
def test_dali_on_parts_equals_a_sequential_read(make_clip: MakeClip, name: str) -> None:
    """All jobs of a clip are decoded in one call, so parts of several jobs share a batch."""
    wanted = list(jobs(make_clip(name, **MADE | CLIPS[name])))
    decoder = DaliDecoder(SMALL)
    for job, frames in zip(wanted, decoder.decode(wanted), strict=True):
        np.testing.assert_array_equal(frames, decode_frames(job.file, job.plan, seek=False))
    assert decoder.num_fallbacks == 0


def test_real_clips(real_clips: list[str]) -> None:
    """`nasa_13013.mp4` has two video streams and an edit list that hides packets."""
    trimmed = [
        path for path in real_clips if planned(path, None, SMALL, PIXELS).file.codec in CONTAINERS
    ]
    assert {"nasa_13013.mp4", "h265_video.mp4"} <= {Path(path).name for path in trimmed}
    for path in trimmed:
        assert dali_reads(planned(path, None, SMALL, PIXELS).file, "gpu", BLACKWELL)
        assert assert_parts_are_exact(path, every=3) < num_packets(
            path, planned(path, None, SMALL, PIXELS).file.stream
        )


def cut(source: str, target: str, shown_from: int, drop: slice = slice(0)) -> None:
    """Copy a stream, with an edit list that hides the first frames, without packets `drop`."""
    with av.open(source) as whole, av.open(target, "w") as container:
        stream = container.add_stream_from_template(whole.streams.video[0])
        packets = [packet for packet in whole.demux(video=0) if packet.size]
        del packets[drop]
        for packet in packets:
            assert packet.pts is not None and packet.dts is not None
            assert packet.duration is not None
            packet.pts -= shown_from * packet.duration
            packet.dts -= shown_from * packet.duration
            packet.stream = stream
            container.mux(packet)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["b_pyramid.mp4", "open_gop.mp4", "hevc_open_gop.mp4"])
@pytest.mark.parametrize("shown_from", [0, 1, 10, 25])
@pytest.mark.parametrize("begins_inside_a_gop", [False, True])
def test_edit_lists_and_missing_starts(
    make_clip: MakeClip, tmp_path: Path, name: str, shown_from: int, begins_inside_a_gop: bool
) -> None:
    source, target = make_clip(name, **MADE | CLIPS[name]), str(tmp_path / f"cut_{name}")
    cut(source, target, shown_from, slice(0, 3 if begins_inside_a_gop else 0))
    wanted = list(jobs(target))
    assert wanted[0].file.has_hidden_packets == bool(shown_from or begins_inside_a_gop)
    decoder = DaliDecoder(SMALL)
    for job, frames in zip(wanted, decoder.decode(wanted), strict=True):
        np.testing.assert_array_equal(frames, decode_frames(job.file, job.plan, seek=False))
    assert decoder.num_fallbacks == 0


def join_with_other_pps(one: str, other: str, target: str) -> None:
    """Join two streams of one SPS. The PPS of the second is in its first packet only."""
    with av.open(one) as first, av.open(other) as second, av.open(target, "w") as container:
        template = first.streams.video[0]
        stream = container.add_stream_from_template(template)
        assert template.codec_context.extradata is not None
        nal = NalReader("h264", template.codec_context.extradata)
        packets = [p for source in (first, second) for p in source.demux(video=0) if p.size]
        for position, packet in enumerate(packets):
            units = list(nal.units(bytes(packet)))
            if position > NUM_FRAMES:
                units = [unit for unit in units if nal.kind(unit) != PPS]
            copy = av.Packet(b"".join(len(unit).to_bytes(4, "big") + unit for unit in units))
            assert packet.pts is not None
            copy.pts = packet.pts + (NUM_FRAMES * 1000 // 16 if position >= NUM_FRAMES else 0)
            copy.dts = position * 1000 // 16 - 500
            copy.time_base, copy.is_keyframe = packet.time_base, packet.is_keyframe
            copy.stream = stream
            container.mux(copy)


def test_a_key_frame_without_its_parameter_sets_starts_no_part(
    make_clip: MakeClip, tmp_path: Path
) -> None:
    one, other = (
        make_clip(f"{offset}.mkv", **MADE | x264(f"repeat-headers=1:chroma-qp-offset={offset}"))
        for offset in (0, 9)
    )
    joined = str(tmp_path / "joined.mkv")
    join_with_other_pps(one, other, joined)
    file = planned(joined, None, SMALL, PIXELS).file
    assert not file.format_changes
    assert file.keyframes.tolist() == [0, 20, 40, 60, 80, 100]
    assert_parts_are_exact(joined)
    starts = [60, 80, 100]
    parts = [split(with_frames(planned(joined, None, SMALL, PIXELS), [n]))[0] for n in starts]
    assert [part.positions.tolist() == [0] for part in parts] == [True, False, False]


def write_packets(source: str, target: str, pts: list[int]) -> None:
    """Write the packets of `source` in their order, at other times."""
    with av.open(source) as shown, av.open(target, "w") as container:
        stream = container.add_stream_from_template(shown.streams.video[0])
        packets = [packet for packet in shown.demux(video=0) if packet.size]
        for position, (packet, time) in enumerate(zip(packets, pts, strict=True)):
            copy = av.Packet(bytes(packet))
            copy.pts, copy.dts, copy.time_base = time, position, Fraction(1, 1000)
            copy.is_keyframe, copy.stream = packet.is_keyframe, stream
            container.mux(copy)


def test_streams_without_one_packet_per_frame_have_no_parts(
    make_clip: MakeClip, tmp_path: Path
) -> None:
    source, target = (
        make_clip("a.mkv", **MADE | {"gop": 15} | vpx("libvpx-vp9")),
        tmp_path / "b.mkv",
    )
    regular = list(range(100, 100 + 10 * NUM_FRAMES, 10))
    twice = [*regular[:35], regular[34], *regular[36:]]  # two frames at one time
    backwards = [*regular[:15], *regular[45:], *regular[30:45], *regular[15:30]]
    for pts, frames, is_regular in (
        (regular, [5, 59], True),
        (twice, [5, 19], True),
        (twice, [5, 40], False),
        (backwards, [5, 14], True),
        (backwards, [5, 20], False),
    ):
        write_packets(source, str(target), pts)
        job = with_frames(planned(str(target), None, SMALL, PIXELS), frames)
        assert bool(split(job)) == is_regular


def test_codecs_without_a_row_are_decoded_whole(make_clip: MakeClip) -> None:
    path = make_clip("old.mp4", codec="mpeg4", **MADE)
    job = with_frames(planned(path, None, SMALL, PIXELS), [3, 50])
    (part,) = split(job)
    assert part.encoded.tobytes() == Path(path).read_bytes()
    assert part.positions.tolist() == part.frames.tolist() == [3, 50]
