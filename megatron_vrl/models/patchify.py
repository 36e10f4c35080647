"""Video frames -> normalised patches for the vision tower.

Frames are copied to the device as bytes and become floats there. Patch order and normalisation
follow transformers' `Qwen2VLVideoProcessor`, which other families use too.
"""

import functools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_vrl.parallel.arrays import upload
from megatron_vrl.video.rules import CHANNELS, TEMPORAL, PixelRules


def patchify(
    frames: NDArray[np.uint8], pixels: PixelRules, device: torch.device | None = None
) -> Tensor:
    """Return normalised float32 patches [T*h*w, values] of RGB bytes [F, H, W, 3].

    Rows are ordered by time, then by merge cell, then by the four patches of a cell. Columns are
    ordered by channel, frame of the temporal step, row, column. H and W must be multiples of
    `pixels.cell` and F must be even.
    """
    count, height, width, _ = frames.shape
    cell, merge, patch = pixels.cell, pixels.merge, pixels.patch
    cells = upload(frames, device or torch.device("cpu")).view(
        count // TEMPORAL, TEMPORAL,
        height // cell, merge, patch,
        width // cell, merge, patch,
        CHANNELS,
    )  # [T, 2, rows, merge, patch, columns, merge, patch, C]  # fmt: skip
    # Permute bytes, then convert: a quarter of the memory traffic of permuting floats.
    patches = cells.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).contiguous()  # [T, h/m, w/m, m, m, C, ...]
    columns = patches.view(-1, CHANNELS, TEMPORAL * patch * patch).float()  # [T*h*w, C, ...]
    mean, std = _mean_and_std(pixels, columns.device)
    return columns.sub_(mean).div_(std).flatten(1)  # [T*h*w, values]


@functools.cache
def _mean_and_std(pixels: PixelRules, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean and deviation, [C, 1] each, scaled by 255 so that they apply to bytes."""
    mean, std = (
        np.float32(255) * np.array(values, dtype=np.float32)[:, None]
        for values in (pixels.mean, pixels.std)
    )
    return upload(mean, device), upload(std, device)
