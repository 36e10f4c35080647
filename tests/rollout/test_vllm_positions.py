"""M-RoPE positions against vLLM's own function: what the engine samples with, the trainer trains.

The function is called as vLLM calls it, with features that hold the grid and, for videos, the
seconds of a temporal step as a float32 tensor. transformers is no oracle here: its releases
disagree on the text after a video.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from megatron_vrl.models.qwen2_5_vl.positions import VisionBlock, mrope_positions
from megatron_vrl.rollout.vllm.startup import import_vllm

pytestmark = pytest.mark.slow  # imports vLLM

Item = tuple[str, tuple[int, int, int], float]  # modality, grid, seconds of a temporal step
Positions = Callable[..., tuple[npt.NDArray[np.int64], int]]
TEXT, VIDEO, IMAGE = 7, 90, 91
START, END = 92, 93


@pytest.fixture(scope="module")
def vllm_positions() -> Positions:
    """vllm_positions(ids, [(modality, offset, grid_thw, seconds)], tokens_per_second, merge)."""
    import_vllm()
    from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration as Model
    from vllm.multimodal import inputs

    def elem(value: object) -> Any:
        field = inputs.MultiModalSharedField(batch_size=1)
        return inputs.MultiModalFieldElem(data=torch.tensor(value), field=field)

    def feature(
        modality: str, offset: int, grid_thw: tuple[int, int, int], seconds: float, merge: int
    ) -> Any:
        data = {f"{modality}_grid_thw": elem(grid_thw)}
        if modality == "video":
            data["second_per_grid_ts"] = elem(np.float32(seconds))
        length = int(np.prod(grid_thw)) // merge**2
        return inputs.MultiModalFeatureSpec(
            data=inputs.MultiModalKwargsItem(data),
            modality=modality,
            identifier=str(offset),
            mm_position=inputs.PlaceholderRange(offset=offset, length=length),
        )

    def positions(
        ids: list[int],
        items: list[tuple[str, int, tuple[int, int, int], float]],
        tokens_per_second: int,
        merge: int,
    ) -> tuple[npt.NDArray[np.int64], int]:
        kind: Any = Model
        model = kind.__new__(kind)  # the method reads the config alone
        vision = SimpleNamespace(spatial_merge_size=merge, tokens_per_second=tokens_per_second)
        model.__dict__["config"] = SimpleNamespace(vision_config=vision)
        features = [feature(*item, merge) for item in items]
        result, delta = model.get_mrope_input_positions(list(ids), features)
        return result.numpy(), delta

    return positions


def video(steps: int, height: int, width: int, seconds: float) -> Item:
    return "video", (steps, height, width), seconds


def image(height: int, width: int) -> Item:
    return "image", (1, height, width), 0.0


CASES = {
    "text": [],
    "image": [image(6, 10)],
    "smallest image": [image(2, 2)],
    "wide image": [image(2, 40)],
    "one video": [video(4, 6, 8, 1.0)],
    "half a second": [video(5, 4, 4, 0.5)],
    "a step of 0.7 s": [video(9, 4, 6, 0.7)],
    "a step of 1.37 s": [video(30, 6, 10, 1.37)],
    "a step under one position": [video(16, 2, 2, 0.1)],
    "one step": [video(1, 6, 14, 2.0)],
    "odd cells": [video(3, 10, 6, 0.9)],
    "two videos": [video(3, 4, 4, 1.0), video(2, 8, 2, 1.5)],
    "many videos": [video(k + 1, 2 * k + 2, 4, 0.3 * k + 0.2) for k in range(5)],
    "video, then image": [video(4, 2, 6, 0.7), image(4, 6)],
    "image, then video": [image(8, 4), video(6, 4, 2, 1.37)],
    "steps of a video with text between": [video(1, 4, 6, 0.7)] * 5,
    "all mixed": [image(2, 6), video(12, 4, 2, 0.5), image(4, 4), video(2, 2, 2, 2.7)],
}


@pytest.mark.parametrize("tokens_per_second", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_positions_equal_vllm(vllm_positions: Positions, name: str, tokens_per_second: int) -> None:
    ids, items = [TEXT] * 3, []
    for modality, grid_thw, seconds in CASES[name]:
        pad = VIDEO if modality == "video" else IMAGE
        items.append((modality, len(ids) + 1, grid_thw, seconds))
        ids += [START, *[pad] * (int(np.prod(grid_thw)) // 4), END, TEXT]
    ids += [TEXT] * 5
    wanted, delta = vllm_positions(ids, items, tokens_per_second, merge=2)
    blocks = [VisionBlock(grid, float(np.float32(seconds))) for _, grid, seconds in CASES[name]]
    got = mrope_positions(
        np.array(ids), [VIDEO, IMAGE], blocks, merge=2, tokens_per_second=tokens_per_second
    )
    np.testing.assert_array_equal(got, wanted)
    # The answer continues both: vLLM's decode step n stands at n + delta.
    assert int(got.max()) + 1 == len(ids) + delta


@pytest.mark.parametrize("seed", range(20))
def test_random_prompts_equal_vllm(vllm_positions: Positions, seed: int) -> None:
    rng = np.random.default_rng(seed)
    ids, items, blocks = [TEXT] * int(rng.integers(0, 4)), [], []
    for _ in range(rng.integers(1, 5)):
        modality = rng.choice(["video", "image"])
        steps = int(rng.integers(1, 40)) if modality == "video" else 1
        height, width = (int(side) * 2 for side in rng.integers(1, 12, 2))
        grid = (steps, height, width)
        seconds = float(np.float32(rng.uniform(0.05, 3))) if modality == "video" else 0.0
        items.append((modality, len(ids), grid, seconds))
        pad = VIDEO if modality == "video" else IMAGE
        ids += [pad] * (int(np.prod(grid)) // 4) + [TEXT] * int(rng.integers(1, 6))
        blocks.append(VisionBlock(grid, seconds))
    wanted, _ = vllm_positions(ids, items, 2, merge=2)
    got = mrope_positions(np.array(ids), [VIDEO, IMAGE], blocks, merge=2, tokens_per_second=2)
    np.testing.assert_array_equal(got, wanted)
