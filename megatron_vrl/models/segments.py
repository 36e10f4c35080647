"""Attention segments of a packed micro-batch, as integer arrays.

A segment is a range of query rows with the key rows that they attend to. Segments with nearly equal
numbers of keys share one attention call; shorter ones are padded.
"""

from collections.abc import Iterator
from dataclasses import astuple, dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_vrl.batching.pack import MicroBatch, length_buckets

Index = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Segments:
    """Attention segments as arrays over segments; starts are rows of T.

    A query attends to all rows of the prefix (an answer's prompt) and to its own sequence up to
    itself.
    """

    query_start: Index  # first query
    query_length: Index  # number of queries
    prefix_start: Index
    prefix_length: Index  # rows of the prefix, 0 for a prompt
    own_start: Index  # first row of the query's own sequence
    own_length: Index  # rows from own_start to the last query

    def take(self, members: Index | list[int]) -> "Segments":
        """Return the segments with the indices `members`."""
        return Segments(*(array[members] for array in astuple(self)))


def attention_segments(batch: MicroBatch) -> Segments:
    """Return the segments of the rows that this rank computes.

    Prompts and answers are cut where the rank's contiguous ranges of rows end.
    """
    group, none = batch.answer_group, np.zeros_like(batch.prompt_start)
    start = np.concatenate([batch.prompt_start, batch.answer_start])
    end = start + np.concatenate([batch.prompt_length, batch.answer_length])
    prefix_start = np.concatenate([none, batch.prompt_start[group]])
    prefix = np.concatenate([none, batch.prompt_length[group]])
    parts = []
    for run in np.split(batch.rows, np.flatnonzero(np.diff(batch.rows) != 1) + 1):
        first, last = start.clip(min=run[0]), end.clip(max=run[-1] + 1)
        part = Segments(first, last - first, prefix_start, prefix, start, last - start)
        parts.append(astuple(part.take(np.flatnonzero(part.query_length > 0))))
    return Segments(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def segment_buckets(batch: MicroBatch) -> Iterator[tuple[Segments, bool]]:
    """Yield the segments of each attention call, and whether the call is causal and needs no mask.

    Whole prompts need no mask, unless context-parallel ranks split them.
    """
    segments = attention_segments(batch)
    causal = (segments.prefix_length == 0) & (segments.own_length == segments.query_length)
    whole = len(batch.rows) == len(batch.key_rows)
    for kind in (causal, ~causal):
        chosen = segments.take(np.flatnonzero(kind))
        for members in length_buckets((chosen.prefix_length + chosen.own_length).tolist()):
            yield chosen.take(members), kind is causal and whole


def padded_attention_sizes(batch: MicroBatch) -> tuple[int, int, int]:
    """Return query rows, key rows and mask entries of the calls of `segment_buckets`, with
    padding."""
    queries = keys = mask = 0
    for part, fast in segment_buckets(batch):
        entries, longest = len(part.query_length), int(part.query_length.max())
        seen = int(part.prefix_length.max()) + int(part.own_length.max())
        queries += entries * longest
        keys += entries * seen
        mask += 0 if fast else entries * longest * seen
    return queries, keys, mask


def varlen_attention_sizes(batch: MicroBatch) -> tuple[int, int]:
    """Return query rows and key rows of the one call of a variable-length kernel."""
    segments = attention_segments(batch)
    keys = segments.prefix_length + segments.own_length
    return int(segments.query_length.sum()), int(keys.sum())
