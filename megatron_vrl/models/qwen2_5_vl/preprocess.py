"""Video frames -> normalised patches for the vision tower.

Frames are copied to the device as bytes and become floats there. Patch order and normalisation
follow transformers' `Qwen2VLVideoProcessor`.
"""

import functools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_vrl.parallel.arrays import upload
from megatron_vrl.video.rules import CELL, CHANNELS, MERGE, PATCH, TEMPORAL

# Mean and deviation of OpenAI CLIP, scaled by 255 so that they apply to bytes.
MEAN = np.float32(255) * np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
STD = np.float32(255) * np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)


def patchify(frames: NDArray[np.uint8], device: torch.device | None = None) -> Tensor:
    """Return normalised float32 patches [T*h*w, 1176] of RGB bytes [F, H, W, 3].

    Rows are ordered by time, then by merge cell, then by the four patches of a cell. Columns are
    ordered by channel, frame of the temporal step, row, column. H and W must be multiples of 28 and
    F must be even.
    """
    count, height, width, _ = frames.shape
    cells = upload(frames, device or torch.device("cpu")).view(
        count // TEMPORAL, TEMPORAL,
        height // CELL, MERGE, PATCH,
        width // CELL, MERGE, PATCH,
        CHANNELS,
    )  # [T, 2, h/2, 2, 14, w/2, 2, 14, C]  # fmt: skip
    # Permute bytes, then convert: a quarter of the memory traffic of permuting floats.
    patches = cells.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).contiguous()  # [T, h/2, w/2, 2, 2, C, ...]
    columns = patches.view(-1, CHANNELS, TEMPORAL * PATCH * PATCH).float()  # [T*h*w, C, 392]
    mean, std = _mean_and_std(columns.device)
    return columns.sub_(mean).div_(std).flatten(1)  # [T*h*w, 1176]


@functools.cache
def _mean_and_std(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return `MEAN` and `STD`, [C, 1] each, on `device`."""
    return upload(MEAN[:, None], device), upload(STD[:, None], device)
