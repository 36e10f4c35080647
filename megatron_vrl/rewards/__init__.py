"""How good is a response? A new reward part is one file and one row in `PARTS`.

A part is in [0, 1]; a task names its parts, the configuration weighs them. Every part of the task
is computed and logged, a part without a weight counts nothing.
"""

import difflib
import math
from collections.abc import Callable
from typing import Literal

from megatron_vrl.config import Rewards
from megatron_vrl.errors import ConfigError
from megatron_vrl.rewards import accuracy, format, seed, temporal_iou
from megatron_vrl.tasks import TASKS, Parsed
from megatron_vrl.types import VideoSample

PARTS: dict[str, Callable[[VideoSample, Parsed], float]] = {
    "format": format.score,
    "temporal_iou": temporal_iou.score,
    "accuracy": accuracy.score,
}
SEED_PARTS: dict[str, dict[str, Callable[[VideoSample, str], float]]] = {
    "temporal_grounding": {"format": seed.format_score, "temporal_iou": seed.temporal_iou},
}


def score(
    sample: VideoSample,
    response: str,
    mode: Literal["strict", "seed"],
    weights: dict[str, float],
) -> tuple[dict[str, float], float]:
    """Parts of the sample's task and their weighted sum; `weights` as `weights_of` checked them."""
    task = TASKS[sample.task]
    if mode == "seed" and task.name in SEED_PARTS:
        parts = {name: part(sample, response) for name, part in SEED_PARTS[task.name].items()}
    else:
        parsed = task.parse(response, sample)
        parts = {name: PARTS[name](sample, parsed) for name in task.parts}
    return parts, sum(weights.get(name, 0.0) * value for name, value in parts.items())


def weights_of(cfg: Rewards) -> dict[str, dict[str, float]]:
    """Task -> reward part -> weight. Raises ConfigError for a part the task does not have."""
    weights = {
        "temporal_grounding": cfg.temporal_grounding,
        "multiple_choice": cfg.multiple_choice,
        "grounded_qa": cfg.grounded_qa,
    }
    for task, of_part in weights.items():
        for part, weight in of_part.items():
            _check(f"rewards.{task}.{part}={weight!r}", part, weight, TASKS[task].parts)
    return weights


def _check(where: str, part: str, weight: float, known: tuple[str, ...]) -> None:
    if part not in known:
        near = difflib.get_close_matches(part, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}."
        raise ConfigError(f"{where}: the task has no reward part {part!r}; {hint}")
    if not (math.isfinite(weight) and weight >= 0):
        raise ConfigError(f"{where}: a weight must be a number >= 0.")
