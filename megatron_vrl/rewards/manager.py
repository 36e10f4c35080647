"""Answers -> reward parts: those of the text, their length, and the user's own functions.

A function that cannot grade an answer gives NaN, never 0, and is named: its group is then left out
of training as every group with a reward that is no number (megatron_vrl/trainer/experience.py).
"""

import math
from collections.abc import Sequence

import numpy as np

from megatron_vrl.config import Rewards
from megatron_vrl.rewards import LENGTH, length, score, weighted, weights_of
from megatron_vrl.rewards.user_functions import Call, Returned, Workers
from megatron_vrl.types import Prompt, Rollout, ScoredGroup, VideoSample


class RewardManager:
    """One per process."""

    def __init__(self, cfg: Rewards) -> None:
        """Raises ConfigError for weights or functions that cannot be."""
        self._cfg = cfg
        self._weights = weights_of(cfg)
        self._workers: Workers | None = None
        used = {name for of_task in self._weights.values() for name in of_task}
        paths = {name: path for name, path in cfg.functions.items() if name in used}
        if paths:
            self._workers = Workers(paths, cfg.function_workers, cfg.function_timeout_s)
        self._failures: dict[str, list[str]] = {}

    def groups(
        self,
        samples: Sequence[VideoSample],
        prompts: Sequence[Prompt],
        answers: Sequence[Sequence[Rollout]],
    ) -> list[ScoredGroup]:
        """Each prompt's answers with their rewards."""
        rows = [
            [self._of_answer(sample, rollout) for rollout in rollouts]
            for sample, rollouts in zip(samples, answers, strict=True)
        ]
        self._add_functions(samples, answers, rows)
        return [
            ScoredGroup(
                sample=sample,
                prompt=prompt,
                rollouts=tuple(rollouts),
                parts={name: np.array([row[name] for row in of_group]) for name in of_group[0]},
                rewards=np.array([weighted(row, self._weights[sample.task]) for row in of_group]),
            )
            for sample, prompt, rollouts, of_group in zip(
                samples, prompts, answers, rows, strict=True
            )
        ]

    def parts(self, sample: VideoSample, rollouts: Sequence[Rollout]) -> list[dict[str, float]]:
        """Of one prompt's answers, without their sum."""
        rows = [self._of_answer(sample, rollout) for rollout in rollouts]
        self._add_functions([sample], [rollouts], [rows])
        return rows

    def take_failures(self) -> dict[str, list[str]]:
        """Function -> what each of its calls did that failed since the last call of this."""
        failures, self._failures = self._failures, {}
        return failures

    def close(self) -> None:
        if self._workers:
            self._workers.close()

    def _of_answer(self, sample: VideoSample, rollout: Rollout) -> dict[str, float]:
        weights = self._weights[sample.task]
        parts, _ = score(sample, rollout.text, self._cfg.mode, weights)
        if LENGTH in weights:
            parts[LENGTH] = length.score(parts, len(rollout.token_ids), self._cfg.length_tokens)
        return parts

    def _add_functions(
        self,
        samples: Sequence[VideoSample],
        answers: Sequence[Sequence[Rollout]],
        rows: Sequence[Sequence[dict[str, float]]],
    ) -> None:
        """All calls of a step at once, so that the workers share them out."""
        if self._workers is None:
            return
        calls = [
            (row, sample, Call(name, rollout.text, sample))
            for sample, rollouts, of_group in zip(samples, answers, rows, strict=True)
            for rollout, row in zip(rollouts, of_group, strict=True)
            for name in self._weights[sample.task]
            if name in self._cfg.functions
        ]
        results = self._workers.run([call for _, _, call in calls])
        for (row, sample, call), returned in zip(calls, results, strict=True):
            row[call.function] = self._graded(call.function, sample, returned)

    def _graded(self, name: str, sample: VideoSample, returned: Returned) -> float:
        value, error = returned
        if not error and not 0.0 <= value <= 1.0:
            error = f"returned {value!r}, expected a number in [0, 1]"
        if not error:
            return value
        self._failures.setdefault(name, []).append(f"{error}, on an answer to {sample.id}")
        return math.nan
