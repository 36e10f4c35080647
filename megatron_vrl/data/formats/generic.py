"""Reader of the generic format: questions of any task without options.

A file is a list of {id, task, video, duration, question, rationale} with the truth: `truth` with
the fields of the task's `Truth.record`, for a task with its own kind of truth, such as a count, or
`intervals` [[s, e], ...] in seconds, for temporal_grounding and multi_segment_grounding.
`rationale` is optional. Questions with options have other formats (training.py).
"""

from collections.abc import Iterable, Iterator
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from megatron_vrl.config import Source
from megatron_vrl.data.formats.records import (
    HeaderDuration,
    Name,
    Reader,
    Record,
    Seconds,
    Span,
    apply_clip,
    to_intervals,
    video_path,
)
from megatron_vrl.errors import DataError
from megatron_vrl.tasks import TASKS, Truth
from megatron_vrl.types import Sample, VideoClip


class GenericRecord(Record):
    """Question of a task, with `truth` or `intervals`."""

    id: Name
    task: Name
    video: str
    duration: Seconds
    question: str
    truth: dict[str, Any] | None = None
    intervals: Annotated[list[Span], Field(min_length=1)] | None = None
    rationale: str = ""


def generic(
    records: Iterable[tuple[int, GenericRecord]],
    source: Source,
    header_duration_s: HeaderDuration | None,
) -> Iterator[Sample]:
    """Yield one sample per record. Raises DataError for an invalid task or truth."""
    for _, record in records:
        sample = Sample(
            id=record.id,
            task=record.task,
            media=(VideoClip(video_path(record.video, source, record.id)),),
            duration_s=record.duration,
            query=record.question.strip(),
            rationale=record.rationale.strip(),
            intervals_s=to_intervals(_intervals(record, source)),
            options=(),
            option="",
            truth=None if record.intervals else _truth(record, source),
        )
        yield apply_clip(sample, record, source)


def _intervals(record: GenericRecord, source: Source) -> list[Span]:
    """Return the true intervals of a record that has some; [] for a record with `truth`."""
    if record.intervals is None:
        return []
    task = TASKS.get(record.task)
    known = [t.name for t in TASKS.values() if t.truth == Truth(intervals=True)]
    if task is None or task.name not in known:
        raise DataError(
            f"{source.json_path}: record {record.id!r}: field 'task' is {record.task!r}, expected "
            f"a task whose truth is field 'intervals' ({', '.join(known)})."
        )
    return record.intervals


def _truth(record: GenericRecord, source: Source) -> Any:
    """Return the record's truth as an object of its task's `Truth.record`."""
    where = f"{source.json_path}: record {record.id!r}"
    known = [name for name, task in TASKS.items() if task.truth.record]
    if record.task not in known:
        raise DataError(
            f"{where}: field 'task' is {record.task!r}, expected a task with a truth of its own "
            f"({', '.join(known) or 'there is none yet'}); docs/extending.md adds one."
        )
    model = TASKS[record.task].truth.record
    assert model is not None
    if record.truth is None:
        raise DataError(f"{where}: field 'truth' is missing.")
    try:
        return model.model_validate(record.truth)
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
    field = ".".join(["truth", *map(str, wrong["loc"])])
    if wrong["type"] == "missing":
        raise DataError(f"{where}: field {field!r} is missing.")
    raise DataError(f"{where}: field {field!r} is {wrong['input']!r:.80}, refused: {wrong['msg']}.")


GENERIC_READER = Reader(schema=TypeAdapter(list[GenericRecord]), samples=generic, is_list=True)
