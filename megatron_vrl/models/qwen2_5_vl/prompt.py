"""Prompt forms of Qwen2.5-VL: each vision block is one run of pad tokens.

A block is a visual, or with textual timestamps (`timestamps.py`) a temporal step of a video.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from megatron_vrl.models.architecture import Architecture
from megatron_vrl.models.family import PromptForm, Tokenize
from megatron_vrl.models.qwen2_5_vl.positions import VisionBlock, mrope_positions
from megatron_vrl.models.qwen2_5_vl.timestamps import EXPLANATION, step_blocks, step_parts
from megatron_vrl.types import Visual

Blocks = Callable[[Visual], list[VisionBlock]]  # vision blocks that show a visual, in order

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


def _one_block(visual: Visual) -> list[VisionBlock]:
    """Return the visual as one vision block."""
    return [VisionBlock.of(visual)]


def _expand(
    token_ids: Sequence[int],
    visuals: Sequence[Visual],
    arch: Architecture,
    _: Tokenize,
    blocks: Blocks = _one_block,
) -> list[int]:
    """Return the ids with the pad token of each block repeated, once for each vision token."""
    pads = (arch.video_token, arch.image_token)
    shown = [block for visual in visuals for block in blocks(visual)]
    cells = iter([block.num_tokens(arch.vision.merge) for block in shown])
    repeats = [next(cells) if token in pads else 1 for token in token_ids]
    ids: list[int] = np.repeat(token_ids, repeats).tolist()
    return ids


def _positions(
    token_ids: NDArray[np.int64],
    visuals: Sequence[Visual],
    arch: Architecture,
    blocks: Blocks = _one_block,
) -> NDArray[np.int64]:
    """Return M-RoPE positions [3, P]."""
    return mrope_positions(
        token_ids,
        (arch.video_token, arch.image_token),
        [block for visual in visuals for block in blocks(visual)],
        merge=arch.vision.merge,
        tokens_per_second=arch.vision.tokens_per_second,
    )


PROMPT = PromptForm(
    structure_tokens=STRUCTURE_TOKENS,
    stop_tokens=("<|im_end|>", "<|endoftext|>"),
    expand=_expand,
    positions=_positions,
)

INTERLEAVED_PROMPT = replace(
    PROMPT,
    parts=step_parts,
    expand=partial(_expand, blocks=step_blocks),
    positions=partial(_positions, blocks=step_blocks),
    explanation=EXPLANATION,
    step_blocks=True,
    step_text=10,  # of `123.5s: ` and the two marks of a vision block
)
