"""Cards: one question kept whole, with its frames and every answer, for a person to read.

Written while the run goes on: a row of cards.jsonl and one JPEG strip per card. The strip's cells
divide the video's duration evenly, so that it lines up with a time axis drawn under it.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from megatron_vrl.observe.metrics import Phase
from megatron_vrl.storage.files import RowFile, full_disk_named
from megatron_vrl.types import Interval

CELLS = 8  # frames of a strip
CELL_PX = 160  # width of one


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    text: str
    intervals_s: tuple[Interval, ...]  # predicted, seconds; () when none could be read
    option: str  # predicted letter; "" when none could be read
    components: dict[str, float]  # reward component -> value
    reward: float
    advantage: float
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    phase: Phase
    step: int
    sample_id: str
    task: str
    question: str
    options: tuple[str, ...]
    option: str  # the right letter; "" when the task has none
    intervals_s: tuple[Interval, ...]  # true, seconds; () when the task has none
    duration_s: float
    answers: tuple[Answer, ...]


class CardFile:
    def __init__(self, out_dir: Path, resume: tuple[str, int] | None) -> None:
        self._folder = out_dir / "cards"
        self._folder.mkdir(exist_ok=True)
        self._rows = RowFile(out_dir / "cards.jsonl", resume)

    def append(
        self, card: Card, frames: NDArray[np.uint8], timestamps_s: NDArray[np.float64]
    ) -> None:
        """`frames` [F, height, width, 3] RGB, `timestamps_s` [F]."""
        safe_id = "".join(c if c.isalnum() else "_" for c in card.sample_id)[-60:]
        path = self._folder / f"{card.phase}-{card.step:06d}-{safe_id}.jpg"
        with full_disk_named(path):
            strip(frames, timestamps_s, card.duration_s).save(path, quality=82)
        self._rows.append({**asdict(card), "strip": f"cards/{path.name}"})

    def close(self) -> None:
        self._rows.close()


def strip(
    frames: NDArray[np.uint8], timestamps_s: NDArray[np.float64], duration_s: float
) -> Image.Image:
    """The frame nearest to the middle of each of CELLS equal parts of the video, side by side."""
    middles_s = (np.arange(CELLS) + 0.5) * duration_s / CELLS
    nearest = np.abs(timestamps_s[None, :] - middles_s[:, None]).argmin(axis=1)  # [CELLS]
    height_px = max(1, round(CELL_PX * frames.shape[1] / frames.shape[2]))
    image = Image.new("RGB", (CELL_PX * CELLS, height_px))
    for cell, index in enumerate(nearest):
        frame = Image.fromarray(frames[index]).resize((CELL_PX, height_px))
        image.paste(frame, (cell * CELL_PX, 0))
    return image
