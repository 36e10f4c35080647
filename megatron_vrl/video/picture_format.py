"""PictureFormats: detects a stream whose frame size or pixel format changes, from its packets.

DALI's decoder takes the format from the start of the stream and returns garbage after a change.
`video/routing.py` sends such files to PyAV. No frame is decoded here.

  H.264, HEVC  sequence parameter sets (SPS), compared as bytes (ITU-T H.264 7.3.1, H.265 7.3.1;
               ISO/IEC 14496-15 for MP4 and Matroska)
  VP8          key frame header (RFC 6386, 9.1)
  VP9          frame header (VP9 bitstream specification 6.2)
  JPEG         frame header (ITU-T T.81, B.2.2)

Not supported: MPEG-4 and AV1, which DALI decodes on a GPU only.
"""

from collections.abc import Iterator

H264_SPS, HEVC_SPS = 7, 33
VP9_KEY_SYNC_BITS, VP9_RGB = 24, 7
JPEG_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # SOF markers


class PictureFormats:
    """Collects formats of a stream: `add` every packet in order, then read `changes`."""

    def __init__(self, codec: str, header: bytes):
        """`header`: extradata of the stream, b"" if it has none."""
        self._codec, self._header = codec, header
        self._found: set[bytes] = set()
        is_listed = codec in ("h264", "hevc") and header[:1] == b"\x01"  # avcC or hvcC
        self._length_bytes = (header[4 if codec == "h264" else 21] & 3) + 1 if is_listed else 0
        if is_listed:
            self._found |= set(_listed_sets(codec, header))

    def add(self, packet: bytes) -> None:
        """Record the formats in one packet."""
        if self._codec in ("h264", "hevc"):
            units = _units(packet, self._length_bytes)
            self._found |= set(_sequence_sets(self._codec, units))
        elif self._codec in _HEADERS and (found := _HEADERS[self._codec](packet)):
            self._found.add(found)

    @property
    def changes(self) -> bool:
        """Return whether more than one format was found."""
        return len(self._found) > 1


def _units(packet: bytes, length_bytes: int) -> Iterator[bytes]:
    """Yield NAL units, split by start codes, or by lengths of `length_bytes` bytes."""
    if length_bytes:
        at = 0
        while at + length_bytes < len(packet):
            size = int.from_bytes(packet[at : at + length_bytes], "big")
            at += length_bytes
            yield packet[at : at + size]
            at += size
        return
    start = packet.find(b"\0\0\1")
    while start >= 0:
        stop = packet.find(b"\0\0\1", start + 3)
        yield packet[start + 3 : stop if stop >= 0 else None].rstrip(b"\0")
        start = stop


def _sequence_sets(codec: str, units: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the SPS before the first slice. No picture has an SPS after its first slice."""
    for unit in units:
        kind = _kind(codec, unit)
        if kind == (H264_SPS if codec == "h264" else HEVC_SPS):
            yield unit.rstrip(b"\0")
        elif kind in (range(1, 6) if codec == "h264" else range(32)):
            return


def _kind(codec: str, unit: bytes) -> int:
    """Return the NAL unit type; -1 for an empty unit."""
    if not unit:
        return -1
    return unit[0] & 31 if codec == "h264" else unit[0] >> 1 & 63


def _listed_sets(codec: str, header: bytes) -> Iterator[bytes]:
    """Yield the SPS in an avcC or hvcC record."""
    at, arrays = (5, 1) if codec == "h264" else (23, header[22] if len(header) > 22 else 0)
    for _ in range(arrays):
        if codec == "h264":
            count, at = header[at] & 31, at + 1
        else:
            count, at = int.from_bytes(header[at + 1 : at + 3], "big"), at + 3
        for _ in range(count):
            size = int.from_bytes(header[at : at + 2], "big")
            unit = header[at + 2 : at + 2 + size]
            at += 2 + size
            yield from _sequence_sets(codec, iter([unit]))


def _vp8(packet: bytes) -> bytes:
    """Return width, height and scales of a key frame; b"" for another frame."""
    return packet[6:10] if len(packet) > 9 and not packet[0] & 1 else b""


def _vp9(packet: bytes) -> bytes:
    """Return profile, colours and size of a key frame.

    For another frame return b"", or the packet itself if it contains a frame size.
    """
    bits = _Bits(packet)
    bits.take(2)
    profile = bits.take(1) | bits.take(1) << 1
    if profile == 3:
        bits.take(1)
    if bits.take(1):  # show_existing_frame
        return b""
    is_inter, is_shown, is_resilient = bits.take(1), bits.take(1), bits.take(1)
    if not is_inter:
        return repr((profile, *_vp9_colours(bits, profile), bits.take(32))).encode()
    is_intra = not is_shown and bits.take(1)
    if not is_resilient:
        bits.take(2)
    if is_intra:
        return packet
    bits.take(8 + 3 * 4)  # refresh flags and references
    return b"" if any(bits.take(1) for _ in range(3)) else packet


def _vp9_colours(bits: "_Bits", profile: int) -> tuple[int, ...]:
    """Return (bit depth, colour space, range, subsampling)."""
    bits.take(VP9_KEY_SYNC_BITS)
    depth = bits.take(1) if profile >= 2 else 0
    space = bits.take(3)
    colour_range = bits.take(1) if space != VP9_RGB else 1
    chroma = bits.take(3 if space != VP9_RGB else 1) if profile in (1, 3) else 0
    return depth, space, colour_range, chroma


class _Bits:
    """Reads bits of the first 24 bytes, most significant first."""

    def __init__(self, content: bytes):
        self._value = int.from_bytes(content[:24].ljust(24, b"\0"), "big")
        self._left = 24 * 8

    def take(self, count: int) -> int:
        """Return the next `count` bits as an integer."""
        self._left -= count
        return self._value >> self._left & ((1 << count) - 1)


def _jpeg(packet: bytes) -> bytes:
    """Return precision, size and sampling from the frame header."""
    at = 2
    while at + 4 <= len(packet) and packet[at] == 0xFF:
        size = int.from_bytes(packet[at + 2 : at + 4], "big")
        if packet[at + 1] in JPEG_FRAMES:
            return packet[at + 1 : at + 2 + size]
        at += 2 + size
    return b""


_HEADERS = {"vp8": _vp8, "vp9": _vp9, "mjpeg": _jpeg}
