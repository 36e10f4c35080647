"""Detects videos whose frame times differ from annotated times or from the model's positions."""

from collections.abc import Iterator

import numpy as np

from megatron_vrl.video.probe import DecodeJob
from megatron_vrl.video.rules import TEMPORAL


def time_problems(job: DecodeJob) -> Iterator[str]:
    """Yield a sentence for a video that starts late, and one for a varying frame rate.

    A difference is reported if it exceeds one temporal step (`seconds_per_grid`), the model's
    resolution. Example: 1 s per step and frames up to 1.4 s from their positions are reported, 0.9
    s are not.
    """
    step_s = job.plan.seconds_per_grid
    if job.file.late_s > step_s:
        yield (
            f"its first picture is shown {job.file.late_s:.2f} s after the start of the file, and "
            "times count from that picture; shift the annotated times, or cut the file there."
        )
    off_s = _max_offset_s(job)
    if off_s > step_s:
        yield (
            f"its frame rate varies: sampled frames are up to {off_s:.2f} s from the times that "
            f"their positions encode, {step_s:.2f} s per step; encode it at a constant rate."
        )


def _max_offset_s(job: DecodeJob) -> float:
    """Return the maximum offset in seconds of a temporal step's first frame from its position."""
    shown_s = job.file.timestamps_s[job.plan.indices[::TEMPORAL]]
    positions_s = np.arange(len(shown_s)) * job.plan.seconds_per_grid
    return float(np.abs(shown_s - shown_s[0] - positions_s).max())
