"""PictureFormats: detects a stream whose frame size or pixel format changes, from its packets.

DALI's decoder takes the format from the start of the stream and returns garbage after a change.
`video/routing.py` sends such files to PyAV. No frame is decoded here.

  H.264, HEVC  sequence parameter sets (SPS), compared as bytes (`video/nal.py`)
  VP8          key frame header (RFC 6386, 9.1)
  VP9          frame header (VP9 bitstream specification 6.2)
  JPEG         frame header (ITU-T T.81, B.2.2)

Not supported: MPEG-4 and AV1, which DALI decodes on a GPU only.
"""

from collections.abc import Iterable, Iterator

from megatron_vrl.video.nal import SLICES, SPS, NalReader

VP9_KEY_SYNC_BITS, VP9_RGB = 24, 7
JPEG_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # SOF markers


class PictureFormats:
    """Collects formats of a stream: `add` every packet in order, then read `changes`."""

    def __init__(self, codec: str, header: bytes):
        """`header`: extradata of the stream, b"" if it has none."""
        self._codec = codec
        self._nal = NalReader(codec, header) if codec in SPS else None
        self._found: set[bytes] = set()
        if self._nal is not None and header[:1] == b"\x01":  # avcC or hvcC
            self._found |= set(self._sequence_sets(self._nal.header_units))

    def add(self, packet: bytes) -> None:
        """Record the formats in one packet."""
        if self._nal is not None:
            self._found |= set(self._sequence_sets(self._nal.units(packet)))
        elif self._codec in _HEADERS and (found := _HEADERS[self._codec](packet)):
            self._found.add(found)

    @property
    def changes(self) -> bool:
        """Return whether more than one format was found."""
        return len(self._found) > 1

    def _sequence_sets(self, units: Iterable[bytes]) -> Iterator[bytes]:
        """Yield the SPS before the first slice. No picture has an SPS after its first slice."""
        assert self._nal is not None
        for unit in units:
            kind = self._nal.kind(unit)
            if kind == SPS[self._codec]:
                yield unit.rstrip(b"\0")
            elif kind in SLICES[self._codec]:
                return


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
