"""Distance IoU of two intervals, scaled to [0, 1]: (1 + DIoU) / 2.

DIoU = IoU - (distance of the centres / hull)^2, with `hull` the length of the shortest interval
that contains both (arXiv 1911.08287). The form in one dimension is that of ActionFormer's released
loss (arXiv 2202.07925, `ctr_diou_loss_1d`). DIoU lies in (-1, 1] and falls with the distance of an
answer that overlaps no truth. The scale is the one of `giou.py`.
"""

from megatron_vrl.rewards.temporal_iou import iou
from megatron_vrl.types import Interval, Parsed, Sample


def score(sample: Sample, parsed: Parsed) -> float:
    """Return the largest scaled DIoU with a true interval; 0 if no interval could be read."""
    if parsed.interval_s is None:
        return 0.0
    return max(scaled_diou(parsed.interval_s, truth_s) for truth_s in sample.intervals_s)


def scaled_diou(left: Interval, right: Interval) -> float:
    """Return (1 + DIoU) / 2 of two intervals, in [0, 1] and exactly symmetric."""
    hull = max(left[1], right[1]) - min(left[0], right[0])
    distance = abs((left[0] + left[1]) - (right[0] + right[1])) / 2.0
    return (1.0 + iou(left, right) - (distance / hull) ** 2) / 2.0
