"""Selection and order of training samples: sources -> one pool -> an endless, resumable stream.

The order depends only on the configuration and the seed. Every rank and every restarted run
computes the same order, and one integer (`SampleStream.state`) is the position of a run in it.

Example: 3 samples and a global batch of 2. Epoch 0 is a permutation such as [2, 0, 1]. Step 1 takes
samples 2 and 0, step 2 takes sample 1 and the first sample of epoch 1. `state` is then 4.
"""

import math
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from megatron_vrl.config import Source
from megatron_vrl.data.formats.records import HeaderDuration
from megatron_vrl.data.formats.training import read
from megatron_vrl.data.media_limits import DEFAULT_LIMITS, MediaLimits
from megatron_vrl.data.pool import Drawn, Pool, is_indexed, open_source
from megatron_vrl.data.problems import Problem
from megatron_vrl.data.schedule import Schedule
from megatron_vrl.errors import ConfigError, DataError, VideoError, counted
from megatron_vrl.types import Sample

_STRATEGY = re.compile(r"(first|end|random):([0-9]+(?:\.[0-9]+)?)(%?)")


def load(
    sources: Sequence[Source],
    seed: int,
    header_duration_s: HeaderDuration | None = None,
    limits: MediaLimits = DEFAULT_LIMITS,
) -> list[Sample]:
    """Return the samples of all sources in order. A second id "a" becomes "a#2"."""
    return list(chain(*load_by_source(sources, seed, header_duration_s, limits)))


def load_by_source(
    sources: Sequence[Source],
    seed: int,
    header_duration_s: HeaderDuration | None = None,
    limits: MediaLimits = DEFAULT_LIMITS,
) -> list[list[Sample]]:
    """Return the samples of each source, with unique ids, after `sampling_strategy` is applied.

    Raises DataError for a sample with more videos or images than `limits`.
    """
    by_source: list[list[Sample]] = []
    seen: set[str] = set()
    for number, source in enumerate(sources):
        whole = read(source, header_duration_s)
        limits.check(whole, source)
        samples: list[Sample] = []
        for index in chosen_indices(source.sampling_strategy, len(whole), [seed, number]):
            sample = whole[index]
            unique, copy = sample.id, 1
            while unique in seen:
                copy += 1
                unique = f"{sample.id}#{copy}"
            seen.add(unique)
            samples.append(replace(sample.inside(source.data_folder), id=unique))
        by_source.append(samples)
    return by_source


def open_pool(
    sources: Sequence[Source],
    seed: int,
    header_duration_s: HeaderDuration | None = None,
    limits: MediaLimits = DEFAULT_LIMITS,
) -> Pool:
    """Return the samples that a stream draws from. Large files are indexed, not loaded."""
    if not any(map(is_indexed, sources)):
        by_source = load_by_source(sources, seed, header_duration_s, limits)
        return Pool(sources, by_source, [np.arange(len(samples)) for samples in by_source])
    parts = [open_source(source, header_duration_s, limits) for source in sources]
    kept = [
        np.array(chosen_indices(source.sampling_strategy, len(part), [seed, number]), np.int64)
        for number, (source, part) in enumerate(zip(sources, parts, strict=True))
    ]
    return Pool(sources, parts, kept)


def chosen_indices(strategy: str, num_samples: int, seed: Sequence[int]) -> list[int]:
    """Return the indices that `sampling_strategy` keeps, ascending. A percentage is rounded up.

    Example: "first:10%" of 25 samples keeps [0, 1, 2].
    """
    if strategy == "all":
        return list(range(num_samples))
    match = _STRATEGY.fullmatch(strategy)
    if match is None or (not match[3] and "." in match[2]):
        raise ConfigError(
            f"sampling_strategy {strategy!r} is not known; "
            f"give all, first:N, end:N or random:N, N a count or a percentage such as 10%."
        )
    wanted = math.ceil(Fraction(match[2]) * num_samples / 100) if match[3] else int(match[2])
    num_kept = min(wanted, num_samples)
    if num_kept == 0:
        raise DataError(
            f"sampling_strategy {strategy!r} keeps none of {counted(num_samples, 'sample')}."
        )
    if match[1] == "first":
        return list(range(num_kept))
    if match[1] == "end":
        return list(range(num_samples - num_kept, num_samples))
    drawn = np.random.default_rng(seed).choice(num_samples, num_kept, replace=False)
    return sorted(drawn.tolist())


