"""Temporal IoU: overlap of the answered interval and a true interval, divided by their union.

If a sample has several true intervals, the one with the largest IoU counts: the question asks for
one interval that shows the answer, not for all of them. NExT-GQA is evaluated by the same rule.

A question that asks for every interval is scored by the IoU of sets: the length of the intersection
of both unions over the length of everything that is covered. VUE-TR and TimeLens2 (arXiv
2607.17423, `iou_overlap_ratio` of its released code) score so.
"""

from megatron_vrl.rewards.interval_sets import merge, set_iou
from megatron_vrl.types import Interval, Parsed, Sample


def score(sample: Sample, parsed: Parsed) -> float:
    """Return the largest IoU with a true interval; 0 if no interval could be read."""
    if parsed.interval_s is None:
        return 0.0
    return max(iou(parsed.interval_s, truth_s) for truth_s in sample.intervals_s)


def score_set(sample: Sample, parsed: Parsed) -> float:
    """Return the IoU of the answered and the true set of intervals; 0 if none could be read."""
    if not parsed.intervals_s:
        return 0.0
    return set_iou(merge(parsed.intervals_s), merge(sample.intervals_s))


def iou(left: Interval, right: Interval) -> float:
    """Return the IoU of two intervals with start < end.

    The result is exactly symmetric, and lies in [0, 1] in floating point too.
    """
    overlap = max(0.0, min(left[1], right[1]) - max(left[0], right[0]))
    return overlap / (max(left[1], right[1]) - min(left[0], right[0]))  # the union if they overlap
