"""What is in a video file, from its header and its packets; no picture but the first is decoded.

`probe` keeps the pts of every frame, so frame numbers and times are right for variable frame rates
and for headers that name no count. The first picture is decoded for its display matrix, which PyAV
shows nowhere else: sizes here are those a file is shown at, turned by multiples of 90 degrees.
Left out: mirrored display matrices and pixels that are not square.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from megatron_vrl.config import Video
from megatron_vrl.errors import VideoError
from megatron_vrl.types import Interval
from megatron_vrl.video.rules import SamplingPlan, plan_frames

MAX_SIDE = 16384  # pixels; no codec here allows more, and one frame would fill the memory
ROUNDING_S = 1e-3  # containers round times to a millisecond, annotations to less


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoFile:
    """What a file's video stream says. N frames in order of presentation."""

    path: str
    codec: str
    stream: int  # index of the video stream that is read
    height: int  # pixels as shown, so after turning
    width: int
    quarter_turns: int  # 0 to 3, counterclockwise, from a decoded frame to the shown one
    pixel_format: str
    matrix: int  # FFmpeg's AVColorSpace
    colour_range: int  # FFmpeg's AVColorRange
    native_fps: float  # frames per second, the average where the rate varies
    duration_s: float
    timestamps_s: NDArray[np.float64]  # [N] from the first frame's
    pts: NDArray[np.int64]  # [N] rising, in units of the stream
    keyframes: NDArray[np.int64]  # rising frame numbers one can seek to
    has_pts: bool  # False: only decoding times are known, frames are counted instead
    has_hidden_packets: bool  # packets that show no frame; decoders that count packets miscount

    @property
    def num_frames(self) -> int:
        return len(self.pts)

    @property
    def coded_size(self) -> tuple[int, int]:
        """(height, width) of a decoded frame before it is turned."""
        size = (self.height, self.width)
        return size[::-1] if self.quarter_turns % 2 else size

    def keyframe_before(self, index: int) -> int:
        """Number of the last keyframe at or before frame `index`; 0 if none is marked."""
        place = int(np.searchsorted(self.keyframes, index, side="right"))
        return int(self.keyframes[place - 1]) if place else 0

    def within(self, window_s: Interval | None) -> tuple[int, int, float]:
        """First frame, number of frames and frames per second of a window.

        Raises VideoError, whose message does not name the file, if no frame is shown in it.
        """
        if window_s is None:
            return 0, self.num_frames, self.native_fps
        start_s, end_s = window_s
        first = int(np.searchsorted(self.timestamps_s, start_s - ROUNDING_S))
        stop = int(np.searchsorted(self.timestamps_s, end_s + ROUNDING_S, side="right"))
        if first >= stop:
            raise VideoError(
                f"has no frame from {start_s:.2f} to {end_s:.2f} s, it is {self.duration_s:.2f} s "
                "long; correct the window.",
                "window",
            )
        after_s = self.timestamps_s[stop] if stop < self.num_frames else self.duration_s
        fps = float((stop - first) / (after_s - self.timestamps_s[first]))
        return first, stop - first, _rounded_to(self.native_fps, fps)


@dataclass(frozen=True, slots=True)
class DecodeJob:
    file: VideoFile
    plan: SamplingPlan


@dataclass(frozen=True, slots=True)
class _Packet:
    pts: int
    duration: int
    is_keyframe: bool


def planned(path: str, window_s: Interval | None, cfg: Video) -> DecodeJob:
    """Which frames will be decoded at what size, and so `plan.num_tokens`, before any of it is.

    Raises VideoError, whose message does not name the file.
    """
    file = probe(path)
    first, count, fps = file.within(window_s)
    return DecodeJob(file, plan_frames(count, fps, file.height, file.width, cfg, first))


def probe(path: str) -> VideoFile:
    """Scan a file. Raises VideoError, whose message does not name the file."""
    try:
        with av.open(path) as container:
            stream: Any = container.streams.best("video")
            if stream is None:
                raise VideoError("has no video stream; give a file with pictures.", "no_pictures")
            if max(stream.width, stream.height) > MAX_SIDE:
                raise VideoError(
                    f"has frames of {stream.width}x{stream.height}, wider or higher than "
                    f"{MAX_SIDE} pixels; replace it.",
                    "too_large",
                )
            return _scan(path, container, stream)
    except av.FFmpegError as error:
        raise VideoError(
            f"cannot be opened as a video ({error.strerror}); replace it.", "unreadable"
        ) from None


