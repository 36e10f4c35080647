"""NalReader: splits the packets of H.264 and HEVC streams into NAL units.

Sources: ITU-T H.264 7.3.1 and 7.3.2.3, H.265 7.3.1; ISO/IEC 14496-15 for MP4 and Matroska.
"""

from collections.abc import Iterator

H264, HEVC = "h264", "hevc"
SPS = {H264: 7, HEVC: 33}  # sequence parameter set
PARAMETER_SETS = {H264: {7, 8}, HEVC: {32, 33, 34}}
SLICES = {H264: range(1, 6), HEVC: range(32)}


class NalReader:
    """Reads NAL units of one stream. `header_units` has those of the container's header."""

    def __init__(self, codec: str, header: bytes):
        """`header`: extradata of the stream, b"" if it has none."""
        self._codec = codec
        is_listed = header[:1] == b"\x01"  # avcC or hvcC
        self._length_bytes = (header[4 if codec == H264 else 21] & 3) + 1 if is_listed else 0
        self.header_units = list(_listed(codec, header) if is_listed else self.units(header))

    def units(self, packet: bytes) -> Iterator[bytes]:
        """Yield NAL units that are not empty, split by start codes or by their stored lengths."""
        if not self._length_bytes:
            yield from _between_start_codes(packet)
            return
        at = 0
        while at + self._length_bytes < len(packet):
            size = int.from_bytes(packet[at : at + self._length_bytes], "big")
            at += self._length_bytes
            if size:
                yield packet[at : at + size]
            at += size

    def kind(self, unit: bytes) -> int:
        """Return the NAL unit type."""
        return unit[0] & 31 if self._codec == H264 else unit[0] >> 1 & 63


def _between_start_codes(packet: bytes) -> Iterator[bytes]:
    start = packet.find(b"\0\0\1")
    while start >= 0:
        stop = packet.find(b"\0\0\1", start + 3)
        if unit := packet[start + 3 : stop if stop >= 0 else None].rstrip(b"\0"):
            yield unit
        start = stop


def _listed(codec: str, header: bytes) -> Iterator[bytes]:
    """Yield the parameter sets in an avcC or hvcC record."""
    at, arrays = (5, 2) if codec == H264 else (23, header[22] if len(header) > 22 else 0)
    for array in range(arrays):
        if codec == H264:  # SPS, then PPS
            count = header[at] & (31 if array == 0 else 255) if at < len(header) else 0
            at += 1
        else:
            count, at = int.from_bytes(header[at + 1 : at + 3], "big"), at + 3
        for _ in range(count):
            size = int.from_bytes(header[at : at + 2], "big")
            if unit := header[at + 2 : at + 2 + size]:
                yield unit
            at += 2 + size
