"""Readers of sets in which a sentence has one or several intervals of a video.

  timelens_bench  {video id: {duration, spans [[s, e], ...], queries}}: charades-timelens.json,
                  activitynet-timelens.json and qvhighlights-timelens.json of TimeLens-Bench, one
                  span for each query
  timelens        {video_path, duration, source, events [{query, span}]}, one video a record, or
                  {video_path, duration, query, span}: TimeLens-100K and TimeLens2-93K. `span` is
                  [s, e] or [[s, e], ...]
  qvhighlights    [{qid, query, duration, vid, relevant_windows [[s, e], ...]}]: highlight_*.jsonl
                  of QVHighlights; the test release without windows has no truth

Sources: TencentARC/TimeLens 5d90c06 (timelens/dataset/timelens_data.py), MCG-NJU/TimeLens2 a5ce450
(grpo/README.md), jayleicn/moment_detr b7e553a (data/README.md). Queries of TimeLens lose white
space and final periods, as in its loader. The annotation files of TimeLens were not at hand:
unknown is whether every record has a `duration`, which is required here.

Not supported: the directories of extracted frames that some records of TimeLens2-93K name. The
reader adds ".mp4" to such a name. Saliency scores of QVHighlights are ignored.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import Field, TypeAdapter

from megatron_vrl.config import Source
from megatron_vrl.data.formats.records import (
    HeaderDuration,
    Reader,
    Record,
    Seconds,
    Span,
    apply_clip,
    to_intervals,
    video_file,
    video_path,
)
from megatron_vrl.errors import DataError, counted
from megatron_vrl.types import Interval, Sample, VideoClip


class TimelensBench(Record):
    """Video of TimeLens-Bench with one span for each query."""

    duration: Seconds
    spans: list[Span]
    queries: list[str]


class TimelensEvent(Record):
    """Sentence with its intervals."""

    query: str
    span: Span | list[Span]


class Timelens(Record):
    """Video of a training set of TimeLens, with `events`, or with one `query` and `span`."""

    video_path: str
    duration: Seconds
    source: str = ""
    events: list[TimelensEvent] | None = None
    query: str | None = None
    span: Span | list[Span] | None = None


class QvHighlights(Record):
    """Sentence of QVHighlights with its windows."""

    qid: int
    query: str
    duration: Seconds
    vid: str
    relevant_windows: list[Span] = Field(default_factory=list)


def timelens_bench(
    records: Iterable[tuple[str, TimelensBench]],
    source: Source,
    header_duration_s: HeaderDuration | None,
) -> Iterator[Sample]:
    """Yield one sample per query, with the id VIDEO/INDEX."""
    for video, record in records:
        if len(record.spans) != len(record.queries):
            raise DataError(
                f"{source.json_path}: record {video!r} has {counted(len(record.spans), 'span')} "
                f"and {len(record.queries)} queries; expected one span for each query."
            )
        path = video_path(video_file(video), source, video)
        for index, (span, query) in enumerate(zip(record.spans, record.queries, strict=True)):
            sample = _sample(
                f"{video}/{index}", path, record.duration, _cleaned(query), to_intervals([span])
            )
            yield apply_clip(sample, record, source)


def timelens(
    records: Iterable[tuple[int, Timelens]],
    source: Source,
    header_duration_s: HeaderDuration | None,
) -> Iterator[Sample]:
    """Yield one sample per event, with the id VIDEO/RECORD.EVENT of their indices."""
    for number, record in records:
        path = video_path(video_file(record.video_path), source, number)
        for index, event in enumerate(_events(record, number, source)):
            sample = _sample(
                f"{record.video_path}/{number}.{index}",
                path,
                record.duration,
                _cleaned(event.query),
                to_intervals(_spans(event.span)),
                labels=(f"source/{record.source}",) if record.source else (),
            )
            yield apply_clip(sample, record, source)


def qvhighlights(
    records: Iterable[tuple[int, QvHighlights]],
    source: Source,
    header_duration_s: HeaderDuration | None,
) -> Iterator[Sample]:
    """Yield one sample per record, with the id `qid`."""
    for _, record in records:
        sample = _sample(
            str(record.qid),
            video_path(video_file(record.vid), source, record.qid),
            record.duration,
            record.query.strip(),
            to_intervals(record.relevant_windows),
        )
        yield apply_clip(sample, record, source)


MOMENT_READERS: dict[str, Reader] = {
    "timelens_bench": Reader(
        schema=TypeAdapter(dict[str, TimelensBench]), samples=timelens_bench, is_list=False
    ),
    "timelens": Reader(schema=TypeAdapter(list[Timelens]), samples=timelens, is_list=False),
    "qvhighlights": Reader(
        schema=TypeAdapter(list[QvHighlights]), samples=qvhighlights, is_list=True
    ),
}


def _events(record: Timelens, number: int, source: Source) -> list[TimelensEvent]:
    """Return the events of a record in either form. Raises DataError if it has none."""
    events = record.events
    if events is None and record.query is not None and record.span is not None:
        events = [TimelensEvent(query=record.query, span=record.span)]
    if events is None:
        raise DataError(
            f"{source.json_path}: record {number} ({record.video_path!r}) has no 'events' with a "
            "query and a span, and no 'query' with a 'span' of its own."
        )
    return events


def _spans(span: list[Any]) -> list[Any]:
    """Return a list of [start, end] for one [start, end] or a list of them."""
    return span if not span or isinstance(span[0], list) else [span]


def _cleaned(query: str) -> str:
    """Return a query with single spaces and without final periods."""
    return re.sub(r"\s+", " ", query).strip().strip(".").strip()


def _sample(
    name: str,
    video: str,
    duration_s: float,
    query: str,
    intervals_s: tuple[Interval, ...],
    labels: tuple[str, ...] = (),
) -> Sample:
    """Return a temporal grounding sample."""
    return Sample(
        id=name,
        task="temporal_grounding",
        media=(VideoClip(video),),
        duration_s=duration_s,
        query=query,
        rationale=query,
        intervals_s=intervals_s,
        options=(),
        option="",
        labels=labels,
    )
