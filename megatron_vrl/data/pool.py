"""A pool of training samples too large to hold: a record is parsed when it is drawn.

Annotations that are lists, .json or .jsonl, are indexed: one pass over the file in blocks finds
where each record begins and ends, 16 bytes a record are kept, and no record and no video is opened
before its turn. What is wrong with a record is therefore told when it is drawn; tools/check_data.py
tells it beforehand. Left out: unique ids (a second "a" keeps its name), and annotations keyed by
video, which are read whole.
"""

import json
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_vrl.config import Source
from megatron_vrl.data.problems import Problem
from megatron_vrl.data.readers import READERS, HeaderDuration, read, read_record
from megatron_vrl.errors import DataError, VideoError
from megatron_vrl.types import VideoSample

READ_WHOLE_BYTES = 16 << 20  # smaller files are checked from end to end at the start
BLOCK_BYTES = 4 << 20

Drawn = VideoSample | Problem | None  # Problem: its video is bad; None: a question without use


def is_indexed(source: Source) -> bool:
    """Whether its records are parsed one by one, when they are drawn."""
    if not READERS[source.format].is_list:
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

    def __getitem__(self, index):  # of an int alone, no slices
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
        self._source = source
        self._header_duration_s = header_duration_s
        self._spans = index_records(source.json_path)

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, number):  # of an int alone, no slices
        """Raises DataError naming file, record and field."""
        start, stop = self._spans[number].tolist()
        with open(self._source.json_path, "rb") as file:
            content = os.pread(file.fileno(), stop - start, start)
        record = json.loads(content)
        try:
            return read_record(record, number, self._source, self._header_duration_s)
        except VideoError as error:
            video = os.path.join(self._source.data_folder, record["video"])
            name = f"{record['video']}/{number}"
            return Problem(sample=name, video=video, kind=error.kind, reason=f"{video} {error}")


def index_records(path: str) -> NDArray[np.int64]:
    """[N, 2] first byte of each record and the byte after its last one.

    Raises DataError if the file cannot be read or is not a list of records.
    """
    spans = _lines if path.endswith(".jsonl") else _elements
    try:
        found = np.fromiter((at for span in spans(path) for at in span), np.int64)
    except OSError as error:
        raise DataError(f"Cannot read the annotations {path}: {error.strerror}.") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}.") from None
    return found.reshape(-1, 2)


def _lines(path: str) -> Iterator[tuple[int, int]]:
    start = 0
    with open(path, "rb") as file:
        for line in file:
            if line.strip():
                yield start, start + len(line)
            start += len(line)


def _elements(path: str) -> Iterator[tuple[int, int]]:
    """Of a JSON list. Latin-1 gives every byte one character, so that places are bytes."""
    parse = json.JSONDecoder().raw_decode
    with open(path, encoding="latin-1", newline="") as file:
        text, before, at, is_last = file.read(BLOCK_BYTES), 0, 0, False
        at = _skip(text, 0)
        if text[at : at + 1] != "[":
            raise ValueError("expected a list of records")
        at += 1
        while True:
            at = _skip(text, at)
            if text[at : at + 1] == "]":
                return
            try:
                _, stop = parse(text, at)
                after = _skip(text, stop)
                if after == len(text):
                    raise ValueError("the list does not end")
            except ValueError:
                if is_last:
                    raise
                block = file.read(BLOCK_BYTES)
                is_last = not block
                text, before, at = text[at:] + block, before + at, 0
                continue
            yield before + at, before + stop
            if text[after] not in ",]":
                raise ValueError(f"expected a comma at byte {before + after}")
            at = after + (text[after] == ",")


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at
