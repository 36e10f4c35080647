"""Packets of a file's video stream, and what they say about the whole file; one picture is decoded.

A recording that begins inside a group of pictures starts at its first keyframe: what comes before
it cannot be decoded. Transport streams that were joined may begin their clock anew; each part then
follows the one before. The first picture is decoded for its display matrix and size.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import av

from megatron_vrl.errors import VideoError
from megatron_vrl.video.picture_format import PictureFormats

# Streams of packets that may be cut and joined anywhere: FFmpeg marks the packet before a joint as
# damaged and takes the duration from the first and last time stamps, so neither tells a cut.
JOINABLE = {"mpegts", "mpeg"}
REORDERED = {"h264", "hevc"}  # codecs whose packets are not in the order of presentation


@dataclass(frozen=True, slots=True)
class Packet:
    """A packet that shows one frame; times in units of the stream."""

    pts: int
    duration: int
    is_keyframe: bool


@dataclass(slots=True)
class Scan:
    packets: list[Packet] = field(default_factory=list)  # in decoding order
    has_pts: bool = True  # False: frames have to be counted
    num_hidden: int = 0  # packets that show no frame
    format_changes: bool = False
    degrees: int = 0  # counterclockwise, from a decoded frame to the shown one
    begin_s: float = float("inf")  # of all streams
    end_s: float = 0.0  # of all streams


def scan(container: Any, stream: Any) -> Scan:
    """Raises VideoError, whose message does not name the file, if a packet is cut off."""
    codec = stream.codec.canonical_name
    formats = PictureFormats(codec, bytes(stream.codec_context.extradata or b""))
    found, clock, first_frame = Scan(), _Clock(), None
    before_key, key_pts, has_pts = list[Packet](), None, True
    # AVI keeps the order of decoding alone; what FFmpeg gives as times of presentation is a guess.
    found.has_pts = container.format.name != "avi" or codec not in REORDERED
    for packet, time in _timed(container, found):
        if packet.stream_index != stream.index:
            continue
        if packet.is_corrupt:
            _refuse_cut(container, packet, found.end_s)
        first_frame = first_frame or _first_frame(packet)
        formats.see(bytes(packet))
        found.format_changes |= packet.has_sidedata("new_extradata")
        if packet.is_keyframe and key_pts is None:
            key_pts = time
        if packet.is_discard or (codec == "vp8" and not bytes(packet)[0] & 0x10):
            found.num_hidden += 1  # cut away by an edit list, or a VP8 frame that is never shown
            continue
        has_pts &= packet.pts is not None
        shown = Packet(clock(packet, time, container), packet.duration or 0, packet.is_keyframe)
        (found.packets if key_pts is not None else before_key).append(shown)
    if key_pts is None:
        found.packets = before_key  # no keyframe is marked: whatever decodes is shown
    elif found.packets and not clock.restarts:
        whole = [packet for packet in found.packets if packet.pts >= key_pts]
        found.num_hidden += len(before_key) + len(found.packets) - len(whole)
        found.packets = whole
    found.has_pts &= has_pts and not clock.restarts
    found.format_changes |= formats.changes
    _of_first_frame(found, stream, first_frame)
    return found


def _timed(container: Any, found: Scan) -> Iterator[tuple[Any, int]]:
    """Packets of all streams that have a time, with it."""
    for packet in container.demux():
        time = packet.pts if packet.pts is not None and found.has_pts else packet.dts
        if not packet.size or time is None:
            continue
        found.begin_s = min(found.begin_s, float(time * packet.time_base))
        end_s = float((time + (packet.duration or 0)) * packet.time_base)
        found.end_s = max(found.end_s, end_s)
        yield packet, time


class _Clock:
    """Presentation times that go on where those of a joined file begin anew."""

    def __init__(self) -> None:
        self.restarts = 0
        self._last_dts: int | None = None
        self._end = self._offset = 0

    def __call__(self, packet: Any, time: int, container: Any) -> int:
        if packet.dts is not None and container.format.name in JOINABLE:
            if self._last_dts is not None and packet.dts < self._last_dts:
                self.restarts += 1
                self._offset = self._end - time
            self._last_dts = packet.dts
        self._end = max(self._end, time + self._offset + (packet.duration or 1))
        return time + self._offset


def _refuse_cut(container: Any, packet: Any, end_s: float) -> None:
    if container.format.name not in JOINABLE:
        raise VideoError(f"is cut off after {end_s:.2f} s; replace it.", "cut_off")
    packet.is_corrupt = False


def _first_frame(packet: Any) -> Any:
    try:
        return next(iter(packet.decode()), None)
    except (av.FFmpegError, ValueError):
        return None  # what is damaged is told by the decoder, by name and time


def _of_first_frame(found: Scan, stream: Any, frame: Any) -> None:
    if frame is None:
        return
    found.degrees = frame.rotation
    found.format_changes |= (frame.width, frame.height) != (stream.width, stream.height)
    found.format_changes |= frame.format.name != stream.codec_context.pix_fmt
