"""Pool: training samples by index.

Records of large annotation files are parsed when they are drawn.

A large list (.json or .jsonl) is indexed: one pass in blocks validates every record and stores its
byte range, 16 bytes per record. No video is opened before its sample is drawn. Example: 490,000
records (71 MB) take 8 MB of index.

Not supported for indexed files: unique ids (a second "a" keeps its id). Annotations keyed by video
are loaded whole.
"""

import os
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_vrl.config import Source
from megatron_vrl.data.formats.json_files import parse, version, without_collector
from megatron_vrl.data.formats.records import HeaderDuration
from megatron_vrl.data.formats.tables import is_table
from megatron_vrl.data.formats.training import (
    is_list,
    list_records,
    read,
    read_record,
    refuse_none,
)
from megatron_vrl.data.media_limits import DEFAULT_LIMITS, MediaLimits
from megatron_vrl.data.problems import Problem
from megatron_vrl.errors import DataError, VideoError
from megatron_vrl.types import Sample

READ_WHOLE_BYTES = 16 << 20  # smaller files are loaded whole

Drawn = Sample | Problem | None  # Problem: the video is bad; None: the question is unusable


def is_indexed(source: Source) -> bool:
    """Return whether the records of the source are parsed when they are drawn."""
    if not is_list(source) or is_table(source.json_path):
        return False
    if source.format == "temporal_r1":  # durations are in the videos, which may not all be opened
        return True
    path = Path(source.json_path)
    return path.is_file() and path.stat().st_size > READ_WHOLE_BYTES


class Pool(Sequence[Drawn]):
    """Samples of several sources by index. `chosen[i]` has the indices used of sources[i]."""

    def __init__(
        self,
        sources: Sequence[Source],
        parts: Sequence[Sequence[Drawn]],
        chosen: Sequence[NDArray[np.int64]],
    ):
        self._sources, self._parts, self._chosen = sources, parts, chosen
        self._ends = list(accumulate(map(len, chosen)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def sizes(self) -> list[int]:
        """Return the number of samples of each source."""
        return [len(of_source) for of_source in self._chosen]

    def names(self) -> list[str]:
        """Return the id of each sample, "" for an unusable one. Parses every record."""
        drawn = (self[index] for index in range(len(self)))
        return [d.id if isinstance(d, Sample) else d.sample if d else "" for d in drawn]

    def only(self, kept: NDArray[np.bool_]) -> "Pool":
        """Return the pool of the samples for which the mask `kept` [N] is True."""
        of_source = np.split(kept, self._ends[:-1])
        chosen = [which[keep] for which, keep in zip(self._chosen, of_source, strict=True)]
        return Pool(self._sources, self._parts, chosen)

    def __getitem__(self, index: Any) -> Any:  # int only, no slices
        part = bisect_right(self._ends, index)
        before = self._ends[part - 1] if part else 0
        drawn = self._parts[part][int(self._chosen[part][index - before])]
        if isinstance(drawn, Sample):
            return drawn.inside(self._sources[part].data_folder)
        return drawn


def open_source(
    source: Source, header_duration_s: HeaderDuration | None, limits: MediaLimits
) -> Sequence[Drawn]:
    """Return the samples of a source, indexed or loaded.

    Raises DataError for a sample with more videos or images than `limits`.
    """
    if is_indexed(source):
        return IndexedSource(source, header_duration_s, limits)
    samples = read(source, header_duration_s)
    limits.check(samples, source)
    return samples


class IndexedSource(Sequence[Drawn]):
    """Samples of one list file, parsed on access."""

    def __init__(
        self,
        source: Source,
        header_duration_s: HeaderDuration | None,
        limits: MediaLimits = DEFAULT_LIMITS,
    ):
        """Validate every record. Raises DataError naming file, record or line, and field."""
        self._source = source
        self._header_duration_s = header_duration_s
        of_any_weight = {"weight": 1.0, "sampling_strategy": "all"}
        whole = source.model_copy(update=of_any_weight)
        self._spans = _index(whole, version(source.json_path), limits)

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, number: Any) -> Any:  # int only, no slices
        """Parse one record. Raises DataError if the file was changed after it was indexed."""
        start, stop = self._spans[number].tolist()
        with open(self._source.json_path, "rb") as file:
            content = os.pread(file.fileno(), stop - start, start)
        try:
            record = parse(content)
        except ValueError:
            raise DataError(
                f"{self._source.json_path} was changed during the run: record {number} is no "
                "longer where it was. Start the same command again."
            ) from None
        try:
            return read_record(record, number, self._source, self._header_duration_s)
        except VideoError as error:
            video = os.path.join(self._source.data_folder, record["video"])
            name = f"{record['video']}/{number}"
            return Problem(sample=name, video=video, kind=error.kind, reason=f"{video} {error}")


@lru_cache(maxsize=32)
def _index(source: Source, file_version: tuple[int, int], limits: MediaLimits) -> NDArray[np.int64]:
    """Return the byte range [N, 2] of each record, (first byte, byte after the last one).

    Every record is validated. The result is cached because a run and its checks open the same file
    several times.
    """
    offsets, num_kept = array("q"), 0
    with without_collector():
        for number, (record, start, stop, line) in enumerate(list_records(source)):
            sample = read_record(record, number, source, _one_second, line)
            num_kept += sample is not None
            limits.check([sample] if sample else [], source)
            offsets.extend((start, stop))
    spans = np.frombuffer(offsets, np.int64).reshape(-1, 2)
    refuse_none(source, num_kept, len(spans))
    return spans


def _one_second(path: str) -> float:
    """Return a dummy duration: validation must not open videos."""
    return 1.0
