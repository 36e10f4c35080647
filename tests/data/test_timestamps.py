"""Textual timestamps between temporal steps: TimeLens's form, and one encoding for both sides."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_vrl.config import Data
from megatron_vrl.context import prompt_encoder
from megatron_vrl.data.prompt import PromptEncoder
from megatron_vrl.errors import ConfigError
from megatron_vrl.models.architecture import read_architecture
from megatron_vrl.models.qwen2_5_vl.timestamps import EXPLANATION
from megatron_vrl.rollout.request import make_request
from megatron_vrl.types import Sample, VideoClip
from tests.tiny import image, video

CLIP = video((3, 4, 6), 1.25, seed=0)
CELLS = 4 * 6 // 4  # vision tokens of a temporal step


@pytest.fixture(scope="module")
def encoder(released: Path) -> PromptEncoder:
    data = Data(system_prompt="none", timestamps="interleaved")
    return prompt_encoder(released, read_architecture(released), data)


def rendered(encoder: PromptEncoder, token_ids: object) -> str:
    return str(encoder.tokenizer.decode(token_ids))


def test_the_form_is_that_of_timelens(encoder: PromptEncoder) -> None:
    """Text as in TimeLens: the time of a step's first frame, then the step as a vision block."""
    prompt = encoder.encode("a", None, (CLIP, "When?"))
    block = "<|vision_start|><|video_pad|><|vision_end|>"
    assert rendered(encoder, prompt.engine_token_ids) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n0.0s: {block}1.2s: {block}2.5s: {block}When?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    whole = rendered(encoder, prompt.token_ids)
    assert whole.replace("<|video_pad|>" * CELLS, "<|video_pad|>") == rendered(
        encoder, prompt.engine_token_ids
    )


def test_the_numbers_are_explained_before_the_question(encoder: PromptEncoder) -> None:
    sample = Sample(
        id="a",
        task="temporal_grounding",
        media=(VideoClip("a.mp4"),),
        duration_s=4.0,
        query="a man sits",
        rationale="",
        intervals_s=((0.0, 1.0),),
        options=(),
        option="",
    )
    text = rendered(encoder, encoder.prompt(sample, CLIP).engine_token_ids)
    assert f"<|vision_end|>{EXPLANATION}" in text


def test_times_of_a_window_count_from_its_first_frame(encoder: PromptEncoder) -> None:
    later = replace(CLIP, timestamps_s=CLIP.timestamps_s + 40.0)
    ids = encoder.encode("a", None, (later, "When?")).token_ids
    assert np.array_equal(ids, encoder.encode("a", None, (CLIP, "When?")).token_ids)


def test_positions_are_those_of_blocks_with_one_step(encoder: PromptEncoder) -> None:
    """M-RoPE time stands still in a block; `test_vllm_positions.py` compares with vLLM."""
    prompt = encoder.encode("a", None, (CLIP, "When?"))
    pad = encoder.tokenizer.convert_tokens_to_ids("<|video_pad|>")
    at = np.flatnonzero(prompt.token_ids == pad)
    time, height, width = prompt.positions[:, at].reshape(3, 3, CELLS)
    assert all(len(set(of_step)) == 1 for of_step in time.tolist())
    assert np.array_equal(height - time, [[0, 0, 0, 1, 1, 1]] * 3)
    assert np.array_equal(width - time, [[0, 1, 2, 0, 1, 2]] * 3)
    text = np.flatnonzero(prompt.token_ids != pad)
    assert np.array_equal(*prompt.positions[:2, text])
    assert (np.diff(prompt.positions[0, text]) > 0).all()


@pytest.mark.parametrize("embedded", [False, True])
def test_the_engine_gets_every_step_as_a_video(encoder: PromptEncoder, embedded: bool) -> None:
    prompt = encoder.encode("a", None, (CLIP, "When?"))
    if embedded:
        prompt = replace(prompt, visual_embeds=(np.arange(3.0 * CELLS)[:, None],))
    steps = make_request(prompt).visuals
    assert [step.grid_thw for step in steps] == [(1, 4, 6)] * 3
    times = np.concatenate([step.timestamps_s for step in steps])
    assert np.array_equal(times, CLIP.timestamps_s)
    if embedded:
        assert all(len(step.frames) == 0 for step in steps)
        assert [float(s.embeddings[0, 0]) for s in steps if s.embeddings is not None] == [0, 6, 12]
    else:
        assert np.array_equal(np.concatenate([step.frames for step in steps]), CLIP.frames)


def test_an_image_has_no_timestamp(encoder: PromptEncoder) -> None:
    prompt = encoder.encode("a", None, (CLIP, image((4, 4), 1), "?"))
    text = rendered(encoder, prompt.engine_token_ids)
    assert "2.5s: <|vision_start|><|video_pad|><|vision_end|><|vision_start|><|image_pad|>" in text


def test_a_long_prompt_counts_its_timestamps(released: Path, encoder: PromptEncoder) -> None:
    length = len(encoder.encode("a", None, (CLIP, "?")).token_ids)
    data = Data(system_prompt="none", timestamps="interleaved", max_prompt_tokens=length - 1)
    short = prompt_encoder(released, read_architecture(released), data)
    with pytest.raises(ConfigError, match=f"has {length} tokens, 18 of them vision"):
        short.encode("a", None, (CLIP, "?"))
