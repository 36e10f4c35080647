"""Sampling rules compared with qwen-vl-utils (measured and reimplemented) and transformers."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from megatron_vrl.config import Video
from megatron_vrl.errors import VideoError
from megatron_vrl.models.families import FAMILIES, family_named
from megatron_vrl.models.qwen2_5_vl.pixels import PIXELS
from megatron_vrl.video import rules
from megatron_vrl.video.rules import PixelRules


def restated(
    total: int, fps: float, height: int, width: int, cfg: Video, pixels: PixelRules
) -> tuple[list[int], int, int, float]:
    """Reimplementation of fetch_video of qwen-vl-utils 0.0.14 with torch's linspace."""
    cell = pixels.cell  # image_factor
    min_pixels = cfg.min_pixels or 128 * cell**2
    max_pixels = cfg.max_pixels or 768 * cell**2
    total_pixels = cfg.total_pixels or 128_000 * cell**2 * 0.9
    min_frames = math.ceil(cfg.min_frames / 2) * 2
    max_frames = math.floor(min(cfg.max_frames, total) / 2) * 2
    nframes = total / fps * cfg.fps
    nframes = min(min(max(nframes, min_frames), max_frames), total)
    nframes = math.floor(nframes / 2) * 2
    indices = torch.linspace(0, total - 1, nframes).round().long().tolist()
    budget = max(min(max_pixels, total_pixels / nframes * 2), int(min_pixels * 1.05))
    h_bar, w_bar = max(cell, round(height / cell) * cell), max(cell, round(width / cell) * cell)
    if h_bar * w_bar > budget:
        beta = math.sqrt((height * width) / budget)
        h_bar = math.floor(height / beta / cell) * cell
        w_bar = math.floor(width / beta / cell) * cell
    elif h_bar * w_bar < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        h_bar = math.ceil(height * beta / cell) * cell
        w_bar = math.ceil(width * beta / cell) * cell
    return indices, h_bar, w_bar, nframes / total * fps


@given(
    total=st.integers(2, 100_000),
    fps=st.floats(1, 120),
    height=st.integers(16, 2200),
    width=st.integers(16, 4000),
    wanted_fps=st.sampled_from([0.5, 1.0, 2.0, 4.0]),
    max_frames=st.integers(2, 768),
    total_pixels=st.none() | st.integers(200_000, 90_316_800),
    pixels=st.sampled_from([family_named(name).pixels for name in FAMILIES]),
)
def test_plan_is_qwens(
    total: int,
    fps: float,
    height: int,
    width: int,
    wanted_fps: float,
    max_frames: int,
    total_pixels: int | None,
    pixels: PixelRules,
) -> None:
    cfg = Video(fps=wanted_fps, max_frames=max_frames, total_pixels=total_pixels)
    indices, rows, columns, sampled_fps = restated(total, fps, height, width, cfg, pixels)
    assume(max(height, width) <= 200 * min(height, width) and rows and columns)
    plan = rules.plan_frames(total, fps, height, width, cfg, pixels)
    assert plan.indices.tolist() == indices
    assert (plan.height, plan.width) == (rows, columns)
    assert plan.sampled_fps == sampled_fps
    assert plan.seconds_per_grid == np.float32(2 / sampled_fps)  # as vLLM and transformers keep it
    assert plan.grid_thw == (
        len(indices) // 2,
        rows // pixels.patch,
        columns // pixels.patch,
    )


def test_measured_values() -> None:
    plan = rules.plan_frames(300, 30.0, 720, 1280, Video(), PIXELS)
    assert len(plan.indices) == 20
    assert plan.indices[[0, 1, 2, -1]].tolist() == [0, 16, 31, 299]
    assert plan.seconds_per_grid == 1.0
    plan = rules.plan_frames(240, 30.0, 720, 1280, Video(), PIXELS)
    assert (plan.height, plan.width, plan.num_tokens) == (560, 1008, 5760)


@pytest.mark.parametrize(("num_frames", "sampled"), [(1, [0, 0]), (2, [0, 1]), (3, [0, 2])])
def test_short_videos(num_frames: int, sampled: list[int]) -> None:
    plan = rules.plan_frames(num_frames, 30.0, 112, 112, Video(), PIXELS)
    assert plan.indices.tolist() == sampled
    assert plan.grid_thw[0] == 1


@given(total=st.integers(1, 10_000), max_frames=st.integers(1, 768), side=st.integers(1, 3000))
def test_plan_fits_its_limits(total: int, max_frames: int, side: int) -> None:
    cfg = Video(max_frames=max_frames, total_pixels=20_000_000)
    plan = rules.plan_frames(total, 25.0, side, 2 * side, cfg, PIXELS)
    assert len(plan.indices) % 2 == 0
    assert (np.diff(plan.indices) >= 0).all()
    assert plan.indices[0] == 0
    assert plan.indices[-1] <= total - 1
    assert plan.height * plan.width <= 768 * PIXELS.cell**2
    assert plan.num_tokens * 4 == math.prod(plan.grid_thw)


def test_extreme_aspect_ratio_is_rejected() -> None:
    with pytest.raises(VideoError, match="2010x10, longer than 200:1"):
        rules.smart_resize(10, 2010, 100352, 602112, cell=PIXELS.cell)


def test_rules_need_no_heavy_library() -> None:
    heavy = "{'torch', 'av', 'nvidia.dali'}"
    code = f"import sys, megatron_vrl.video.rules; print({heavy} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "set()"
