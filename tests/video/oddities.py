"""Generates tiny clips of every container and codec, each with one unusual property."""

import io
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal

import av
import numpy as np

SIZE = (64, 96)  # height and width
SMALLER = (48, 64)
FPS = 8
NUM_FRAMES = 20
CODECS = {
    "mp4": ("libx264", "libx265", "libvpx-vp9", "mpeg4"),
    "mov": ("libx264", "libx265", "mjpeg"),
    "mkv": ("libx264", "libx265", "libvpx", "libvpx-vp9", "mjpeg"),
    "webm": ("libvpx", "libvpx-vp9"),
    "avi": ("libx264", "mjpeg", "mpeg4"),
    "ts": ("libx264", "libx265", "mpeg2video"),
    "flv": ("libx264",),
}
OPTIONS = {  # parameter sets in every key packet, so that streams may be joined
    "libx264": {"x264-params": "keyint=6:min-keyint=6:scenecut=0:repeat-headers=1:bframes={b}"},
    "libx265": {"x265-params": "log-level=none:keyint=6:min-keyint=6:scenecut=0:bframes={b}"},
    "libvpx": {"deadline": "realtime", "cpu-used": "8"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"},
}
Part = tuple["av.Packet[av.VideoStream]", av.VideoStream]  # a packet and its stream
Track = list[Part] | Literal["audio", "cover"]
MATRIX = [(container, codec) for container, codecs in CODECS.items() for codec in codecs]


@lru_cache(maxsize=64)
def encoded(
    codec: str,
    size: tuple[int, int] = SIZE,
    pixels: str = "",
    bframes: int = 0,
    open_gop: bool = False,
    first: int = 0,
) -> bytes:
    """Encode NUM_FRAMES frames, with parameter sets in the container's header."""
    file = io.BytesIO()
    carrier = "matroska" if codec in ("libvpx", "libvpx-vp9", "mjpeg") else "mpegts"
    carrier = "avi" if codec == "mpeg4" else carrier
    rng = np.random.default_rng(3)
    picture = np.kron(rng.integers(0, 256, (4, 4, 3)), np.ones((40, 40, 1))).astype(np.uint8)
    options = {k: v.format(b=bframes) for k, v in OPTIONS.get(codec, {}).items()}
    if open_gop:
        options = {k: f"{v}:open-gop=1" for k, v in options.items()}
    with av.open(file, "w", format=carrier) as container:
        stream = container.add_stream(codec, rate=FPS if codec != "mpeg2video" else 25)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = size
        stream.pix_fmt = pixels or ("yuvj420p" if codec == "mjpeg" else "yuv420p")
        stream.gop_size, stream.options = 6, {**options}
        for index in range(NUM_FRAMES):
            moved = np.roll(picture, 5 * (index + first), axis=1)[: size[0], : size[1]].copy()
            moved[:8, :8] = 12 * index
            frame = av.VideoFrame.from_ndarray(moved, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def packets(codec: str, **options: Any) -> Iterator[Part]:
    """Return the packets of `encoded` with their stream. Times are in frames from 0."""
    # stays open: its stream is the template of what is written
    source = av.open(io.BytesIO(encoded(codec, **options)), "r")
    stream = source.streams.video[0]
    unit = stream.time_base
    assert unit is not None
    found = [packet for packet in source.demux(stream) if packet.size]
    tick = 1 / Fraction(FPS if codec != "mpeg2video" else 25)
    shown = [p.dts if p.pts is None else p.pts for p in found]
    start = min(time for time in shown if time is not None) * unit
    for packet, pts in zip(found, shown, strict=True):
        assert pts is not None and packet.dts is not None
        content: av.Packet[Any] = av.Packet(bytes(packet))
        content.pts = round((pts * unit - start) / tick)
        content.dts = round((packet.dts * unit - start) / tick)
        content.duration, content.time_base = 1, tick
        content.is_keyframe = packet.is_keyframe
        yield content, stream


def mux(
    path: str,
    tracks: list[Track],
    seconds: float = 0.0,
    turned: int = 0,
    times: Callable[[int], int] | None = None,
) -> None:
    """Write `tracks` (packets, "audio" or "cover") as the streams of one file."""
    with av.open(path, "w") as container:
        streams = [_stream_for(track, container, path, turned) for track in tracks]
        for track, stream in zip(tracks, streams, strict=True):
            for packet in _of(track, stream):
                if isinstance(track, list):
                    assert packet.pts is not None and packet.dts is not None
                    packet.pts += round(seconds / packet.time_base)
                    packet.dts += round(seconds / packet.time_base)
                    if times:
                        packet.pts, packet.dts = times(packet.pts), times(packet.dts)
                packet.stream = stream
                container.mux(packet)


def _stream_for(
    track: Track, container: av.container.OutputContainer, path: str, turned: int
) -> av.AudioStream | av.VideoStream:
    """Add the stream of a track to the file."""
    if track == "audio":
        name = {"flv": "aac", "avi": "libmp3lame", "webm": "libopus"}
        sound = container.add_stream(name.get(path.rpartition(".")[2], "aac"), rate=48000)
        assert isinstance(sound, av.AudioStream)
        sound.layout = "mono"
        return sound
    if track == "cover":
        cover = container.add_stream("mjpeg", rate=1)
        assert isinstance(cover, av.VideoStream)
        cover.width = cover.height = 32
        cover.pix_fmt = "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        return cover
    assert isinstance(track, list)
    stream = container.add_stream_from_template(track[0][1])
    if turned:
        stream.set_display_rotation(turned)
    return stream


def _of(track: Track, stream: av.AudioStream | av.VideoStream) -> Iterator["av.Packet[Any]"]:
    if isinstance(track, list):
        yield from (packet for packet, _ in track)
    elif isinstance(stream, av.VideoStream):
        white = np.full((32, 32, 3), 255, np.uint8)
        picture = av.VideoFrame.from_ndarray(white, format="rgb24").reformat(format="yuvj420p")
        yield from [*stream.encode(picture), *stream.encode()]
    else:
        for start in range(0, 2 * 48000, 960):
            frame = av.AudioFrame.from_ndarray(
                np.zeros((1, 960), np.float32), format="fltp", layout="mono"
            )
            frame.sample_rate, frame.pts = 48000, start
            yield from stream.encode(frame)
        yield from stream.encode()


def joined(*parts: list[Part]) -> list[Part]:
    """Return the parts as one stream, one after the other, with the header of the first."""
    found: list[Part] = []
    shift = 0
    for part in parts:
        for packet, _ in part:
            assert packet.pts is not None and packet.dts is not None
            packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
            found.append((packet, parts[0][0][1]))
        shift += NUM_FRAMES
    return found


def _plain(path: str, codec: str) -> None:
    mux(path, [list(packets(codec))])


def _smaller(path: str, codec: str) -> None:
    mux(path, [joined(list(packets(codec)), list(packets(codec, size=SMALLER)))])


def _larger(path: str, codec: str) -> None:
    mux(path, [joined(list(packets(codec, size=SMALLER)), list(packets(codec)))])


def _chroma(path: str, codec: str) -> None:
    other = {"mjpeg": "yuvj444p"}.get(codec, "yuv444p")
    mux(path, [joined(list(packets(codec)), list(packets(codec, pixels=other)))])


def _two_streams(path: str, codec: str) -> None:
    mux(path, [list(packets(codec)), list(packets(codec, size=SMALLER, first=9))])


def _two_streams_small_first(path: str, codec: str) -> None:
    mux(path, [list(packets(codec, size=SMALLER, first=9)), list(packets(codec))])


ODDITIES = {
    "plain": _plain,
    "smaller": _smaller,
    "larger": _larger,
    "other_chroma": _chroma,
    "two_streams": _two_streams,
    "two_streams_small_first": _two_streams_small_first,
    "cover_first": lambda path, codec: mux(path, ["cover", list(packets(codec))]),
    "cover_last": lambda path, codec: mux(path, [list(packets(codec)), "cover"]),
    "audio_first": lambda path, codec: mux(path, ["audio", list(packets(codec))]),
    "b_frames": lambda path, codec: mux(path, [list(packets(codec, bframes=3))]),
    "open_gop": lambda path, codec: mux(path, [list(packets(codec, bframes=3, open_gop=True))]),
    "late": lambda path, codec: mux(path, ["audio", list(packets(codec))], seconds=2.0),
    "offset": lambda path, codec: mux(path, [list(packets(codec))], seconds=30.0),
    "cut_by_edit": lambda path, codec: mux(path, [list(packets(codec))], seconds=-0.5),
    "rotated": lambda path, codec: mux(path, [list(packets(codec))], turned=90),
    "odd_size": lambda path, codec: mux(path, [list(packets(codec, size=(58, 74)))]),
    "variable": lambda path, codec: mux(
        path, [list(packets(codec))], times=lambda t: t + t * t // 9
    ),
    "mid_gop": lambda path, codec: mux(path, [list(packets(codec, bframes=2))[3:]]),
    "leading": lambda path, codec: mux(path, [list(packets(codec, bframes=3, open_gop=True))[6:]]),
}
# MPEG-4 says its size outside the packets, so parts of two sizes cannot be joined; of MPEG-2 FFmpeg
# loses the last picture before the change.
ONE_SIZE = {"mpeg4", "mpeg2video"}
ONLY = {
    **dict.fromkeys(("smaller", "larger"), {codec for _, codec in MATRIX} - ONE_SIZE),
    "other_chroma": {"libx264", "libx265", "mjpeg"},
    "b_frames": {"libx264", "libx265"},
    "open_gop": {"libx264", "libx265"},
    "leading": {"libx264", "libx265"},
}
IMPOSSIBLE = {  # containers without covers; AVI does not say which pictures come before a keyframe
    *((name, cover) for name in ("flv", "webm") for cover in ("cover_first", "cover_last")),
    ("avi", "leading"),
}
