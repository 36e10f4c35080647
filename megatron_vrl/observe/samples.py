"""SampleLog: logs whole samples during a run: question, frames and every answer, for the report.

Each logged sample is one row of samples.jsonl and one JPEG in samples/ with its media in their
order: a strip of frames for each video, a row of cells for images; text alone has none. The cells
of a strip divide the video's duration evenly, so the strip aligns with a time axis below it.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from megatron_vrl.observe.metrics import Phase
from megatron_vrl.storage.files import RowFile, full_disk_named
from megatron_vrl.types import EncodedVideo, Interval, Visual

CELLS = 8  # frames per strip
CELL_PX = 160  # width of a cell


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer as parsed and scored."""

    text: str
    intervals_s: tuple[Interval, ...]  # predicted, seconds; () if none was parsed
    option: str  # predicted letter; "" if none was parsed
    components: dict[str, float]  # reward component -> value
    reward: float
    advantage: float
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedSample:
    """One prompt with its ground truth and all answers of its group."""

    phase: Phase
    step: int
    sample_id: str
    task: str
    question: str
    options: tuple[str, ...]
    option: str  # correct letter; "" when the task has none
    intervals_s: tuple[Interval, ...]  # ground truth, seconds; () when the task has none
    duration_s: float  # of the only video; 0 without one
    answers: tuple[Answer, ...]


class SampleLog:
    """Appends logged samples to samples.jsonl and writes their strips."""

    def __init__(self, out_dir: Path, resume: tuple[str, int] | None) -> None:
        self._folder = out_dir / "samples"
        self._folder.mkdir(exist_ok=True)
        self._rows = RowFile(out_dir / "samples.jsonl", resume)

    def append(self, sample: LoggedSample, visuals: Sequence[Visual]) -> None:
        """Log one sample with its videos and images."""
        if not visuals:
            self._rows.append({**asdict(sample), "strip": ""})
            return
        safe_id = "".join(c if c.isalnum() else "_" for c in sample.sample_id)[-60:]
        path = self._folder / f"{sample.phase}-{sample.step:06d}-{safe_id}.jpg"
        with full_disk_named(path):
            picture_of(visuals, sample.duration_s).save(path, quality=82)
        self._rows.append({**asdict(sample), "strip": f"samples/{path.name}"})

    def close(self) -> None:
        """Close samples.jsonl."""
        self._rows.close()


def picture_of(visuals: Sequence[Visual], duration_s: float = 0.0) -> Image.Image:
    """Return the media below each other: a strip for each video, rows of cells for images.

    `duration_s` is the annotated duration of the only video; 0: each strip spans its own video.
    """
    rows: list[Image.Image] = []
    for is_video, group in groupby(visuals, lambda visual: isinstance(visual, EncodedVideo)):
        shown = list(group)
        if is_video:
            rows += [
                strip(v.frames, v.timestamps_s, duration_s or v.duration_s)
                for v in shown
                if isinstance(v, EncodedVideo)
            ]
        else:
            rows += [_cells(shown[i : i + CELLS]) for i in range(0, len(shown), CELLS)]
    picture = Image.new("RGB", (CELL_PX * CELLS, sum(row.height for row in rows)))
    top = 0
    for row in rows:
        picture.paste(row, (0, top))
        top += row.height
    return picture


def _cells(images: Sequence[Visual]) -> Image.Image:
    """Return at most CELLS images side by side, each in a cell of its own."""
    pictures = [_cell(image.frames[0]) for image in images]
    row = Image.new("RGB", (CELL_PX * CELLS, max(one.height for one in pictures)))
    for cell, picture in enumerate(pictures):
        row.paste(picture, (cell * CELL_PX, 0))
    return row


def _cell(frame: NDArray[np.uint8]) -> Image.Image:
    """Return a frame [height, width, 3] with the width of a cell."""
    height_px = max(1, round(CELL_PX * frame.shape[0] / frame.shape[1]))
    return Image.fromarray(frame).resize((CELL_PX, height_px))


def strip(
    frames: NDArray[np.uint8], timestamps_s: NDArray[np.float64], duration_s: float
) -> Image.Image:
    """Return CELLS frames side by side, each the nearest to the middle of its part of the duration.

    Example: of a 16 s video, the 8 cells show the frames nearest to 1, 3, 5, ..., 15 s.
    """
    middles_s = (np.arange(CELLS) + 0.5) * duration_s / CELLS
    nearest = np.abs(timestamps_s[None, :] - middles_s[:, None]).argmin(axis=1)  # [CELLS]
    cells = [_cell(frames[index]) for index in nearest]
    image = Image.new("RGB", (CELL_PX * CELLS, cells[0].height))
    for cell, frame in enumerate(cells):
        image.paste(frame, (cell * CELL_PX, 0))
    return image
