"""The order of training samples: weights of sources, and curricula by recorded difficulty.

An endless row of epochs, each a function of its number and the seed, so that one integer says how
far a run has come. A source of n samples with weight w gives w * n of them to an epoch on average:
they are dealt out of its own endless row of shuffled passes, so that over several epochs every
sample comes equally often. With all weights 1 an epoch is a plain permutation.

A curriculum goes through the samples of an epoch in stages of equal size by recorded mean reward
(stats.jsonl of tools/select_data.py), shuffled within a stage; samples without a record come last.
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
    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float],
        seed: int,
        stages: NDArray[np.int64] | None = None,
    ) -> None:
        """`sizes` and `weights` of the sources, whose samples stand one after the other; `stages`
        [N] of a curriculum, see `stages_of`."""
        self._sizes = sizes
        self._per_epoch = [Fraction(str(w)) * n for w, n in zip(weights, sizes, strict=True)]
        self._seed = seed
        self._stages = stages
        if sum(self._per_epoch) < 1:
            raise DataError(
                f"The sources of `data` give {float(sum(self._per_epoch)):g} samples to an epoch; "
                "give them more samples or a higher weight."
            )

    def locate(self, position: int) -> tuple[int, int]:
        """(epoch, index in it) of a position in the endless row."""
        most = int(Fraction(position + 1 + len(self._sizes)) / sum(self._per_epoch)) + 2
        epoch = bisect_right(range(most), position, key=self.before) - 1
        return epoch, position - self.before(epoch)

    def epoch(self, number: int) -> NDArray[np.int64]:
        """Indices of samples in the epoch's order."""
        first = np.cumsum([0, *self._sizes[:-1]])
        parts = [start + self._dealt(source, number) for source, start in enumerate(first)]
        chosen = np.sort(np.concatenate(parts))
        shuffled = chosen[np.random.default_rng([self._seed, number]).permutation(len(chosen))]
        if self._stages is None:
            return shuffled
        return shuffled[np.argsort(self._stages[shuffled], kind="stable")]

    def before(self, epoch: int) -> int:
        """Samples of the epochs before this one."""
        return sum(int(share * epoch) for share in self._per_epoch)

    def _dealt(self, source: int, epoch: int) -> NDArray[np.int64]:
        """Of one source, counted from its first sample."""
        size, share = self._sizes[source], self._per_epoch[source]
        start, end = int(share * epoch), int(share * (epoch + 1))
        passes = range(start // size, -(-end // size)) if size else range(0)
        rows = [np.random.default_rng([self._seed, source, p, 1]).permutation(size) for p in passes]
        if not rows:
            return np.zeros(0, np.int64)
        offset = passes[0] * size
        return np.concatenate(rows)[start - offset : end - offset]


def stages_of(
    ids: Sequence[str], mean_rewards: Mapping[str, float], curriculum: Curriculum, count: int
) -> NDArray[np.int64] | None:
    """Stage [N] of each sample, from 0; None without a curriculum."""
    if curriculum == "none":
        return None
    sign = -1.0 if curriculum == "easy_first" else 1.0
    known = [index for index, name in enumerate(ids) if name in mean_rewards]
    ranked = sorted(known, key=lambda index: sign * mean_rewards[ids[index]])
    stages = np.full(len(ids), count, np.int64)
    stages[ranked] = np.arange(len(ranked)) * count // max(1, len(ranked))
    return stages


def read_mean_rewards(path: str) -> dict[str, float]:
    """Sample id -> mean reward, of a stats.jsonl. Raises DataError naming the line."""
    found = {}
    for number, row in _rows(path):
        try:
            found[str(row["id"])] = float(row["reward"]["mean"])
        except (KeyError, TypeError, ValueError):
            raise DataError(
                f"{path}, line {number}: no field reward.mean; give a stats.jsonl."
            ) from None
    return found


def read_ids(path: str) -> set[str]:
    """Ids in a kept.jsonl. Raises DataError naming the line."""
    found = set()
    for number, row in _rows(path):
        if not isinstance(row, dict) or "id" not in row:
            raise DataError(f"{path}, line {number}: no field id; give a kept.jsonl.")
        found.add(str(row["id"]))
    return found


def _rows(path: str) -> list[tuple[int, dict[str, Any]]]:
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
        return [(n, json.loads(line)) for n, line in enumerate(lines, start=1) if line.strip()]
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}): give what tools/select_data.py wrote."
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON lines: {error}.") from None