def _scan(path: str, container: Any, stream: Any) -> VideoFile:
    codec = stream.codec.canonical_name
    packets: list[_Packet] = []
    has_pts, hidden, end_s, degrees = True, 0, 0.0, None
    for packet in container.demux():
        time = packet.dts if packet.pts is None else packet.pts
        if not packet.size or time is None:
            continue
        end_s = max(end_s, float((time + (packet.duration or 0)) * packet.time_base))
        if packet.stream.index != stream.index:
            continue
        if packet.is_corrupt:
            raise VideoError(f"is cut off after {end_s:.2f} s; replace it.", "cut_off")
        if degrees is None:
            degrees = _rotation(packet)
        if packet.is_discard or (codec == "vp8" and not bytes(packet)[0] & 0x10):
            hidden += 1  # cut away by an edit list, or a VP8 reference frame that is never shown
            continue
        has_pts &= packet.pts is not None
        packets.append(_Packet(time, packet.duration or 0, packet.is_keyframe))
    if not packets:
        raise VideoError("has a video stream without frames; replace it.", "no_pictures")
    file = _index(path, codec, stream, packets, round((degrees or 0) / 90) % 4, has_pts, hidden)
    _check_complete(container, end_s, file)
    return file


def _rotation(packet: Any) -> int | None:
    """Degrees by which a packet's frame is to be turned counterclockwise; None if it gives none."""
    try:
        return next((frame.rotation for frame in packet.decode()), None)
    except av.FFmpegError:
        return None  # what is damaged is told by the decoder, by name and time


def _index(
    path: str,
    codec: str,
    stream: Any,
    packets: Sequence[_Packet],
    quarter_turns: int,
    has_pts: bool,
    hidden: int,
) -> VideoFile:
    packets = sorted(packets, key=lambda packet: packet.pts)
    pts, first = np.unique(np.array([packet.pts for packet in packets]), return_index=True)
    if len(packets) > 1 and len(pts) == 1:
        raise VideoError("has a duration of 0 s; replace it.", "no_duration")
    seconds = float(stream.time_base)
    timestamps_s = (pts - pts[0]) * seconds
    nominal_fps = float(stream.average_rate or 0)
    # Some containers leave out durations; the last frame then lasts as long as the others.
    last_s = packets[-1].duration * seconds
    if not last_s:
        last_s = timestamps_s[-1] / (len(pts) - 1) if len(pts) > 1 else 1 / (nominal_fps or 1)
    duration_s = float(timestamps_s[-1] + last_s)
    context = stream.codec_context
    size = (stream.height, stream.width)
    height, width = size[::-1] if quarter_turns % 2 else size
    return VideoFile(
        path=path,
        codec=codec,
        stream=stream.index,
        height=height,
        width=width,
        quarter_turns=quarter_turns,
        pixel_format=context.pix_fmt or "",
        matrix=int(context.colorspace),
        colour_range=int(context.color_range),
        # Where the header agrees it is exact, while times rounded to 1/1000 s would move the count
        # of sampled frames across a whole number.
        native_fps=_rounded_to(nominal_fps, len(pts) / duration_s),
        duration_s=duration_s,
        timestamps_s=timestamps_s,
        pts=pts,
        keyframes=np.flatnonzero([packets[i].is_keyframe for i in first]),
        has_pts=has_pts,
        has_hidden_packets=hidden > 0 or len(pts) < len(packets),
    )


def _rounded_to(exact: float, measured: float) -> float:
    return exact if abs(exact - measured) < 0.01 * measured else measured


def _check_complete(container: Any, end_s: float, file: VideoFile) -> None:
    """A container cut between two packets reads without an error; its header still knows."""
    if container.duration is None:
        return
    promised_s = (container.duration + max(container.start_time or 0, 0)) / av.time_base
    if promised_s - end_s > min(1.0, 0.1 * promised_s) + 1 / file.native_fps:
        raise VideoError(
            f"is cut off after {end_s:.2f} of {promised_s:.2f} s; replace it.", "cut_off"
        )
