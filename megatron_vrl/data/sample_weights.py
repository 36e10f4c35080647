"""Sampling weights of training samples by recorded difficulty: std^a x (1 - mean)^b.

`std` is the standard deviation of the reward over a sample's answers, and `mean` the mean of the
components that score its content, the temporal IoU for grounding. The exponents are
`data.sample_weight_std_power` (a) and `data.sample_weight_mean_power` (b). The formula, with its
1e-8 added to both bases, is that of TimeLens2 (arXiv 2607.17423, `build_sample_weights` of its
released code, which trains with a = 0 and b = 2). A sample without a record has the mean weight of
the others.

The statistics are a stats.jsonl of `mvrl select`, or those of a selection inside the run.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_vrl.config import Data
from megatron_vrl.data.schedule import numbered_rows
from megatron_vrl.errors import DataError
from megatron_vrl.tasks import TASKS

EPSILON = 1e-8


class Statistics(NamedTuple):
    """Recorded answers to one sample."""

    std: float  # of the reward
    mean: float  # of the components that score the content, in [0, 1]


def has_weights(data: Data) -> bool:
    """Return whether samples are drawn by weight."""
    return data.sample_weight_std_power > 0 or data.sample_weight_mean_power > 0


def read_statistics(path: str) -> dict[str, Statistics]:
    """Return the statistics by sample id from a stats.jsonl. Raises DataError naming the line."""
    found: dict[str, Statistics] = {}
    for number, row in numbered_rows(path):
        try:
            found |= statistics_of([row])
        except (KeyError, TypeError, ValueError):
            raise DataError(
                f"{path}, line {number}: no fields reward.std and components; give a stats.jsonl."
            ) from None
    return found


def statistics_of(rows: Iterable[Mapping[str, Any]]) -> dict[str, Statistics]:
    """Return the statistics by sample id; rows of videos that could not be read are left out."""
    return {
        str(row["id"]): Statistics(
            float(row["reward"]["std"]),
            float(np.mean([row["components"][n]["mean"] for n in TASKS[row["task"]].correctness])),
        )
        for row in rows
        if row["components"]
    }


def sample_weights(
    ids: Sequence[str], statistics: Mapping[str, Statistics], data: Data
) -> NDArray[np.float64] | None:
    """Return the weight [N] of each sample; None if no sample has statistics."""
    recorded = [statistics.get(name) for name in ids]
    known = np.array([one for one in recorded if one is not None]).reshape(-1, 2)
    if not len(known):
        return None
    spread, content = known[:, 0], np.clip(known[:, 1], 0.0, 1.0)
    weights = (spread + EPSILON) ** data.sample_weight_std_power
    weights = weights * (1.0 - content + EPSILON) ** data.sample_weight_mean_power
    of_all = np.full(len(ids), weights.mean())
    of_all[[one is not None for one in recorded]] = weights
    return of_all
