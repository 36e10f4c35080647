"""Prompt form of Qwen3-VL: timestamps as text between the temporal steps of a video.

The chat template renders a video as `<|vision_start|><|video_pad|><|vision_end|>`. Each temporal
step takes the place of the pad token in turn: its time as text, then its vision tokens in a pair of
vision tokens of its own. Two steps of four tokens each:

    <|vision_start|>
    <0.2 seconds><|vision_start|><|video_pad|> x 4<|vision_end|>
    <1.2 seconds><|vision_start|><|video_pad|> x 4<|vision_end|>
    <|vision_end|>

This is the form of transformers' `Qwen3VLProcessor` from 5.10 on and of vLLM, which both keep the
outer pair of tokens. The time of a step is the mean of its first and last frame, with one decimal.
The frames' times are those of the time axis, from the container; the processors divide frame
numbers by a frame rate.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_vrl.models.architecture import Architecture
from megatron_vrl.models.family import PromptForm, Tokenize
from megatron_vrl.types import EncodedVideo, Visual

STRUCTURE_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def step_times(frame_times_s: Sequence[float], temporal_patch: int) -> list[float]:
    """Return the time in seconds of each temporal step of `temporal_patch` frames."""
    last = temporal_patch - 1
    return [
        (frame_times_s[first] + frame_times_s[first + last]) / 2
        for first in range(0, len(frame_times_s), temporal_patch)
    ]


def timestamp(time_s: float) -> str:
    """Return the text before a temporal step."""
    return f"<{time_s:.1f} seconds>"


def expand(
    rendered: Sequence[int], visuals: Sequence[Visual], arch: Architecture, tokenize: Tokenize
) -> list[int]:
    """Return token ids with one pad token per vision token, of ids with one pad token per
    visual."""
    remaining = iter(visuals)
    ids: list[int] = []
    for token in rendered:
        if token in (arch.video_token, arch.image_token):
            ids += _visual_ids(next(remaining), arch, tokenize)
        else:
            ids.append(token)
    return ids


def _visual_ids(visual: Visual, arch: Architecture, tokenize: Tokenize) -> list[int]:
    """Return the token ids that take the place of a visual's pad token."""
    _, height, width = visual.grid_thw
    tokens = height * width // arch.vision.merge**2
    if not isinstance(visual, EncodedVideo):
        return [arch.image_token] * tokens
    ids: list[int] = []
    for time in step_times(visual.timestamps_s.tolist(), arch.vision.temporal_patch):
        ids += tokenize(timestamp(time))
        ids += [arch.vision_start_token, *[arch.video_token] * tokens, arch.vision_end_token]
    return ids


def positions(
    token_ids: NDArray[np.int64], visuals: Sequence[Visual], arch: Architecture
) -> NDArray[np.int64]:
    """Return M-RoPE positions [3, P] of expanded token ids [P].

    Text counts up on all three axes. A temporal step stands at one time, that of the next text
    token, and spans height and width; the text after it resumes at 1 + the largest position so far.
    Raise ValueError if the pad tokens and the visuals' grids differ in number.
    """
    is_pad = np.isin(token_ids, (arch.video_token, arch.image_token))
    steps = list(_step_cells(visuals, arch.vision.merge))
    if int(is_pad.sum()) != sum(cells.shape[1] for cells in steps):
        raise ValueError("vision pad tokens and grid cells differ in number")
    parts: list[NDArray[np.int64]] = []
    start = next_position = 0
    for cells in steps:
        first = start + int(np.argmax(is_pad[start:]))
        parts.append(_text(next_position, first - start))
        next_position += first - start
        parts.append(cells + next_position)
        next_position += int(cells.max()) + 1
        start = first + cells.shape[1]
    parts.append(_text(next_position, len(token_ids) - start))
    return np.concatenate(parts, axis=1)


def _text(first: int, count: int) -> NDArray[np.int64]:
    """Return text positions [3, count] that start at `first`."""
    return np.broadcast_to(np.arange(first, first + count), (3, count))


def _step_cells(visuals: Sequence[Visual], merge: int) -> Iterator[NDArray[np.int64]]:
    """Yield positions [3, tokens] of each temporal step, from 0."""
    for steps, height, width in (visual.grid_thw for visual in visuals):
        cells = np.indices((1, height // merge, width // merge)).reshape(3, -1)
        for _ in range(steps):
            yield cells


PROMPT = PromptForm(
    structure_tokens=STRUCTURE_TOKENS,
    stop_tokens=("<|im_end|>", "<|endoftext|>"),
    expand=expand,
    positions=positions,
    step_text=10,  # of `<123.5 seconds>` and the pair of vision tokens
)
