"""A pool of training samples too large to hold: a record is parsed when it is drawn.

Annotations that are lists, .json or .jsonl, are indexed: one pass over the file in blocks checks
each record and finds where it begins and ends, 16 bytes a record are kept, and no video is opened
before its turn. Left out: unique ids (a second "a" keeps its name), and annotations keyed by
video, which are read whole.
"""

import os
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_vrl.config import Source
from megatron_vrl.data.formats.json_files import parse, version, without_collector
from megatron_vrl.data.formats.records import HeaderDuration
from megatron_vrl.data.formats.training import (
    is_list,
    list_records,
    read,
    read_record,
    refuse_none,
)
from megatron_vrl.data.problems import Problem
from megatron_vrl.errors import DataError, VideoError
from megatron_vrl.types import VideoSample

READ_WHOLE_BYTES = 16 << 20  # smaller files are checked from end to end at the start

Drawn = VideoSample | Problem | None  # Problem: its video is bad; None: a question without use


def is_indexed(source: Source) -> bool:
    """Whether its records are parsed one by one, when they are drawn."""
    if not is_list(source):
        return False
    if source.format == "temporal_r1":  # durations are in the videos, which may not all be opened
        return True
    path = Path(source.json_path)
    return path.is_file() and path.stat().st_size > READ_WHOLE_BYTES


class Pool(Sequence[Drawn]):
    """Samples of several sources by number; `chosen[i]` are those of sources[i] that count."""

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
        """Samples of each source."""
        return [len(of_source) for of_source in self._chosen]

    def names(self) -> list[str]:
        """Id of each sample, "" for one without use. Parses every record."""
        drawn = (self[index] for index in range(len(self)))
        return [d.id if isinstance(d, VideoSample) else d.sample if d else "" for d in drawn]

    def only(self, kept: NDArray[np.bool_]) -> "Pool":
        """The pool of the samples that `kept` [N] says."""
        of_source = np.split(kept, self._ends[:-1])
        chosen = [which[keep] for which, keep in zip(self._chosen, of_source, strict=True)]
        return Pool(self._sources, self._parts, chosen)

    def __getitem__(self, index: Any) -> Any:  # of an int alone, no slices
        part = bisect_right(self._ends, index)
        before = self._ends[part - 1] if part else 0
        drawn = self._parts[part][int(self._chosen[part][index - before])]
        if isinstance(drawn, VideoSample):
            return replace(drawn, folder=self._sources[part].data_folder)
        return drawn


def open_part(source: Source, header_duration_s: HeaderDuration | None) -> Sequence[Drawn]:
    return (
        IndexedSource(source, header_duration_s)
        if is_indexed(source)
        else read(source, header_duration_s)
    )


class IndexedSource(Sequence[Drawn]):
    def __init__(self, source: Source, header_duration_s: HeaderDuration | None):
        """Check every record. Raises DataError naming file, record or line, and field."""
        self._source = source
        self._header_duration_s = header_duration_s
        self._spans = _index(
            source.format, source.json_path, source.data_folder, version(source.json_path)
        )

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, number: Any) -> Any:  # of an int alone, no slices
        """Raises DataError naming the file if it was changed since it was indexed."""
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
def _index(
    form: str, json_path: str, data_folder: str, file_version: tuple[int, int]
) -> NDArray[np.int64]:
    """[N, 2] first byte of each record and the byte after its last one, all of them checked.

    A run and the checks before it ask for the same file several times.
    """
    source = Source.model_validate(
        {"format": form, "json_path": json_path, "data_folder": data_folder}
    )
    places, num_kept = array("q"), 0
    with without_collector():
        for number, (record, start, stop, line) in enumerate(list_records(source)):
            sample = read_record(record, number, source, _one_second, line)
            num_kept += sample is not None
            places.extend((start, stop))
    spans = np.frombuffer(places, np.int64).reshape(-1, 2)
    refuse_none(source, num_kept, len(spans))
    return spans


def _one_second(path: str) -> float:
    """Stands in for the duration in a video's header: an index opens no video."""
    return 1.0
