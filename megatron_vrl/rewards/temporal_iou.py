"""Temporal IoU: overlap of the answered interval and a true one, over their union.

Where a sample has several true intervals, the one that fits best counts: the question asks for a
span that shows the answer, not for all of them (this is also how NExT-GQA is evaluated).
"""

from megatron_vrl.types import Interval, Parsed, VideoSample


def score(sample: VideoSample, parsed: Parsed) -> float:
    if parsed.interval_s is None:
        return 0.0
    return max(iou(parsed.interval_s, truth_s) for truth_s in sample.intervals_s)


def iou(left: Interval, right: Interval) -> float:
    """Intervals with start < end. Exactly symmetric, and in [0, 1] in floating point too."""
    overlap = max(0.0, min(left[1], right[1]) - max(left[0], right[0]))
    return overlap / (max(left[1], right[1]) - min(left[0], right[0]))  # the union if they overlap
