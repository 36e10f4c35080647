"""Weights of the reward components: the tasks' defaults, overridden by `rewards.weights`."""

import difflib
import math
from collections.abc import Collection

from megatron_vrl.config import Rewards
from megatron_vrl.errors import ConfigError
from megatron_vrl.rewards.length import LENGTH
from megatron_vrl.rewards.overlong import OVERLONG
from megatron_vrl.rewards.temporal_sensitivity import TEMPORAL
from megatron_vrl.tasks import TASKS, Task

KL = "kl"
RESERVED = (LENGTH, TEMPORAL, OVERLONG, KL)  # components that no task and no function may define

Weights = dict[str, dict[str, float]]  # task -> component -> weight


def reward_weights(cfg: Rewards) -> Weights:
    """Return the weights of every task's components.

    A component that `rewards.weights` leaves out has the task's default weight. A weight of 0
    makes a component that is logged and not trained on. Raises ConfigError naming a task, a
    component, a weight or a function's name that is refused.
    """
    _check_functions(cfg)
    for task in cfg.weights:
        if task not in TASKS:
            raise ConfigError(f"rewards.weights.{task}: no such task; {_nearest(task, TASKS)}")
    return {name: _of_task(task, cfg) for name, task in TASKS.items()}


def _of_task(task: Task, cfg: Rewards) -> dict[str, float]:
    """Return the weights of one task. Raises ConfigError for one that is refused."""
    given = cfg.weights.get(task.name, {})
    known = (*task.components, *task.optional_components, LENGTH, *cfg.functions)
    for component, weight in given.items():
        where = f"rewards.weights.{task.name}.{component}={weight!r}"
        if component not in known:
            raise ConfigError(
                f"{where}: the task has no reward component {component!r}; "
                f"{_nearest(component, known)}"
            )
        if not (math.isfinite(weight) and weight >= 0):
            raise ConfigError(f"{where}: a weight must be a number >= 0.")
    return {**task.default_weights, **given}


def _check_functions(cfg: Rewards) -> None:
    """Raise ConfigError if a user's function has the name of another component."""
    tasks = TASKS.values()
    taken = {name for task in tasks for name in (*task.components, *task.optional_components)}
    for name in cfg.functions:
        if name in taken or name in RESERVED:
            raise ConfigError(f"rewards.functions.{name}: this name is taken; choose another.")


def _nearest(name: str, known: Collection[str]) -> str:
    """Return the end of a sentence: the nearest known name, or all of them."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}."
