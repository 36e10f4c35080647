"""Boundary IoU: temporal IoU, lowered by the errors of start and end.

The value is IoU x (1 - start error) x (1 - end error), with errors as fractions of the video's
duration (timestamp-aware IoU of Time-R1, arXiv 2503.13377, `iou_v2` in its code). It distinguishes
answers with equal IoU by their boundaries. If a sample has several true intervals, the one with the
largest value counts. Times are ordered and inside the video, so no factor is negative.
"""

from megatron_vrl.rewards.temporal_iou import iou
from megatron_vrl.types import Interval, Parsed, Sample


def score(sample: Sample, parsed: Parsed) -> float:
    """Return the largest boundary IoU with a true interval; 0 if no interval could be read."""
    if parsed.interval_s is None:
        return 0.0
    answer_s, duration_s = parsed.interval_s, sample.duration_s
    return max(_boundary_iou(answer_s, truth_s, duration_s) for truth_s in sample.intervals_s)


def _boundary_iou(answer_s: Interval, truth_s: Interval, duration_s: float) -> float:
    """Return the boundary IoU with one true interval."""
    start_error = abs(answer_s[0] - truth_s[0]) / duration_s
    end_error = abs(answer_s[1] - truth_s[1]) / duration_s
    return iou(answer_s, truth_s) * (1.0 - start_error) * (1.0 - end_error)
