"""Which samples, in which order: sources -> one pool -> an endless, resumable stream.

Everything is a function of the configuration and the seed, so any rank or restarted run sees the
same samples in the same order, and an integer says how far a stream has come.
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
from megatron_vrl.data.pool import Drawn, Pool, is_indexed, open_part
from megatron_vrl.data.problems import Problem
from megatron_vrl.data.schedule import Schedule
from megatron_vrl.errors import ConfigError, DataError, VideoError, counted
from megatron_vrl.types import VideoSample

_STRATEGY = re.compile(r"(first|end|random):([0-9]+(?:\.[0-9]+)?)(%?)")


def load(
    sources: Sequence[Source], seed: int, header_duration_s: HeaderDuration | None = None
) -> list[VideoSample]:
    """Samples of all sources in their order, each id once: a second "a" becomes "a#2"."""
    return list(chain(*load_by_source(sources, seed, header_duration_s)))


def load_by_source(
    sources: Sequence[Source], seed: int, header_duration_s: HeaderDuration | None = None
) -> list[list[VideoSample]]:
    by_source: list[list[VideoSample]] = []
    seen: set[str] = set()
    for number, source in enumerate(sources):
        whole = read(source, header_duration_s)
        samples: list[VideoSample] = []
        for index in chosen(source.sampling_strategy, len(whole), [seed, number]):
            sample = whole[index]
            unique, copy = sample.id, 1
            while unique in seen:
                copy += 1
                unique = f"{sample.id}#{copy}"
            seen.add(unique)
            samples.append(replace(sample, id=unique, folder=source.data_folder))
        by_source.append(samples)
    return by_source


def open_pool(
    sources: Sequence[Source], seed: int, header_duration_s: HeaderDuration | None = None
) -> Pool:
    """What a stream draws from: as `load`, but large annotations are indexed and not read."""
    if not any(map(is_indexed, sources)):
        by_source = load_by_source(sources, seed, header_duration_s)
        return Pool(sources, by_source, [np.arange(len(samples)) for samples in by_source])
    parts = [open_part(source, header_duration_s) for source in sources]
    kept = [
        np.array(chosen(source.sampling_strategy, len(part), [seed, number]), np.int64)
        for number, (source, part) in enumerate(zip(sources, parts, strict=True))
    ]
    return Pool(sources, parts, kept)


def chosen(strategy: str, num_samples: int, seed: Sequence[int]) -> list[int]:
    """Indices that `sampling_strategy` keeps, ascending. A percentage is rounded up."""
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
    """Order of one epoch: a permutation of `num_samples` indices."""
    return np.random.default_rng([seed, epoch]).permutation(num_samples)


@dataclass(frozen=True, slots=True, eq=False)
class _Round:
    """What a stream draws from between two selections."""

    samples: Sequence[Drawn]
    schedule: Schedule
    start: int  # place in the stream
    before: int  # samples in the schedule's epochs that were over by then

    def locate(self, place: int) -> tuple[int, int]:
        return self.schedule.locate(place - self.start + self.before)


class SampleStream:
    """Shuffled epochs without end; a batch may reach over the end of one.

    `state` counts the samples handed out since the start, with those that had no use. Each rank
    takes the same batch and works on its own share of it.
    """

    def __init__(
        self, samples: Sequence[Drawn], seed: int, schedule: Schedule | None = None
    ) -> None:
        """Without a schedule an epoch is a permutation of the samples."""
        if not len(samples):
            raise DataError("There are no samples to train on; check the sources of `data`.")
        self._rounds: list[_Round] = []
        self._shuffled: tuple[_Round, int, NDArray[np.int64]] | None = None
        self.turn(samples, schedule or Schedule([len(samples)], [1.0], seed), start=0, epoch=0)
        self.state = 0

    def turn(self, samples: Sequence[Drawn], schedule: Schedule, start: int, epoch: int) -> None:
        """Draw from these from the place `start` on, beginning with the schedule's `epoch`."""
        self._rounds.append(_Round(samples, schedule, start, schedule.before(epoch)))

    def restore(self, state: int) -> None:
        self.state = state

    @property
    def epoch(self) -> int:
        """Which the next sample belongs to."""
        return self._round.locate(self.state)[0]

    def take(self, num_samples: int) -> list[VideoSample]:
        """The next `num_samples` samples. Raises VideoError if one cannot be made."""
        drawn = self.draw(num_samples)
        for item in drawn:
            if isinstance(item, Problem):
                raise VideoError(item.reason, item.kind)
        return drawn  # type: ignore[return-value]

    def draw(self, num_samples: int) -> list[VideoSample | Problem]:
        """The next `num_samples` samples, or what is wrong with them."""
        return [self._next() for _ in range(num_samples)]

    def peek(self, num_samples: int) -> list[VideoSample | Problem]:
        """What `draw` would give."""
        state = self.state
        try:
            return self.draw(num_samples)
        finally:
            self.state = state

    def at(self, position: int) -> VideoSample | Problem:
        """What was handed out when `state` became `position` + 1."""
        state, self.state = self.state, position
        try:
            return self._next()
        finally:
            self.state = state

    @property
    def _round(self) -> _Round:
        after = bisect_right(self._rounds, self.state, key=lambda one: one.start)
        return self._rounds[after - 1]

    def _next(self) -> VideoSample | Problem:
        for _ in range(len(self._round.samples)):
            now = self._round
            epoch, index = now.locate(self.state)
            if self._shuffled is None or self._shuffled[:2] != (now, epoch):
                self._shuffled = now, epoch, now.schedule.epoch(epoch)
            self.state += 1
            if (drawn := now.samples[int(self._shuffled[2][index])]) is not None:
                return drawn
        raise DataError("No record of `data` has a question that can be asked; check its sources.")
