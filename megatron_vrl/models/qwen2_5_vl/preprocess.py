"""Frames to what the vision tower reads, on the device that it runs on: bytes are sent, not floats.

Order and normalisation are those of transformers' `Qwen2VLVideoProcessor`.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_vrl.video.rules import CELL, CHANNELS, MERGE, PATCH, TEMPORAL

# OpenAI CLIP, with the rescaling by 1/255 folded in as transformers does.
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]) * 255  # of RGB bytes
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]) * 255


def patchify(frames: NDArray[np.uint8], device: torch.device | None = None) -> Tensor:
    """[F, H, W, 3] RGB bytes -> [T*h*w, 1176] normalised patches, float32.

    Rows run over time, then merged cells, then the four patches inside a cell; columns over
    channel, frame of the step, row, column. H and W are multiples of 28, F is even.
    """
    count, height, width, _ = frames.shape
    cells = torch.tensor(frames, device=device).view(
        count // TEMPORAL, TEMPORAL,
        height // CELL, MERGE, PATCH,
        width // CELL, MERGE, PATCH,
        CHANNELS,
    )  # [T, 2, h/2, 2, 14, w/2, 2, 14, C]  # fmt: skip
    # Bytes are moved before they become floats: a quarter of the memory traffic.
    patches = cells.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).contiguous()  # [T, h/2, w/2, 2, 2, C, ...]
    columns = patches.view(-1, CHANNELS, TEMPORAL * PATCH * PATCH).float()  # [T*h*w, C, 392]
    mean, std = (of_channel[:, None].to(columns.device) for of_channel in (MEAN, STD))
    return columns.sub_(mean).div_(std).flatten(1)  # [T*h*w, 1176]
