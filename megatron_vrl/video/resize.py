"""The one resize of decoded frames: bicubic with antialiasing on bytes, as Qwen's processor does.

Every decoder that leaves frames on the CPU goes through here, so the bytes of an EncodedVideo do
not depend on which one is configured. DALI's own resize differs from it by at most 1 and is used
only where frames are decoded on the GPU.
"""

import numpy as np
import torch
from numpy.typing import NDArray


def resize(frames: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """[F, H, W, 3] -> [F, height, width, 3], always a new array."""
    if frames.shape[1:3] == (height, width):
        return frames.copy()
    # A permuted view is channels-last to torch: its fast byte kernel, and no copy on the way back.
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(
        pixels, (height, width), mode="bicubic", antialias=True, align_corners=False
    )
    return np.ascontiguousarray(resized.permute(0, 2, 3, 1).numpy())


def turned(frames: NDArray[np.uint8], quarter_turns: int) -> NDArray[np.uint8]:
    """[F, H, W, 3] turned counterclockwise; the same array where nothing is turned."""
    if not quarter_turns:
        return frames
    return np.ascontiguousarray(np.rot90(frames, quarter_turns, axes=(1, 2)))
