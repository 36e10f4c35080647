"""Probes a video file: header and packet timestamps. Only the first frame is decoded.

`probe` keeps the pts of every frame, so frame numbers and times are correct for variable frame
rates and for headers without a frame count. Times are relative to the first shown frame. Sizes are
display sizes, after rotation by multiples of 90 degrees. Not supported: mirrored display matrices
and non-square pixels.
"""

from dataclasses import dataclass
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from megatron_vrl.config import Video
from megatron_vrl.errors import VideoError
from megatron_vrl.types import Interval
from megatron_vrl.video.faults import as_video_error
from megatron_vrl.video.rules import PixelRules, SamplingPlan, plan_frames
from megatron_vrl.video.scan import JOINABLE, Scan, scan

MAX_SIDE = 16384  # pixels; no supported codec allows more, and one frame would fill the memory
STARTS_AT_0 = ("mov", "matroska")  # containers whose clock starts at 0, not at the first packet
ROUNDING_S = 1e-3  # tolerance: containers round times to 1 ms


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoFile:
    """Properties of a file's video stream. N frames in presentation order."""

    path: str
    codec: str
    stream: int  # index of the decoded video stream
    height: int  # pixels, after rotation
    width: int
    quarter_turns: int  # 0 to 3, counterclockwise rotation of decoded frames for display
    pixel_format: str
    matrix: int  # FFmpeg's AVColorSpace
    colour_range: int  # FFmpeg's AVColorRange
    native_fps: float  # frames per second; average for a variable rate
    duration_s: float
    timestamps_s: NDArray[np.float64]  # [N] seconds after the first frame
    pts: NDArray[np.int64]  # [N] ascending, in the stream's time base
    keyframes: NDArray[np.int64]  # frame numbers of keyframes, ascending
    has_pts: bool  # False: only dts are known, so frames are numbered by counting
    has_hidden_packets: bool  # some packets show no frame, so counting packets miscounts frames
    has_other_pictures: bool  # another video stream, or cover art
    format_changes: bool  # size or pixel format changes in the stream or differs from the header
    late_s: float  # seconds from the start of the file's clock to the first frame

    @property
    def num_frames(self) -> int:
        """Return the number of shown frames."""
        return len(self.pts)

    @property
    def coded_size(self) -> tuple[int, int]:
        """Return (height, width) of a decoded frame before rotation."""
        size = (self.height, self.width)
        return size[::-1] if self.quarter_turns % 2 else size

    def keyframe_before(self, index: int) -> int:
        """Return the number of the last keyframe at or before frame `index`; 0 if there is none."""
        after = int(np.searchsorted(self.keyframes, index, side="right"))
        return int(self.keyframes[after - 1]) if after else 0

    def within(self, window_s: Interval | None) -> tuple[int, int, float]:
        """Return (first frame, number of frames, frames per second) of a window.

        Raises VideoError, whose message does not name the file, if the window has no frame.
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
        return first, stop - first, _snap_to(self.native_fps, fps)


@dataclass(frozen=True, slots=True)
class DecodeJob:
    """A probed file and the frames to decode from it."""

    file: VideoFile
    plan: SamplingPlan


def planned(path: str, window_s: Interval | None, cfg: Video, pixels: PixelRules) -> DecodeJob:
    """Return the decode job of a clip. `plan.num_tokens` is known before any frame is decoded.

    Raises VideoError, whose message does not name the file.
    """
    with as_video_error("cannot be read as a video", "unreadable"):
        file = probe(path)
        first, count, fps = file.within(window_s)
        plan = plan_frames(count, fps, file.height, file.width, cfg, pixels, first)
        return DecodeJob(file, plan)


def probe(path: str) -> VideoFile:
    """Return the properties of a file. Raises VideoError, whose message does not name the file."""
    with (
        as_video_error("cannot be opened as a video", "unreadable"),
        open_video(path) as container,
    ):
        stream: Any = container.streams.best("video")
        if stream is None:
            raise VideoError("has no video stream; give a file with pictures.", "no_pictures")
        _check_stream(stream)
        found = scan(container, stream)
        if not found.packets:
            raise VideoError(
                "has a video stream without timestamps; replace it, or put a raw stream into a "
                "container.",
                "no_pictures",
            )
        file = _index(path, container, stream, found)
        _check_complete(container, found.end_s, file)
        return file


def open_video(path: str) -> Any:
    """Return PyAV's container. Tags that are not UTF-8 are accepted."""
    return av.open(path, metadata_errors="replace")


def _check_stream(stream: Any) -> None:
    """Raise VideoError if the codec is unknown or the size is invalid."""
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
        raise VideoError("has no frame size in its header; replace it.", "unreadable")


def _index(path: str, container: Any, stream: Any, found: Scan) -> VideoFile:
    """Return the VideoFile of a scanned file."""
    packets = sorted(found.packets, key=lambda packet: packet.pts)
    pts, first = np.unique(np.array([packet.pts for packet in packets]), return_index=True)
    if len(packets) > 1 and len(pts) == 1:
        raise VideoError("has a duration of 0 s; replace it.", "no_duration")
    seconds = float(stream.time_base)
    timestamps_s = (pts - pts[0]) * seconds
    nominal_fps = float(stream.average_rate or 0)
    # Some containers have no packet durations. The last frame then gets the average duration.
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
        # The header's rate is exact if it agrees. Timestamps rounded to 1/1000 s could change the
        # number of sampled frames.
        native_fps=_snap_to(nominal_fps, len(pts) / duration_s),
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


def _snap_to(exact: float, measured: float) -> float:
    """Return `exact` if it is within 1 % of `measured`, else `measured`."""
    return exact if abs(exact - measured) < 0.01 * measured else measured


def _clock_start_s(container: Any, found: Scan) -> float:
    """Return when a player's clock starts: 0 in some containers, else the first packet."""
    is_absolute = not {*container.format.name.split(",")}.isdisjoint(STARTS_AT_0)
    return min(found.begin_s, 0.0) if is_absolute else found.begin_s


def _check_complete(container: Any, end_s: float, file: VideoFile) -> None:
    """Raise VideoError if the header promises a longer video than the packets have.

    A container that is cut between two packets is read without an error.
    """
    name = container.format.name
    if container.duration is None or name in JOINABLE:
        return
    # FFmpeg counts Matroska's duration from 0, and that of other containers from the first packet.
    before = 0 if "matroska" in name else max(container.start_time or 0, 0)
    promised_s = (container.duration + before) / av.time_base
    if promised_s - end_s > min(1.0, 0.1 * promised_s) + 1 / file.native_fps:
        raise VideoError(
            f"is cut off after {end_s:.2f} of {promised_s:.2f} s; replace it.", "cut_off"
        )
