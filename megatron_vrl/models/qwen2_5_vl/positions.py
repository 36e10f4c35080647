"""M-RoPE positions of Qwen2.5-VL for a prompt with videos or images.

The rule is that of the original Qwen2.5-VL code and of vLLM: text counts up on all three axes; a
vision block starts where the text stopped and spans (time, height, width); the following text
resumes at 1 + the largest position so far on any axis. transformers 5 resumes elsewhere and is not
followed. An image is a video of one temporal step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_vrl.types import EncodedVideo, Visual


@dataclass(frozen=True, slots=True)
class VisionBlock:
    """Grid and time scale of one video or image in a prompt."""

    grid_thw: tuple[int, int, int]  # temporal steps; height and width in patches
    seconds_per_grid: float  # 0 for images

    @classmethod
    def of(cls, visual: Visual) -> "VisionBlock":
        """Return the block of a visual."""
        seconds = visual.seconds_per_grid if isinstance(visual, EncodedVideo) else 0.0
        return cls(visual.grid_thw, seconds)

    def num_tokens(self, merge: int) -> int:
        """Return the number of vision tokens of the block."""
        t, h, w = self.grid_thw
        return t * h * w // merge**2


def mrope_positions(
    token_ids: NDArray[np.int64],
    pad_tokens: Sequence[int],
    blocks: Sequence[VisionBlock],
    *,
    merge: int,
    tokens_per_second: float,
) -> NDArray[np.int64]:
    """Return positions [3, P] of `token_ids` [P], which holds one pad token per vision token.

    `blocks` are in order of appearance. Raise ValueError if the number of their tokens differs from
    the number of pad tokens.
    """
    is_pad = np.isin(token_ids, pad_tokens)
    if int(is_pad.sum()) != sum(block.num_tokens(merge) for block in blocks):
        raise ValueError("vision pad tokens and grid cells differ in number")
    parts: list[NDArray[np.int64]] = []
    start = next_position = 0
    for block in blocks:
        first = start + int(np.argmax(is_pad[start:]))
        parts.append(_text(next_position, first - start))
        next_position += first - start
        cells = _cells(block, merge, tokens_per_second) + next_position  # [3, cells]
        parts.append(cells)
        next_position = int(cells.max()) + 1
        start = first + cells.shape[1]
    parts.append(_text(next_position, len(token_ids) - start))
    return np.concatenate(parts, axis=1)


def _text(first: int, count: int) -> NDArray[np.int64]:
    """Return text positions [3, count] that start at `first`."""
    return np.broadcast_to(np.arange(first, first + count), (3, count))


def _cells(block: VisionBlock, merge: int, tokens_per_second: float) -> NDArray[np.int64]:
    """Return positions [3, tokens] of a vision block that starts at 0."""
    t, h, w = block.grid_thw
    step = tokens_per_second * block.seconds_per_grid
    time, height, width = np.indices((t, h // merge, w // merge)).reshape(3, -1)
    return np.stack([np.floor(time * step).astype(np.int64), height, width])
