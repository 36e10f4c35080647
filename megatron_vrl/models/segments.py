"""Who attends to whom in a packed micro-batch, as arrays of integers, before anything is a tensor.

A segment is a run of queries with the keys that they see. Segments whose keys are of nearly equal
length share a call of the kernel; what lies in between is padding.
"""

from collections.abc import Iterator
from dataclasses import astuple, dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_vrl.batching.pack import MicroBatch, length_buckets

Index = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Segments:
    """Queries that stand in a row and the keys they see: all of a prefix, and their own piece up
    to themselves. Arrays over segments; starts are rows of T."""

    start: Index  # of the queries
    length: Index
    prefix_start: Index
    prefix: Index  # length, 0: none
    own_start: Index
    own: Index  # length; its last row is the last query

    def take(self, members: Index | list[int]) -> "Segments":
        return Segments(*(array[members] for array in astuple(self)))


def segments_of(batch: MicroBatch) -> Segments:
    """The pieces of the micro-batch, cut where this rank's runs of rows end."""
    group, none = batch.answer_group, np.zeros_like(batch.prompt_start)
    start = np.concatenate([batch.prompt_start, batch.answer_start])
    end = start + np.concatenate([batch.prompt_length, batch.answer_length])
    prefix_start = np.concatenate([none, batch.prompt_start[group]])
    prefix = np.concatenate([none, batch.prompt_length[group]])
    parts = []
    for run in np.split(batch.rows, np.flatnonzero(np.diff(batch.rows) != 1) + 1):
        first, last = start.clip(min=run[0]), end.clip(max=run[-1] + 1)
        part = Segments(first, last - first, prefix_start, prefix, start, last - start)
        parts.append(astuple(part.take(np.flatnonzero(part.length > 0))))
    return Segments(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def buckets_of(batch: MicroBatch) -> Iterator[tuple[Segments, bool]]:
    """Segments of one call, and whether it is causal over rows in order and needs no mask: that of
    whole prompts, unless another context-parallel rank holds a part of them."""
    segments = segments_of(batch)
    causal = (segments.prefix == 0) & (segments.own == segments.length)
    whole = len(batch.rows) == len(batch.key_rows)
    for kind in (causal, ~causal):
        chosen = segments.take(np.flatnonzero(kind))
        for members in length_buckets((chosen.prefix + chosen.own).tolist()):
            yield chosen.take(members), kind is causal and whole


def padded_sizes(batch: MicroBatch) -> tuple[int, int, int]:
    """Rows of queries and of keys that the calls of `buckets_of` read; entries of their masks."""
    queries = keys = mask = 0
    for part, fast in buckets_of(batch):
        entries, longest = len(part.length), int(part.length.max())
        seen = int(part.prefix.max()) + int(part.own.max())
        queries += entries * longest
        keys += entries * seen
        mask += 0 if fast else entries * longest * seen
    return queries, keys, mask


def exact_sizes(batch: MicroBatch) -> tuple[int, int]:
    """The same rows for a kernel that takes sequences of any length in one call."""
    segments = segments_of(batch)
    return int(segments.length.sum()), int((segments.prefix + segments.own).sum())
