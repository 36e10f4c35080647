"""Colour conversion by a file's tags: matrix and range of YCbCr -> RGB.

A file may be tagged with a matrix (BT.601, BT.709, BT.2020, ...) and a range (16 to 235, or 0 to
255). FFmpeg applies both. DALI uses the range, on the CPU only from the pixel format, and decodes
every matrix as BT.601. Multiplying DALI's RGB by `correction` gives the RGB of the tagged matrix,
exactly except for values that were clipped.

As in FFmpeg, untagged files are BT.601 and limited range, whatever their size. Not supported:
primaries and transfer curves. HDR frames are returned as stored.
"""

import numpy as np
from numpy.typing import NDArray

UNSPECIFIED_RANGE, LIMITED_RANGE, FULL_RANGE = 0, 1, 2  # FFmpeg's AVColorRange
# FFmpeg's AVColorSpace -> weights of red and blue in luma (ITU-R BT.709-6, BT.2020-2, FCC, SMPTE)
BT601 = (0.299, 0.114)
LUMA_WEIGHTS = {1: (0.2126, 0.0722), 4: (0.30, 0.11), 7: (0.212, 0.087), 9: (0.2627, 0.0593)}


def is_bt601(matrix: int) -> bool:
    """Return whether frames with this matrix tag are decoded as BT.601."""
    return matrix not in LUMA_WEIGHTS


def format_implies_range(pixel_format: str, colour_range: int) -> bool:
    """Return whether the pixel format alone gives the range.

    FFmpeg's full-range formats begin with yuvj.
    """
    return (colour_range == FULL_RANGE) == pixel_format.startswith("yuvj")


def to_rgb(matrix: int) -> NDArray[np.float64]:
    """Return the matrix [3, 3] from (Y', Cb, Cr), chroma centred at 0, to R'G'B'."""
    red, blue = LUMA_WEIGHTS.get(matrix, BT601)
    green = 1 - red - blue
    return np.array(
        [
            [1, 0, 2 * (1 - red)],
            [1, -2 * blue * (1 - blue) / green, -2 * red * (1 - red) / green],
            [1, 2 * (1 - blue), 0],
        ]
    )


def correction(matrix: int) -> NDArray[np.float32]:
    """Return the matrix [3, 3] from RGB decoded as BT.601 to RGB decoded with `matrix`."""
    return (to_rgb(matrix) @ np.linalg.inv(to_rgb(6))).astype(np.float32)


def correct_matrix(frames: NDArray[np.uint8], matrix: int) -> NDArray[np.uint8]:
    """Return frames [..., 3] that were decoded as BT.601 as if decoded with `matrix`."""
    if is_bt601(matrix):
        return frames
    values = frames.astype(np.float32) @ correction(matrix).T
    rounded: NDArray[np.uint8] = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    return rounded
