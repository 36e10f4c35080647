"""Temporal Wasserstein reward: exp(-beta x W1 / length of the truth), with beta = 1.

W1 is the Wasserstein distance, in seconds, between the uniform distribution over the answered
intervals and the one over the true intervals. An answer that overlaps no truth still scores more
the nearer it lies, so a group of misses has a gradient. The value is 1 for the true intervals and
positive for every readable answer; an unreadable answer scores 0.

Source: TimeLens2, arXiv 2607.17423: the formula of its project page, and `twass1` of its released
code (grpo/timelens/rewards/metrics.py, commit f07353b). The code's first release divided by the
length of the union of answer and truth; a wide answer then enlarged its own divisor.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

from megatron_vrl.rewards.interval_sets import length, merge
from megatron_vrl.types import Interval, Parsed, Sample

BETA = 1.0


def score(sample: Sample, parsed: Parsed) -> float:
    """Return the largest reward with a true interval; 0 if no interval could be read."""
    if parsed.interval_s is None:
        return 0.0
    return max(reward((parsed.interval_s,), (truth_s,)) for truth_s in sample.intervals_s)


def score_set(sample: Sample, parsed: Parsed) -> float:
    """Return the reward of the answered set of intervals; 0 if none could be read."""
    if not parsed.intervals_s:
        return 0.0
    return reward(merge(parsed.intervals_s), merge(sample.intervals_s))


def reward(answer_s: Sequence[Interval], truth_s: Sequence[Interval]) -> float:
    """Return the reward of one merged set of intervals for another, in (0, 1] up to rounding."""
    return math.exp(-BETA * wasserstein(answer_s, truth_s) / length(truth_s))


def wasserstein(left_s: Sequence[Interval], right_s: Sequence[Interval]) -> float:
    """Return W1 in seconds between the uniform distributions over two merged sets.

    On a line, W1 is the area between the two distribution functions. Their difference is linear
    between neighbouring starts and ends. The result is exactly symmetric.
    """
    times_s = sorted({time_s for interval in (*left_s, *right_s) for time_s in interval})
    gaps = [_before(left_s, time_s) - _before(right_s, time_s) for time_s in times_s]
    return sum(
        _mean_height(*heights) * (end_s - start_s)
        for heights, (start_s, end_s) in zip(pairwise(gaps), pairwise(times_s), strict=True)
    )


def _before(merged_s: Sequence[Interval], time_s: float) -> float:
    """Return the fraction of a merged set that lies before a time."""
    before_s = sum(max(0.0, min(time_s, end_s) - start_s) for start_s, end_s in merged_s)
    return before_s / length(merged_s)


def _mean_height(left: float, right: float) -> float:
    """Return the mean of |x| over x from `left` to `right`."""
    if left * right >= 0.0:
        return (abs(left) + abs(right)) / 2.0
    return (left * left + right * right) / (2.0 * (abs(left) + abs(right)))
