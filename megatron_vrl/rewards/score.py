"""Reward components that the text of a response decides.

Every component of the sample's task is computed, and of its optional ones those that the weights
name. `rewards.mode: temporal_r1` computes the released scores where the task has them; optional
components are read strictly in every mode. `rewards.mode: answer_only` reads an answer as `strict`
does and expects no think block: the exact format is the answer block alone.
"""

from collections.abc import Mapping

from megatron_vrl.config import RewardMode
from megatron_vrl.tasks import TASKS
from megatron_vrl.tasks.answer import EMPTY_THINKING
from megatron_vrl.types import Sample


def score(
    sample: Sample,
    response: str,
    mode: RewardMode,
    weights: Mapping[str, float],
) -> tuple[dict[str, float], float]:
    """Return (component -> value, weighted sum of these) of one response.

    `weights` are those of the sample's task: a value of `reward_weights`.
    """
    task = TASKS[sample.task]
    of_parsed = {n: c for n, c in task.optional_components.items() if n in weights}
    if mode == "temporal_r1" and task.temporal_r1_components:
        released = task.temporal_r1_components.items()
        components = {name: component(sample, response) for name, component in released}
    else:
        of_parsed = {**task.components, **of_parsed}
        components = {}
    if of_parsed:
        parsed = task.parse(EMPTY_THINKING * (mode == "answer_only") + response, sample)
        components |= {name: component(sample, parsed) for name, component in of_parsed.items()}
    return components, weighted_sum(components, weights)


def weighted_sum(components: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """Return the sum of the components by weight; a component without a weight counts 0."""
    return sum(weights.get(name, 0.0) * value for name, value in components.items())
