"""Small prompts, answers and micro-batches for tests."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from safetensors.torch import load_file
from torch import Tensor

from megatron_vrl.algorithms.tokens import Tokens
from megatron_vrl.batching.pack import Answer, Group, MicroBatch
from megatron_vrl.config import Batch
from megatron_vrl.models.qwen2_5_vl.positions import VisionBlock, mrope_positions
from megatron_vrl.parallel.mesh import Mesh
from megatron_vrl.policy.micro_batches import plan_batches
from megatron_vrl.types import EncodedImage, EncodedVideo, Prompt, Visual

VIDEO_TOKEN, IMAGE_TOKEN, VISION_START, VISION_END = 90, 91, 92, 93


def video(
    grid_thw: tuple[int, int, int], seconds_per_grid: float, seed: int, patch: int = 14
) -> EncodedVideo:
    t, h, w = grid_thw
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 256, (2 * t, h * patch, w * patch, 3), dtype=np.uint8)
    return EncodedVideo(
        path=f"video-{seed}.mp4",
        digest=f"{seed:032x}",
        codec="h264",
        duration_s=t * seconds_per_grid,
        frame_indices=np.arange(2 * t),
        timestamps_s=np.arange(2 * t) * seconds_per_grid / 2,
        sampled_fps=2 / seconds_per_grid,
        seconds_per_grid=seconds_per_grid,
        grid_thw=grid_thw,
        frame_budget=h * w * patch**2,
        frames=frames,
    )


def image(grid_hw: tuple[int, int], seed: int, patch: int = 14) -> EncodedImage:
    h, w = grid_hw
    rng = np.random.default_rng(seed)
    picture = rng.integers(0, 256, (1, h * patch, w * patch, 3), dtype=np.uint8)
    return EncodedImage(
        path=f"image-{seed}.png",
        digest=f"{seed:032x}",
        grid_thw=(1, h, w),
        frames=picture.repeat(2, axis=0),
    )


def prompt(visuals: Sequence[Visual], seed: int) -> Prompt:
    """Random words around the visuals; `seed` decides which, and how many."""
    rng = np.random.default_rng(seed + 1000)
    blocks = [VisionBlock.of(visual) for visual in visuals]
    pads = [VIDEO_TOKEN if isinstance(v, EncodedVideo) else IMAGE_TOKEN for v in visuals]
    ids = list(rng.integers(0, 90, 3))
    compact = list(ids)
    for block, pad in zip(blocks, pads, strict=True):
        for words, cells in ((ids, block.num_tokens(2)), (compact, 1)):
            words += [VISION_START, *[pad] * cells, VISION_END]
    tail = list(rng.integers(0, 90, 2 + seed % 4))
    ids, compact = ids + tail, compact + tail
    return Prompt(
        id=f"sample-{seed}",
        visuals=tuple(visuals),
        token_ids=np.array(ids),
        engine_token_ids=tuple(compact),
        positions=mrope_positions(
            np.array(ids), [VIDEO_TOKEN, IMAGE_TOKEN], blocks, merge=2, tokens_per_second=2
        ),
    )


def answered(prompts: Sequence[Prompt], seed: int, longest: int = 8) -> list[Group]:
    """Three random answers of 1 to `longest` tokens to each prompt."""
    rng = np.random.default_rng(seed)
    return [
        Group(
            prompt=asked,
            answers=tuple(
                Answer(
                    token_ids=rng.integers(0, 90, length),
                    advantage=float(rng.normal()),
                    engine_logprobs=rng.normal(size=length).astype(np.float32),
                )
                for length in rng.integers(1, longest + 1, 3)
            ),
        )
        for asked in prompts
    ]


# One video, two, an image beside a video, and text alone: every layout trains on all four.
PROMPTS = [
    prompt([video((3, 4, 4), 1.0, 0)], 0),
    prompt([video((2, 2, 6), 2.0, 1), video((1, 6, 4), 0.5, 2)], 1),
    prompt([image((4, 6), 3), video((4, 2, 2), 1.5, 4)], 2),
    prompt([], 3),
]
GROUPS = answered(PROMPTS, seed=3)


def micro_batches(
    groups: Sequence[Group], mesh: Mesh, layout: Literal["shared", "plain"] = "shared"
) -> list[MicroBatch]:
    """Return the micro-batches of this data rank, text alone in one of its own.

    A token weighs 1 / (tokens of all ranks).
    """
    mine = list(groups[mesh.data.rank :: mesh.data.size])
    return plan_batches(mine, mine[0], Batch(tokens=40, layout=layout), mesh)


def token_loss(tokens: Tokens) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss in which every part of the model has a gradient, for `Policy.update`."""
    metrics = {"entropy": tokens.entropy, "logprob": tokens.logprob}
    if tokens.reference is not None:
        metrics["reference_gap_max"] = (tokens.logprob.detach() - tokens.reference).abs()
    of_answer = 1 + 0.1 * tokens.sequence_sum(tokens.logprob).tanh()  # also over context ranks
    return -tokens.logprob * tokens.advantage * of_answer - 0.01 * tokens.entropy, metrics


def present(parts: Iterable[Tensor | None]) -> list[Tensor]:
    """Return the tensors as a list. Fail if one is None, as log-probs are before the last stage."""
    tensors = list(parts)
    found = [tensor for tensor in tensors if tensor is not None]
    assert len(found) == len(tensors)
    return found


def sharded_tensors(directory: Path) -> dict[str, Tensor]:
    """Return every tensor of a Hugging Face folder by its name in the files."""
    shards = [load_file(shard) for shard in sorted(directory.glob("*.safetensors"))]
    return {name: tensor for shard in shards for name, tensor in shard.items()}
