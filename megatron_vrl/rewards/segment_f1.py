"""Segment F1: harmonic mean of precision and recall of the answered set of intervals, in seconds.

Precision is the part of the answer that lies in the truth, recall the part of the truth that lies
in the answer. It is the global matching of MUSEG (arXiv 2505.20715, `reward_global_matching` of its
released code, without the 1e-6 in its divisors). MUSEG's reward is `segment_f1` + `matched_giou`.
"""

from megatron_vrl.rewards.interval_sets import length, merge, overlap
from megatron_vrl.types import Parsed, Sample


def score(sample: Sample, parsed: Parsed) -> float:
    """Return F1 in [0, 1]; 0 if no interval could be read."""
    answer_s, truth_s = merge(parsed.intervals_s), merge(sample.intervals_s)
    if not answer_s:
        return 0.0
    return min(1.0, 2.0 * overlap(answer_s, truth_s) / (length(answer_s) + length(truth_s)))
