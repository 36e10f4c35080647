"""Patches of frames compared with their definition and with transformers."""

import numpy as np
import pytest
import torch

from megatron_vrl.models.patchify import patchify
from megatron_vrl.models.qwen2_5_vl.pixels import PIXELS
from megatron_vrl.rollout.vllm.torchvision_shim import declare_missing_ops


def test_patchify_places_every_pixel() -> None:
    """Compare with the definition, pixel by pixel."""
    frames = np.random.default_rng(0).integers(0, 256, (4, 56, 84, 3), dtype=np.uint8)
    rows = patchify(frames, PIXELS).numpy().reshape(2, 2, 3, 2, 2, 3, 2, 14, 14)
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    for f, y, x, c in np.ndindex(frames.shape):
        row = rows[f // 2, y // 28, x // 28, y // 14 % 2, x // 14 % 2]
        want = (frames[f, y, x, c] / 255 - mean[c]) / std[c]
        assert abs(row[c, f % 2, y % 14, x % 14] - want) < 1e-6


def test_patchify_equals_transformers() -> None:
    declare_missing_ops()
    pytest.importorskip("torchvision")
    from transformers import Qwen2VLVideoProcessor

    frames = np.random.default_rng(1).integers(0, 256, (6, 112, 140, 3), dtype=np.uint8)
    theirs = Qwen2VLVideoProcessor(do_resize=False, do_sample_frames=False)(
        videos=[torch.from_numpy(frames).permute(0, 3, 1, 2)], return_tensors="pt"
    )
    assert theirs["video_grid_thw"].tolist() == [[3, 8, 10]]
    np.testing.assert_allclose(
        patchify(frames, PIXELS).numpy(), theirs["pixel_values_videos"].numpy(), rtol=0, atol=1e-6
    )
