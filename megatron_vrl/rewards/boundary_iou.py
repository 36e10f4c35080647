"""Boundary-aware IoU: temporal IoU, lowered by how far start and end are off.

Time-R1's timestamp-aware IoU (arXiv 2503.13377, `iou_v2` in its code): IoU times one minus the
error of the start times one minus the error of the end, errors as shares of the video's duration.
Two answers with the same IoU are told apart by their ends. Of several true intervals the one that
gives most counts. Here the times are ordered and inside the video, so no factor is negative.
"""

from megatron_vrl.rewards.temporal_iou import iou
from megatron_vrl.types import Interval, Parsed, VideoSample


def score(sample: VideoSample, parsed: Parsed) -> float:
    if parsed.interval_s is None:
        return 0.0
    answer_s = parsed.interval_s
    return max(_aware(answer_s, truth_s, sample.duration_s) for truth_s in sample.intervals_s)


def _aware(answer_s: Interval, truth_s: Interval, duration_s: float) -> float:
    start_error = abs(answer_s[0] - truth_s[0]) / duration_s
    end_error = abs(answer_s[1] - truth_s[1]) / duration_s
    return iou(answer_s, truth_s) * (1.0 - start_error) * (1.0 - end_error)
