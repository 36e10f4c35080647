"""Samples within a task's budget: the highest ranks, or a random draw around a wanted mean.

The random draw is the Gaussian filter of TimeLens (arXiv 2512.14698, `_filter_annos` of its
released code with `fixed_gaussian_sampling`, mean 0.05 and std 0.2). The weight of a sample is a
normal density at its mean IoU, divided by the number of samples in its bin, one of 20 bins of mean
IoU. So the drawn means follow the density wherever the pool has samples. Samples are drawn without
replacement.

Duration buckets get equal parts of the budget, rounded down, as TimeLens divides 2,500 samples
among nine buckets. A bucket with fewer samples keeps all of them, and no other bucket gets the
rest.
"""

import numpy as np
from numpy.typing import NDArray

from megatron_vrl.config import Selection

BINS = 20


def within_budget(
    ranks: NDArray[np.float64],
    means: NDArray[np.float64],
    durations_s: NDArray[np.float64],
    most: int,
    rule: Selection,
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """Return the indices of at most `most` samples to keep. All arrays are [N]."""
    edges = rule.duration_buckets_s
    buckets = np.searchsorted(edges, durations_s)  # a duration at an edge is below it
    kept = []
    for bucket in range(len(edges) + 1):
        inside = np.flatnonzero(buckets == bucket)
        if rule.gaussian_filter_std == 0:
            keys = ranks[inside]
        else:
            keys = _log_weights(means[inside], rule) + rng.gumbel(size=len(inside))
        kept.append(inside[np.argsort(-keys, kind="stable")][: most // (len(edges) + 1)])
    return np.concatenate(kept)


def _log_weights(means: NDArray[np.float64], rule: Selection) -> NDArray[np.float64]:
    """Return the logarithm of each sample's weight [N], up to a constant."""
    bins = np.clip((means * BINS).astype(np.int64), 0, BINS - 1)
    density = np.bincount(bins, minlength=BINS)[bins]
    deviation = (means - rule.gaussian_filter_mean) / rule.gaussian_filter_std
    log_weights: NDArray[np.float64] = -0.5 * deviation**2 - np.log(density)
    return log_weights
