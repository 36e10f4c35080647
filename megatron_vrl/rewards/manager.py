"""RewardManager: answers -> reward components and their weights.

The components of an answer are, in this order: those that the task reads from the text, `length`,
the user's own functions, and `overlong`. The trainer adds `kl` last, which needs log-probs
(megatron_vrl/trainer/experience.py). A user's function that cannot grade an answer gives NaN, never
0, and its failure is recorded; the trainer leaves a group with a NaN out of training.
"""

import math
from collections.abc import Sequence

import numpy as np

from megatron_vrl.config import Rewards
from megatron_vrl.rewards import length
from megatron_vrl.rewards.length import LENGTH
from megatron_vrl.rewards.overlong import OVERLONG, Overlong, overlong_penalty
from megatron_vrl.rewards.score import score
from megatron_vrl.rewards.user_functions import Call, Returned, Workers
from megatron_vrl.rewards.weights import reward_weights
from megatron_vrl.tasks import TASKS
from megatron_vrl.types import Prompt, RewardComponent, Rollout, Sample, ScoredGroup


class RewardManager:
    """Computes rewards; each rank has one. `close` ends the processes of the user's functions."""

    def __init__(self, cfg: Rewards, overlong: Overlong | None = None) -> None:
        """Raise ConfigError for a weight or a function that is refused.

        `overlong` adds the overlong penalty to the components of a group.
        """
        self._cfg = cfg
        self.weights = reward_weights(cfg)  # task -> component -> weight
        self._overlong = overlong if overlong and overlong.buffer else None
        self._workers: Workers | None = None
        used = {name for of_task in self.weights.values() for name in of_task}
        paths = {name: path for name, path in cfg.functions.items() if name in used}
        if paths:
            self._workers = Workers(paths, cfg.function_workers, cfg.function_timeout_s)
        self._failures: dict[str, list[str]] = {}

    def groups(
        self,
        samples: Sequence[Sample],
        prompts: Sequence[Prompt],
        answers: Sequence[Sequence[Rollout]],
    ) -> list[ScoredGroup]:
        """Return one scored group for each prompt and its answers."""
        rows = [
            [self._score(sample, rollout) for rollout in rollouts]
            for sample, rollouts in zip(samples, answers, strict=True)
        ]
        self._add_functions(samples, answers, rows)
        return [
            ScoredGroup(
                sample=sample,
                prompt=prompt,
                rollouts=tuple(rollouts),
                components=self._with_weights(sample, rollouts, of_group),
            )
            for sample, prompt, rollouts, of_group in zip(
                samples, prompts, answers, rows, strict=True
            )
        ]

    def components(self, sample: Sample, rollouts: Sequence[Rollout]) -> list[dict[str, float]]:
        """Return the components of each answer to one prompt, without `overlong`."""
        rows = [self._score(sample, rollout) for rollout in rollouts]
        self._add_functions([sample], [rollouts], [rows])
        return rows

    def take_failures(self) -> dict[str, list[str]]:
        """Return function -> sentences on its calls that failed since the last `take_failures`."""
        failures, self._failures = self._failures, {}
        return failures

    def close(self) -> None:
        """End the processes of the user's functions."""
        if self._workers:
            self._workers.close()

    def _score(self, sample: Sample, rollout: Rollout) -> dict[str, float]:
        """Return the components of one answer that need no other process."""
        weights = self.weights[sample.task]
        components, _ = score(sample, rollout.text, self._cfg.mode, weights)
        if LENGTH in weights:
            correctness = [components[name] for name in TASKS[sample.task].correctness]
            components[LENGTH] = length.score(
                correctness, len(rollout.token_ids), self._cfg.length_tokens
            )
        return components

    def _with_weights(
        self,
        sample: Sample,
        rollouts: Sequence[Rollout],
        rows: Sequence[dict[str, float]],
    ) -> dict[str, RewardComponent]:
        """Return the components of a group from those of its answers, and `overlong`."""
        weights = self.weights[sample.task]
        components = {
            name: RewardComponent(np.array([row[name] for row in rows]), weights.get(name, 0.0))
            for name in rows[0]
        }
        if self._overlong:
            limit, buffer, weight = self._overlong
            lengths = np.array([len(rollout.token_ids) for rollout in rollouts])
            components[OVERLONG] = RewardComponent(overlong_penalty(lengths, limit, buffer), weight)
        return components

    def _add_functions(
        self,
        samples: Sequence[Sample],
        answers: Sequence[Sequence[Rollout]],
        rows: Sequence[Sequence[dict[str, float]]],
    ) -> None:
        """Add the values of the user's functions to `rows`, in one batch of calls."""
        if self._workers is None:
            return
        calls = [
            (row, sample, Call(name, rollout.text, sample))
            for sample, rollouts, of_group in zip(samples, answers, rows, strict=True)
            for rollout, row in zip(rollouts, of_group, strict=True)
            for name in self.weights[sample.task]
            if name in self._cfg.functions
        ]
        results = self._workers.run([call for _, _, call in calls])
        for (row, sample, call), returned in zip(calls, results, strict=True):
            row[call.function] = self._graded(call.function, sample, returned)

    def _graded(self, name: str, sample: Sample, returned: Returned) -> float:
        """Return the value of a call; NaN, with the failure recorded, if it has none in [0, 1]."""
        value, error = returned
        if not error and not 0.0 <= value <= 1.0:
            error = f"returned {value!r}, expected a number in [0, 1]"
        if not error:
            return value
        self._failures.setdefault(name, []).append(f"{error}, on an answer to {sample.id}")
        return math.nan
