"""Sets of intervals: union, length, overlap and IoU. Times are seconds, and start < end.

The rewards of one interval and of several share these functions. A set is given as intervals in any
order, which may overlap; `merge` returns the union of them as separate intervals.
"""

from collections.abc import Iterable, Sequence

from megatron_vrl.types import Interval


def merge(intervals_s: Iterable[Interval]) -> tuple[Interval, ...]:
    """Return the union as separate intervals, ordered by start; touching intervals become one."""
    merged: list[Interval] = []
    for start_s, end_s in sorted(intervals_s):
        if merged and start_s <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end_s))
        else:
            merged.append((start_s, end_s))
    return tuple(merged)


def length(merged_s: Iterable[Interval]) -> float:
    """Return the summed length of merged intervals."""
    return sum(end_s - start_s for start_s, end_s in merged_s)


def overlap(left_s: Sequence[Interval], right_s: Sequence[Interval]) -> float:
    """Return the length of the intersection of two merged sets."""
    return sum(
        max(0.0, min(left_end, right_end) - max(left_start, right_start))
        for left_start, left_end in left_s
        for right_start, right_end in right_s
    )


def set_iou(left_s: Sequence[Interval], right_s: Sequence[Interval]) -> float:
    """Return intersection over union of two merged sets that are not empty, in [0, 1]."""
    union = length(merge((*left_s, *right_s)))
    return min(1.0, overlap(left_s, right_s) / union)
