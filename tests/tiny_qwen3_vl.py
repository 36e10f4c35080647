"""Small Qwen3-VL prompts for tests, in which words stand between the steps of a video."""

from collections.abc import Sequence
from functools import partial

import numpy as np

from megatron_vrl.models.architecture import Architecture, VisionArchitecture
from megatron_vrl.models.qwen3_vl.prompt import PROMPT
from megatron_vrl.types import EncodedVideo, Prompt, Visual
from tests import tiny
from tests.tiny import IMAGE_TOKEN, VIDEO_TOKEN, VISION_END, VISION_START

PATCH = 16
video = partial(tiny.video, patch=PATCH)
image = partial(tiny.image, patch=PATCH)

ARCH = Architecture(  # the config of `tiny_models.qwen3_model`, untied
    family="qwen3_vl",
    hidden=48,
    mlp=80,
    layers=6,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vocab=96,
    rope_base=10000.0,
    mrope_section=(4, 2, 2),
    norm_eps=1e-6,
    tied_head=False,
    max_positions=4096,
    video_token=VIDEO_TOKEN,
    image_token=IMAGE_TOKEN,
    vision_start_token=VISION_START,
    vision_end_token=VISION_END,
    qk_norm=True,
    vision=VisionArchitecture(
        hidden=32,
        mlp=40,
        layers=5,
        heads=2,
        patch=PATCH,
        temporal_patch=2,
        merge=2,
        channels=3,
        position_grid=5,
        deepstack_layers=(0, 1, 3),
    ),
)


def words(text: str) -> list[int]:
    """One token below 90 for each character of a timestamp."""
    return [ord(character) % 90 for character in text]


def prompt(visuals: Sequence[Visual], seed: int) -> Prompt:
    """Random words around the visuals; `seed` decides which, and how many."""
    rng = np.random.default_rng(seed + 1000)
    compact = list(rng.integers(0, 90, 3))
    for visual in visuals:
        pad = VIDEO_TOKEN if isinstance(visual, EncodedVideo) else IMAGE_TOKEN
        compact += [VISION_START, pad, VISION_END]
    compact += list(rng.integers(0, 90, 2 + seed % 4))
    ids = np.array(PROMPT.expand(compact, visuals, ARCH, words))
    return Prompt(
        id=f"sample-{seed}",
        visuals=tuple(visuals),
        token_ids=ids,
        engine_token_ids=tuple(compact),
        positions=PROMPT.positions(ids, visuals, ARCH),
    )


# One video, two, an image beside a video, and text alone, as in tests/tiny.py.
PROMPTS = [
    prompt([video((3, 4, 4), 1.0, 0)], 0),
    prompt([video((2, 2, 6), 2.0, 1), video((1, 6, 4), 0.5, 2)], 1),
    prompt([image((4, 6), 3), video((4, 2, 2), 1.5, 4)], 2),
    prompt([], 3),
]
GROUPS = tiny.answered(PROMPTS, seed=3)
