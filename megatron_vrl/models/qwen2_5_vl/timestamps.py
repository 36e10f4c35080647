"""Textual timestamps between the temporal steps of a video (`data.timestamps: interleaved`).

The form is TimeLens's for Qwen2.5-VL (arXiv 2512.14698): each temporal step is a vision block of
its own, and the time of its first frame stands before the block, as in
`0.0s: <vision block>1.0s: <vision block>`. A sentence before the question explains the numbers. It
is `GROUNDING_PROMPT_TEXT_TIMESTAMP` of TimeLens's branch `train` (training/data/grounding.py). The
processor of the released checkpoint is not part of that code. The text before a block follows
public code that queries the checkpoint.

The grid of a block has one temporal step, so M-RoPE time stands still inside a block, and the text
between blocks moves it on. In the released model a block is an image. Here it is a video of one
step, since vLLM resizes images by rules of its own; positions and embeddings of the two are equal.
A step keeps its two frames here; public code that imitates the released processor repeats the
first.
"""

from collections.abc import Iterator

from megatron_vrl.models.family import visual_part
from megatron_vrl.models.qwen2_5_vl.positions import VisionBlock
from megatron_vrl.types import EncodedVideo, Visual

EXPLANATION = (
    "You are given a video with multiple frames. "
    "The numbers before each video frame indicate its sampling timestamp (in seconds). "
)


def step_texts(video: EncodedVideo) -> list[str]:
    """Return the text before each temporal step: seconds since the first frame that is shown."""
    first_s = video.timestamps_s[0]
    return [f"{time_s - first_s:.1f}s: " for time_s in video.timestamps_s[::2]]


def step_parts(visual: Visual) -> Iterator[dict[str, str]]:
    """Yield the parts of a chat message that show a visual: text and block of each step."""
    if not isinstance(visual, EncodedVideo):
        yield from visual_part(visual)
        return
    for text in step_texts(visual):
        yield {"type": "text", "text": text}
        yield {"type": "video"}


def step_blocks(visual: Visual) -> list[VisionBlock]:
    """Return the vision blocks that show a visual, in order: one per temporal step of a video."""
    if isinstance(visual, EncodedVideo):
        steps, height, width = visual.grid_thw
        return [VisionBlock((1, height, width), visual.seconds_per_grid)] * steps
    return [VisionBlock.of(visual)]
