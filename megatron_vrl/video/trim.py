"""Cuts a video stream down to the packets that the wanted frames depend on. Nothing is re-encoded.

DALI decodes every frame up to the last one wanted. `split` gives DALI small files instead, one for
each run of groups of pictures (GOPs) that hold wanted frames:

  - a part starts at an access point, the last one before its frames in decoding and in display;
  - it ends with its last wanted frame;
  - leading pictures of the access point, which need the GOP before, are left out;
  - non-reference frames of H.264 and HEVC are left out unless they are wanted.

Each part is decoded by a fresh decoder, so open GOPs need no special care. Packets that an edit
list hides are ordinary frames of a part, since the part has no edit list.

Example: frames 0 and 70 of a file with closed GOPs of 30 frames. Part 1 has the packet of frame 0.
Part 2 starts at frame 60 and has the reference frames up to frame 70, and frame 70.

An access point is a packet whose container flags a key frame and which repeats the parameter sets
that the header lacks. H.264 key frames are also IDR pictures, or have a recovery point of 0 frames
(so the key frames of intra refresh do not count). Without a second access point, a part starts
where the stream starts.

Codecs without a row in `CONTAINERS` are decoded whole. PyAV decodes streams in which packets and
frames do not correspond: a packet without pts, two packets with one pts, a packet whose frame is
never shown, a hidden packet with the pts of a shown one, access points out of order.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import av
import numpy as np
from numpy.typing import NDArray

from megatron_vrl.video.nal import H264, HEVC, PARAMETER_SETS, SLICES, NalReader
from megatron_vrl.video.probe import DecodeJob, VideoFile, open_video

# Codec -> container of its parts. FFmpeg derives the reordering delay of H.264 from MP4's times.
CONTAINERS = {
    H264: "mp4",
    HEVC: "mp4",
    "vp8": "matroska",
    "vp9": "matroska",
    "mjpeg": "matroska",
}
H264_IDR, H264_SEI, RECOVERY_POINT = 5, 6, 6
HEVC_ACCESS = range(16, 24)  # IRAP pictures
HEVC_NON_REFERENCE = range(0, 16, 2)  # for pictures of their own temporal layer
TICK = Fraction(1, 25)  # seconds; any value, since DALI counts frames


@dataclass(frozen=True, slots=True)
class Part:
    """A video file in memory, and the frames to take from it."""

    encoded: NDArray[np.uint8]  # [bytes]
    frames: NDArray[np.int64]  # [n] frame numbers in the original file, ascending
    positions: NDArray[np.int32]  # [n] the same frames, counted in `encoded`
    num_packets: int


class _Irregular(Exception):
    """Packets and frames of a stream do not correspond."""


class _Packet(NamedTuple):
    """One packet of a part. Times are in the stream's time base."""

    content: bytes
    pts: int
    is_keyframe: bool
    non_reference_layer: int  # temporal layer of a non-reference frame; -1 for a reference frame
    layer: int  # temporal layer


def split(job: DecodeJob) -> list[Part]:
    """Return the parts of a job; [] if packets and frames of the file do not correspond.

    Raises FFmpegError or OSError if the file cannot be read.
    """
    file = job.file
    if file.codec not in CONTAINERS:
        return [_whole(job)]
    numbers = {int(file.pts[i]): int(i) for i in job.plan.indices}
    try:
        with open_video(file.path) as container:
            stream = container.streams[file.stream]
            groups = _groups(_packets(container, stream, file), set(numbers))
            return [_part(stream, file.codec, packets, numbers) for packets in groups]
    except _Irregular:
        return []


def _whole(job: DecodeJob) -> Part:
    """Return the file itself, without a look at its packets."""
    frames = np.unique(job.plan.indices)
    encoded = np.fromfile(job.file.path, np.uint8)
    return Part(encoded, frames, frames.astype(np.int32), job.file.num_frames)


def _packets(container: Any, stream: Any, file: VideoFile) -> Iterator[tuple[_Packet, bool]]:
    """Yield (packet, whether it is an access point) from the first access point on.

    Packets that an edit list hides have no frame number. Raises _Irregular for other packets
    without a number, and for hidden packets with one.
    """
    access = _AccessPoints(file.codec, bytes(stream.codec_context.extradata or b""))
    shown, has_started, first_pts = set(file.pts.tolist()), False, 0
    for packet in container.demux(stream):
        if not packet.size:
            continue
        if packet.pts is None:
            raise _Irregular
        content = bytes(packet)
        found, is_access = access.add(content, packet.pts, packet.is_keyframe)
        if not has_started:
            has_started = packet.is_keyframe or not len(file.keyframes)
            is_access, first_pts = has_started, packet.pts
        if not has_started or packet.pts < first_pts:
            continue  # a recording that begins inside a GOP: shown by no decoder
        if packet.is_discard == (packet.pts in shown):
            raise _Irregular
        yield found, is_access


