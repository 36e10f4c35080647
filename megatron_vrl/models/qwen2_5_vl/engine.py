"""Inputs of vLLM for Qwen2.5-VL: what its processor is told, and what it derives."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megatron_vrl.models.family import EngineInputs
from megatron_vrl.parallel.arrays import as_tensor
from megatron_vrl.types import VisualInput


def _video_metadata(video: VisualInput) -> dict[str, Any]:
    """Return metadata that makes vLLM's processor take all frames without sampling.

    The processor derives the seconds per grid step as 2 / fps, so fps is computed from them. The
    processor keeps the result in 32 bits: positions agree with a trainer that uses
    float(np.float32(seconds_per_grid)).
    """
    num_frames = len(video.frames)
    fps = 2.0 / video.seconds_per_grid
    return {
        "total_num_frames": num_frames,
        "fps": fps,
        "duration": num_frames / fps,
        "frames_indices": list(range(num_frames)),
        "video_backend": "megatron_vrl",
        "do_sample_frames": False,
    }


def _embeddings(videos: Sequence[VisualInput]) -> dict[str, Any]:
    """Return the embeddings, grids and seconds per grid step of videos."""
    embeddings = [as_tensor(video.embeddings) for video in videos if video.embeddings is not None]
    return {
        "video_embeds": torch.cat(embeddings),
        "video_grid_thw": torch.tensor([video.grid_thw for video in videos]),
        "second_per_grid_ts": torch.tensor([video.seconds_per_grid for video in videos]),
    }


def _derived(item: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return grid and seconds per grid step that vLLM derived."""
    grid = tuple(item["video_grid_thw"].data.tolist())
    return grid, float(item["second_per_grid_ts"].data)


def _expected(video: VisualInput) -> tuple[Any, ...]:
    """Return grid and seconds per grid step, the latter in 32 bits."""
    return video.grid_thw, float(torch.tensor(video.seconds_per_grid))


ENGINE = EngineInputs(
    model_class="vllm.model_executor.models.qwen2_5_vl:Qwen2_5_VLForConditionalGeneration",
    processor_kwargs={"do_resize": False, "cap_pixels_per_frame": False},
    not_quantised=("visual.*",),
    video_metadata=_video_metadata,
    embeddings=_embeddings,
    derived=_derived,
    expected=_expected,
)
