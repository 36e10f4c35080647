"""Numbers of an evaluation: one flat dict per split, with the trivial answers beside the model's.

An unreadable answer scores 0 in every mean, as a wrong one does, and is counted apart in
`failure_rate`. Answers are read by the strict parser in either reward mode; only `reward` and
`format_rate` follow the mode. IoU and IoP take the best of several true intervals;
`accuracy_gqa` counts the right options whose answered span is at least half true.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from megatron_vrl.config import Rewards
from megatron_vrl.rewards import accuracy, score, temporal_iou, weights_of
from megatron_vrl.tasks import TASKS, Parsed
from megatron_vrl.types import Interval, VideoSample

IOU_THRESHOLDS = (0.3, 0.5, 0.7)
GRID_STEPS = 40  # the best constant interval is searched in fractions of 1/40 of the video


@dataclass(frozen=True, slots=True)
class Scored:
    sample: VideoSample
    parsed: Parsed
    parts: dict[str, float]
    reward: float


def summarise(
    samples: Sequence[VideoSample], responses: Sequence[str], cfg: Rewards
) -> dict[str, float]:
    """One response per sample, in order. Keys are `NAME` over all samples and `TASK/NAME`."""
    if not samples or len(samples) != len(responses):
        raise ValueError(f"{len(samples)} samples and {len(responses)} responses.")
    weights = weights_of(cfg)
    scored = []
    for sample, response in zip(samples, responses, strict=True):
        parsed = TASKS[sample.task].parse(response, sample)
        parts, reward = score(sample, response, cfg.mode, weights[sample.task])
        scored.append(Scored(sample, parsed, parts, reward))
    summary = dict(_means(scored))
    for task in sorted({sample.task for sample in samples}):
        of_task = [row for row in scored if row.sample.task == task]
        for name, value in (*_means(of_task), *_task_metrics(of_task)):
            summary[f"{task}/{name}"] = value
    return summary


def _means(scored: Sequence[Scored]) -> Iterator[tuple[str, float]]:
    yield "num_samples", float(len(scored))
    yield "reward", _mean([row.reward for row in scored])
    yield "format_rate", _mean([row.parts["format"] for row in scored])
    yield "failure_rate", _mean([row.parsed.failure != "" for row in scored])


def _task_metrics(scored: Sequence[Scored]) -> Iterator[tuple[str, float]]:
    samples = [row.sample for row in scored]
    parts = TASKS[samples[0].task].parts
    if "accuracy" in parts:
        right = [accuracy.score(row.sample, row.parsed) for row in scored]
        yield "accuracy", _mean(right)
    if "temporal_iou" in parts:
        ious = [temporal_iou.score(row.sample, row.parsed) for row in scored]
        yield "miou", _mean(ious)
        for threshold in IOU_THRESHOLDS:
            yield f"r1@{threshold}", _mean([value >= threshold for value in ious])
    if "accuracy" in parts and "temporal_iou" in parts:  # the metrics of NExT-GQA
        iops = [_best_iop(row.sample, row.parsed.interval_s) for row in scored]
        yield "miop", _mean(iops)
        yield "accuracy_gqa", _mean([r * (p >= 0.5) for r, p in zip(right, iops, strict=True)])


def best_constant_letter(samples: Sequence[VideoSample]) -> tuple[str, float]:
    """The letter that is right most often, the first of equals, and its accuracy."""
    letters = [sample.option for sample in samples]
    best = max(sorted(set(letters)), key=letters.count)
    return best, letters.count(best) / len(letters)


def best_constant_interval(samples: Sequence[VideoSample]) -> tuple[Interval, float]:
    """The best answer that ignores video and question, as fractions of the duration, by grid."""
    grid = np.linspace(0.0, 1.0, GRID_STEPS + 1)
    intervals = [(float(start), float(end)) for start, end in combinations(grid, 2)]
    truths, firsts = _truths(samples)
    mious = [_constant_miou(truths, firsts, interval) for interval in intervals]
    best = int(np.argmax(mious))
    return intervals[best], mious[best]


def constant_interval_miou(samples: Sequence[VideoSample], interval: Interval) -> float:
    """mIoU of one interval, as fractions of the duration, answered to everything."""
    return _constant_miou(*_truths(samples), interval)


def _truths(samples: Sequence[VideoSample]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """All true intervals [T, 2] as fractions, and the row of each sample's first [N]."""
    truths = [np.array(sample.intervals_s) / sample.duration_s for sample in samples]
    counts = [len(of_sample) for of_sample in truths]
    return np.concatenate(truths), np.cumsum([0, *counts[:-1]])


def _constant_miou(
    truths: NDArray[np.float64], firsts: NDArray[np.int64], interval: Interval
) -> float:
    start, end = interval
    overlap = np.minimum(truths[:, 1], end) - np.maximum(truths[:, 0], start)
    hull = np.maximum(truths[:, 1], end) - np.minimum(truths[:, 0], start)
    ious = np.maximum(overlap, 0.0) / hull  # [T]
    return float(np.maximum.reduceat(ious, firsts).mean())  # best of each sample's, then mean


def _best_iop(sample: VideoSample, interval_s: Interval | None) -> float:
    """Intersection over the prediction: how much of the answered span is true."""
    if interval_s is None:
        return 0.0
    start_s, end_s = interval_s
    overlaps = [min(end_s, t_end) - max(start_s, t_start) for t_start, t_end in sample.intervals_s]
    return max(0.0, *overlaps) / (end_s - start_s)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
