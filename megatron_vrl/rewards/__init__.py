"""How good is a response? A new reward part is one file and one row in `PARTS`.

A part is in [0, 1]; a task names its parts, the configuration weighs them. Every part of the task
is computed and logged, and so is every part of `OPTIONAL` and every function of the user's that
the task's weights name; a weight of 0 makes a part that is logged and counts nothing. What needs
more than the text of one response is added by `megatron_vrl.rewards.manager`.
"""

import difflib
import math
from collections.abc import Callable, Mapping
from typing import Literal

from megatron_vrl.config import Rewards
from megatron_vrl.errors import ConfigError
from megatron_vrl.rewards import accuracy, boundary_iou, format, temporal_iou, temporal_r1
from megatron_vrl.rewards.overlong import OVERLONG
from megatron_vrl.tasks import TASKS, Parsed
from megatron_vrl.types import VideoSample

PARTS: dict[str, Callable[[VideoSample, Parsed], float]] = {
    "format": format.score,
    "temporal_iou": temporal_iou.score,
    "accuracy": accuracy.score,
    "boundary_iou": boundary_iou.score,
}
LENGTH = "length"
RESERVED = (OVERLONG, "kl")  # components that algorithm settings add
OPTIONAL = {"boundary_iou": "temporal_iou", LENGTH: "format"}  # part -> the task's part it needs
TEMPORAL_R1_COMPONENTS: dict[str, dict[str, Callable[[VideoSample, str], float]]] = {
    "temporal_grounding": {
        "format": temporal_r1.format_score,
        "temporal_iou": temporal_r1.temporal_iou,
    },
}


def score(
    sample: VideoSample,
    response: str,
    mode: Literal["strict", "temporal_r1"],
    weights: dict[str, float],
) -> tuple[dict[str, float], float]:
    """Parts of the sample's task and their weighted sum; `weights` as `weights_of` checked them.

    Of the optional parts those that the text alone decides; they are read strictly in either mode.
    """
    task = TASKS[sample.task]
    of_text = [name for name in weights if name in PARTS and name not in task.parts]
    if mode == "temporal_r1" and task.name in TEMPORAL_R1_COMPONENTS:
        parts = {
            name: part(sample, response) for name, part in TEMPORAL_R1_COMPONENTS[task.name].items()
        }
    else:
        of_text = [*task.parts, *of_text]
        parts = {}
    if of_text:
        parsed = task.parse(response, sample)
        parts |= {name: PARTS[name](sample, parsed) for name in of_text}
    return parts, weighted(parts, weights)


def weighted(parts: Mapping[str, float], weights: Mapping[str, float]) -> float:
    return sum(weights.get(name, 0.0) * value for name, value in parts.items())


def weights_of(cfg: Rewards) -> dict[str, dict[str, float]]:
    """Task -> reward part -> weight. Raises ConfigError for a part the task does not have."""
    weights = {
        "temporal_grounding": cfg.temporal_grounding,
        "multiple_choice": cfg.multiple_choice,
        "grounded_qa": cfg.grounded_qa,
    }
    for name in cfg.functions:
        if name in (*PARTS, LENGTH, *RESERVED):
            raise ConfigError(f"rewards.functions.{name}: this name is taken; choose another.")
    for task, of_part in weights.items():
        parts = TASKS[task].parts
        optional = tuple(part for part, needed in OPTIONAL.items() if needed in parts)
        for part, weight in of_part.items():
            known = (*parts, *optional, *cfg.functions)
            _check(f"rewards.{task}.{part}={weight!r}", part, weight, known)
    return weights


def _check(where: str, part: str, weight: float, known: tuple[str, ...]) -> None:
    if part not in known:
        near = difflib.get_close_matches(part, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}."
        raise ConfigError(f"{where}: the task has no reward part {part!r}; {hint}")
    if not (math.isfinite(weight) and weight >= 0):
        raise ConfigError(f"{where}: a weight must be a number >= 0.")
