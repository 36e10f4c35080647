"""Prompts of Qwen3-VL: token ids of transformers' processor, with the frames' own times."""

from dataclasses import replace
from typing import Any

import make_tiny_model
import numpy as np
import pytest
import released_qwen3_vl
import torch

from megatron_vrl.data.prompt import PromptEncoder
from megatron_vrl.models.qwen3_vl.family import FAMILY
from megatron_vrl.models.qwen3_vl.pixels import PIXELS
from megatron_vrl.models.qwen3_vl.prompt import step_times, timestamp
from megatron_vrl.rollout.request import make_request
from megatron_vrl.types import EncodedVideo, Visual
from tests.models.against_hf import seen_by_transformers
from tests.tiny_qwen3_vl import ARCH, image, video

NATIVE_FPS = 29.97
SYSTEM, QUESTION = "Look.", "when is <0.5 seconds> the red square visible?"


@pytest.fixture(scope="module")
def processor() -> Any:
    tokenizer = make_tiny_model.train_tokenizer(512, released_qwen3_vl.TEXTS)
    return released_qwen3_vl.make_processor(tokenizer, 1024, 1024)


@pytest.fixture(scope="module")
def encoder(processor: Any, tmp_path_factory: pytest.TempPathFactory) -> PromptEncoder:
    folder = tmp_path_factory.mktemp("processor")
    processor.save_pretrained(folder)
    token = processor.tokenizer.convert_tokens_to_ids
    arch = replace(
        ARCH,
        video_token=token("<|video_pad|>"),
        image_token=token("<|image_pad|>"),
        vision_start_token=token("<|vision_start|>"),
        vision_end_token=token("<|vision_end|>"),
    )
    return PromptEncoder(folder, arch, "none", max_tokens=1000)


def test_interleaved_timestamps_change_nothing(encoder: PromptEncoder) -> None:
    """Qwen3-VL's own form has timestamps: one block per video, and no sentence about numbers."""
    assert FAMILY.interleaved_prompt == FAMILY.prompt
    prompt = encoder.encode("a", None, (sampled((3, 4, 6), 13, 1), QUESTION))
    (block,) = make_request(prompt).visuals
    assert block.grid_thw == (3, 4, 6) and len(block.timestamps_s) == 6


def sampled(grid: tuple[int, int, int], every: int, seed: int) -> EncodedVideo:
    """A video of frames 0, `every`, 2 `every`, ... of a file with a constant frame rate."""
    indices = np.arange(2 * grid[0]) * every
    return replace(video(grid, 1.0, seed), frame_indices=indices, timestamps_s=indices / NATIVE_FPS)


@pytest.mark.parametrize(
    "visuals",
    [
        [sampled((3, 4, 6), 13, 1)],
        [sampled((1, 2, 2), 1, 1), sampled((4, 2, 6), 331, 2)],
        [image((4, 4), 1), sampled((2, 4, 2), 7, 2)],
        [],
    ],
    ids=["video", "two videos", "image and video", "text"],
)
def test_tokens_and_pixels_equal_transformers(
    processor: Any, encoder: PromptEncoder, visuals: list[Visual]
) -> None:
    kinds = ["video" if isinstance(visual, EncodedVideo) else "image" for visual in visuals]
    content = [*({"type": kind} for kind in kinds), {"type": "text", "text": QUESTION}]
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    videos = [visual for visual in visuals if isinstance(visual, EncodedVideo)]
    shown: dict[str, Any] = {}
    if videos:
        shown["videos"] = [torch.from_numpy(v.frames).permute(0, 3, 1, 2) for v in videos]
        shown["video_metadata"] = [
            {
                "fps": NATIVE_FPS,
                "frames_indices": video.frame_indices.tolist(),
                "total_num_frames": 10_000,
            }
            for video in videos
        ]
        shown |= {"videos_kwargs": {"do_sample_frames": False, "do_resize": False}}
    images = [torch.from_numpy(v.frames[0]).permute(2, 0, 1) for v in visuals if v not in videos]
    if images:
        shown |= {"images": images, "images_kwargs": {"do_resize": False}}
    theirs = processor(text=[text], return_tensors="pt", **shown)
    ours = encoder.encode("one", SYSTEM, (*visuals, QUESTION))
    assert ours.token_ids.tolist() == theirs["input_ids"][0].tolist()
    for name, wanted in seen_by_transformers(ours, PIXELS).items():
        torch.testing.assert_close(theirs[name], wanted, rtol=0, atol=1e-6)


def test_a_steps_time_is_the_mean_of_its_frames() -> None:
    assert step_times([0.0, 0.5, 1.0, 1.9], 2) == [0.25, 1.45]
    assert [timestamp(time) for time in (0.0, 0.25, 9.96, 123.44)] == [
        "<0.0 seconds>",
        "<0.2 seconds>",
        "<10.0 seconds>",
        "<123.4 seconds>",
    ]


def test_text_of_users_is_no_timestamp(encoder: PromptEncoder) -> None:
    """The words of a timestamp in a question stay words, and positions count only real steps."""
    asked = encoder.encode("one", None, (sampled((2, 2, 2), 5, 1), QUESTION))
    pads = np.flatnonzero(asked.token_ids == encoder._arch.video_token)
    assert len(pads) == 2 and (np.diff(asked.positions[0]) == 1).all()
