"""Colour tags: which matrix turns a file's YCbCr into RGB, also where a decoder does not heed it.

A file may say its matrix (BT.601, BT.709, BT.2020, ...) and its range (16 to 235, or all of 0 to
255). FFmpeg obeys both. DALI knows the range alone, from the pixel format on the CPU, and reads
every matrix as BT.601. Since both matrices mix the same three values, what DALI gives is put right
by a third one, `correction`; exact but for the values that were clipped on the way.

Untagged files are BT.601 and limited, as in FFmpeg, whatever their size. Left out: primaries and
transfer curves, so HDR pictures are shown as they are stored.
"""

import numpy as np
from numpy.typing import NDArray

UNSPECIFIED_RANGE, LIMITED_RANGE, FULL_RANGE = 0, 1, 2  # FFmpeg's AVColorRange
# FFmpeg's AVColorSpace -> share of red and of blue in luma, ITU-R BT.709-6, BT.2020-2, FCC, SMPTE
BT601 = (0.299, 0.114)
SHARES = {1: (0.2126, 0.0722), 4: (0.30, 0.11), 7: (0.212, 0.087), 9: (0.2627, 0.0593)}


def is_bt601(matrix: int) -> bool:
    return matrix not in SHARES


def range_shows(pixel_format: str, colour_range: int) -> bool:
    """Whether the pixel format alone says the range: FFmpeg's full-range ones begin with yuvj."""
    return (colour_range == FULL_RANGE) == pixel_format.startswith("yuvj")


def to_rgb(matrix: int) -> NDArray[np.float64]:
    """[3, 3] from (Y', Cb, Cr), chroma centred at 0, to R'G'B'."""
    red, blue = SHARES.get(matrix, BT601)
    green = 1 - red - blue
    return np.array(
        [
            [1, 0, 2 * (1 - red)],
            [1, -2 * blue * (1 - blue) / green, -2 * red * (1 - red) / green],
            [1, 2 * (1 - blue), 0],
        ]
    )


def correction(matrix: int) -> NDArray[np.float32]:
    """[3, 3] from RGB that was read as BT.601 to RGB as `matrix` says."""
    return (to_rgb(matrix) @ np.linalg.inv(to_rgb(6))).astype(np.float32)


def corrected(frames: NDArray[np.uint8], matrix: int) -> NDArray[np.uint8]:
    """[..., 3] bytes read as BT.601 -> as `matrix` says."""
    if is_bt601(matrix):
        return frames
    values = frames.astype(np.float32) @ correction(matrix).T
    rounded: NDArray[np.uint8] = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    return rounded
