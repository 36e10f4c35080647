"""Schedule: the order of training samples, with source weights and curricula.

A schedule is an endless sequence of epochs. Each epoch is a function of its number and the seed, so
one integer is the position of a run. A source of n samples with weight w contributes w * n samples
per epoch on average. They are taken from an endless sequence of shuffled passes over the source, so
every sample of a source is used equally often over several epochs. If all weights are 1, an epoch
is a permutation of all samples.

Example: a source of 4 samples with weight 0.5 contributes 2 samples to epoch 0 and the other 2 to
epoch 1.

With sample weights, an epoch has as many samples, drawn by systematic sampling: a sample occurs in
proportion to its weight, rounded up or down at random. Example: with the weights 3, 1, 0 and 0, an
epoch of four samples contains the first one three times and the second one once.

A curriculum sorts the samples of an epoch into stages of equal size by recorded mean reward
(stats.jsonl of tools/select_data.py). `easy_first` begins with high rewards, `hard_first` with low
rewards. Samples are shuffled within a stage. Samples without a record come last.
"""

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_vrl.errors import DataError

Curriculum = Literal["none", "easy_first", "hard_first"]


class Schedule:
    """Endless sequence of epochs over the concatenated samples of all sources."""

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float],
        seed: int,
        stages: NDArray[np.int64] | None = None,
        sample_weights: NDArray[np.float64] | None = None,
    ) -> None:
        """`sizes` and `weights` have one entry per source.

        `stages` [N]: curriculum stage of each sample. `sample_weights` [N]: positive weights.
        """
        self._sizes = sizes
        self._per_epoch = [Fraction(str(w)) * n for w, n in zip(weights, sizes, strict=True)]
        self._seed = seed
        self._stages, self._sample_weights = stages, sample_weights
        if sum(self._per_epoch) < 1:
            raise DataError(
                f"The sources of `data` give {float(sum(self._per_epoch)):g} samples to an epoch; "
                "give them more samples or a higher weight."
            )

    def locate(self, position: int) -> tuple[int, int]:
        """Return (epoch, index in the epoch) of a position in the sequence."""
        most = int(Fraction(position + 1 + len(self._sizes)) / sum(self._per_epoch)) + 2
        epoch = bisect_right(range(most), position, key=self.before) - 1
        return epoch, position - self.before(epoch)

    def epoch(self, number: int) -> NDArray[np.int64]:
        """Return the sample indices of an epoch in order."""
        first = np.cumsum([0, *self._sizes[:-1]])
        parts = [start + self._drawn_from(source, number) for source, start in enumerate(first)]
        chosen = np.sort(np.concatenate(parts))
        if self._sample_weights is not None and len(chosen):
            chosen = self._resampled(chosen, self._sample_weights[chosen], number)
        shuffled = chosen[np.random.default_rng([self._seed, number]).permutation(len(chosen))]
        if self._stages is None:
            return shuffled
        return shuffled[np.argsort(self._stages[shuffled], kind="stable")]

    def before(self, epoch: int) -> int:
        """Return the number of samples in all epochs before this one."""
        return sum(int(count * epoch) for count in self._per_epoch)

    def _resampled(
        self, chosen: NDArray[np.int64], weights: NDArray[np.float64], epoch: int
    ) -> NDArray[np.int64]:
        """Return as many samples, each as often as its weight says."""
        ends = np.cumsum(weights) * (len(chosen) / weights.sum())
        offset = np.random.default_rng([self._seed, epoch, 2]).random()
        steps = np.minimum(np.floor(ends + offset), len(chosen))
        steps[-1] = len(chosen)
        return np.repeat(chosen, np.diff(steps, prepend=0.0).astype(np.int64))

    def _drawn_from(self, source: int, epoch: int) -> NDArray[np.int64]:
        """Return the indices that an epoch takes from one source, relative to its first sample."""
        size, count = self._sizes[source], self._per_epoch[source]
        start, end = int(count * epoch), int(count * (epoch + 1))
        passes = range(start // size, -(-end // size)) if size else range(0)
        rows = [np.random.default_rng([self._seed, source, p, 1]).permutation(size) for p in passes]
        if not rows:
            return np.zeros(0, np.int64)
        offset = passes[0] * size
        return np.concatenate(rows)[start - offset : end - offset]


def stages_of(
    ids: Sequence[str], mean_rewards: Mapping[str, float], curriculum: Curriculum, count: int
) -> NDArray[np.int64] | None:
    """Return the curriculum stage [N] of each sample, from 0; None without a curriculum.

    Samples without a recorded reward get stage `count`.
    """
    if curriculum == "none":
        return None
    sign = -1.0 if curriculum == "easy_first" else 1.0
    known = [index for index, name in enumerate(ids) if name in mean_rewards]
    ranked = sorted(known, key=lambda index: sign * mean_rewards[ids[index]])
    stages = np.full(len(ids), count, np.int64)
    stages[ranked] = np.arange(len(ranked)) * count // max(1, len(ranked))
    return stages


def read_mean_rewards(path: str) -> dict[str, float]:
    """Return sample id -> mean reward from a stats.jsonl. Raises DataError naming the line."""
    rewards = {}
    for number, row in numbered_rows(path):
        try:
            rewards[str(row["id"])] = float(row["reward"]["mean"])
        except (KeyError, TypeError, ValueError):
            raise DataError(
                f"{path}, line {number}: no field reward.mean; give a stats.jsonl."
            ) from None
    return rewards


def read_ids(path: str) -> set[str]:
    """Return the ids in a kept.jsonl. Raises DataError naming the line."""
    ids = set()
    for number, row in numbered_rows(path):
        if not isinstance(row, dict) or "id" not in row:
            raise DataError(f"{path}, line {number}: no field id; give a kept.jsonl.")
        ids.add(str(row["id"]))
    return ids


def numbered_rows(path: str) -> list[tuple[int, dict[str, Any]]]:
    """Return (line number, row) of a JSON lines file. Raises DataError."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
        return [(n, json.loads(line)) for n, line in enumerate(lines, start=1) if line.strip()]
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}): give a file of tools/select_data.py."
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON lines: {error}.") from None
