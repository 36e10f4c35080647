"""What is in a video file, from its header and its packets; no picture but the first is decoded.

`probe` keeps the pts of every frame, so frame numbers and times are right for variable frame rates
and for headers that name no count. Times count from the first frame that is shown. Sizes are those
a file is shown at, turned by multiples of 90 degrees. Left out: mirrored display matrices and
pixels that are not square.
"""

from dataclasses import dataclass
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from megatron_vrl.config import Video
from megatron_vrl.errors import VideoError
from megatron_vrl.types import Interval
from megatron_vrl.video.faults import faults_of_file
from megatron_vrl.video.rules import SamplingPlan, plan_frames
from megatron_vrl.video.scan import JOINABLE, Scan, scan

MAX_SIDE = 16384  # pixels; no codec here allows more, and one frame would fill the memory
STARTS_AT_0 = ("mov", "matroska")  # players show their clock from 0, not from the first packet
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
    has_other_pictures: bool  # another video stream, or a cover, which is one too
    format_changes: bool  # size or pixel format, inside the stream or beside its header
    late_s: float  # from the start of the file's clock to the first frame

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


def planned(path: str, window_s: Interval | None, cfg: Video) -> DecodeJob:
    """Which frames will be decoded at what size, and so `plan.num_tokens`, before any of it is.

    Raises VideoError, whose message does not name the file.
    """
    with faults_of_file("cannot be read as a video", "unreadable"):
        file = probe(path)
        first, count, fps = file.within(window_s)
        return DecodeJob(file, plan_frames(count, fps, file.height, file.width, cfg, first))


def probe(path: str) -> VideoFile:
    """Scan a file. Raises VideoError, whose message does not name the file."""
    with (
        faults_of_file("cannot be opened as a video", "unreadable"),
        open_video(path) as container,
    ):
        stream: Any = container.streams.best("video")
        if stream is None:
            raise VideoError("has no video stream; give a file with pictures.", "no_pictures")
        _check_stream(stream)
        found = scan(container, stream)
        if not found.packets:
            raise VideoError(
                "has a video stream without frames that have a time; replace it, or put a raw "
                "stream into a container.",
                "no_pictures",
            )
        file = _index(path, container, stream, found)
        _check_complete(container, found.end_s, file)
        return file


def open_video(path: str) -> Any:
    """PyAV's container. A tag that is not UTF-8 is no reason to refuse a file."""
    return av.open(path, metadata_errors="replace")


def _check_stream(stream: Any) -> None:
    if stream.codec_context is None:
        raise VideoError(
            "has a codec that FFmpeg does not know; encode it again, with H.264 for example.",
            "unreadable",
        )
    if max(stream.width, stream.height) > MAX_SIDE:
        raise VideoError(
            f"has frames of {stream.width}x{stream.height}, wider or higher than "
            f"{MAX_SIDE} pixels; replace it.",
            "too_large",
        )
    if min(stream.width, stream.height) < 1:
        raise VideoError("does not say how large its frames are; replace it.", "unreadable")


def _index(path: str, container: Any, stream: Any, found: Scan) -> VideoFile:
    packets = sorted(found.packets, key=lambda packet: packet.pts)
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
    context, quarter_turns = stream.codec_context, round(found.degrees / 90) % 4
    size = (stream.height, stream.width)
    height, width = size[::-1] if quarter_turns % 2 else size
    return VideoFile(
        path=path,
        codec=stream.codec.canonical_name,
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
        has_pts=found.has_pts,
        has_hidden_packets=found.num_hidden > 0 or len(pts) < len(packets),
        has_other_pictures=len(container.streams.video) > 1,
        format_changes=found.format_changes,
        late_s=float(pts[0]) * seconds - _clock_start_s(container, found),
    )


def _rounded_to(exact: float, measured: float) -> float:
    return exact if abs(exact - measured) < 0.01 * measured else measured


def _clock_start_s(container: Any, found: Scan) -> float:
    """Where a player starts: at 0 in containers that say so, else at the first packet of all."""
    is_absolute = not {*container.format.name.split(",")}.isdisjoint(STARTS_AT_0)
    return min(found.begin_s, 0.0) if is_absolute else found.begin_s


def _check_complete(container: Any, end_s: float, file: VideoFile) -> None:
    """A container cut between two packets reads without an error; its header still knows."""
    name = container.format.name
    if container.duration is None or name in JOINABLE:
        return
    # Matroska's duration is counted from 0 by FFmpeg, from the first packet by others.
    before = 0 if "matroska" in name else max(container.start_time or 0, 0)
    promised_s = (container.duration + before) / av.time_base
    if promised_s - end_s > min(1.0, 0.1 * promised_s) + 1 / file.native_fps:
        raise VideoError(
            f"is cut off after {end_s:.2f} of {promised_s:.2f} s; replace it.", "cut_off"
        )