def _groups(packets: Iterator[tuple[_Packet, bool]], missing: set[int]) -> Iterator[list[_Packet]]:
    """Yield the packets of each part, in decoding order. `missing`: the pts of wanted frames.

    A GOP continues the part before it if that part's wanted frames are not complete: its leading
    pictures are wanted. Raises _Irregular if the order of packets is not the decoder's.
    """
    group: list[_Packet] = []
    times: set[int] = set()  # pts in `group`
    end = 0  # packets of `group` up to the last wanted one
    for packet, is_access in packets:
        if is_access and not any(pts < packet.pts for pts in missing):
            if end:
                yield group[:end]
            group, times, end = [], set(), 0
        elif is_access and packet.pts < max(times, default=packet.pts):
            raise _Irregular
        if group and packet.pts < group[0].pts:
            continue  # a leading picture
        if packet.pts in times:
            raise _Irregular
        group.append(packet)
        times.add(packet.pts)
        if packet.pts in missing:
            missing.remove(packet.pts)
            end = len(group)
        if not missing:
            yield group[:end]
            return
    raise _Irregular  # a wanted frame has no packet


def _part(stream: Any, codec: str, packets: list[_Packet], numbers: dict[int, int]) -> Part:
    """Return the part made of `packets`. `numbers`: pts of wanted frames -> frame number."""
    top = max(packet.layer for packet in packets)
    kept = [p for p in packets if p.non_reference_layer != top or p.pts in numbers]
    in_order = sorted(packet.pts for packet in kept)
    rank = {pts: position for position, pts in enumerate(in_order)}
    wanted = [pts for pts in in_order if pts in numbers]
    return Part(
        encoded=_mux(stream, CONTAINERS[codec], kept, rank),
        frames=np.array([numbers[pts] for pts in wanted]),
        positions=np.array([rank[pts] for pts in wanted], np.int32),
        num_packets=len(kept),
    )


def _mux(
    template: Any, container: str, packets: list[_Packet], rank: dict[int, int]
) -> NDArray[np.uint8]:
    """Return a file with the packets, one tick apart in presentation order."""
    delay = max(position - rank[packet.pts] for position, packet in enumerate(packets))
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream_from_template(template)
        for position, packet in enumerate(packets):
            copy = av.Packet(packet.content)
            copy.dts, copy.pts = position, rank[packet.pts] + delay
            copy.duration, copy.time_base = 1, TICK
            copy.is_keyframe = packet.is_keyframe
            copy.stream = stream
            output.mux(copy)
    return np.frombuffer(file.getbuffer(), np.uint8)


class _AccessPoints:
    """Finds access points and non-reference frames: `add` every packet in decoding order."""

    def __init__(self, codec: str, header: bytes):
        self._codec = codec
        self._nal = NalReader(codec, header) if codec in SLICES else None
        self._header = (
            {unit.rstrip(b"\0") for unit in self._nal.header_units} if self._nal else set()
        )
        self._in_packets: set[bytes] = set()  # parameter sets that the header lacks

    def add(self, content: bytes, pts: int, is_keyframe: bool) -> tuple[_Packet, bool]:
        """Return the packet and whether decoding can start at it."""
        if self._nal is None:
            return _Packet(content, pts, is_keyframe, -1, 0), is_keyframe
        units = [(self._nal.kind(unit), unit) for unit in self._nal.units(content)]
        sets = {u.rstrip(b"\0") for kind, u in units if kind in PARAMETER_SETS[self._codec]}
        is_complete = self._in_packets <= sets
        self._in_packets |= sets - self._header
        slices = [(kind, unit) for kind, unit in units if kind in SLICES[self._codec]]
        if self._codec == H264:
            layer, is_reference = 0, any(unit[0] & 0x60 for _, unit in slices)
            is_clean = any(
                kind == H264_IDR or (kind == H264_SEI and _recovers_at_once(unit))
                for kind, unit in units
            )
        else:
            layer = max((unit[1] & 7 for _, unit in slices if len(unit) > 1), default=0)
            is_reference = any(kind not in HEVC_NON_REFERENCE for kind, _ in slices)
            is_clean = any(kind in HEVC_ACCESS for kind, _ in slices)
        is_reference |= not slices
        packet = _Packet(content, pts, is_keyframe, -1 if is_reference else layer, layer)
        return packet, is_keyframe and is_clean and is_complete


def _recovers_at_once(sei: bytes) -> bool:
    """Return whether H.264 SEI has a recovery point of 0 frames (ITU-T H.264 7.3.2.3, D.1.8)."""
    content, at = sei.replace(b"\0\0\3", b"\0\0"), 1
    while at + 2 < len(content):
        kind, at = _sei_number(content, at)
        size, at = _sei_number(content, at)
        if kind == RECOVERY_POINT:
            return content[at : at + 1] >= b"\x80"  # ue(v) of 0 is the bit 1
        at += size
    return False


def _sei_number(content: bytes, at: int) -> tuple[int, int]:
    """Return a number coded as bytes of 255 and a last byte, and the position after it."""
    end = at
    while content[end : end + 1] == b"\xff":
        end += 1
    return 255 * (end - at) + sum(content[end : end + 1]), end + 1
