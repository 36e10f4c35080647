"""The resize of decoded frames: bicubic, antialiased, on uint8, equal to Qwen's video processor.

Every decoder that returns frames on the CPU uses it, so frames do not depend on the decoder. On a
GPU, DALI's own resize is used instead, which differs by at most 1.
"""

import numpy as np
import torch
from numpy.typing import NDArray


def resize(frames: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Return frames [F, H, W, 3] resized to [F, height, width, 3], always a new array."""
    if frames.shape[1:3] == (height, width):
        return frames.copy()
    # The permuted view has channels-last layout: torch uses its fast uint8 kernel, without a copy.
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(
        pixels, (height, width), mode="bicubic", antialias=True, align_corners=False
    )
    return np.ascontiguousarray(resized.permute(0, 2, 3, 1).numpy())


def rotate(frames: NDArray[np.uint8], quarter_turns: int) -> NDArray[np.uint8]:
    """Return frames [F, H, W, 3] rotated counterclockwise; the same array for 0 quarter turns."""
    if not quarter_turns:
        return frames
    return np.ascontiguousarray(np.rot90(frames, quarter_turns, axes=(1, 2)))
