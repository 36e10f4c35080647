"""Where a video's times differ from the times that annotations and positions count."""

from collections.abc import Iterator

import numpy as np

from megatron_vrl.video.probe import DecodeJob
from megatron_vrl.video.rules import TEMPORAL


def problems_of_times(job: DecodeJob) -> Iterator[str]:
    """One sentence each for pictures that start late and for a rate that varies too much.

    Both are told from one temporal step (`seconds_per_grid`) on: less is not seen by the model.
    """
    step_s = job.plan.seconds_per_grid
    if job.file.late_s > step_s:
        yield (
            f"its first picture is shown {job.file.late_s:.2f} s after the start of the file, and "
            "times count from that picture; shift the annotated times, or cut the file there."
        )
    off_s = _farthest_s(job)
    if off_s > step_s:
        yield (
            f"its frame rate varies: sampled frames lie up to {off_s:.2f} s from the times that "
            f"their positions stand for, {step_s:.2f} s a step; encode it at a constant rate."
        )


def _farthest_s(job: DecodeJob) -> float:
    """Most seconds between a temporal step's first frame and its position (M-RoPE)."""
    shown_s = job.file.timestamps_s[job.plan.indices[::TEMPORAL]]
    positions_s = np.arange(len(shown_s)) * job.plan.seconds_per_grid
    return float(np.abs(shown_s - shown_s[0] - positions_s).max())
