"""Reads all packets of a file and collects what they reveal about its video stream.

A recording that begins inside a group of pictures (GOP) starts at its first keyframe; packets
before it cannot be decoded. In joined transport streams the clock may restart; each part is then
placed after the part before it. Only the first frame is decoded, for its rotation and its size.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import av

from megatron_vrl.errors import VideoError
from megatron_vrl.video.picture_format import PictureFormats

# Containers that may be cut and joined anywhere. FFmpeg flags the packet before a joint as corrupt
# and computes the duration from the first and last timestamps. Neither indicates a truncated file.
JOINABLE = {"mpegts", "mpeg"}
REORDERED = {"h264", "hevc"}  # codecs whose packets are not in presentation order


@dataclass(frozen=True, slots=True)
class Packet:
    """A packet that shows one frame. Times are in the stream's time base."""

    pts: int
    duration: int
    is_keyframe: bool


@dataclass(slots=True)
class Scan:
    """Result of reading all packets."""

    packets: list[Packet] = field(default_factory=list)  # in decoding order
    has_pts: bool = True  # False: frames are numbered by counting
    num_hidden: int = 0  # packets that show no frame
    format_changes: bool = False
    degrees: int = 0  # counterclockwise rotation of decoded frames for display
    begin_s: float = float("inf")  # first packet of any stream
    end_s: float = 0.0  # end of the last packet of any stream


def scan(container: Any, stream: Any) -> Scan:
    """Return what the packets reveal.

    Raises VideoError, without the file name, if a packet is truncated.
    """
    codec = stream.codec.canonical_name
    formats = PictureFormats(codec, bytes(stream.codec_context.extradata or b""))
    found, clock, first_frame = Scan(), _Clock(), None
    before_key, key_pts, has_pts = list[Packet](), None, True
    # AVI stores decoding order only. The pts that FFmpeg returns for it are a guess.
    found.has_pts = container.format.name != "avi" or codec not in REORDERED
    for packet, time in _packets_with_time(container, found):
        if packet.stream_index != stream.index:
            continue
        if packet.is_corrupt:
            _refuse_cut(container, packet, found.end_s)
        first_frame = first_frame or _first_frame(packet)
        formats.add(bytes(packet))
        found.format_changes |= packet.has_sidedata("new_extradata")
        if packet.is_keyframe and key_pts is None:
            key_pts = time
        if packet.is_discard or (codec == "vp8" and not bytes(packet)[0] & 0x10):
            found.num_hidden += 1  # removed by an edit list, or a VP8 frame that is never shown
            continue
        has_pts &= packet.pts is not None
        shown = Packet(clock(packet, time, container), packet.duration or 0, packet.is_keyframe)
        (found.packets if key_pts is not None else before_key).append(shown)
    if key_pts is None:
        found.packets = before_key  # no keyframe is flagged: every decodable packet is shown
    elif found.packets and not clock.restarts:
        whole = [packet for packet in found.packets if packet.pts >= key_pts]
        found.num_hidden += len(before_key) + len(found.packets) - len(whole)
        found.packets = whole
    found.has_pts &= has_pts and not clock.restarts
    found.format_changes |= formats.changes
    _apply_first_frame(found, stream, first_frame)
    return found


def _packets_with_time(container: Any, found: Scan) -> Iterator[tuple[Any, int]]:
    """Yield (packet, time) of all streams, without packets that have no time."""
    for packet in container.demux():
        time = packet.pts if packet.pts is not None and found.has_pts else packet.dts
        if not packet.size or time is None:
            continue
        found.begin_s = min(found.begin_s, float(time * packet.time_base))
        end_s = float((time + (packet.duration or 0)) * packet.time_base)
        found.end_s = max(found.end_s, end_s)
        yield packet, time


class _Clock:
    """Presentation times that continue where the timestamps of a joined file restart."""

    def __init__(self) -> None:
        self.restarts = 0
        self._last_dts: int | None = None
        self._end = self._offset = 0

    def __call__(self, packet: Any, time: int, container: Any) -> int:
        """Return the presentation time of a packet, shifted if the clock has restarted."""
        if packet.dts is not None and container.format.name in JOINABLE:
            if self._last_dts is not None and packet.dts < self._last_dts:
                self.restarts += 1
                self._offset = self._end - time
            self._last_dts = packet.dts
        self._end = max(self._end, time + self._offset + (packet.duration or 1))
        return time + self._offset


def _refuse_cut(container: Any, packet: Any, end_s: float) -> None:
    """Raise VideoError for a corrupt packet, except at a joint of a joinable container."""
    if container.format.name not in JOINABLE:
        raise VideoError(f"is cut off after {end_s:.2f} s; replace it.", "cut_off")
    packet.is_corrupt = False


def _first_frame(packet: Any) -> Any:
    """Return the first decoded frame of a packet, or None."""
    try:
        return next(iter(packet.decode()), None)
    except (av.FFmpegError, ValueError):
        return None  # the decoder reports damage later, with file name and time


def _apply_first_frame(found: Scan, stream: Any, frame: Any) -> None:
    """Record rotation and size of the first frame."""
    if frame is None:
        return
    found.degrees = frame.rotation
    found.format_changes |= (frame.width, frame.height) != (stream.width, stream.height)
    found.format_changes |= frame.format.name != stream.codec_context.pix_fmt
