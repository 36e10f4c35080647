"""Decides which videos DALI decodes.

PyAV, which reads everything that FFmpeg reads, decodes the others.

On the CPU, DALI gets the codecs compiled into DALI 2.1.0, and only files whose colours it converts
correctly, so that frames do not depend on the decoder. On a GPU, DALI gets what NVDEC of that
generation decodes, by NVIDIA's "Video Encode and Decode GPU Support Matrix"; colours are corrected
afterwards. On both, PyAV gets files without pts and files whose size or pixel format changes in the
stream. `video/trim.py` selects the stream and its packets. For codecs that it does not trim, PyAV
also gets files whose packets DALI would miscount, and files with a second video stream (DALI may
pick another one than FFmpeg).

Of the GPU table only 8-bit 4:2:0 H.264 has been run (docs/results/gpu.md).
"""

from typing import Literal

from megatron_vrl.video.colour import format_implies_range, is_bt601
from megatron_vrl.video.probe import VideoFile
from megatron_vrl.video.trim import CONTAINERS

CPU_CODECS = {"h264", "hevc", "vp8", "vp9", "mjpeg"}

Capability = tuple[int, int]  # CUDA's (major, minor)
MAXWELL, PASCAL, TURING, AMPERE_86, BLACKWELL = (5, 2), (6, 1), (7, 5), (8, 6), (10, 0)
# codec -> pixel format -> first generation that decodes it. 8-bit 4:2:0 is yuv420p, or yuvj420p in
# full range. A100 (8.0) has no AV1 decoder.
NVDEC: dict[str, dict[str, Capability]] = {
    "h264": {
        "yuv420p": MAXWELL,
        "yuvj420p": MAXWELL,
        "yuv420p10le": BLACKWELL,
        "yuv422p": BLACKWELL,
    },
    "hevc": {
        "yuv420p": MAXWELL,
        "yuvj420p": MAXWELL,
        "yuv420p10le": PASCAL,
        "yuv420p12le": PASCAL,
        "yuv444p": TURING,
        "yuv444p10le": TURING,
        "yuv444p12le": TURING,
        "yuv422p10le": BLACKWELL,
    },
    "vp8": {"yuv420p": MAXWELL},
    "vp9": {"yuv420p": MAXWELL, "yuv420p10le": PASCAL, "yuv420p12le": PASCAL},
    "av1": {"yuv420p": AMPERE_86, "yuv420p10le": AMPERE_86},
    "mpeg4": {"yuv420p": MAXWELL},
    "mjpeg": {"yuvj420p": MAXWELL},
}


def dali_reads(
    file: VideoFile, device: Literal["cpu", "gpu"], capability: Capability = (0, 0)
) -> bool:
    """Return whether DALI decodes the file. `capability` is the GPU's; ignored on the CPU."""
    if file.format_changes or not file.has_pts:
        return False
    is_plain = not file.has_hidden_packets and not file.has_other_pictures
    if file.codec not in CONTAINERS and not is_plain:
        return False
    if device == "gpu":
        since = NVDEC.get(file.codec, {}).get(file.pixel_format)
        return since is not None and capability >= since
    colours = is_bt601(file.matrix) and format_implies_range(file.pixel_format, file.colour_range)
    return file.codec in CPU_CODECS and colours
