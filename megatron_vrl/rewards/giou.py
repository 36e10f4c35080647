"""Generalised IoU of intervals, scaled to [0, 1]: (1 + GIoU) / 2.

GIoU = IoU - (hull - union) / hull (arXiv 1902.09630). `hull` is the length of the shortest interval
that contains answer and truth, `union` the length of what they cover. For an answer that overlaps
no truth, GIoU falls with the gap between them, from 0 to -1. The scaled value is the one of MUSEG
(arXiv 2505.20715, `reward_local_matching` of its released code). So an unreadable answer, which
scores 0, is never better than a miss. Sets of intervals have no GIoU here: their hull contains the
gaps, so the value of a set for itself would be below 1.
"""

from megatron_vrl.rewards.temporal_iou import iou
from megatron_vrl.types import Interval, Parsed, Sample


def score(sample: Sample, parsed: Parsed) -> float:
    """Return the largest scaled GIoU with a true interval; 0 if no interval could be read."""
    if parsed.interval_s is None:
        return 0.0
    return max(scaled_giou(parsed.interval_s, truth_s) for truth_s in sample.intervals_s)


def scaled_giou(left: Interval, right: Interval) -> float:
    """Return (1 + GIoU) / 2 of two intervals, in [0, 1] and exactly symmetric."""
    hull = max(left[1], right[1]) - min(left[0], right[0])
    gap = max(0.0, max(left[0], right[0]) - min(left[1], right[1]))
    return (1.0 + iou(left, right) - gap / hull) / 2.0  # hull - union is the gap between them
