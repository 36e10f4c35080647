"""Baselines: answers that look at neither video nor question, to show beside a model's metrics."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from megatron_vrl.rewards.interval_sets import merge
from megatron_vrl.types import Interval, Sample

GRID_STEPS = 40  # the best constant interval is searched in fractions of 1/40 of the video
WHOLE: Interval = (0.0, 1.0)

Target = Callable[[Sample], str]
ConstantMiou = Callable[[NDArray[np.float64], NDArray[np.int64], Interval], float]


def interval_baselines(samples: Sequence[Sample], target: Target) -> dict[str, list[str]]:
    """Return the answers "whole video" and "best constant" interval to each sample."""
    best, _ = best_constant_interval(samples)
    return _by_interval(samples, target, best)


def interval_set_baselines(samples: Sequence[Sample], target: Target) -> dict[str, list[str]]:
    """Return the answers "whole video" and "best constant" interval, by the IoU of sets."""
    merged = [replace(sample, intervals_s=merge(sample.intervals_s)) for sample in samples]
    best, _ = best_constant_interval(merged, _constant_set_miou)
    return _by_interval(samples, target, best)


def option_baselines(samples: Sequence[Sample], target: Target) -> dict[str, list[str]]:
    """Return the answer "best constant" option to each sample.

    "whole video" repeats it, so that both labels cover a split of several tasks.
    """
    letter, _ = best_constant_letter(samples)
    answers = [target(replace(sample, option=letter)) for sample in samples]
    return {"whole video": answers, "best constant": answers}


def grounded_option_baselines(samples: Sequence[Sample], target: Target) -> dict[str, list[str]]:
    """Return the best constant option with the whole video, and with the best constant interval."""
    letter, _ = best_constant_letter(samples)
    best, _ = best_constant_interval(samples)
    return _by_interval([replace(sample, option=letter) for sample in samples], target, best)


def best_constant_letter(samples: Sequence[Sample]) -> tuple[str, float]:
    """Return the letter that is right most often, the first of equals, and its accuracy."""
    letters = [sample.option for sample in samples]
    best = max(sorted(set(letters)), key=letters.count)
    return best, letters.count(best) / len(letters)


def best_constant_interval(
    samples: Sequence[Sample], miou: ConstantMiou | None = None
) -> tuple[Interval, float]:
    """Return the interval, in fractions of the duration, with the best mIoU on a grid, and that.

    `miou` is `_constant_miou` by default: the IoU with the best of a sample's intervals.
    """
    grid = np.linspace(0.0, 1.0, GRID_STEPS + 1)
    intervals = [(float(start), float(end)) for start, end in combinations(grid, 2)]
    truths, firsts = _truths(samples)
    mious = [(miou or _constant_miou)(truths, firsts, interval) for interval in intervals]
    best = int(np.argmax(mious))
    return intervals[best], mious[best]


def constant_interval_miou(samples: Sequence[Sample], interval: Interval) -> float:
    """Return the mIoU of one interval, in fractions of the duration, as the answer to each."""
    return _constant_miou(*_truths(samples), interval)


def _by_interval(samples: Sequence[Sample], target: Target, best: Interval) -> dict[str, list[str]]:
    """Return the answers with the whole video, and with `best` (fractions), as the interval."""
    return {
        label: [target(replace(s, intervals_s=(_seconds(fraction, s),))) for s in samples]
        for label, fraction in (("whole video", WHOLE), ("best constant", best))
    }


def _seconds(fraction: Interval, sample: Sample) -> Interval:
    """Return an interval in seconds of the sample's video."""
    return (fraction[0] * sample.duration_s, fraction[1] * sample.duration_s)


def _truths(samples: Sequence[Sample]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return all true intervals [T, 2] as fractions, and the row of each sample's first [N]."""
    truths = [np.array(sample.intervals_s) / sample.duration_s for sample in samples]
    counts = [len(of_sample) for of_sample in truths]
    return np.concatenate(truths), np.cumsum([0, *counts[:-1]])


def _constant_miou(
    truths: NDArray[np.float64], firsts: NDArray[np.int64], interval: Interval
) -> float:
    """Return the mIoU of one interval; `truths` and `firsts` are those of `_truths`."""
    start, end = interval
    overlap = np.minimum(truths[:, 1], end) - np.maximum(truths[:, 0], start)
    hull = np.maximum(truths[:, 1], end) - np.minimum(truths[:, 0], start)
    ious = np.maximum(overlap, 0.0) / hull  # [T]
    return float(np.maximum.reduceat(ious, firsts).mean())  # best of each sample's, then mean


def _constant_set_miou(
    truths: NDArray[np.float64], firsts: NDArray[np.int64], interval: Interval
) -> float:
    """Return the mean IoU of one interval with the set of each sample's separate intervals."""
    start, end = interval
    overlaps = np.minimum(truths[:, 1], end) - np.maximum(truths[:, 0], start)
    shared = np.add.reduceat(np.maximum(overlaps, 0.0), firsts)  # [N]
    lengths = np.add.reduceat(truths[:, 1] - truths[:, 0], firsts)
    return float((shared / (lengths + (end - start) - shared)).mean())