def order(num_samples: int, epoch: int, seed: int) -> NDArray[np.int64]:
    """Return the sample order of one epoch: a permutation of `num_samples` indices."""
    return np.random.default_rng([seed, epoch]).permutation(num_samples)


@dataclass(frozen=True, slots=True, eq=False)
class _Round:
    """Samples and schedule that a stream uses from one data selection to the next."""

    samples: Sequence[Drawn]
    schedule: Schedule
    start: int  # position in the stream
    before: int  # samples in the schedule's epochs before `start`

    def locate(self, position: int) -> tuple[int, int]:
        """Return (epoch, index in the epoch) of a position in the stream."""
        return self.schedule.locate(position - self.start + self.before)


class SampleStream:
    """Endless stream of shuffled epochs. A batch may span two epochs.

    `state` is the number of samples drawn so far, including samples that were skipped because their
    question cannot be asked. Every rank draws the same batch and processes its own shard of it.
    """

    def __init__(
        self, samples: Sequence[Drawn], seed: int, schedule: Schedule | None = None
    ) -> None:
        """Start at position 0. Without a schedule, an epoch is a permutation of the samples."""
        if not len(samples):
            raise DataError("There are no samples to train on; check the sources of `data`.")
        self._rounds: list[_Round] = []
        self._shuffled: tuple[_Round, int, NDArray[np.int64]] | None = None
        self.turn(samples, schedule or Schedule([len(samples)], [1.0], seed), start=0, epoch=0)
        self.state = 0

    def turn(self, samples: Sequence[Drawn], schedule: Schedule, start: int, epoch: int) -> None:
        """Draw from `samples` from position `start` on, beginning with the schedule's `epoch`."""
        self._rounds.append(_Round(samples, schedule, start, schedule.before(epoch)))

    def restore(self, state: int) -> None:
        """Continue at position `state`."""
        self.state = state

    @property
    def epoch(self) -> int:
        """Return the epoch of the next sample."""
        return self._round.locate(self.state)[0]

    def take(self, num_samples: int) -> list[Sample]:
        """Return the next `num_samples` samples. Raises VideoError if the video of one is bad."""
        drawn = self.draw(num_samples)
        for item in drawn:
            if isinstance(item, Problem):
                raise VideoError(item.reason, item.kind)
        return drawn  # type: ignore[return-value]

    def draw(self, num_samples: int) -> list[Sample | Problem]:
        """Return the next `num_samples` samples; a Problem in place of an unusable one."""
        return [self._next() for _ in range(num_samples)]

    def peek(self, num_samples: int) -> list[Sample | Problem]:
        """Return what `draw` would return, without moving the position."""
        state = self.state
        try:
            return self.draw(num_samples)
        finally:
            self.state = state

    def at(self, position: int) -> Sample | Problem:
        """Return the sample that moved `state` from `position` to `position` + 1."""
        state, self.state = self.state, position
        try:
            return self._next()
        finally:
            self.state = state

    @property
    def _round(self) -> _Round:
        """Return the round at the current position."""
        after = bisect_right(self._rounds, self.state, key=lambda one: one.start)
        return self._rounds[after - 1]

    def _next(self) -> Sample | Problem:
        """Return the next sample. Records without a usable question are skipped."""
        for _ in range(len(self._round.samples)):
            now = self._round
            epoch, index = now.locate(self.state)
            if self._shuffled is None or self._shuffled[:2] != (now, epoch):
                self._shuffled = now, epoch, now.schedule.epoch(epoch)
            self.state += 1
            if (drawn := now.samples[int(self._shuffled[2][index])]) is not None:
                return drawn
        raise DataError("No record of `data` has a question that can be asked; check its sources.")
