"""Evaluation metrics that several tasks share. An unreadable answer scores 0 in every mean."""

from collections.abc import Sequence

import numpy as np

from megatron_vrl.rewards import accuracy, segment_f1, temporal_iou
from megatron_vrl.rewards.interval_sets import merge
from megatron_vrl.types import Interval, Parsed, Sample

IOU_THRESHOLDS = (0.3, 0.5, 0.7)


def option_metrics(samples: Sequence[Sample], parsed: Sequence[Parsed]) -> dict[str, float]:
    """Return {"accuracy"}: the fraction of right options."""
    return {"accuracy": mean(_right(samples, parsed))}


def interval_metrics(samples: Sequence[Sample], parsed: Sequence[Parsed]) -> dict[str, float]:
    """Return {"miou", "r1@0.3", "r1@0.5", "r1@0.7"}: mean IoU, and fractions of IoU >= threshold.

    The IoU of an answer is that with the best of several true intervals.
    """
    ious = [temporal_iou.score(*pair) for pair in zip(samples, parsed, strict=True)]
    recalls = {f"r1@{t}": mean([value >= t for value in ious]) for t in IOU_THRESHOLDS}
    return {"miou": mean(ious), **recalls}


def interval_set_metrics(samples: Sequence[Sample], parsed: Sequence[Parsed]) -> dict[str, float]:
    """Return {"miou", "iou@0.3", "iou@0.5", "iou@0.7", "f1", "count_accuracy"} of interval sets.

    "miou" and "f1" are means, "iou@t" is the fraction of sets with an IoU of at least t, and
    "count_accuracy" the fraction with as many separate intervals as the truth.
    """
    pairs = list(zip(samples, parsed, strict=True))
    ious = [temporal_iou.score_set(*pair) for pair in pairs]
    recalls = {f"iou@{t}": mean([value >= t for value in ious]) for t in IOU_THRESHOLDS}
    counts = [len(merge(p.intervals_s)) == len(merge(s.intervals_s)) for s, p in pairs]
    f1 = mean([segment_f1.score(*pair) for pair in pairs])
    return {"miou": mean(ious), **recalls, "f1": f1, "count_accuracy": mean(counts)}


def grounded_option_metrics(
    samples: Sequence[Sample], parsed: Sequence[Parsed]
) -> dict[str, float]:
    """Return the metrics of NExT-GQA: option and interval metrics, "miop" and "accuracy_gqa".

    IoP is the intersection over the predicted interval. `accuracy_gqa` counts right options whose
    interval has an IoP of at least 0.5.
    """
    right = _right(samples, parsed)
    iops = [_best_iop(s, p.interval_s) for s, p in zip(samples, parsed, strict=True)]
    return {
        "accuracy": mean(right),
        **interval_metrics(samples, parsed),
        "miop": mean(iops),
        "accuracy_gqa": mean([r * (iop >= 0.5) for r, iop in zip(right, iops, strict=True)]),
    }


def mean(values: Sequence[float]) -> float:
    """Return the mean as a Python float."""
    return float(np.mean(values))


def _right(samples: Sequence[Sample], parsed: Sequence[Parsed]) -> list[float]:
    """Return 1 or 0 for each answer: whether its option is the right one."""
    return [accuracy.score(*pair) for pair in zip(samples, parsed, strict=True)]


def _best_iop(sample: Sample, interval_s: Interval | None) -> float:
    """Return the largest fraction of the answered interval that lies in a true one."""
    if interval_s is None:
        return 0.0
    start_s, end_s = interval_s
    overlaps = [min(end_s, t_end) - max(start_s, t_start) for t_start, t_end in sample.intervals_s]
    return max(0.0, *overlaps) / (end_s - start_s)
