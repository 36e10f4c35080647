"""SampleLog: logs whole samples during a run: question, frames and every answer, for the report.

Each logged sample is one row of samples.jsonl and one JPEG strip of frames in samples/. The cells
of a strip divide the video's duration evenly, so the strip aligns with a time axis below it.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from megatron_vrl.observe.metrics import Phase
from megatron_vrl.storage.files import RowFile, full_disk_named
from megatron_vrl.types import Interval

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
    duration_s: float
    answers: tuple[Answer, ...]


class SampleLog:
    """Appends logged samples to samples.jsonl and writes their strips."""

    def __init__(self, out_dir: Path, resume: tuple[str, int] | None) -> None:
        self._folder = out_dir / "samples"
        self._folder.mkdir(exist_ok=True)
        self._rows = RowFile(out_dir / "samples.jsonl", resume)

    def append(
        self, sample: LoggedSample, frames: NDArray[np.uint8], timestamps_s: NDArray[np.float64]
    ) -> None:
        """Log one sample with its `frames` [F, height, width, 3] RGB and `timestamps_s` [F]."""
        safe_id = "".join(c if c.isalnum() else "_" for c in sample.sample_id)[-60:]
        path = self._folder / f"{sample.phase}-{sample.step:06d}-{safe_id}.jpg"
        with full_disk_named(path):
            strip(frames, timestamps_s, sample.duration_s).save(path, quality=82)
        self._rows.append({**asdict(sample), "strip": f"samples/{path.name}"})

    def close(self) -> None:
        """Close samples.jsonl."""
        self._rows.close()


def strip(
    frames: NDArray[np.uint8], timestamps_s: NDArray[np.float64], duration_s: float
) -> Image.Image:
    """Return CELLS frames side by side, each the nearest to the middle of its part of the duration.

    Example: of a 16 s video, the 8 cells show the frames nearest to 1, 3, 5, ..., 15 s.
    """
    middles_s = (np.arange(CELLS) + 0.5) * duration_s / CELLS
    nearest = np.abs(timestamps_s[None, :] - middles_s[:, None]).argmin(axis=1)  # [CELLS]
    height_px = max(1, round(CELL_PX * frames.shape[1] / frames.shape[2]))
    image = Image.new("RGB", (CELL_PX * CELLS, height_px))
    for cell, index in enumerate(nearest):
        frame = Image.fromarray(frames[index]).resize((CELL_PX, height_px))
        image.paste(frame, (cell * CELL_PX, 0))
    return image
