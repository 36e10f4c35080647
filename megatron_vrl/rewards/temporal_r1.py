"""The reward that was released with Temporal-R1 (arXiv 2506.01908), bit for bit.

Kept to reproduce its curves, faults included: accuracy reads the *first* answer block (even one
inside the thinking) and format looks at the whole response; times are neither ordered nor clipped;
the union is the convex hull; one newline after the response costs the format. Only grounding was
released, so the other tasks score as in the strict mode. Only the first true interval is used,
normalised by the annotated duration as in the released data.
"""

import json
import re

from megatron_vrl.types import Interval, VideoSample

FORMAT = re.compile(
    r'<think>.*?</think>\s*<answer>\s*{\s*"start_time"\s*:\s*"([\d.]+)"\s*,'
    r'\s*"end_time"\s*:\s*"([\d.]+)"\s*}\s*</answer>',
    re.DOTALL,
)
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
UNREADABLE = (ValueError, TypeError, KeyError, OverflowError, RecursionError)


def format_score(sample: VideoSample, response: str) -> float:
    return 1.0 if FORMAT.fullmatch(response) else 0.0


def read_interval(response: str) -> tuple[Interval | None, str]:
    """(seconds, failure) of the first answer block: in no order, not clipped, perhaps not finite.

    Whatever goes wrong, the released score is 0; the failure, "" or one sentence, is ours.
    """
    block = ANSWER.search(response)
    if block is None:
        return None, "no <answer> block"
    try:
        answer = json.loads(block[1].strip())
        return (float(answer["start_time"]), float(answer["end_time"])), ""
    except UNREADABLE as error:
        return None, f"the first answer block is not read: {type(error).__name__} {error!s:.60}"


def temporal_iou(sample: VideoSample, response: str) -> float:
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
    """The order of the arguments of min and max decides what NaN gives: 0."""
    overlap = max(min(answer[1], truth[1]) - max(answer[0], truth[0]), 0)
    return max(0, overlap / (max(answer[1], truth[1]) - min(answer[0], truth[0])))
