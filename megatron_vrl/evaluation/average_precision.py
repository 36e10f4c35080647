"""Average precision of scored windows, as QVHighlights evaluates moment retrieval.

Source: jayleicn/moment_detr b7e553a, standalone_eval (AP of ActivityNet and Pascal VOC). The
windows of a question are sorted by score. A window is right if its IoU with a true interval reaches
the threshold and no earlier window has taken that interval. AP is the area under the interpolated
precision-recall curve. mAP is the mean over questions and over the thresholds 0.5, 0.55, ..., 0.95.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from megatron_vrl.rewards.temporal_iou import iou
from megatron_vrl.types import Interval

Window = tuple[float, float, float]  # start and end in seconds, score

THRESHOLDS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))
MOST_WINDOWS = 10  # the first ones of a prediction; the rest is not evaluated
LENGTHS_S: Mapping[str, Interval] = {"short": (0, 10), "middle": (10, 30), "long": (30, 150)}


def average_precisions(windows: Sequence[Window], truths: Sequence[Interval]) -> dict[str, float]:
    """Return "map", "map@0.5" and "map@0.75" of one question, and "map_LENGTH" for LENGTHS_S.

    "map_LENGTH" compares with the true intervals of that length, shortest excluded. The result has
    no such value if the question has no such interval.
    """
    precisions = [average_precision(windows, truths, threshold) for threshold in THRESHOLDS]
    by_threshold = dict(zip(THRESHOLDS, precisions, strict=True))
    values = {
        "map": float(np.mean(precisions)),
        "map@0.5": by_threshold[0.5],
        "map@0.75": by_threshold[0.75],
    }
    for name, (shortest, longest) in LENGTHS_S.items():
        kept = [(start, end) for start, end in truths if shortest < end - start <= longest]
        if kept:
            of_length = [average_precision(windows, kept, threshold) for threshold in THRESHOLDS]
            values[f"map_{name}"] = float(np.mean(of_length))
    return values


def average_precision(
    windows: Sequence[Window], truths: Sequence[Interval], threshold: float
) -> float:
    """Return the interpolated average precision at one IoU threshold; 0 without windows."""
    taken: set[int] = set()
    right: list[bool] = []
    for start, end, _ in sorted(windows[:MOST_WINDOWS], key=lambda window: -window[2]):
        ious = [iou((start, end), truth) if start < end else 0.0 for truth in truths]
        free = [i for i in range(len(truths)) if ious[i] >= threshold and i not in taken]
        right.append(bool(free))
        if free:
            taken.add(max(free, key=lambda i: (ious[i], i)))
    if not taken:
        return 0.0
    found = np.cumsum(right)
    precision = found / np.arange(1, len(right) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]  # the best precision at this recall or more
    return float(best[np.array(right)].sum() / len(truths))
