"""vLLM's inputs for Qwen3-VL: frames, or embeddings, with the times of the time axis.

vLLM and transformers divide the numbers of the sampled frames by the frame rate to get their
times. They get the times as frame numbers at one frame per second, so the prompt shows the same
timestamps as the trainer's.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megatron_vrl.models.family import EngineInputs
from megatron_vrl.models.qwen3_vl.prompt import step_times
from megatron_vrl.parallel.arrays import as_tensor
from megatron_vrl.types import VisualInput
from megatron_vrl.video.rules import TEMPORAL


def _step_times(video: VisualInput) -> list[float]:
    return step_times(video.timestamps_s.tolist(), TEMPORAL)


def _video_metadata(video: VisualInput) -> dict[str, Any]:
    """Return metadata that makes vLLM's processor take all frames without sampling."""
    return {
        "total_num_frames": len(video.frames),
        "fps": 1.0,
        "duration": float(video.timestamps_s[-1]),
        "frames_indices": video.timestamps_s.tolist(),
        "video_backend": "megatron_vrl",
        "do_sample_frames": False,
    }


def _embeddings(videos: Sequence[VisualInput]) -> dict[str, Any]:
    """Return the embeddings, grids and step times of videos."""
    embeddings = [as_tensor(video.embeddings) for video in videos if video.embeddings is not None]
    return {
        "video_embeds": torch.cat(embeddings),
        "video_grid_thw": torch.tensor([video.grid_thw for video in videos]),
        "timestamps": [_step_times(video) for video in videos],
    }


def _derived(item: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return grid and step times of a processed video."""
    times = item["timestamps"].data
    return tuple(item["video_grid_thw"].data.tolist()), tuple(map(float, times))


def _expected(video: VisualInput) -> tuple[Any, ...]:
    """Return grid and step times of the trainer's video."""
    return video.grid_thw, tuple(_step_times(video))


ENGINE = EngineInputs(
    model_class="vllm.model_executor.models.qwen3_vl:Qwen3VLForConditionalGeneration",
    processor_kwargs={"do_resize": False, "cap_pixels_per_frame": False},
    not_quantised=("visual.*",),
    video_metadata=_video_metadata,
    embeddings=_embeddings,
    derived=_derived,
    expected=_expected,
)
