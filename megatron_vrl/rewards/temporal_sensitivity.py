"""Bonus for answers that need the order of the frames (`rewards.temporal`).

`shuffled_group` is T-GRPO (Video-R1, arXiv 2503.21776): a second group of half the size answers the
prompt with shuffled frames. Right answers of the first group earn BONUS if their group's mean
accuracy is at least RATIO times that of the second. The constants and the threshold of a right
answer are those of its released trainer (src/r1-v/src/open_r1/trainer/grpo_trainer.py), which adds
the bonus to the accuracy reward.

`shuffled_boundaries` is TaRO's temporal-sensitivity reward (arXiv 2606.09248): the frames around
the true boundaries are shuffled, and the same answers are scored again. An answer earns BONUS if
its mean log-prob falls by more than that of its group on average, and its IoU is at least MIN_IOU.
The constants are those of its released recipe (scripts/run_qwen2_5_vl_7b.sh: temp_alpha 0.3,
temp_iou_thresh 0.7, temp_margin 0, temp_diff_thresh mean). TaRO computes both log-probs with the
trainer's model; here those with the frames in order are the engine's.

An answer's component is 1 or 0, and BONUS is its weight.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from megatron_vrl.rewards.length import RIGHT
from megatron_vrl.tasks import TASKS
from megatron_vrl.types import RewardComponent

TEMPORAL = "temporal"  # name of the component
BONUS = 0.3
RATIO = 0.8
MIN_IOU = 0.7

Components = Mapping[str, RewardComponent]


def shuffled_group_bonus(
    task: str, ordered: Components, shuffled: Components
) -> NDArray[np.float64]:
    """Return the component [n] of a group from its components and those of the shuffled group.

    The accuracy of an answer is the mean of the components that `Task.correctness` names. A right
    answer has all of them above RIGHT, as for `length`.
    """
    scores = _correctness(task, ordered)
    passes = scores.mean() >= RATIO * _correctness(task, shuffled).mean()
    values: NDArray[np.float64] = (passes & (scores > RIGHT).all(axis=0)).astype(np.float64)
    return values


def shuffled_boundaries_bonus(
    drops: NDArray[np.float64], ious: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the component [n] of a group.

    `drops` [n]: an answer's mean log-prob with the frames in order, less that with the boundaries
    shuffled.
    """
    values: NDArray[np.float64] = ((drops > drops.mean()) & (ious >= MIN_IOU)).astype(np.float64)
    return values


def _correctness(task: str, components: Components) -> NDArray[np.float64]:
    """Return the components [k, n] that score what is answered."""
    return np.array([components[name].values for name in TASKS[task].correctness])
