"""Reward released with Temporal-R1 (arXiv 2506.01908), bit for bit.

It reproduces the released curves, faults included. The IoU reads the *first* answer block, even one
inside the thinking, while the format covers the whole response. Times are neither ordered nor
clipped. The union is the convex hull. One newline after the response loses the format. The first
true interval alone counts, divided by the annotated duration as in the released data. Only
grounding was released, so the other tasks score as in mode strict.
"""

import json
import re

from megatron_vrl.types import Interval, Sample

FORMAT = re.compile(
    r'<think>.*?</think>\s*<answer>\s*{\s*"start_time"\s*:\s*"([\d.]+)"\s*,'
    r'\s*"end_time"\s*:\s*"([\d.]+)"\s*}\s*</answer>',
    re.DOTALL,
)
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
UNREADABLE = (ValueError, TypeError, KeyError, OverflowError, RecursionError)


def format_score(sample: Sample, response: str) -> float:
    """Return 1 if the whole response has the released format, else 0."""
    return 1.0 if FORMAT.fullmatch(response) else 0.0


def read_interval(response: str) -> tuple[Interval | None, str]:
    """Return (times in seconds, failure) of the first answer block.

    The times may be out of order, outside the video or not finite. `failure` is "" or one sentence;
    the released code has no such sentence and scores 0.
    """
    block = ANSWER.search(response)
    if block is None:
        return None, "no <answer> block"
    try:
        answer = json.loads(block[1].strip())
        return (float(answer["start_time"]), float(answer["end_time"])), ""
    except UNREADABLE as error:
        return None, f"the first answer block is not read: {type(error).__name__} {error!s:.60}"


def temporal_iou(sample: Sample, response: str) -> float:
    """Return the hull IoU with the first true interval; 0 for any error."""
    interval_s, _ = read_interval(response)
    if interval_s is None:
        return 0.0
    start_s, end_s = sample.intervals_s[0]
    truth = (start_s / sample.duration_s, end_s / sample.duration_s)
    answer = (interval_s[0] / sample.duration_s, interval_s[1] / sample.duration_s)
    try:
        return hull_iou(answer, truth)
    except ZeroDivisionError:  # start, end and truth are one instant
        return 0.0


def hull_iou(answer: Interval, truth: Interval) -> float:
    """Return the overlap divided by the convex hull of both intervals.

    The order of the arguments of min and max matters: it makes the result 0 for NaN.
    """
    overlap = max(min(answer[1], truth[1]) - max(answer[0], truth[0]), 0)
    return max(0, overlap / (max(answer[1], truth[1]) - min(answer[0], truth[0])))
