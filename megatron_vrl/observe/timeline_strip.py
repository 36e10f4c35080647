"""Image of a video's frames with intervals marked on a time axis below."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from megatron_vrl.observe.samples import CELL_PX, CELLS, strip
from megatron_vrl.types import Interval

BAR_PX = 12
RULER_PX = 16
INK, PAPER, TRACK, MARK = "#222222", "#ffffff", "#dddddd", "#d9480f"


def timeline_strip(
    frames: NDArray[np.uint8],
    timestamps_s: NDArray[np.float64],
    duration_s: float,
    intervals_s: Sequence[Interval],
) -> Image.Image:
    """Return the image of `frames` [F, height, width, 3] RGB with `timestamps_s` [F].

    The time axis is linear over the width.
    """
    pictures = strip(frames, timestamps_s, duration_s)
    width, top = CELL_PX * CELLS, pictures.height
    image = Image.new("RGB", (width, top + BAR_PX + RULER_PX), PAPER)
    image.paste(pictures, (0, 0))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, top + 2, width, top + BAR_PX - 2), fill=TRACK)
    for start_s, end_s in intervals_s:
        left, right = (round(width * time / duration_s) for time in (start_s, end_s))
        draw.rectangle((left, top, max(left + 1, right), top + BAR_PX), fill=MARK)
        draw.rectangle((left, 0, max(left + 1, right), top - 1), outline=MARK, width=3)
    for cell in range(CELLS):
        time = f"{duration_s * cell / CELLS:.1f} s"
        draw.text((cell * CELL_PX + 2, top + BAR_PX + 2), time, fill=INK)
    return image
