"""Matched GIoU: mean scaled GIoU of answered and true intervals, matched one to one in time order.

The first answered interval is compared with the first true one, and so on; an interval without a
partner counts 0. So a wrong number of intervals costs reward, also if their union is right. It is
the local matching of MUSEG (arXiv 2505.20715, `reward_local_matching` of its released code). There
the intervals keep the order of the answer; here they are ordered by start, as in TimeLens2's form
of the reward (`ngiou` of its released code).

Example: truth [0, 2] and [4, 6], answer [0, 2]: (1 + 0) / 2.
"""

from megatron_vrl.rewards.giou import scaled_giou
from megatron_vrl.rewards.interval_sets import merge
from megatron_vrl.types import Parsed, Sample


def score(sample: Sample, parsed: Parsed) -> float:
    """Return the mean over max(answered, true) intervals; 0 if none could be read."""
    answer_s, truth_s = sorted(parsed.intervals_s), merge(sample.intervals_s)
    pairs = zip(answer_s, truth_s, strict=False)
    return sum(scaled_giou(*pair) for pair in pairs) / max(len(answer_s), len(truth_s))
