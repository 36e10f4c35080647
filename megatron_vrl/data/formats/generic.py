"""Reader of the generic format: questions of a task with its own kind of truth, such as a count.

A file is a list of {id, task, video, duration, question, truth, rationale}. `truth` has the fields
of the task's `Truth.record`. `rationale` is optional. Questions with intervals or options have
other formats (training.py).
"""

from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import TypeAdapter, ValidationError

from megatron_vrl.config import Source
from megatron_vrl.data.formats.records import (
    HeaderDuration,
    Name,
    Reader,
    Record,
    Seconds,
    apply_clip,
    video_path,
)
from megatron_vrl.errors import DataError
from megatron_vrl.tasks import TASKS
from megatron_vrl.types import VideoSample


class GenericRecord(Record):
    """Question of a task with its own kind of truth."""

    id: Name
    task: Name
    video: str
    duration: Seconds
    question: str
    truth: dict[str, Any]
    rationale: str = ""


def generic(
    records: Iterable[tuple[int, GenericRecord]],
    source: Source,
    header_duration_s: HeaderDuration | None,
) -> Iterator[VideoSample]:
    """Yield one sample per record. Raises DataError for an invalid task or truth."""
    for _, record in records:
        sample = VideoSample(
            id=record.id,
            task=record.task,
            video=video_path(record.video, source, record.id),
            duration_s=record.duration,
            query=record.question.strip(),
            rationale=record.rationale.strip(),
            intervals_s=(),
            options=(),
            option="",
            truth=_truth(record, source),
        )
        yield apply_clip(sample, record, source)


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
    try:
        return model.model_validate(record.truth)
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
    field = ".".join(["truth", *map(str, wrong["loc"])])
    if wrong["type"] == "missing":
        raise DataError(f"{where}: field {field!r} is missing.")
    raise DataError(f"{where}: field {field!r} is {wrong['input']!r:.80}, refused: {wrong['msg']}.")


GENERIC_READER = Reader(schema=TypeAdapter(list[GenericRecord]), samples=generic, is_list=True)
