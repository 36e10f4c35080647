"""Prompt form of Qwen2.5-VL: each visual is one run of pad tokens."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_vrl.models.architecture import Architecture
from megatron_vrl.models.family import PromptForm, Tokenize
from megatron_vrl.models.qwen2_5_vl.positions import VisionBlock, mrope_positions
from megatron_vrl.types import Visual

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


def _expand(
    token_ids: Sequence[int], visuals: Sequence[Visual], arch: Architecture, _: Tokenize
) -> list[int]:
    """Return the ids with the pad token of each visual repeated, once for each vision token."""
    pads = (arch.video_token, arch.image_token)
    cells = iter([VisionBlock.of(visual).num_tokens(arch.vision.merge) for visual in visuals])
    repeats = [next(cells) if token in pads else 1 for token in token_ids]
    ids: list[int] = np.repeat(token_ids, repeats).tolist()
    return ids


def _positions(
    token_ids: NDArray[np.int64], visuals: Sequence[Visual], arch: Architecture
) -> NDArray[np.int64]:
    """Return M-RoPE positions [3, P]."""
    return mrope_positions(
        token_ids,
        (arch.video_token, arch.image_token),
        [VisionBlock.of(visual) for visual in visuals],
        merge=arch.vision.merge,
        tokens_per_second=arch.vision.tokens_per_second,
    )


PROMPT = PromptForm(
    structure_tokens=STRUCTURE_TOKENS,
    stop_tokens=("<|im_end|>", "<|endoftext|>"),
    expand=_expand,
    positions=_positions,
)
